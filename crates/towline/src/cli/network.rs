//! `towline network`: with the words and columns of `docker network`.

mod attach;
mod list;
mod options;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::ExitCode;

use clap::Subcommand;
use ipnet::IpNet;

use super::refused::not_built;
use super::template::Template;
use super::{Context, output};
use crate::api::{NetworkCreate, Request, Response, service};
use crate::client::Client;
use options::Options;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a network
    Create(Box<CreateArgs>),
    /// List networks
    #[command(visible_alias = "list")]
    Ls(list::LsArgs),
    /// Show all about networks, as JSON
    #[command(after_help = "Example: towline network inspect myoverlay
         towline network inspect --format '{{.Name}} {{.Subnets}}' myoverlay")]
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
        /// Also its services, each with its members
        #[arg(short, long)]
        verbose: bool,
        /// How to print each: 'json', or a template such as '{{.Name}} {{json .Labels}}'
        #[arg(short, long, value_name = "TEMPLATE", conflicts_with = "json")]
        format: Option<String>,
        /// As without it: the answer is always JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove networks that have no containers
    #[command(
        visible_alias = "remove",
        after_help = "Example: towline network rm myoverlay"
    )]
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
        /// A network that does not exist is no error
        #[arg(short, long)]
        force: bool,
    },
    /// Connect a running container to a network
    Connect(attach::ConnectArgs),
    /// Disconnect a running container from a network
    Disconnect(attach::DisconnectArgs),
    /// Remove all networks that nobody uses
    Prune(list::PruneArgs),
}

const CREATE_HELP: &str = "\
Settings (--opt):
  mtu=BYTES                as --mtu; Docker's com.docker.network.driver.mtu is the same
  vlan=drop|pass           frames with 802.1Q tags [default: drop, RFC 7348 §6.1]
  flood=true|false         carry broadcast, multicast and unknown destinations to all hosts of the
                           network; if not, ARP and ND are answered and the rest is dropped [default: true]
  dscp=0..63|uniform       outer DSCP: fixed, or the inner one, both ways (RFC 2983) [default: 0]
  ttl=1..255               outer TTL or hop limit [default: 64]
  udp-checksum=true|false  outer UDP checksums; 'false' sends zero and takes zero, over IPv6 too
                           (RFC 6935), and costs bulk transfers the kernel's segmentation [default: true]
  mac=epoch|docker         MAC addresses: new ones for a reused address, or made of the IPv4 address
                           alone [default: epoch]
  address-rest=SECONDS     how long a freed address rests [default: 10]
  dns-ttl=SECONDS          how long an answer with a name of this network may be kept, 0 to 3600
                           [default: 5]

Example: towline network create -d overlay --subnet 10.0.9.0/24 myoverlay
         towline network create --opt vlan=pass --opt dscp=uniform trunk";

#[derive(Debug, clap::Args)]
#[command(after_help = CREATE_HELP)]
pub(crate) struct CreateArgs {
    /// The network's name: lower-case letters, digits, '_', '.', '-'; at most 63
    name: String,
    /// The kind of network; only 'overlay' exists
    #[arg(short, long, default_value = "overlay")]
    driver: String,
    /// A subnet in CIDR form; once per subnet, IPv4 or IPv6; 0.0.0.0/27 is any free /27
    /// [default: the next free one of the cluster's address pools]
    #[arg(long, value_name = "CIDR")]
    subnet: Vec<String>,
    /// The part of a subnet that addresses come from which nobody asks for by number; at most one per subnet
    /// [default: all of it]
    #[arg(long, value_name = "CIDR")]
    ip_range: Vec<String>,
    /// The gateway's address; at most one per subnet [default: its first address]
    #[arg(long, value_name = "ADDRESS")]
    gateway: Vec<IpAddr>,
    /// An address that no container gets, NAME=ADDRESS; once per address
    #[arg(long, value_name = "NAME=ADDRESS")]
    aux_address: Vec<String>,
    /// Have IPv4; --ipv4=false where every --subnet is one of IPv6 [default: true, but where every --subnet is one of IPv6]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ipv4: Option<bool>,
    /// Add an IPv6 subnet from the cluster's address pools where no --subnet is one
    #[arg(long)]
    ipv6: bool,
    /// A setting, KEY=VALUE; once per setting (all are listed below)
    #[arg(short, long, value_name = "KEY=VALUE")]
    opt: Vec<String>,
    /// Make the network that carries published ports: a cluster has one, `ingress`, until it is removed
    #[arg(long)]
    ingress: bool,
    /// The VXLAN network identifier, 1 to 16777215 [default: the next free one from 4096]
    #[arg(long)]
    vni: Option<u32>,
    /// MTU of the containers' interfaces in bytes
    /// [default: the smallest link MTU of the hosts less the encapsulation]
    #[arg(long)]
    mtu: Option<u16>,
    /// As --opt flood=false
    #[arg(long)]
    no_flood: bool,
    /// A label, KEY=VALUE; once per label
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Let any container attach; with --attachable=false only members of services may
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    attachable: bool,
    /// Lead nowhere else: containers on such networks alone have no way to the outside, and no default route
    #[arg(long)]
    internal: bool,
    /// Print the network as JSON instead of its id
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    refused: RefusedOptions,
}

