use super::super::endpoints::Wish;
use super::super::members::PATIENCE;
use super::super::testing::{Bench, NOW, id};
use super::*;
use crate::message::ToManager;
use crate::network::Endpoint;
use crate::request::{EndpointState, Request, ServiceDetails};
use crate::service::{Publish, PublishMode};

fn spec(name: &str) -> ServiceSpec {
    ServiceSpec::named(name, "blue")
}

fn service(bench: &mut Bench, request: Request) -> Service {
    match bench.call(1, request) {
        Response::Service(service) => *service,
        other => panic!("{other:?}"),
    }
}

fn create(bench: &mut Bench, spec: ServiceSpec) -> Service {
    service(bench, Request::CreateService(spec))
}

fn refused(bench: &mut Bench, spec: ServiceSpec) -> String {
    let refused = bench.manager.create_service(spec, id(1), NOW);
    refused.expect_err("a refusal")
}

fn details(bench: &mut Bench, name: &str) -> ServiceDetails {
    match bench.call(1, Request::Service(name.to_owned())) {
        Response::ServiceDetails(details) => *details,
        other => panic!("{other:?}"),
    }
}

fn allocate(
    bench: &mut Bench,
    network: &str,
    container: String,
    ips: &[IpAddr],
    host: u8,
) -> Result<Response, String> {
    let wish = Wish {
        network,
        container,
        ips,
        mac: None,
        joining: None,
    };
    bench.manager.allocate(wish, id(host), NOW)
}

fn published(published: u16) -> Publish {
    Publish {
        target: 80,
        published: Some(published),
        protocol: Default::default(),
        mode: PublishMode::Ingress,
        on: None,
    }
}

fn join(bench: &mut Bench, network: &str, container: &str) -> Endpoint {
    let request = Request::Allocate {
        network: network.to_owned(),
        container: container.to_owned(),
        ips: Vec::new(),
        mac: None,
        service: Some("web".to_owned()),
        weight: Some(3),
    };
    match bench.call(2, request) {
        Response::Endpoint(endpoint) => endpoint,
        other => panic!("{other:?}"),
    }
}

/// A bench with the network of published ports.
fn bench() -> (Bench, Vni) {
    let (mut bench, vni, _) = Bench::new();
    let routes_in_use = Vec::new();
    bench.call(1, Request::MakeIngress { routes_in_use });
    (bench, vni)
}

#[test]
fn the_network_of_published_ports_is_made_once() {
    let (mut bench, _) = bench();
    let ingress = bench.manager.state.ingress().expect("an ingress network");
    let network = bench.manager.state.networks[&ingress].network.clone();
    assert_eq!((network.name.as_str(), ingress.get()), ("ingress", 4095));
    let nets: Vec<String> = network.subnets.iter().map(|s| s.net.to_string()).collect();
    assert_eq!(
        nets[0], "10.0.0.0/24",
        "the first of the pools, as in Swarm"
    );
    assert!(
        nets[1].starts_with("fd") && nets[1].ends_with("::/64"),
        "{nets:?}"
    );
    let taken = allocate(&mut bench, "ingress", "c9".to_owned(), &[], 2);
    assert!(taken.unwrap_err().contains("takes no containers"));
    for (name, host) in [
        ("host:h2", 1),
        ("host:h1", 2),
        ("host:", 2),
        ("host:h2x", 2),
    ] {
        let name = name.to_owned();
        let taken = allocate(&mut bench, "ingress", name, &[], host);
        assert!(taken.unwrap_err().contains("invalid container name"));
    }
    let own = allocate(&mut bench, "ingress", "host:h2".to_owned(), &[], 2);
    assert!(matches!(own, Ok(Response::Endpoint(own)) if own.ips.len() == 2));
    let on_blue = allocate(&mut bench, "blue", "host:h2".to_owned(), &[], 2);
    assert!(on_blue.unwrap_err().contains("invalid container name"));

    let web = ServiceSpec {
        publish: vec![published(8080)],
        ..spec("web")
    };
    create(&mut bench, web);
    assert_eq!(
        bench.manager.remove_network("ingress").unwrap_err(),
        "ingress network cannot be removed because service web depends on it"
    );
    assert_eq!(
        bench.manager.remove_network("blue").unwrap_err(),
        "network blue is in use by service web"
    );
    bench.call(1, Request::RemoveService("web".to_owned()));
    bench.sent.clear();
    bench.manager.remove_network("ingress").expect("unused");
    bench.turn();
    let told = |message: &ToAgent| *message == ToAgent::Ingress(None);
    assert_eq!(
        bench
            .sent
            .iter()
            .filter(|(_, message)| told(message))
            .count(),
        2
    );
    // An operator removed it: it does not come back by itself.
    let routes_in_use = Vec::new();
    bench.call(1, Request::MakeIngress { routes_in_use });
    assert_eq!(bench.manager.state.ingress(), None);
    let error = refused(
        &mut bench,
        ServiceSpec {
            publish: vec![published(8080)],
            ..spec("web")
        },
    );
    assert!(error.contains("no ingress network"), "{error}");
}

