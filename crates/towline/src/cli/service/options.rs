//! What `service create` and `service update` are given.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::IpAddr;

use anyhow::bail;
use control::service::{
    Balance, EndpointMode, HealthTest, Protocol, Publish, PublishMode, ServiceSpec,
};

use super::no_scheduler;
use super::refused::{RefusedChanges, RefusedOptions, one_network};
use crate::api::service::{Change, HealthChange};
use crate::cli::{USAGE, failure};

/// How long a member's open connections are given when it goes, in seconds.
const DRAIN_TIMEOUT: u32 = 10;
/// The keys of `--opt`, for whoever gives another.
const KEYS: &str = "preserve-client";

const CREATE_HELP: &str = "\
Ports (--publish), as in Docker:
  [[ADDRESS|INTERFACE:]PUBLISHED:]TARGET[/tcp|/udp]    a port or a range: 8080:80, 127.0.0.1:53:53/udp, 8000-8002:80-82
  published=8080,target=80,protocol=tcp,mode=ingress   mode=ingress: every host hands it to any member;
                                                       mode=host: a member's own host to that member
  Without a published port one of 30000 to 32767 is chosen and kept.

Settings (--opt):
  preserve-client=true|false  members see their clients' addresses; if not, the entry host's [default: true]

Example: towline service create --name web --network myoverlay --publish 8080:80 --health-http 80/healthy
         towline run -d --service web -- my-server";

#[derive(Debug, clap::Args)]
#[command(after_help = CREATE_HELP)]
pub(crate) struct CreateArgs {
    /// The service's name: lower-case letters, digits, '_', '.', '-'; at most 63
    #[arg(long, required = true)]
    name: Option<String>,
    /// The network its members are on
    #[arg(long, value_name = "NETWORK", required = true)]
    network: Vec<String>,
    /// Publish a port; once per port or range
    #[arg(short, long, value_name = "PORT")]
    publish: Vec<String>,
    /// 'vip': the name has one address that is shared out; 'dnsrr': the members' own
    #[arg(long, value_name = "MODE", default_value = "vip", value_parser = mode)]
    endpoint_mode: EndpointMode,
    /// How new connections are shared out: 'rr' in turn, 'weighted' in turn by weight, 'source' by the client's address
    #[arg(long, value_name = "WAY", default_value = "rr", value_parser = balance)]
    lb: Balance,
    /// The virtual address wanted; once per family [default: the next free ones]
    #[arg(long, value_name = "ADDRESS")]
    vip: Vec<IpAddr>,
    #[command(flatten)]
    health: HealthArgs,
    /// Forget a connection that is silent for so long [default: as the kernel does, 5 days for TCP, 2 min for UDP]
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    idle_timeout: Option<u32>,
    /// How long the open connections of a member that goes are waited for [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    drain_timeout: Option<u32>,
    /// A setting, KEY=VALUE; once per setting (all are listed below)
    #[arg(short, long, value_name = "KEY=VALUE")]
    opt: Vec<String>,
    /// A label, KEY=VALUE; once per label
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Print the service as JSON instead of its id
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    refused: RefusedOptions,
    /// Docker's image and command
    #[arg(hide = true, trailing_var_arg = true, value_name = "IMAGE")]
    started: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline service update web --publish-add 8443:443 --lb source")]
pub(crate) struct UpdateArgs {
    /// Its name or id
    service: String,
    /// Publish another port; once per port or range
    #[arg(long, value_name = "PORT")]
    publish_add: Vec<String>,
    /// Publish a port no more, by its target port: PORT or PORT/PROTOCOL
    #[arg(long, value_name = "TARGET", value_parser = target)]
    publish_rm: Vec<(u16, Option<Protocol>)>,
    /// How new connections are shared out: 'rr', 'weighted' or 'source'
    #[arg(long, value_name = "WAY", value_parser = balance)]
    lb: Option<Balance>,
    #[command(flatten)]
    health: HealthArgs,
    /// Forget a connection that is silent for so long; 'none': as the kernel does
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_none)]
    idle_timeout: Option<Seconds>,
    /// How long the open connections of a member that goes are waited for
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    drain_timeout: Option<u32>,
    /// A setting, KEY=VALUE, as of 'service create'
    #[arg(short, long, value_name = "KEY=VALUE")]
    opt: Vec<String>,
    /// Set a label, KEY=VALUE
    #[arg(long, value_name = "KEY=VALUE")]
    label_add: Vec<String>,
    /// Take a label away
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
    /// Print the service as JSON instead of its id
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    refused: RefusedOptions,
    #[command(flatten)]
    refused_changes: RefusedChanges,
}

