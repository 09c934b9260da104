//! `network connect` and `network disconnect`: networks of containers that run.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::api::container::{Connect, Request, Response};
use crate::api::{self};
use crate::cli::refused::not_built;
use crate::cli::{Context, output, unexpected};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The container gets one more interface, the first of eth0, eth1 … that is free; its others and its connections stay. \
    A container that was on internal networks alone gets its way to the outside with the first other network.\n\n\
    Example: towline network connect --ip 10.0.9.7 myoverlay c1"
)]
pub(crate) struct ConnectArgs {
    /// The IPv4 address there [default: the next free one]
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<Ipv4Addr>,
    /// The IPv6 address there [default: the next free one, where the network has IPv6]
    #[arg(long, value_name = "ADDRESS")]
    ip6: Option<Ipv6Addr>,
    /// Another name of the container there, which several may share; once per name
    #[arg(long, visible_alias = "network-alias", value_name = "NAME")]
    alias: Vec<String>,
    #[command(flatten)]
    refused: RefusedOptions,
    /// The network's name or id
    network: String,
    /// The container's name, or the beginning of its id
    container: String,
}

/// Docker's options that are not built, so that each is refused by name.
#[derive(Debug, clap::Args)]
struct RefusedOptions {
    #[arg(long, hide = true)]
    driver_opt: Vec<String>,
    #[arg(long, hide = true)]
    gw_priority: Option<String>,
    #[arg(long, hide = true)]
    link: Vec<String>,
    #[arg(long, hide = true)]
    link_local_ip: Vec<String>,
}

impl RefusedOptions {
    fn check(&self) -> anyhow::Result<()> {
        for (given, option, instead) in [
            (!self.driver_opt.is_empty(), "--driver-opt", "leave it out"),
            (
                self.gw_priority.is_some(),
                "--gw-priority",
                "the way to the outside is the gateway bridge, whatever the networks",
            ),
            (
                !self.link.is_empty(),
                "--link",
                "containers on one network find each other by name; --alias gives one more",
            ),
            (
                !self.link_local_ip.is_empty(),
                "--link-local-ip",
                "leave it out",
            ),
        ] {
            if given {
                return Err(not_built(&format!("network connect {option}"), instead));
            }
        }
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The interface goes, and connections over it end; its other interfaces and their connections stay. The default route goes with \
    the last network that is not internal.\n\n\
    Example: towline network disconnect myoverlay c1"
)]
pub(crate) struct DisconnectArgs {
    /// Also a member of a service on that network: it is drained first, and is no member any more
    #[arg(short, long)]
    force: bool,
    /// The network's name or id
    network: String,
    /// The container's name, or the beginning of its id
    container: String,
}

pub(super) fn connect(args: ConnectArgs, context: &Context) -> anyhow::Result<()> {
    args.refused.check()?;
    let ips = args.ip.map(IpAddr::from).into_iter();
    change(
        Request::Connect(Connect {
            container: args.container,
            network: args.network,
            ips: ips.chain(args.ip6.map(IpAddr::from)).collect(),
            aliases: args.alias,
        }),
        context,
    )
}

pub(super) fn disconnect(args: DisconnectArgs, context: &Context) -> anyhow::Result<()> {
    change(
        Request::Disconnect {
            container: args.container,
            network: args.network,
            force: args.force,
        },
        context,
    )
}

fn change(request: Request, context: &Context) -> anyhow::Result<()> {
    match context
        .client()?
        .request(&api::Request::Container(request))?
    {
        api::Response::Container(Response::Changed(warnings)) => {
            output::warnings(&warnings);
            Ok(())
        }
        _ => Err(unexpected()),
    }
}
