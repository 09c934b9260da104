//! `service ls`, `service ps` and `service inspect`: which, and how they are shown.

use std::process::ExitCode;

use serde_json::json;

use super::{ask, table};
use crate::api::service::{Member, Request, Response, Service, Summary};
use crate::cli::filter::Filters;
use crate::cli::template::Template;
use crate::cli::{Context, output, unexpected};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Filters: id=PREFIX, name=PART, network=NAME, mode=vip|dnsrr, label=KEY[=VALUE]

Example: towline service ls
         towline service ls --filter label=tier --format '{{.Name}} {{.Members}}'")]
pub(crate) struct LsArgs {
    /// Only services for which this holds, KEY=VALUE; once per filter: values of one key are alternatives
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// How to print each: 'json', or a template such as '{{.ID}} {{.Name}}' or 'table {{.Name}}\t{{.Ports}}'. Fields: .ID, .Name,
    /// .Network, .Mode, .Members, .VIPs, .Ports, .Labels, .Label "key"
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "json")]
    format: Option<String>,
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// Do not cut ids
    #[arg(long)]
    no_trunc: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Filters: name=PART (the container's), host=NAME, state=serving|not-serving|host-lost|down

Example: towline service ps web
         towline service ps --filter state=serving --format '{{.Name}} {{.Host}}' web")]
pub(crate) struct PsArgs {
    /// Names or ids
    #[arg(required = true, value_name = "SERVICE")]
    services: Vec<String>,
    /// Only members for which this holds, KEY=VALUE; once per filter: values of one key are alternatives
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// How to print each: 'json', or a template such as '{{.Name}} {{.State}}' or 'table {{.Name}}\t{{.Host}}'. Fields: .Name, .Service,
    /// .Host, .IPs, .Weight, .State
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "json")]
    format: Option<String>,
    /// Print containers' names alone
    #[arg(short, long)]
    quiet: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline service inspect web
         towline service inspect --pretty web
         towline service inspect --format '{{.Spec.Name}} {{.VIPs}}' web")]
pub(crate) struct InspectArgs {
    /// Names or ids
    #[arg(required = true, value_name = "SERVICE")]
    services: Vec<String>,
    /// How to print each: 'json', or a template such as '{{.Spec.Name}} {{json .Spec.Labels}}'
    #[arg(short, long, value_name = "TEMPLATE", conflicts_with_all = ["json", "pretty"])]
    format: Option<String>,
    /// Print lines for people instead of JSON
    #[arg(long, conflicts_with = "json")]
    pretty: bool,
    /// As without it: the answer is always JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn ls(args: &LsArgs, context: &Context) -> anyhow::Result<()> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let keys = ["id", "name", "network", "mode", "label"];
    let filters = Filters::parse(&args.filter, &keys)?;
    let Response::Services(mut services) = ask(context, Request::List)? else {
        return Err(unexpected());
    };
    services.retain(|service| listed(&filters, service));
    if args.json {
        return output::json(&services);
    }
    let cut = |id: &str| match id.get(..12) {
        Some(start) if !args.no_trunc => start.to_owned(),
        _ => id.to_owned(),
    };
    if let Some(template) = template {
        let fields = |service: &Summary| {
            json!({
                "ID": cut(&service.id), "Name": service.name, "Network": service.network, "Mode": service.mode,
                "Members": table::serving(service), "VIPs": service.vips, "Labels": service.labels,
                "Ports": service.ports.iter().map(table::published).collect::<Vec<_>>(),
            })
        };
        return template.print(&services.iter().map(fields).collect::<Vec<_>>());
    }
    if args.quiet {
        let mut ids = services.iter();
        return ids.try_for_each(|service| output::line(&cut(&service.id)));
    }
    table::services(&services, cut)
}

fn listed(filters: &Filters, service: &Summary) -> bool {
    filters.starts("id", &service.id)
        && filters.part_of("name", &service.name)
        && filters.is("network", &service.network)
        && filters.is("mode", &service.mode)
        && filters.labels("label", &service.labels)
}