/// How members are looked after.
#[derive(Debug, clap::Args)]
struct HealthArgs {
    /// A member is healthy while this command, run in it by 'sh -c', ends with 0
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,
    /// A member is healthy while it takes TCP connections to this port
    #[arg(long, value_name = "PORT")]
    health_tcp: Option<u16>,
    /// A member is healthy while this port answers GET with a code from 200 to 399
    #[arg(long, value_name = "PORT[/PATH]", value_parser = http)]
    health_http: Option<HealthTest>,
    /// Time between two checks [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = milliseconds)]
    health_interval: Option<u32>,
    /// How long a check may take [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = milliseconds)]
    health_timeout: Option<u32>,
    /// Failures in a row that make a member unhealthy [default: 3]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    health_retries: Option<u32>,
    /// Time after a member's start in which failures do not count [default: 0s]
    #[arg(long, value_name = "DURATION", value_parser = milliseconds)]
    health_start_period: Option<u32>,
    /// Check nothing: members are healthy while they run
    #[arg(long)]
    no_healthcheck: bool,
}

impl HealthArgs {
    fn change(self) -> anyhow::Result<HealthChange> {
        let command = self
            .health_cmd
            .map(|line| HealthTest::Command(vec!["sh".into(), "-c".into(), line]));
        let tcp = self.health_tcp.map(|port| HealthTest::Tcp { port });
        let mut tests = [command, tcp, self.health_http].into_iter().flatten();
        let test = tests.next();
        if tests.next().is_some() {
            return Err(failure(
                USAGE,
                "a service has one health check: give one of --health-cmd, --health-tcp and --health-http",
            ));
        }
        let change = HealthChange {
            none: false,
            test,
            interval: self.health_interval,
            timeout: self.health_timeout,
            retries: self.health_retries,
            start_period: self.health_start_period,
        };
        if !self.no_healthcheck {
            return Ok(change);
        }
        if change != HealthChange::default() {
            return Err(failure(
                USAGE,
                "--no-healthcheck contradicts the other --health options: leave one out",
            ));
        }
        Ok(HealthChange {
            none: true,
            ..change
        })
    }
}

impl CreateArgs {
    /// The service that is wanted.
    pub(super) fn spec(self) -> anyhow::Result<ServiceSpec> {
        self.refused.check("create")?;
        if !self.started.is_empty() {
            return Err(no_scheduler("service create IMAGE"));
        }
        Ok(ServiceSpec {
            name: self.name.unwrap_or_default(),
            network: one_network(self.network)?,
            mode: self.endpoint_mode,
            balance: self.lb,
            vips: self.vip,
            publish: publish(&self.publish)?,
            health: self.health.change()?.applied(None)?,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain_timeout.unwrap_or(DRAIN_TIMEOUT),
            preserve_client: preserve_client(&self.opt)?.unwrap_or(true),
            labels: labels(&self.label)?,
        })
    }
}