/// Docker's options that are not built yet, so that each is refused by name.
#[derive(Debug, clap::Args)]
struct RefusedOptions {
    #[arg(long, hide = true)]
    encrypted: bool,
    #[arg(long, hide = true)]
    ipam_driver: Option<String>,
    #[arg(long, hide = true)]
    ipam_opt: Vec<String>,
    #[arg(long, hide = true)]
    scope: Option<String>,
    #[arg(long, hide = true)]
    config_only: bool,
    #[arg(long, hide = true)]
    config_from: Option<String>,
}

impl RefusedOptions {
    fn check(&self) -> anyhow::Result<()> {
        let leave_it_out = "leave it out";
        for (given, option, instead) in [
            (
                self.encrypted,
                "--encrypted",
                "run the underlay over a network you trust",
            ),
            (self.ipam_driver.is_some(), "--ipam-driver", leave_it_out),
            (!self.ipam_opt.is_empty(), "--ipam-opt", leave_it_out),
            (
                self.scope.is_some(),
                "--scope",
                "every network is the cluster's",
            ),
            (self.config_only, "--config-only", leave_it_out),
            (self.config_from.is_some(), "--config-from", leave_it_out),
        ] {
            if given {
                return Err(not_built(&format!("network create {option}"), instead));
            }
        }
        Ok(())
    }
}

pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create(args) => create(*args, context)?,
        Command::Ls(args) => list::ls(&args, context)?,
        Command::Inspect {
            networks,
            verbose,
            format,
            json: _,
        } => return inspect(networks, verbose, format.as_deref(), context),
        Command::Rm { networks, force } => return rm(networks, force, context),
        Command::Connect(args) => attach::connect(args, context)?,
        Command::Disconnect(args) => attach::disconnect(args, context)?,
        Command::Prune(args) => list::prune(&args, context)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn create(args: CreateArgs, context: &Context) -> anyhow::Result<()> {
    args.refused.check()?;
    if args.driver != "overlay" {
        anyhow::bail!(
            "no driver '{}': only 'overlay' exists, so leave -d out",
            args.driver
        );
    }
    let subnets = args
        .subnet
        .iter()
        .map(|text| prefix("subnet", text))
        .collect::<anyhow::Result<Vec<IpNet>>>()?;
    check_ipv4(args.ipv4, &subnets)?;
    let no_flood = args.no_flood.then_some("flood=false");
    let mtu = args.mtu.map(|mtu| format!("mtu={mtu}"));
    let given = args.opt.iter().map(String::as_str);
    let options = Options::parse(given.chain(no_flood).chain(mtu.as_deref()))?;
    let request = Request::NetworkCreate(NetworkCreate {
        name: args.name,
        subnets,
        ip_ranges: args
            .ip_range
            .iter()
            .map(|text| prefix("ip-range", text))
            .collect::<anyhow::Result<_>>()?,
        gateways: args.gateway,
        aux_addresses: args
            .aux_address
            .iter()
            .map(|text| aux_address(text))
            .collect::<anyhow::Result<_>>()?,
        ipv6: args.ipv6,
        addressing: options.addressing,
        ingress: args.ingress,
        internal: args.internal,
        attachable: args.attachable,
        dns_ttl: options.dns_ttl,
        vni: args.vni,
        mtu: options.mtu,
        settings: options.settings,
        labels: args
            .label
            .iter()
            .map(|text| label(text))
            .collect::<anyhow::Result<BTreeMap<_, _>>>()?,
    });
    let Response::Network(network) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&network)
    } else {
        output::line(&network.id)
    }
}

/// A prefix as an operator writes it; one with host bits set is refused as Docker does.
fn prefix(what: &str, text: &str) -> anyhow::Result<IpNet> {
    let net: IpNet = text.parse().map_err(|_| {
        anyhow::anyhow!("invalid {what} '{text}': it should look like 10.0.9.0/24 or fd00:9::/64")
    })?;
    if net != net.trunc() {
        anyhow::bail!("invalid {what} {text}: it should be {}", net.trunc());
    }
    Ok(net)
}

/// Refuses what `--ipv4` says when the subnets say something else.
fn check_ipv4(ipv4: Option<bool>, subnets: &[IpNet]) -> anyhow::Result<()> {
    let without = !subnets.is_empty() && subnets.iter().all(|net| net.addr().is_ipv6());
    match ipv4 {
        Some(true) if without => anyhow::bail!(
            "--ipv4 contradicts the subnets, which are all of IPv6: add one of IPv4, such as --subnet 0.0.0.0/24 for any that is free"
        ),
        Some(false) if subnets.is_empty() => anyhow::bail!(
            "--ipv4=false needs a subnet of IPv6: give one, such as --subnet fd00:9::/64"
        ),
        Some(false) if !without => {
            anyhow::bail!("--ipv4=false contradicts a --subnet of IPv4: leave one of them out")
        }
        _ => Ok(()),
    }
}

