//! `towline update`: what holds for the whole cluster and can be changed.

use std::process::ExitCode;

use super::{Context, output};
use crate::api::{Host, Request, Response, Update};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline update --vxlan-port 8472

Every host re-opens its UDP socket; frames under way may be lost, connections go on. A host that is
away follows when it is back. One that can't follow keeps its port, is named, and tries again.
The TCP port of control stays as it is.")]
pub(crate) struct Args {
    /// The UDP port on which all hosts receive VXLAN, 1 to 49151
    #[arg(long, value_name = "PORT", required = true)]
    vxlan_port: u16,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    let port = args.vxlan_port;
    let request = Request::Update(Update { vxlan_port: port });
    let Response::Hosts(hosts) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&hosts)?;
    } else {
        output::table(
            &["NAME", "VTEP", "RESULT"],
            hosts.iter().map(|host| {
                [
                    host.name.clone(),
                    std::net::SocketAddr::new(host.vtep, host.port).to_string(),
                    result(host, port),
                ]
            }),
        )?;
    }
    let failed: Vec<&str> = hosts
        .iter()
        .filter(|host| host.port != port && host.state == "up")
        .map(|host| host.name.as_str())
        .collect();
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::bail!(
        "not on port {port}: {}; these hosts try again every few seconds, or choose another port",
        failed.join(", ")
    )
}

fn result(host: &Host, port: u16) -> String {
    match &host.port_problem {
        _ if host.port == port => "done".to_owned(),
        Some(problem) => format!("keeps port {}: {problem}", host.port),
        None if host.state == "up" => "has not answered yet".to_owned(),
        None => format!("is {}: follows when it is back", host.state),
    }
}
