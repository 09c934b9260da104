//! Docker's options of `service create` and `service update` that are not built, so that each is refused by its name.

use super::no_scheduler;
use crate::cli::refused::not_built;
use crate::cli::{USAGE, failure};

/// What members are given.
const AT_RUN: &str = "give it to each member, at 'towline run --service'";
/// What is chosen once.
const ANEW: &str = "make the service anew with 'towline service rm' and 'towline service create', and start its members again";

/// Options of both commands.
#[derive(Debug, clap::Args)]
pub(super) struct RefusedOptions {
    #[arg(long, hide = true)]
    replicas: Option<String>,
    #[arg(long, hide = true)]
    mode: Option<String>,
    #[arg(long, hide = true)]
    constraint: Vec<String>,
    #[arg(long, hide = true)]
    placement_pref: Vec<String>,
    #[arg(long, hide = true)]
    replicas_max_per_node: Option<String>,
    #[arg(long, hide = true)]
    restart_condition: Option<String>,
    #[arg(long, hide = true)]
    update_parallelism: Option<String>,
    #[arg(long, hide = true)]
    update_delay: Option<String>,
    #[arg(long, hide = true)]
    image: Option<String>,
    #[arg(short, long, hide = true)]
    env: Vec<String>,
    #[arg(long, hide = true)]
    mount: Vec<String>,
    #[arg(long, hide = true)]
    dns: Vec<String>,
    #[arg(long, hide = true)]
    dns_search: Vec<String>,
    #[arg(long, hide = true)]
    dns_option: Vec<String>,
}

impl RefusedOptions {
    /// Refuses what was given.
    pub(super) fn check(&self, command: &str) -> anyhow::Result<()> {
        for (given, option) in [
            (self.replicas.is_some(), "--replicas"),
            (self.mode.is_some(), "--mode"),
            (!self.placement_pref.is_empty(), "--placement-pref"),
            (
                self.replicas_max_per_node.is_some(),
                "--replicas-max-per-node",
            ),
            (self.restart_condition.is_some(), "--restart-condition"),
            (self.update_parallelism.is_some(), "--update-parallelism"),
            (self.update_delay.is_some(), "--update-delay"),
            (self.image.is_some(), "--image"),
        ] {
            if given {
                return Err(no_scheduler(&format!("service {command} {option}")));
            }
        }
        refuse(
            command,
            [
                (!self.constraint.is_empty(), "--constraint", AT_RUN),
                (
                    !self.env.is_empty(),
                    "--env",
                    "put it into the members' command: 'env', 'sh -c'",
                ),
                (!self.mount.is_empty(), "--mount", AT_RUN),
                (!self.dns.is_empty(), "--dns", AT_RUN),
                (!self.dns_search.is_empty(), "--dns-search", AT_RUN),
                (!self.dns_option.is_empty(), "--dns-option", AT_RUN),
            ],
        )
    }
}

/// Options of `service update` alone.
#[derive(Debug, clap::Args)]
pub(super) struct RefusedChanges {
    #[arg(long, hide = true)]
    endpoint_mode: Option<String>,
    #[arg(long, hide = true)]
    vip: Vec<String>,
    #[arg(long, hide = true)]
    network_add: Vec<String>,
    #[arg(long, hide = true)]
    network_rm: Vec<String>,
    #[arg(long, hide = true)]
    constraint_add: Vec<String>,
    #[arg(long, hide = true)]
    constraint_rm: Vec<String>,
    #[arg(long, hide = true)]
    mount_add: Vec<String>,
    #[arg(long, hide = true)]
    mount_rm: Vec<String>,
}

impl RefusedChanges {
    /// Refuses what was given.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let of_members = "'towline network connect' and 'network disconnect' change members' networks; a service stays on its own";
        refuse(
            "update",
            [
                (self.endpoint_mode.is_some(), "--endpoint-mode", ANEW),
                (!self.vip.is_empty(), "--vip", ANEW),
                (!self.network_add.is_empty(), "--network-add", of_members),
                (!self.network_rm.is_empty(), "--network-rm", of_members),
                (!self.constraint_add.is_empty(), "--constraint-add", AT_RUN),
                (!self.constraint_rm.is_empty(), "--constraint-rm", AT_RUN),
                (!self.mount_add.is_empty(), "--mount-add", AT_RUN),
                (!self.mount_rm.is_empty(), "--mount-rm", AT_RUN),
            ],
        )
    }
}

fn refuse<'a>(
    command: &str,
    options: impl IntoIterator<Item = (bool, &'a str, &'a str)>,
) -> anyhow::Result<()> {
    for (given, option, instead) in options {
        if given {
            return Err(not_built(&format!("service {command} {option}"), instead));
        }
    }
    Ok(())
}