fn aux_address(text: &str) -> anyhow::Result<(String, IpAddr)> {
    let invalid =
        || anyhow::anyhow!("invalid aux-address '{text}': it should look like router=10.0.9.5");
    let (name, ip) = text.split_once('=').ok_or_else(invalid)?;
    Ok((name.to_owned(), ip.parse().map_err(|_| invalid())?))
}

pub(crate) fn label(text: &str) -> anyhow::Result<(String, String)> {
    match text.split_once('=') {
        Some(("", _)) => anyhow::bail!("invalid label '{text}': its key is empty; write KEY=VALUE"),
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Ok((text.to_owned(), String::new())),
    }
}

fn inspect(
    names: Vec<String>,
    verbose: bool,
    format: Option<&str>,
    context: &Context,
) -> anyhow::Result<ExitCode> {
    let template = format.map(Template::parse).transpose()?;
    let mut client = context.client()?;
    let mut networks = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match client.request(&Request::NetworkInspect(name)) {
            Ok(Response::Network(network)) => networks.push(*network),
            Ok(_) => return Err(super::unexpected()),
            Err(error) => {
                eprintln!("towline: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    if template.is_none() && !verbose {
        output::json(&networks)?;
        return Ok(code);
    }
    let mut shown = Vec::new();
    for network in &networks {
        let mut object = serde_json::to_value(network)?;
        if verbose && let Some(fields) = object.as_object_mut() {
            let services = services_on(&network.name, &mut client)?;
            fields.insert("services".to_owned(), serde_json::to_value(services)?);
        }
        shown.push(object);
    }
    match template {
        Some(template) => template.print(&shown)?,
        None => output::json(&shown)?,
    }
    Ok(code)
}

/// The services of a network, each with its members.
fn services_on(network: &str, client: &mut Client) -> anyhow::Result<Vec<service::Service>> {
    let list = Request::Service(service::Request::List);
    let Response::Service(service::Response::Services(all)) = client.request(&list)? else {
        return Err(super::unexpected());
    };
    let mut services = Vec::new();
    for found in all.into_iter().filter(|found| found.network == network) {
        match client.request(&Request::Service(service::Request::Inspect(found.id)))? {
            Response::Service(service::Response::Service(found)) => services.push(*found),
            _ => return Err(super::unexpected()),
        }
    }
    Ok(services)
}

fn rm(names: Vec<String>, force: bool, context: &Context) -> anyhow::Result<ExitCode> {
    let mut client = context.client()?;
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match client.request(&Request::NetworkRemove {
            name: name.clone(),
            force,
        }) {
            Ok(_) => output::line(&name)?,
            Err(error) => {
                eprintln!("towline: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_with_host_bits_is_named_with_what_it_should_be() {
        let subnet = |text| prefix("subnet", text);
        let error = subnet("10.0.1.1/24").expect_err("host bits");
        assert_eq!(
            error.to_string(),
            "invalid subnet 10.0.1.1/24: it should be 10.0.1.0/24"
        );
        assert!(subnet("10.0.1.0").is_err());
        assert!(subnet("fd00:9::/64").is_ok());
    }

    #[test]
    fn families_are_those_of_the_subnets() {
        let (v4, v6) = ("10.0.9.0/24", "fd00:9::/64");
        for (ipv4, subnets, word) in [
            (None, &[v6][..], None),
            (Some(true), &[], None),
            (Some(true), &[v4, v6], None),
            (Some(false), &[v6], None),
            (Some(true), &[v6], Some("--subnet 0.0.0.0/24")),
            (Some(false), &[], Some("--subnet fd00:9::/64")),
            (
                Some(false),
                &[v4, v6],
                Some("contradicts a --subnet of IPv4"),
            ),
        ] {
            let subnets: Vec<IpNet> = subnets
                .iter()
                .map(|net| net.parse().expect("a subnet"))
                .collect();
            let said = check_ipv4(ipv4, &subnets)
                .err()
                .map(|error| error.to_string());
            match (word, said) {
                (None, None) => {}
                (Some(word), Some(said)) if said.contains(word) => {}
                (_, said) => panic!("{ipv4:?} {subnets:?}: {said:?}"),
            }
        }
    }

    #[test]
    fn auxiliary_addresses_are_name_and_address() {
        let router = aux_address("router=10.0.9.5").expect("an aux-address");
        assert_eq!(router, ("router".into(), [10, 0, 9, 5].into()));
        for bad in ["router", "router=", "router=10.0.9", "=10.0.9.5=1"] {
            let error = aux_address(bad).expect_err(bad).to_string();
            assert!(error.contains("should look like"), "{error}");
        }
    }

    #[test]
    fn labels_are_key_and_value() {
        assert_eq!(label("a=b=c").expect("label"), ("a".into(), "b=c".into()));
        assert_eq!(label("a").expect("label"), ("a".into(), String::new()));
        assert!(label("=b").is_err());
    }
}
