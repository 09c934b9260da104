//! `towline verify`.

use std::process::ExitCode;

use control::installed::{Difference, Entry, Fault, Finding, RuleDifference, Verified};

use super::{Context, output};
use crate::api::{Request, Response};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every host is sent the digest of what its datapath should hold of each network that it takes part in; where
that is not what it holds, the entries are compared one by one. Rules for services are read back from the kernel, on the host
and in its containers; what is otherwise than the services and members call for is named, and made anew by the host itself.
Exit code 1 when anything differs or a host does not answer.

Example: towline verify --network myoverlay")]
pub(crate) struct Args {
    /// Only this network, by name or id
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = Request::Verify {
        network: args.network,
    };
    let Response::Verified(found) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    let good = found
        .iter()
        .all(|verified| matches!(verified.finding, Finding::Same { .. }));
    if args.json {
        output::json(&found)?;
    } else {
        print(&found)?;
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(found: &[Verified]) -> anyhow::Result<()> {
    output::table(
        &["NETWORK", "HOST", "RESULT"],
        found.iter().map(|verified| {
            [
                verified.network.clone(),
                verified.host.clone(),
                result(&verified.finding),
            ]
        }),
    )?;
    for verified in found {
        let Finding::Differs {
            differences,
            rules,
            count,
        } = &verified.finding
        else {
            continue;
        };
        output::line(&format!("\n{} on {}:", verified.network, verified.host))?;
        for difference in differences {
            output::line(&format!("  {}", describe(difference)))?;
        }
        for rule in rules {
            output::line(&format!("  {}", describe_rule(rule)))?;
        }
        let told = differences.len() + rules.len();
        if told < *count {
            output::line(&format!("  and {} more", count - told))?;
        }
    }
    Ok(())
}

fn result(finding: &Finding) -> String {
    match finding {
        Finding::Same { entries: 1 } => "ok, 1 entry".to_owned(),
        Finding::Same { entries } => format!("ok, {entries} entries"),
        Finding::Differs { count: 1, .. } => "1 difference".to_owned(),
        Finding::Differs { count, .. } => format!("{count} differences"),
        Finding::Unreachable => "not connected to the manager".to_owned(),
        Finding::Silent => "no answer".to_owned(),
    }
}

fn word(fault: Fault) -> &'static str {
    match fault {
        Fault::Missing => "missing",
        Fault::Extra => "extra  ",
    }
}

fn describe_rule(difference: &RuleDifference) -> String {
    let RuleDifference {
        container,
        service,
        rule,
        fault,
    } = difference;
    let place = container
        .as_ref()
        .map_or("the host".to_owned(), |name| format!("container {name}"));
    let service = service
        .as_ref()
        .map_or(String::new(), |name| format!(", service {name}"));
    format!("{}  in {place}{service}: {rule}", word(*fault))
}

fn describe(difference: &Difference) -> String {
    let fault = word(difference.fault);
    match difference.entry {
        Entry::Mac { mac, vtep } => format!("{fault}  mac {mac} at {vtep}"),
        Entry::Neighbor { ip, mac } => format!("{fault}  neighbor {ip} is {mac}"),
        Entry::Member { vtep, flood: true } => format!("{fault}  member {vtep}"),
        Entry::Member { vtep, flood: false } => format!("{fault}  member {vtep}, masked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_reads_as_one_line() {
        let difference = Difference {
            entry: Entry::Member {
                vtep: [192, 0, 2, 2].into(),
                flood: false,
            },
            fault: Fault::Missing,
        };
        assert_eq!(describe(&difference), "missing  member 192.0.2.2, masked");
        assert_eq!(result(&Finding::Same { entries: 1 }), "ok, 1 entry");
        let mut rule = RuleDifference {
            container: Some("c1".to_owned()),
            service: Some("web".to_owned()),
            rule: "chain svc-web in table inet towline".to_owned(),
            fault: Fault::Extra,
        };
        assert_eq!(
            describe_rule(&rule),
            "extra    in container c1, service web: chain svc-web in table inet towline"
        );
        (rule.container, rule.service) = (None, None);
        assert!(describe_rule(&rule).starts_with("extra    in the host: chain"));
    }
}