impl UpdateArgs {
    /// Of which service, and what.
    pub(super) fn change(self) -> anyhow::Result<(String, Change)> {
        self.refused.check("update")?;
        self.refused_changes.check()?;
        let change = Change {
            publish_add: publish(&self.publish_add)?,
            publish_remove: self.publish_rm,
            balance: self.lb,
            health: self.health.change()?,
            idle_timeout: self.idle_timeout.map(|Seconds(seconds)| seconds),
            drain_timeout: self.drain_timeout,
            preserve_client: preserve_client(&self.opt)?,
            label_add: labels(&self.label_add)?,
            label_remove: self.label_rm,
        };
        if change == Change::default() {
            return Err(failure(
                USAGE,
                "nothing to change: 'towline service update --help' lists what can be",
            ));
        }
        Ok((self.service, change))
    }
}

fn publish(texts: &[String]) -> anyhow::Result<Vec<Publish>> {
    let mut ports = Vec::new();
    for text in texts {
        ports.extend(discovery::publish::parse(text, PublishMode::Ingress)?);
    }
    Ok(ports)
}

fn preserve_client(texts: &[String]) -> anyhow::Result<Option<bool>> {
    let mut seen = BTreeSet::new();
    let mut preserve = None;
    for text in texts {
        let Some((key, value)) = text.split_once('=') else {
            bail!("invalid option '{text}': write KEY=VALUE; the key is {KEYS}");
        };
        if key != "preserve-client" {
            bail!("unknown option '{key}': the key is {KEYS}");
        }
        if !seen.insert(key) {
            bail!("the option {key} was given twice: give it once");
        }
        preserve = Some(value.parse().map_err(|_| {
            anyhow::anyhow!("invalid option {key}={value}: it is 'true' or 'false'")
        })?);
    }
    Ok(preserve)
}

fn labels(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    texts
        .iter()
        .map(|text| crate::cli::network::label(text))
        .collect()
}

fn mode(text: &str) -> Result<EndpointMode, String> {
    match text {
        "vip" => Ok(EndpointMode::Vip),
        "dnsrr" => Ok(EndpointMode::Dnsrr),
        _ => Err("it is 'vip' or 'dnsrr'".to_owned()),
    }
}

fn balance(text: &str) -> Result<Balance, String> {
    match text {
        "rr" => Ok(Balance::RoundRobin),
        "weighted" => Ok(Balance::Weighted),
        "source" => Ok(Balance::Source),
        _ => Err("it is 'rr', 'weighted' or 'source'".to_owned()),
    }
}

fn http(text: &str) -> Result<HealthTest, String> {
    let (port, path) = match text.split_once('/') {
        Some((port, path)) => (port, format!("/{path}")),
        None => (text, "/".to_owned()),
    };
    let port = port
        .parse()
        .ok()
        .filter(|&port: &u16| port != 0)
        .ok_or_else(|| "write PORT or PORT/PATH, such as 80/healthy".to_owned())?;
    if path.chars().any(|c| c.is_control() || c == ' ') {
        return Err("a path has no blanks: write %20".to_owned());
    }
    Ok(HealthTest::Http { port, path })
}

fn target(text: &str) -> Result<(u16, Option<Protocol>), String> {
    let (port, protocol) = match text.split_once('/') {
        None => (text, None),
        Some((port, "tcp")) => (port, Some(Protocol::Tcp)),
        Some((port, "udp")) => (port, Some(Protocol::Udp)),
        Some(_) => return Err("a protocol is 'tcp' or 'udp'".to_owned()),
    };
    match port.parse() {
        Ok(port) if port != 0 => Ok((port, protocol)),
        _ => Err("write the target port, such as 80 or 53/udp".to_owned()),
    }
}

/// Seconds, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seconds(Option<u32>);

fn seconds_or_none(text: &str) -> Result<Seconds, String> {
    if text == "none" {
        return Ok(Seconds(None));
    }
    seconds(text).map(|seconds| Seconds(Some(seconds)))
}

/// Whole seconds.
pub(crate) fn seconds(text: &str) -> Result<u32, String> {
    let milliseconds = milliseconds(text)?;
    if milliseconds % 1000 != 0 {
        return Err(format!(
            "'{text}': whole seconds are counted, such as 90s or 1h"
        ));
    }
    Ok(milliseconds / 1000)
}