/// The one network of a service: `NAME`, or Docker's `name=NAME`.
///
/// # Errors
/// A second one, an alias and driver options by their names.
pub(super) fn one_network(given: Vec<String>) -> anyhow::Result<String> {
    let [text] = <[String; 1]>::try_from(given).map_err(|given| {
        not_built(
            &format!("service create --network {}", given.join(" --network ")),
            "a service is on one network; its members may be on more: 'towline run --service NAME --network OTHER'",
        )
    })?;
    let mut name = None;
    for field in text.split(',') {
        match field.split_once('=') {
            None if text == field => name = Some(field),
            Some(("name", value)) if name.is_none() => name = Some(value),
            None if name.is_none() => name = Some(field),
            Some(("alias", _)) => {
                return Err(not_built(
                    "service create --network NAME,alias=ALIAS",
                    "members may share another name: 'towline run --service NAME --network-alias ALIAS'",
                ));
            }
            Some(("driver-opt", _)) => {
                return Err(not_built(
                    "service create --network NAME,driver-opt=…",
                    "leave it out; 'towline network create --opt' has the settings of a network",
                ));
            }
            _ => {
                return Err(failure(
                    USAGE,
                    format!(
                        "invalid field '{field}' in --network '{text}': write the network's name alone"
                    ),
                ));
            }
        }
    }
    match name {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err(failure(
            USAGE,
            format!("--network '{text}' names no network: 'towline network ls' lists them"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        both: RefusedOptions,
        #[command(flatten)]
        changes: RefusedChanges,
    }

    #[test]
    fn each_option_is_refused_by_its_name_with_what_to_do_instead() {
        for (option, instead) in [
            ("--replicas=3", "does not schedule"),
            ("--mode=global", "does not schedule"),
            ("--placement-pref=spread", "does not schedule"),
            ("--replicas-max-per-node=1", "does not schedule"),
            ("--restart-condition=any", "does not schedule"),
            ("--update-parallelism=1", "does not schedule"),
            ("--update-delay=1s", "does not schedule"),
            ("--image=nginx", "does not schedule"),
            (
                "--constraint=node.role==manager",
                "at 'towline run --service'",
            ),
            ("--env=A=b", "'sh -c'"),
            ("--mount=target=/data", "at 'towline run --service'"),
            ("--dns=192.0.2.1", "at 'towline run --service'"),
            ("--dns-search=example", "at 'towline run --service'"),
            ("--dns-option=ndots:1", "at 'towline run --service'"),
            ("--endpoint-mode=dnsrr", "'towline service rm'"),
            ("--vip=10.0.9.9", "'towline service rm'"),
            ("--network-add=blue", "'towline network connect'"),
            ("--network-rm=blue", "'towline network connect'"),
            (
                "--constraint-add=node.role==manager",
                "'towline run --service'",
            ),
            (
                "--constraint-rm=node.role==manager",
                "'towline run --service'",
            ),
            ("--mount-add=target=/data", "'towline run --service'"),
            ("--mount-rm=/data", "'towline run --service'"),
        ] {
            let given = Options::try_parse_from(["towline", option]).expect("it is known");
            let refused = given
                .both
                .check("update")
                .and_then(|()| given.changes.check());
            let error = refused.expect_err(option).to_string();
            let (name, _) = option.split_once('=').expect("a value");
            let named = format!("'service update {name}'");
            assert!(error.starts_with(&named), "{option}: {error}");
            assert!(error.contains(instead), "{option}: {error}");
        }
    }

    #[test]
    fn a_service_is_on_one_network() {
        let network = |texts: &[&str]| one_network(texts.iter().map(|&text| text.into()).collect());
        for plain in ["blue", "name=blue"] {
            assert_eq!(network(&[plain]).expect(plain), "blue");
        }
        for (texts, word) in [
            (
                &["blue", "green"][..],
                "'service create --network blue --network green' is not built",
            ),
            (&["blue,alias=x"], "--network-alias ALIAS"),
            (&["alias=x,name=blue"], "--network-alias ALIAS"),
            (&["blue,driver-opt=a=b"], "driver-opt=…' is not built"),
            (&["blue,colour=red"], "invalid field 'colour=red'"),
            (&["blue,green"], "invalid field 'green'"),
            (&["name="], "names no network"),
            (&[""], "names no network"),
        ] {
            let error = network(texts).expect_err(word).to_string();
            assert!(error.contains(word), "{texts:?}: {error}");
        }
    }
}
