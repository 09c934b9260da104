//! Makes all that a container's command will find: name, addresses, namespace, interfaces.
//!
//! What is about to exist is written down first. A step that fails takes back all before it.

use std::cell::Cell;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use control::{Endpoint, EndpointState, Network};
use ipnet::IpNet;
use netns::{Netlink, Netns, Route, sysctl};
use vtep::datapath::PortSpec;
use vtep::fdb::PortId;

use super::source::Source;
use super::{Agent, clear, gateway, held, mount_points, mounts, name, places, publish};
use crate::agent::state::EndpointRecord;
use crate::agent::{Member, ingress, names, placement};
use crate::api::container::{Prepare, Prepared};
use crate::api::mount;
use crate::shim::folder::{self, Folder, Phase, Spec};
use crate::shim::process::ProcessId;

/// How often a random name is made before one is free.
const NAME_ATTEMPTS: usize = 16;
/// How long the manager's table of a network may take before a container starts without it.
const TABLE_LIMIT: Duration = Duration::from_secs(2);

/// How often it is looked whether a container that is being filled with files is still wanted.
const LOOK_PERIOD: Duration = Duration::from_millis(10);

/// Makes a container that waits for its command.
pub(super) fn prepare(agent: &Arc<Agent>, mut request: Prepare) -> anyhow::Result<Prepared> {
    check(&mut request)?;
    let client = ProcessId::of(request.client).context("the client has gone away")?;
    let prepared = {
        // `leave` can't come between.
        let _changing = agent.changing();
        prepare_one(agent, &request, &client)?
    };
    // Last, and with nothing held: it may take long.
    if let Err(error) = fill(agent, &prepared, &client) {
        clear::aborted(agent, &prepared.name, &prepared.id)?;
        return Err(error);
    }
    Ok(prepared)
}

/// Fills the volumes that it is the first to have, while its client waits and nobody removes it.
fn fill(agent: &Agent, prepared: &Prepared, client: &ProcessId) -> anyhow::Result<()> {
    let (name, folder) = (&prepared.name, agent.containers.folder(&prepared.name)?);
    let current = || {
        let spec = folder.spec().ok().flatten();
        spec.filter(|spec| spec.id == prepared.id && spec.phase == Phase::Ready)
    };
    let removed = || format!("container {name} was removed before its command was started");
    let spec = current().with_context(removed)?;
    let last_look = Cell::new(Instant::now());
    let wanted = || {
        if last_look.get().elapsed() < LOOK_PERIOD {
            return true;
        }
        last_look.set(Instant::now());
        client.is_running() && current().is_some()
    };
    let filled = agent.volumes.fill_all(&spec, &wanted);
    current().with_context(removed)?;
    filled
}

fn prepare_one(
    agent: &Arc<Agent>,
    request: &Prepare,
    client: &ProcessId,
) -> anyhow::Result<Prepared> {
    let member = agent.member()?;
    let placed = placement::check(agent, &member, &request.constraints)?;
    let settled = mounts::settle(&agent.volumes, &request.mounts)?;
    let id = name::random_id().context("can't make an id")?;
    let (name, given) = match &request.name {
        Some(name) => (name.clone(), true),
        None => (String::new(), false),
    };
    let attempts = if given { 1 } else { NAME_ATTEMPTS };
    let mut refused = None;
    for _ in 0..attempts {
        let name = if given {
            name.clone()
        } else {
            name::random().context("can't make a name")?
        };
        let spec = Spec {
            id: id.clone(),
            name,
            command: request.command.clone(),
            remove: request.remove,
            created: folder::now(),
            phase: Phase::Preparing,
            client: Some(client.clone()),
            netns: None,
            mounts: settled.clone(),
            dns: request.dns.clone(),
            remove_volumes: request.remove,
        };
        match prepare_named(agent, &member, spec, request) {
            Ok(mut prepared) => {
                prepared.warnings.extend(placed);
                return Ok(prepared);
            }
            Err(Refusal::Name(error)) => refused = Some(error),
            Err(Refusal::Other(error)) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| anyhow::anyhow!("no random name is free: give one with --name")))
}

/// Why a container was not made.
pub(super) enum Refusal {
    /// Its name is taken; another may be free.
    Name(anyhow::Error),
    /// All else.
    Other(anyhow::Error),
}