#[test]
fn a_virtual_address_is_nobodys_and_rests_after_its_service() {
    let (mut bench, vni) = bench();
    let web = create(&mut bench, spec("web"));
    let [ip] = web.vips[..] else {
        panic!("{web:?}")
    };
    let row = bench
        .manager
        .table(vni)
        .and_then(|table| table.row(ip))
        .cloned();
    let row = row.expect("a row");
    assert_eq!((row.owner, row.state), (HostId::NOBODY, RowState::Down));
    let taken = ServiceSpec {
        vips: vec![ip],
        ..spec("other")
    };
    let error = refused(&mut bench, taken.clone());
    assert!(
        error.contains("is the virtual address of service web"),
        "{error}"
    );
    let taken_by_container = allocate(&mut bench, "blue", "c9".to_owned(), &[ip], 2);
    assert!(taken_by_container.unwrap_err().contains("service web"));
    assert!(refused(&mut bench, spec("web")).contains("already exists"));
    assert!(
        refused(&mut bench, ServiceSpec::named("x", "ingress")).contains("explicitly attached")
    );
    assert!(refused(&mut bench, ServiceSpec::named("x", "red")).contains("not found"));

    bench.call(1, Request::RemoveService("web".to_owned()));
    let next = create(&mut bench, spec("next"));
    assert_ne!(next.vips, web.vips, "it rests");
    let asked = create(&mut bench, taken);
    assert_eq!(asked.vips, web.vips, "asked for by number, it is free");
}

#[test]
fn ports_are_drawn_kept_and_refused_with_their_holders_name() {
    let (mut bench, _) = bench();
    let auto = Publish {
        published: None,
        ..published(1)
    };
    let web = create(
        &mut bench,
        ServiceSpec {
            publish: vec![auto.clone(), published(30_001)],
            ..spec("web")
        },
    );
    let numbers = |service: &Service| -> Vec<Option<u16>> {
        service
            .spec
            .publish
            .iter()
            .map(|port| port.published)
            .collect()
    };
    assert_eq!(numbers(&web), [Some(30_000), Some(30_001)]);
    let other = create(
        &mut bench,
        ServiceSpec {
            publish: vec![auto.clone()],
            ..spec("other")
        },
    );
    assert_eq!(numbers(&other), [Some(30_002)]);
    let updated = service(
        &mut bench,
        Request::UpdateService {
            version: web.version,
            service: "web".to_owned(),
            spec: ServiceSpec {
                publish: vec![auto],
                ..spec("web")
            },
        },
    );
    assert_eq!(numbers(&updated), [Some(30_000)], "kept");
    assert!(updated.version > web.version && updated.epoch == web.epoch);
    let again = bench
        .manager
        .update_service("web", web.version, web.spec.clone());
    assert!(again.unwrap_err().contains("out of sequence"));
    let renamed = ServiceSpec {
        name: "www".to_owned(),
        ..updated.spec.clone()
    };
    let again = bench
        .manager
        .update_service("web", updated.version, renamed);
    assert!(again.unwrap_err().contains("can't be changed"));

    let mut third = ServiceSpec {
        publish: vec![published(30_000)],
        ..spec("third")
    };
    let error = refused(&mut bench, third.clone());
    let id = &updated.id;
    assert_eq!(
        error,
        format!("port '30000' is already in use by service 'web' ({id}) as an ingress port")
    );
    third.publish[0].mode = PublishMode::Host;
    assert!(refused(&mut bench, third.clone()).contains("as an ingress port"));
    third.publish[0].published = Some(9000);
    create(&mut bench, third);
    let mut fourth = ServiceSpec {
        publish: vec![published(9000)],
        ..spec("fourth")
    };
    assert!(refused(&mut bench, fourth.clone()).contains("as a host-published port"));
    fourth.publish[0].mode = PublishMode::Host;
    create(&mut bench, fourth);
}