pub(super) fn ps(args: PsArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let filters = Filters::parse(&args.filter, &["name", "host", "state"])?;
    let (services, code) = look_up(context, args.services)?;
    let members: Vec<(&Service, &Member)> = services
        .iter()
        .flat_map(|service| service.members.iter().map(move |member| (service, member)))
        .filter(|(_, member)| shown(&filters, member))
        .collect();
    if args.json {
        output::json(&members.iter().map(|(_, member)| member).collect::<Vec<_>>())?;
    } else if let Some(template) = template {
        let fields = |(service, member): &(&Service, &Member)| {
            json!({
                "Name": member.container, "Service": service.spec.name, "Host": member.host, "IPs": member.ips,
                "Weight": member.weight, "State": member.state,
            })
        };
        template.print(&members.iter().map(fields).collect::<Vec<_>>())?;
    } else if args.quiet {
        let mut names = members.iter();
        names.try_for_each(|(_, member)| output::line(&member.container))?;
    } else {
        table::members(&members)?;
    }
    Ok(code)
}

fn shown(filters: &Filters, member: &Member) -> bool {
    filters.part_of("name", &member.container)
        && filters.is("host", &member.host)
        && filters.is("state", &member.state)
}

pub(super) fn inspect(args: InspectArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let (services, code) = look_up(context, args.services)?;
    if args.pretty {
        let texts: Vec<String> = services.iter().map(table::pretty).collect();
        output::line(texts.join("\n").trim_end())?;
    } else if let Some(template) = template {
        let objects: Result<Vec<_>, _> = services.iter().map(serde_json::to_value).collect();
        template.print(&objects?)?;
    } else {
        output::json(&services)?;
    }
    Ok(code)
}

/// All that exist of these; one that does not is said, and the code is a failure's.
fn look_up(context: &Context, names: Vec<String>) -> anyhow::Result<(Vec<Service>, ExitCode)> {
    let mut found = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match ask(context, Request::Inspect(name)) {
            Ok(Response::Service(service)) => found.push(*service),
            Ok(_) => return Err(unexpected()),
            Err(error) => {
                eprintln!("towline: {error:#}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok((found, code))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(texts: &[&str], keys: &[&str]) -> Filters {
        let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
        Filters::parse(&texts, keys).expect("filters")
    }

    #[test]
    fn services_are_chosen_by_what_is_listed_of_them() {
        let service = Summary {
            id: "abc123".into(),
            name: "web".into(),
            network: "blue".into(),
            mode: "vip".into(),
            vips: Vec::new(),
            serving: 1,
            members: 2,
            ports: Vec::new(),
            labels: [("tier".to_owned(), "front".to_owned())].into(),
        };
        for (text, fits) in [
            ("id=abc", true),
            ("id=bc1", false),
            ("name=we", true),
            ("name=db", false),
            ("network=blue", true),
            ("network=blu", false),
            ("mode=vip", true),
            ("mode=dnsrr", false),
            ("label=tier", true),
            ("label=tier=back", false),
        ] {
            let keys = ["id", "name", "network", "mode", "label"];
            assert_eq!(listed(&filters(&[text], &keys), &service), fits, "{text}");
        }
    }

    #[test]
    fn members_are_chosen_by_what_is_listed_of_them() {
        let member = Member {
            container: "c1".into(),
            host: "h1".into(),
            ips: Vec::new(),
            weight: 1,
            state: "serving".into(),
        };
        for (texts, fits) in [
            (&["name=c", "host=h1"][..], true),
            (&["name=c", "host=h2"], false),
            (&["state=down", "state=serving"], true),
            (&["state=not-serving"], false),
        ] {
            let filters = filters(texts, &["name", "host", "state"]);
            assert_eq!(shown(&filters, &member), fits, "{texts:?}");
        }
    }
}
