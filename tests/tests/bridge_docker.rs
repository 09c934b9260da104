//! The gateway bridge next to other people's filters: Docker's, and those that leave no place for ours.

use bridge::{BRIDGE_NAME, Gateway, INGRESS_NAME, State};
use towline_tests::outward::{
    DEFAULTS, OUTSIDE, World, gets_outside, netns, reaches, reaches_outside, spec, without_counters,
};
use towline_tests::{TestNetns, sh};

/// What Docker's start leaves: forwarded packets are dropped, users' rules come first.
fn docker(host: &TestNetns, flavour: &str) {
    for program in [
        format!("iptables-{flavour}"),
        format!("ip6tables-{flavour}"),
    ] {
        for rule in [
            "-P FORWARD DROP",
            "-N DOCKER-USER",
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
            "-A DOCKER-USER -i docker0 -s 2001:db8::1 -j DROP",
            "-A DOCKER-USER -j RETURN",
        ] {
            let rule = if program.starts_with("iptables") {
                rule.replace("2001:db8::1", "203.0.113.1")
            } else {
                rule.to_owned()
            };
            sh(host, &format!("{program} -w 5 {rule}"));
        }
    }
}

fn next_to_docker(flavour: &str) {
    let world = World::new();
    let listed = |host: &TestNetns| {
        [
            sh(host, &format!("iptables-{flavour} -w 5 -S")),
            sh(host, &format!("ip6tables-{flavour} -w 5 -S")),
        ]
    };
    docker(&world.host, flavour);
    let before = listed(&world.host);
    let ruleset = without_counters(&sh(&world.host, "nft list ruleset"));
    let container = netns();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    gateway.attach(&spec(&container, "tb1")).expect("attached");
    gets_outside(&container, "past the policy of drop");

    let status = gateway.status().expect("a status");
    assert_eq!(
        status.foreign.len(),
        2,
        "both families: {:?}",
        status.foreign
    );
    assert!(
        status
            .foreign
            .iter()
            .all(|foreign| foreign.state == State::Present && foreign.chain == "DOCKER-USER")
    );
    assert_eq!(status.problems().count(), 0);
    // Every rule of ours names our interface and carries our comment; iptables can still read them all.
    for (now, then) in listed(&world.host).iter().zip(&before) {
        let added: Vec<&str> = now
            .lines()
            .filter(|line| !then.lines().any(|known| known == *line))
            .collect();
        assert_eq!(added.len(), 2, "{now}");
        assert!(
            added
                .iter()
                .all(|line| line.contains(BRIDGE_NAME) && line.contains("--comment towline")),
            "{now}"
        );
        assert!(
            then.lines().all(|line| now.contains(line)),
            "no foreign rule is gone: {now}"
        );
    }

    // Docker builds its chain anew.
    for program in [
        format!("iptables-{flavour}"),
        format!("ip6tables-{flavour}"),
    ] {
        sh(&world.host, &format!("{program} -w 5 -F DOCKER-USER"));
        sh(
            &world.host,
            &format!("{program} -w 5 -A DOCKER-USER -j RETURN"),
        );
    }
    assert!(!reaches(&container, OUTSIDE[0]), "the accepts are gone");
    let status = gateway.status().expect("a status");
    assert!(
        status
            .foreign
            .iter()
            .all(|foreign| foreign.state == State::Missing),
        "{:?}",
        status.foreign
    );
    assert_eq!(
        gateway.repair().expect("repaired").put_back.len(),
        2,
        "one for each family"
    );
    gets_outside(&container, "of a container");
    assert!(
        gateway
            .repair()
            .expect("nothing is amiss")
            .put_back
            .is_empty()
    );

    for program in [
        format!("iptables-{flavour}"),
        format!("ip6tables-{flavour}"),
    ] {
        let address = if program.starts_with("iptables") {
            "203.0.113.1"
        } else {
            "2001:db8::1"
        };
        sh(
            &world.host,
            &format!("{program} -w 5 -I DOCKER-USER 1 -i docker0 -s {address} -j DROP"),
        );
    }
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(listed(&world.host), before);
    assert_eq!(
        without_counters(&sh(&world.host, "nft list ruleset")),
        ruleset
    );
}

#[test]
fn docker_on_iptables_nft_is_left_as_it_was() {
    next_to_docker("nft");
}

#[test]
fn docker_on_iptables_legacy_is_left_as_it_was() {
    next_to_docker("legacy");
}

#[test]
fn accepts_that_a_saved_ruleset_brought_back_are_ours_too() {
    let world = World::new();
    docker(&world.host, "nft");
    let before = sh(&world.host, "iptables-nft -S");
    drop(Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway"));
    // iptables-restore writes the comment in its own form, which nft does not show.
    sh(&world.host, "sh -c iptables-nft-save>/dev/null");
    let saved = sh(&world.host, "iptables-nft-save");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), saved).expect("written");
    sh(
        &world.host,
        &format!("iptables-nft-restore {}", file.path().display()),
    );
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("adopted");
    assert!(gateway.repair().expect("they stand").put_back.is_empty());
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(sh(&world.host, "iptables-nft -S"), before);
}

#[test]
fn a_chain_that_blocks_without_a_place_for_us_is_told_and_the_command_helps() {
    for setup in [
        "iptables-nft -P FORWARD DROP",
        "iptables-legacy -P FORWARD DROP",
        "ip6tables-nft -A FORWARD -j REJECT",
        "nft add table inet fw; add chain inet fw filter-forward { type filter hook forward priority 5; policy drop; }",
    ] {
        let world = World::new();
        sh(&world.host, setup);
        let container = netns();
        let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway all the same");
        gateway.attach(&spec(&container, "tb1")).expect("attached");
        assert!(!reaches_outside(&container), "{setup}");
        assert!(
            gateway
                .repair()
                .expect("nothing that it may do")
                .put_back
                .is_empty(),
            "{setup}"
        );
        let status = gateway.status().expect("a status");
        assert_eq!(status.foreign.len(), 1, "{setup}: {:?}", status.foreign);
        assert_eq!(status.foreign[0].state, State::Blocked);
        let problem = status.problems().next().expect("a problem").to_owned();
        let command = problem
            .split('`')
            .nth(1)
            .unwrap_or_else(|| panic!("a command in: {problem}"));
        for part in command.split(" && ") {
            sh(&world.host, part);
        }
        gets_outside(&container, &format!("after `{command}`"));
        assert_eq!(
            gateway.status().expect("a status").problems().count(),
            0,
            "after `{command}`"
        );
    }
}

#[test]
fn a_filter_of_docker_lets_the_ingress_pass_as_long_as_it_stands() {
    let world = World::new();
    docker(&world.host, "nft");
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let accepts = || {
        let users = sh(&world.host, "iptables-nft -w 5 -S DOCKER-USER");
        users
            .lines()
            .filter(|line| line.contains(INGRESS_NAME))
            .count()
    };
    assert_eq!(accepts(), 0);
    assert!(gateway.repair().expect("all is well").put_back.is_empty());
    sh(
        &world.host,
        &format!("ip link add {INGRESS_NAME} type bridge"),
    );
    let repair = gateway.repair().expect("let pass");
    assert_eq!(repair.put_back.len(), 2, "{:?}", repair.put_back);
    assert_eq!(accepts(), 2, "in and out");
    assert!(gateway.repair().expect("all is well").put_back.is_empty());
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(accepts(), 0);
}