#[test]
fn members_are_told_as_rows_and_every_host_confirms() {
    let (mut bench, vni) = bench();
    let web = create(
        &mut bench,
        ServiceSpec {
            publish: vec![published(8080)],
            ..spec("web")
        },
    );
    for connection in [1, 2] {
        let (generation, revision, network) = (0, 0, None);
        bench.say(
            connection,
            ToManager::Subscribe {
                vni,
                generation,
                revision,
                network,
            },
        );
    }
    let listed = bench.sent.iter().any(|(to, message)| {
        *to == 2 && matches!(message, ToAgent::Services { full: true, services, .. } if *services == [web.clone()])
    });
    assert!(listed, "who follows the network hears of its services");
    let endpoint = join(&mut bench, "blue", "w1");
    let member = endpoint.member.expect("a member");
    assert_eq!(
        (member.service, member.weight, member.serving),
        (web.epoch, 3, false)
    );
    assert_eq!(
        join(&mut bench, "blue", "w1"),
        endpoint,
        "a lost answer leaks nothing"
    );
    let published = join(&mut bench, "ingress", "w1");

    let mut say = |serving, owner_seq| {
        let member = Some(crate::service::Membership { serving, ..member });
        let endpoint = Endpoint {
            member,
            ..endpoint.clone()
        };
        let state = EndpointState::Up;
        bench.say(
            2,
            ToManager::Publish {
                endpoint,
                owner_seq,
                state,
            },
        );
    };
    say(true, 1);
    say(false, 2);
    say(true, 1);
    let details = details(&mut bench, "web");
    let [view] = &details.members[..] else {
        panic!("{details:?}")
    };
    assert_eq!(view.ingress, published.ips);
    assert_eq!((view.member.serving, view.masked), (false, false));

    // Both follow the network; one says that it acts on the edit.
    let ask = Request::Confirmed {
        vni,
        epoch: endpoint.epoch,
        owner_seq: 2,
    };
    let asked = |bench: &mut Bench| {
        bench.sent.clear();
        let request = ask.clone();
        bench.say(2, ToManager::Call { id: 7, request });
        bench.answer()
    };
    let revision = bench.manager.state.last().counter();
    let generation = bench.manager.state.last().generation();
    let applied = |revision| ToManager::Applied {
        vni,
        generation,
        revision,
    };
    assert_eq!(asked(&mut bench), None, "nobody has said so");
    bench.say(1, applied(revision));
    assert_eq!(bench.answer(), None);
    bench.say(2, applied(1));
    assert_eq!(bench.answer(), None, "not far enough");
    for connection in [1, 2] {
        let later = NOW + Duration::from_secs(1);
        bench
            .manager
            .handle_message(connection, ToManager::Heartbeat, later);
    }
    bench.sent.clear();
    bench.manager.handle_timeout(NOW + PATIENCE);
    bench.turn();
    let waiting = vec!["h2".to_owned()];
    assert_eq!(bench.answer(), Some(Response::Confirmed { waiting }));
    bench.say(2, applied(revision));
    assert_eq!(
        asked(&mut bench),
        Some(Response::Confirmed {
            waiting: Vec::new()
        }),
        "at once"
    );
    let other = Request::Confirmed {
        vni,
        epoch: Epoch::new(1, 1),
        owner_seq: 0,
    };
    let result = bench
        .manager
        .confirm_edit(2, 1, id(2), (vni, Epoch::new(1, 1), 0), NOW);
    assert!(result.unwrap_err().contains("not this host's"), "{other:?}");

    // Without the service its members run on.
    bench.sent.clear();
    bench.say(
        1,
        ToManager::Call {
            id: 8,
            request: Request::RemoveService("web".to_owned()),
        },
    );
    let gone = bench.sent.iter().any(|(to, message)| {
        *to == 2 && matches!(message, ToAgent::Services { full: false, removed, .. } if *removed == [web.epoch])
    });
    assert!(gone, "{:?}", bench.sent);
    let row = bench
        .manager
        .table(vni)
        .and_then(|table| table.row(endpoint.ips[0]));
    assert_eq!(row.map(|row| row.state), Some(RowState::Up));
}