impl From<Refusal> for anyhow::Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Name(error) | Refusal::Other(error) => error,
        }
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// What is wrong with the request itself.
fn check(request: &mut Prepare) -> anyhow::Result<()> {
    mount::check(&mut request.mounts)?;
    check_names(request)?;
    if let Some(name) = &request.name {
        name::check(name)?;
    }
    if request.networks.is_empty()
        && request.service.is_none()
        && (!request.ips.is_empty() || request.mac.is_some())
    {
        bail!("an address was given without a network: add --network");
    }
    for (index, network) in request.networks.iter().enumerate() {
        if request
            .networks
            .iter()
            .take(index)
            .any(|before| before == network)
        {
            bail!(
                "the network {} was given twice: give it once",
                control::quote(network)
            );
        }
    }
    Ok(())
}

/// What is wrong with other names and with whom to ask for names.
fn check_names(request: &mut Prepare) -> anyhow::Result<()> {
    let nowhere = request.networks.is_empty() && request.service.is_none();
    if nowhere && let Some(alias) = request.aliases.first() {
        bail!(
            "the alias {} was given without a network: add --network, an alias is a name on a network",
            control::quote(alias)
        );
    }
    request.aliases = name::aliases(&request.aliases)?;
    if request.dns.servers.contains(&names::ADDRESS.into()) {
        bail!(
            "--dns {0}: that is where containers ask the agent, which would ask itself; give the server that it is to ask",
            names::ADDRESS
        );
    }
    for domain in &request.dns.search {
        if domain.is_empty() || domain.len() > 253 || !domain.bytes().all(|b| b.is_ascii_graphic())
        {
            bail!("{} is not a valid domain", control::quote(domain));
        }
    }
    for option in &request.dns.options {
        if option.is_empty() || !option.bytes().all(|b| b.is_ascii_graphic()) {
            bail!(
                "{} can't be an option of the resolver: write one as resolv.conf(5) has it, such as ndots:1",
                control::quote(option)
            );
        }
    }
    Ok(())
}

fn prepare_named(
    agent: &Arc<Agent>,
    member: &Member,
    mut spec: Spec,
    request: &Prepare,
) -> Result<Prepared, Refusal> {
    let lock = agent.containers.lock(&spec.name);
    let _held = held(&lock);
    let folder = agent.containers.folder(&spec.name)?;
    check_free(&folder, &spec.name).map_err(Refusal::Name)?;
    let unwritable = || format!("can't write to {}", folder.path().display());
    folder
        .create()
        .and_then(|()| folder.write_spec(&spec))
        .with_context(unwritable)?;
    let made = claim(member, &spec.name).and_then(|source| {
        make(agent, member, &folder, &mut spec, request, source).map_err(Refusal::Other)
    });
    match made {
        Ok(warnings) => {
            held(&agent.containers.served).insert(spec.name.clone());
            let folder = folder.path().to_owned();
            Ok(Prepared {
                id: spec.id,
                name: spec.name,
                folder,
                warnings,
            })
        }
        Err(refusal) => {
            let released = !matches!(refusal, Refusal::Name(_));
            if let Err(error) = clear::undo(agent, &folder, &mut spec, released) {
                tracing::warn!("container {} could not be undone yet: {error:#}", spec.name);
            }
            Err(refusal)
        }
    }
}

/// Refuses a name that this host or somebody else on it uses.
fn check_free(folder: &Folder, name: &str) -> anyhow::Result<()> {
    if let Some(spec) = folder
        .spec()
        .with_context(|| format!("can't read {}", folder.path().display()))?
    {
        bail!(
            "the name {name} is in use by container {}: 'towline rm -f {name}' removes it, or give another --name",
            spec.id
        );
    }
    if Netns::exists(name) {
        bail!(
            "a network namespace {name} exists and is no container's: \
             give another --name, or delete it with 'ip netns del {name}'"
        );
    }
    Ok(())
}

/// Takes a container's name, or keeps it, and says who hands out what it needs.
///
/// # Errors
/// The name is another's, or it is not known whether it is.
pub(super) fn claim(member: &Member, name: &str) -> Result<Source, Refusal> {
    match member
        .control
        .request(control::Request::ClaimName(name.to_owned()))
    {
        Ok(_) => Ok(Source::Manager),
        // It is claimed once a manager answers; who holds it then keeps it.
        Err(error @ control::RequestError::NotConnected { .. }) => Ok(Source::Block(error)),
        Err(error @ control::RequestError::Refused(_)) => Err(Refusal::Name(error.into())),
        // It may have been claimed all the same.
        Err(error) => Err(Refusal::Other(error.into())),
    }
}

