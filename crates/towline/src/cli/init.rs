//! `towline init`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use control::AddressPool;

use super::{Context, output};
use crate::api::{Init, Request, Response};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline init --advertise 192.0.2.1")]
pub(crate) struct Args {
    /// This host's underlay address, which other hosts reach
    /// [default: the address of the interface with the default route]
    #[arg(long, value_name = "ADDR")]
    advertise: Option<IpAddr>,
    /// UDP port of VXLAN and TCP port of control, 1 to 49151 [default: 4789]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Where subnets come from that nobody asks for by number: base=CIDR,size=BITS, or a CIDR alone; once per pool
    /// [default: base=10.0.0.0/8,size=24; configuration key: default-address-pools]
    #[arg(long, visible_alias = "default-addr-pool", value_name = "POOL")]
    default_address_pool: Vec<String>,
    /// Length in bits of the subnets of a pool that is given as a CIDR alone
    #[arg(long, value_name = "BITS", default_value_t = 24)]
    default_addr_pool_mask_length: u8,
    /// Begin with a certificate authority that 'towline ca export' kept: hosts of its cluster come back to this manager
    /// once they reach it at an address they know [default: a new authority]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = Request::Init(Init {
        advertise: args.advertise,
        port: args.port,
        pools: pools(
            &args.default_address_pool,
            args.default_addr_pool_mask_length,
        )?,
        ca: args.ca.map(super::ca::absolute).transpose()?,
    });
    let Response::Initialized(made) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&made)?;
    } else {
        output::line(&format!(
            "This host is now the manager of a new cluster, at {}.\n\n\
             To add a host, start 'towline agent' on it and run there:\n\n    {}\n",
            made.manager, made.join_command
        ))?;
        output::warnings(&made.warnings);
    }
    Ok(ExitCode::SUCCESS)
}

/// Pools as Docker's daemon takes them, or, as Swarm does, prefixes that share the length of their subnets.
fn pools(texts: &[String], mask_length: u8) -> anyhow::Result<Vec<AddressPool>> {
    let pools = texts
        .iter()
        .map(|text| {
            if text.contains('=') {
                text.parse()
            } else {
                format!("base={text},size={mask_length}").parse()
            }
        })
        .collect::<Result<Vec<AddressPool>, _>>()?;
    control::check_pools(&pools)?;
    Ok(pools)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(texts: &[&str], mask_length: u8) -> anyhow::Result<Vec<AddressPool>> {
        let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
        pools(&texts, mask_length)
    }

    #[test]
    fn pools_as_dockers_daemon_and_as_swarm_take_them() {
        let pools = given(&["base=10.20.0.0/16,size=26", "10.30.0.0/16"], 20).expect("pools");
        assert_eq!((pools[0].size, pools[1].size), (26, 20));
        for (texts, word) in [
            (
                &["10.20.0.0/16", "base=10.20.9.0/24,size=28"][..],
                "overlap",
            ),
            (&["10.20.0.0/26"], "too small for pool"),
            (&["ten"], "base=ten"),
        ] {
            let error = given(texts, 24).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
