//! `towline run`: starts a command in a container.
//!
//! The agent prepares all that the command will find, this process starts the
//! shim, and the shim the command. In the foreground this process only passes
//! signals on and waits for the exit code.

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitCode, ExitStatus};

use control::service::{Publish, PublishMode, WEIGHT_MAX};
use rustix::process::{Pid, Signal};
use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::Signals;

use super::refused::not_built;
use super::{Context, Failure, failure, mount, output, unexpected};
use crate::api::container::{Prepare, Prepared, Request, Response, ServiceWanted};
use crate::api::mount::MountWanted;
use crate::api::{self};
use crate::shim::channel::{Channel, Outcome, Start};
use crate::shim::dns::Dns;
use crate::shim::{self, EXIT_SIGNAL, EXIT_TOWLINE, FORWARDED};

/// A container is a process in network and mount namespaces of its own; it sees this host's files.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: towline run -d --network myoverlay --name c1 -- iperf3 -s\n\n\
    In the foreground it has this terminal's input and output, signals are passed on to it, \
    and its exit code is this command's."
)]
pub(crate) struct Args {
    /// Go to the background and print the name; 'towline logs' shows the output
    #[arg(short, long)]
    detach: bool,
    /// The container's name, unique in the cluster: `[a-z0-9][a-z0-9_.-]{0,62}`
    /// [default: a random one]
    #[arg(long)]
    name: Option<String>,
    /// A network to attach to, by name or id; once per network [default: only the gateway bridge]
    #[arg(long, visible_alias = "net", value_name = "NETWORK")]
    network: Vec<String>,
    /// Another name of the container on its networks, which several may share; once per name
    #[arg(long, visible_alias = "alias", value_name = "NAME")]
    network_alias: Vec<String>,
    /// A server to ask for names that are none of the cluster's; once per server, the first three count [default: this host's]
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<IpAddr>,
    /// A domain to try behind names, '.' for none; once per domain [default: this host's]
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// An option for the container's resolver, as resolv.conf(5) has it; once per option [default: this host's, and ndots:0]
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION")]
    dns_option: Vec<String>,
    /// The service to be a member of, on its network, with a weight if not 1; in static mode there are none
    #[arg(long, value_name = "SERVICE[,weight=N]", value_parser = service)]
    service: Vec<ServiceWanted>,
    /// Give the container a port of this host, as `docker run -p`: [[ADDRESS|INTERFACE:]PUBLISHED:]TARGET[/tcp|/udp]; once per
    /// port or range. Ports of all hosts are published by 'towline service create'
    #[arg(short, long, value_name = "PORT")]
    publish: Vec<String>,
    /// Mount something at a place of the container's own: `type=volume[,source=NAME],target=PATH[,readonly][,volume-nocopy]`,
    /// `type=bind,source=PATH,target=PATH[,readonly]`, or `type=tmpfs,target=PATH[,tmpfs-size=BYTES][,tmpfs-mode=OCTAL]`; once per mount
    #[arg(long, value_name = "MOUNT")]
    mount: Vec<String>,
    /// The same, shorter: a volume's name or a path of this host, and the target; a folder that is missing on this host is made
    #[arg(short, long, value_name = "[SOURCE:]TARGET[:ro|nocopy]")]
    volume: Vec<String>,
    /// Refuse to run on a host for which this does not hold: KEY==VALUE or KEY!=VALUE, the key one of node.id, node.hostname, node.ip
    /// (an address or a prefix), node.role, node.platform.os, node.platform.arch, node.labels.NAME, engine.labels.NAME; all must hold
    #[arg(long, value_name = "EXPRESSION")]
    constraint: Vec<String>,
    /// Remove the container when its command ends, with its volumes that nobody named
    #[arg(long)]
    rm: bool,
    /// The IPv4 address on the first network [default: the next free one]
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<std::net::Ipv4Addr>,
    /// The IPv6 address on the first network [default: the next free one]
    #[arg(long, value_name = "ADDRESS")]
    ip6: Option<std::net::Ipv6Addr>,
    /// The MAC address on the first network [default: made from the address]
    #[arg(long, visible_alias = "mac", value_name = "MAC")]
    mac_address: Option<vtep::MacAddr>,
    /// As without it: in the foreground standard input is always connected
    #[arg(short, long)]
    interactive: bool,
    #[command(flatten)]
    refused: RefusedOptions,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Docker's options that are not built yet, so that each is refused by name.
#[derive(Debug, clap::Args)]
struct RefusedOptions {
    #[arg(short, long, hide = true)]
    tty: bool,
    #[arg(short = 'P', long, hide = true)]
    publish_all: bool,
    #[arg(long, hide = true)]
    link: Vec<String>,
    #[arg(short, long, hide = true)]
    env: Vec<String>,
    #[arg(short, long, hide = true)]
    workdir: Option<String>,
    #[arg(short, long, hide = true)]
    user: Option<String>,
    #[arg(long, hide = true)]
    hostname: Option<String>,
    #[arg(long, hide = true)]
    restart: Option<String>,
    #[arg(short, long, hide = true)]
    label: Vec<String>,
    #[arg(long, hide = true)]
    expose: Vec<String>,
    #[arg(long, hide = true)]
    volume_driver: Option<String>,
    #[arg(long, hide = true)]
    volumes_from: Vec<String>,
    #[arg(long, hide = true)]
    tmpfs: Vec<String>,
    #[arg(long, hide = true)]
    add_host: Vec<String>,
}

impl RefusedOptions {
    fn check(&self) -> anyhow::Result<()> {
        let command = "put it into the command: 'env', 'sh -c'";
        for (given, option, instead) in [
            (
                self.tty,
                "--tty",
                "leave -t out; 'towline exec' has the caller's terminal",
            ),
            (
                self.publish_all,
                "--publish-all",
                "name each port with --publish; on its networks all of the container's ports can be reached",
            ),
            (
                !self.link.is_empty(),
                "--link",
                "containers on one network find each other by name; --network-alias gives one more",
            ),
            (!self.env.is_empty(), "--env", command),
            (self.workdir.is_some(), "--workdir", command),
            (self.user.is_some(), "--user", command),
            (
                self.hostname.is_some(),
                "--hostname",
                "others find the container by --name and --network-alias",
            ),
            (self.restart.is_some(), "--restart", "leave it out"),
            (!self.label.is_empty(), "--label", "leave it out"),
            (
                !self.expose.is_empty(),
                "--expose",
                "leave it out: on its networks all of the container's ports can be reached",
            ),
            (
                self.volume_driver.is_some(),
                "--volume-driver",
                "leave it out: volumes are folders of this host; docs/volumes.md has ways to share one",
            ),
            (
                !self.volumes_from.is_empty(),
                "--volumes-from",
                "name the volumes, and mount them in both with --volume",
            ),
            (
                !self.tmpfs.is_empty(),
                "--tmpfs",
                "write --mount type=tmpfs,target=PATH",
            ),
            (
                !self.add_host.is_empty(),
                "--add-host",
                "containers find each other by name, and other names by the servers of --dns",
            ),
        ] {
            if given {
                return Err(not_built(&format!("run {option}"), instead));
            }
        }
        Ok(())
    }
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    args.refused.check()?;
    let towline = |error: anyhow::Error| failure(EXIT_TOWLINE, format!("{error:#}"));
    let mounts = mount::parse(&args.mount, &args.volume).map_err(|error| {
        // What is not built has an exit code of its own.
        if error.is::<Failure>() {
            error
        } else {
            towline(error)
        }
    })?;
    let prepared = prepare(&args, mounts, context).map_err(towline)?;
    // From here on a signal is passed on. One before this ends this process: the agent sees that, stops filling volumes,
    // and takes back what it has made.
    let signals = Signals::new(FORWARDED.into_iter().chain([SIGCHLD]))
        .map_err(|error| towline(error.into()))?;
    output::warnings(&prepared.warnings);
    match start(&args, context, &prepared, signals) {
        Ok(code) => Ok(code),
        Err(error) => {
            // When the agent is gone too, it clears away at its next start.
            let abort = Request::Abort {
                name: prepared.name,
                id: prepared.id,
            };
            let _ = context
                .client()
                .and_then(|mut agent| agent.request(&api::Request::Container(abort)));
            Err(error)
        }
    }
}

fn prepare(args: &Args, mounts: Vec<MountWanted>, context: &Context) -> anyhow::Result<Prepared> {
    let ips: Vec<IpAddr> = args
        .ip
        .map(IpAddr::from)
        .into_iter()
        .chain(args.ip6.map(IpAddr::from))
        .collect();
    let prepare = Prepare {
        name: args.name.clone(),
        networks: args.network.clone(),
        service: one_service(&args.service)?,
        publish: publish(&args.publish)?,
        ips,
        mac: args.mac_address,
        remove: args.rm,
        aliases: args.network_alias.clone(),
        dns: Dns {
            servers: args.dns.clone(),
            search: args.dns_search.clone(),
            options: args.dns_option.clone(),
        },
        mounts,
        constraints: args.constraint.clone(),
        command: args
            .command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
        client: std::process::id(),
    };
    match context
        .client()?
        .request(&api::Request::Container(Request::Prepare(Box::new(
            prepare,
        ))))? {
        api::Response::Container(Response::Prepared(prepared)) => Ok(prepared),
        _ => Err(unexpected()),
    }
}

/// A container has one part to play.
fn one_service(wanted: &[ServiceWanted]) -> anyhow::Result<Option<ServiceWanted>> {
    match wanted {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        _ => anyhow::bail!("a container is a member of one service: give --service once"),
    }
}

/// Ports of this host.
fn publish(texts: &[String]) -> anyhow::Result<Vec<Publish>> {
    let mut ports = Vec::new();
    for text in texts {
        ports.extend(discovery::publish::parse(text, PublishMode::Host)?);
    }
    if ports.iter().any(|port| port.mode == PublishMode::Ingress) {
        anyhow::bail!(
            "a port of mode=ingress belongs to a service: publish it at 'towline service create' and start its members with --service"
        );
    }
    Ok(ports)
}

/// `NAME` or `NAME,weight=N`.
fn service(text: &str) -> Result<ServiceWanted, String> {
    let (name, weight) = match text.split_once(',') {
        None => (text, 1),
        Some((name, rest)) => {
            let weight = rest
                .strip_prefix("weight=")
                .ok_or_else(|| "write SERVICE or SERVICE,weight=N".to_owned())?;
            let weight = weight
                .parse()
                .ok()
                .filter(|weight| (1..=WEIGHT_MAX).contains(weight));
            let weight =
                weight.ok_or_else(|| format!("a weight is a number from 1 to {WEIGHT_MAX}"))?;
            (name, weight)
        }
    };
    Ok(ServiceWanted {
        name: name.to_owned(),
        weight,
    })
}

/// Starts the command; in the foreground to its end. An error means that it was not started.
fn start(
    args: &Args,
    context: &Context,
    prepared: &Prepared,
    mut signals: Signals,
) -> anyhow::Result<ExitCode> {
    let failed = |error: std::io::Error| {
        failure(
            EXIT_TOWLINE,
            format!("can't start the container's shim: {error}"),
        )
    };
    let (channel, shims) = Channel::pair().map_err(failed)?;
    let mut child = shim::start(
        &prepared.folder,
        context.socket(),
        &args.command,
        shims,
        !args.detach,
    )
    .map_err(failed)?;
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let own: [BorrowedFd<'_>; 3] = [input.as_fd(), output.as_fd(), error.as_fd()];
    let fds = if args.detach { &[][..] } else { &own[..] };
    channel
        .send(
            &Start {
                foreground: !args.detach,
            },
            fds,
        )
        .map_err(failed)?;
    match channel.receive::<Outcome>().map_err(failed)? {
        Some((Outcome::Started, _)) => {}
        Some((Outcome::Failed { code, message }, _)) => {
            // Its end comes before the undoing: it holds the container until then.
            let _ = child.wait();
            return Err(failure(code, message));
        }
        None => {
            let status = child.wait().map_err(failed)?;
            return Err(failure(
                EXIT_TOWLINE,
                format!("the container's shim ended before its command ran: {status}"),
            ));
        }
    }
    if args.detach {
        output::line(&prepared.name)?;
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::from(wait(&mut child, &mut signals)))
}

/// Passes signals on until the shim ends; the exit code.
fn wait(child: &mut Child, signals: &mut Signals) -> u8 {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    for signal in signals.forever() {
        if signal == SIGCHLD {
            match child.try_wait() {
                Ok(Some(status)) => return code_of(status),
                Ok(None) => {}
                Err(_) => break,
            }
        } else if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(signal)) {
            // Not yet waited for, so the id is the shim's even when it has ended.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
    EXIT_TOWLINE
}

fn code_of(status: ExitStatus) -> u8 {
    let signal = status.signal().and_then(|number| u8::try_from(number).ok());
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.or(signal.map(|number| EXIT_SIGNAL.saturating_add(number)))
        .unwrap_or(EXIT_TOWLINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_may_have_a_weight() {
        let wanted = service("web,weight=3").expect("a service");
        assert_eq!((wanted.name.as_str(), wanted.weight), ("web", 3));
        assert_eq!(service("web").expect("a service").weight, 1);
        for bad in ["web,weight=0", "web,weight=257", "web,3", "web,weight="] {
            assert!(service(bad).is_err(), "{bad}");
        }
        let wanted = [wanted.clone(), wanted];
        assert!(one_service(&wanted).is_err());
    }

    #[test]
    fn a_container_alone_gets_ports_of_its_own_host() {
        let ports = publish(&["8080:80".to_owned()]).expect("a port");
        assert_eq!(ports[0].mode, PublishMode::Host);
        let mesh = publish(&["target=80,mode=ingress".to_owned()]).expect_err("no service");
        assert!(mesh.to_string().contains("service create"), "{mesh}");
    }

    #[test]
    fn options_that_are_not_built_are_refused_by_their_names() {
        #[derive(clap::Parser)]
        struct Options {
            #[command(flatten)]
            refused: RefusedOptions,
        }
        for (option, instead) in [
            ("--tty", "towline exec"),
            ("--publish-all", "--publish"),
            ("--link=db", "--network-alias"),
            ("--env=A=b", "'sh -c'"),
            ("--workdir=/tmp", "'sh -c'"),
            ("--user=nobody", "'sh -c'"),
            ("--hostname=web", "--network-alias"),
            ("--restart=always", "leave it out"),
            ("--label=a=b", "leave it out"),
            ("--expose=80", "can be reached"),
            ("--volume-driver=nfs", "docs/volumes.md"),
            ("--volumes-from=db", "--volume"),
            ("--tmpfs=/run", "type=tmpfs"),
            ("--add-host=db:192.0.2.1", "--dns"),
        ] {
            let given = <Options as clap::Parser>::try_parse_from(["towline", option]);
            let error = given.expect("it is known").refused.check();
            let error = error.expect_err(option).to_string();
            let name = option.split('=').next().expect("a name");
            let named = format!("'run {name}' is not built yet");
            assert!(error.starts_with(&named), "{option}: {error}");
            assert!(error.contains(instead), "{option}: {error}");
        }
    }

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(code_of(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(code_of(ExitStatus::from_raw(9)), 137);
        assert_eq!(code_of(ExitStatus::from_raw(15)), 143);
    }
}