/// All that comes after the name. Returns what the operator should know.
fn make(
    agent: &Arc<Agent>,
    member: &Member,
    folder: &Folder,
    spec: &mut Spec,
    request: &Prepare,
    source: Source,
) -> anyhow::Result<Vec<String>> {
    let mut warnings = Vec::new();
    // The tables fill while the rest is made.
    let mut networks: Vec<Network> = request
        .networks
        .iter()
        .map(|name| source.network(agent, member, name))
        .collect::<anyhow::Result<_>>()?;
    let service = request.service.as_ref();
    let service = service
        .map(|wanted| {
            Ok::<_, anyhow::Error>((source.service(member, &wanted.name)?, wanted.weight))
        })
        .transpose()?;
    if let Some((service, _)) = &service
        && networks.iter().all(|network| network.vni != service.vni)
    {
        networks.insert(0, source.network(agent, member, &service.spec.network)?);
    }
    if let Some(network) = networks.iter().find(|network| network.ingress) {
        bail!(
            "the network {} carries published ports between hosts: leave it out, members of services get their place on it",
            network.name
        );
    }
    for network in &networks {
        gateway::check_subnets(member, network)?;
    }
    let mut records = Vec::new();
    for (index, network) in networks.iter().enumerate() {
        let first = index == 0;
        let ips = if first {
            request.ips.clone()
        } else {
            Vec::new()
        };
        let mac = if first { request.mac } else { None };
        let part = service
            .as_ref()
            .filter(|(service, _)| service.vni == network.vni)
            .map(|(service, weight)| (service, *weight));
        let mut endpoint = source.endpoint(member, spec, network, ips, mac, part)?;
        endpoint.names = Some(name::names(spec, request.aliases.clone()));
        records.push(record(agent, endpoint, network, index)?);
    }
    if let Some((service, weight)) = &service
        && service.spec.uses_ingress()
    {
        let (id, epoch) = (&service.id, service.epoch);
        let (record, network) =
            ingress::member_place(agent, member, &spec.name, id, epoch, *weight)?;
        records.push(record);
        networks.push(network);
    }
    warnings.extend(source.warning(member, &records));

    let netns = Netns::create(&spec.name)?;
    spec.netns = Some(netns.id());
    folder.write_spec(spec)?;
    // Nobody on an overlay network may hand out routes by router advertisement.
    for of in ["all", "default"] {
        set_ipv6(&netns, &format!("net/ipv6/conf/{of}/accept_ra"), "0")?;
    }
    for (record, network) in records.iter().zip(&networks) {
        attach(member, &netns, record, network).with_context(|| {
            format!("can't attach {} to the network {}", spec.name, network.name)
        })?;
    }
    if networks.is_empty() || networks.iter().any(gateway::leads_outside) {
        gateway::attach(agent, member, &netns, spec)
            .with_context(|| format!("can't attach {} to the gateway bridge", spec.name))?;
    }
    let of_service = service
        .as_ref()
        .map_or_else(Vec::new, |(service, _)| publish::of_service(service));
    if !publish::open(agent, member, &spec.name, &request.publish, &of_service)? {
        warnings.push(places::ports_closed(&spec.name));
    }
    warnings.extend(
        networks
            .iter()
            .filter_map(|network| late_table(member, network)),
    );
    places::changed(agent, member, &spec.name);
    if member.control.static_tables().is_none() {
        member.names.container(agent, &netns, spec)?;
    }
    agent.volumes.make_all(spec)?;
    warnings.extend(mounts::warning(&spec.mounts));
    if member.control.static_tables().is_none() {
        let own = names::mounts(folder.path(), &agent.config.resolv_conf, spec, &records)?;
        spec.mounts.extend(own);
        crate::shim::mount::in_order(&mut spec.mounts);
    }
    mount_points::make(agent, spec)?;
    spec.phase = Phase::Ready;
    folder.write_spec(spec)?;
    if !super::reconcile::watch_client(agent, spec) {
        bail!("the client has gone away");
    }
    // Last: from here on other hosts send frames.
    for record in &records {
        member.control.publish(record.endpoint(), EndpointState::Up);
    }
    Ok(warnings)
}