#[test]
fn a_lost_service_comes_back_and_a_removed_one_does_not() {
    let (mut bench, vni) = bench();
    let web = create(&mut bench, spec("web"));
    let (generation, revision, network) = (0, 0, None);
    bench.say(
        1,
        ToManager::Subscribe {
            vni,
            generation,
            revision,
            network,
        },
    );
    let offer = |services| ToManager::Offer { vni, services };
    let told = |bench: &Bench| {
        let services = bench.sent.iter().filter_map(|(to, message)| match message {
            ToAgent::Services {
                services, removed, ..
            } if *to == 1 => Some((services.clone(), removed.clone())),
            _ => None,
        });
        services.collect::<Vec<_>>()
    };
    // The store is from before the service: only its rows and its definition are lost, the epoch is not.
    bench.manager.state.forget_service(vni, &web);
    bench.sent.clear();
    bench.say(1, offer(vec![web.clone()]));
    assert_eq!(told(&bench), [(vec![web.clone()], Vec::new())]);
    let row = bench
        .manager
        .table(vni)
        .and_then(|table| table.row(web.vips[0]));
    assert_eq!(row.map(|row| row.epoch), Some(web.epoch));

    // A newer version is taken, an older one answered with what is true.
    let newer = Service {
        version: bench.manager.state.draw(),
        spec: ServiceSpec {
            drain_timeout: 99,
            ..web.spec.clone()
        },
        ..web.clone()
    };
    bench.sent.clear();
    bench.say(1, offer(vec![newer.clone()]));
    assert_eq!(told(&bench), [(vec![newer.clone()], Vec::new())]);
    bench.sent.clear();
    bench.say(1, offer(vec![web.clone()]));
    assert_eq!(told(&bench), [(vec![newer.clone()], Vec::new())]);

    bench.call(1, Request::RemoveService("web".to_owned()));
    bench.sent.clear();
    bench.say(1, offer(vec![newer.clone()]));
    assert_eq!(told(&bench), [(Vec::new(), vec![web.epoch])]);
    // Nor one from the future, or that another has the address of.
    let future = Service {
        epoch: Epoch::new(9, 1),
        version: Epoch::new(9, 1),
        ..newer
    };
    bench.sent.clear();
    bench.say(1, offer(vec![future.clone()]));
    assert_eq!(told(&bench), [(Vec::new(), vec![future.epoch])]);
}

#[test]
fn what_is_stored_is_loaded_again() {
    let (mut bench, vni) = bench();
    let web = create(&mut bench, spec("web"));
    create(&mut bench, spec("gone"));
    bench.call(1, Request::RemoveService("gone".to_owned()));
    let mut stored = std::collections::BTreeMap::new();
    for write in bench.manager.take_writes() {
        match write.value {
            Some(value) => stored.insert(write.key, value),
            None => stored.remove(&write.key),
        };
    }
    let settings = bench.manager.settings.clone();
    let again = Manager::new(settings, &stored, NOW).expect("a good store");
    assert_eq!(again.state.services.get(&web.epoch), Some(&web));
    assert_eq!(again.state.services.len(), 1);
    assert_eq!(again.state.service_bytes(), web.size());
    assert!(again.state.service_floor("gone").is_some());
    assert_eq!(again.state.ingress(), bench.manager.state.ingress());
    assert!(again.state.had_ingress());
    assert!(
        again
            .table(vni)
            .and_then(|table| table.row(web.vips[0]))
            .is_some()
    );
}