/// At most 49 days.
fn milliseconds(text: &str) -> Result<u32, String> {
    let wrong = || {
        format!("'{text}' is no duration: write a number and ms, s, m or h, such as 500ms or 1h")
    };
    let duration = humantime::parse_duration(text).map_err(|_| wrong())?;
    u32::try_from(duration.as_millis()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Create {
        #[command(flatten)]
        args: CreateArgs,
    }

    #[derive(Parser)]
    struct Update {
        #[command(flatten)]
        args: UpdateArgs,
    }

    fn create(line: &str) -> anyhow::Result<ServiceSpec> {
        Create::try_parse_from(format!("create {line}").split_whitespace())?
            .args
            .spec()
    }

    fn update(line: &str) -> anyhow::Result<(String, Change)> {
        Update::try_parse_from(format!("update {line}").split_whitespace())?
            .args
            .change()
    }

    #[test]
    fn a_service_is_what_its_options_say() {
        let spec = create(
            "--name web --network n --publish 8080:80 --lb source --health-http 80/healthy \
             --health-interval 500ms --idle-timeout 1h --opt preserve-client=false --label a=b",
        )
        .expect("a service");
        assert_eq!((spec.publish.len(), spec.balance), (1, Balance::Source));
        assert_eq!(
            (spec.network.as_str(), spec.idle_timeout),
            ("n", Some(3600))
        );
        assert_eq!(spec.drain_timeout, DRAIN_TIMEOUT);
        assert!(!spec.preserve_client);
        let check = spec.health.expect("a check");
        assert_eq!(check.interval, 500);
        assert_eq!(
            check.test,
            HealthTest::Http {
                port: 80,
                path: "/healthy".into()
            }
        );
    }

    #[test]
    fn no_check_is_none_also_when_asked_for() {
        let spec = create("--name web --network name=n --no-healthcheck").expect("a service");
        assert_eq!((spec.network.as_str(), spec.health), ("n", None));
        let (_, change) = update("web --no-healthcheck").expect("a change");
        assert!(change.health.none);
    }

    #[test]
    fn what_cannot_be_is_said() {
        for (line, word) in [
            ("--network n", "--name"),
            ("--name web", "--network"),
            ("--name web --network n --replicas 3", "does not schedule"),
            ("--name web --network n nginx", "does not schedule"),
            ("--name web --network n --lb random", "'weighted'"),
            (
                "--name web --network n --health-tcp 80 --health-cmd true",
                "one health check",
            ),
            (
                "--name web --network n --no-healthcheck --health-tcp 80",
                "contradicts",
            ),
            ("--name web --network n,alias=x", "--network-alias"),
            ("--name web --network n --network m", "on one network"),
            (
                "--name web --network n --health-interval 1s",
                "--health-cmd",
            ),
            (
                "--name web --network n --idle-timeout 500ms",
                "whole seconds",
            ),
            (
                "--name web --network n --opt keep=true",
                "unknown option 'keep'",
            ),
            (
                "--name web --network n --opt preserve-client=1",
                "'true' or 'false'",
            ),
        ] {
            let error = create(line).expect_err(line).to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn an_update_names_what_changes() {
        let (service, change) =
            update("web --publish-rm 53/udp --idle-timeout none --drain-timeout 0s")
                .expect("a change");
        assert_eq!(service, "web");
        assert_eq!(change.publish_remove, [(53, Some(Protocol::Udp))]);
        assert_eq!(change.idle_timeout, Some(None));
        assert_eq!(change.drain_timeout, Some(0));
        for (line, word) in [
            ("web", "nothing to change"),
            ("web --endpoint-mode dnsrr", "service rm"),
            ("web --replicas 3", "does not schedule"),
            ("web --no-healthcheck --health-tcp 1", "contradicts"),
            ("web --publish-rm 0", "target port"),
            ("web --publish-rm 53/sctp", "'tcp' or 'udp'"),
        ] {
            let error = update(line).expect_err(line).to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