/// Writes down what a container has in a network.
fn record(
    agent: &Agent,
    endpoint: Endpoint,
    network: &Network,
    index: usize,
) -> anyhow::Result<EndpointRecord> {
    agent.state.update(|state| {
        let backend = agent.config.backend;
        let record = state.new_endpoint(endpoint, format!("eth{index}"), network.mtu, backend);
        state.endpoints.push(record.clone());
        record
    })
}

/// Makes the interface of one endpoint, with its addresses and routes.
///
/// # Errors
/// What the datapath or the kernel refused; the port may be attached then.
pub(crate) fn attach(
    member: &Member,
    netns: &Netns,
    record: &EndpointRecord,
    network: &Network,
) -> anyhow::Result<()> {
    member.datapath.attach(&port_spec(netns, record))?;
    let netlink = Netlink::open(netns)?;
    for ip in &record.ips {
        netlink.add_address(&record.ifname, with_prefix(*ip, network))?;
    }
    netlink.set_up(&record.ifname)?;
    // An address brings the route of its own subnet along; the network's other subnets are on the link too.
    for subnet in &network.subnets {
        if !record.ips.iter().any(|ip| subnet.net.contains(ip)) {
            let dev = Some(record.ifname.clone());
            netlink.add_route(&Route {
                dst: subnet.net.trunc(),
                via: None,
                dev,
                metric: None,
            })?;
        }
    }
    Ok(())
}

/// What the datapath must know of an endpoint.
pub(crate) fn port_spec(netns: &Netns, record: &EndpointRecord) -> PortSpec {
    PortSpec {
        id: PortId(record.port),
        vni: record.vni,
        netns: netns.clone(),
        ifname: record.ifname.clone(),
        mac: record.mac,
        ips: record.ips.clone(),
        mtu: record.mtu,
        backend: record.backend,
        any_source: ingress::is_host(record),
    }
}

/// The address with its subnet's length; alone when it is in none.
fn with_prefix(ip: IpAddr, network: &Network) -> IpNet {
    let subnet = network
        .subnets
        .iter()
        .find(|subnet| subnet.net.contains(&ip));
    subnet
        .and_then(|subnet| IpNet::new(ip, subnet.net.prefix_len()).ok())
        .unwrap_or_else(|| IpNet::from(ip))
}

/// Sets an IPv6 sysctl; a kernel without IPv6 has none.
fn set_ipv6(netns: &Netns, key: &str, value: &str) -> anyhow::Result<()> {
    if sysctl::get(netns, key).is_ok() {
        sysctl::set(netns, key, value)?;
    }
    Ok(())
}

/// What the operator should know when the manager's table of `network` does not come.
pub(super) fn late_table(member: &Member, network: &Network) -> Option<String> {
    (!wait_for_table(member, network)).then(|| {
        format!(
            "the manager has not sent the table of the network {} yet: \
             its other containers can be reached once it has",
            network.name
        )
    })
}

/// Waits until the manager's table of `network` has come.
fn wait_for_table(member: &Member, network: &Network) -> bool {
    let deadline = Instant::now() + TABLE_LIMIT;
    loop {
        let status = member.control.status();
        if status
            .subscriptions
            .iter()
            .any(|known| known.vni == network.vni && known.generation != 0)
        {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::dns::Dns;

    fn request() -> Prepare {
        Prepare {
            name: Some("c1".into()),
            networks: vec!["a".into(), "b".into()],
            service: None,
            publish: Vec::new(),
            ips: vec!["10.0.9.7".parse().expect("an address")],
            mac: None,
            remove: false,
            aliases: Vec::new(),
            dns: Dns::default(),
            mounts: Vec::new(),
            constraints: Vec::new(),
            command: vec!["true".into()],
            client: 1,
        }
    }

    #[test]
    fn requests_that_contradict_themselves_are_refused() {
        assert!(check(&mut request()).is_ok());
        for (change, word) in [
            ((|r| r.networks.clear()) as fn(&mut Prepare), "--network"),
            (|r| r.networks.push("a".into()), "twice"),
            (|r| r.name = Some("../c1".into()), "name"),
            (|r| r.aliases.push("a..b".into()), "a..b"),
            (|r| r.dns.search.push("a b".into()), "domain"),
            (|r| r.dns.options.push(String::new()), "resolver"),
            (
                |r| r.aliases = (0..17).map(|n| format!("a{n}")).collect(),
                "16",
            ),
        ] {
            let mut wrong = request();
            change(&mut wrong);
            let error = check(&mut wrong).expect_err("contradiction").to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
