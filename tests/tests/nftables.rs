//! What Towline says to nf_tables over netlink is what `nft` reads there; a refused transaction changes nothing.

use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use netns::conntrack::Filter;
use netns::nftables::{
    Base, Batch, Chain, ChainKind, Data, Element, Family, Field, Hook, Protocol, Reject, Rule, Set,
    Table, Type, Value, Verdict, priority, state, status,
};
use netns::{NetfilterSocket, Netlink, Netns};
use towline_tests::{TestNetns, sh, try_sh, unique};

const PREFIX: &str = "tb-";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn socket(netns: &Netns) -> NetfilterSocket {
    NetfilterSocket::open(netns).expect("a socket")
}

fn table() -> Table {
    Table::new(Family::Inet, "towline-test")
}

fn commit(netns: &Netns, batch: &Batch) {
    batch
        .commit(&mut socket(netns))
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Each line without what stands around it, as `nft list` prints them.
fn lines(listing: &str) -> Vec<String> {
    listing
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

fn all_kinds() -> Batch {
    let t = table();
    let subnet = |text: &str| text.parse().expect("a subnet");
    let v4 = ["10.0.0.2", "10.0.0.3", "10.0.0.4"].map(ip);
    let v6 = ["fd00::2", "fd00::3"].map(ip);
    let mut batch = Batch::new();
    let postrouting_mangle = Base::new(ChainKind::Filter, Hook::Postrouting, priority::MANGLE);
    batch
        .remove_table(&t)
        .add_table(&t)
        .add_chain(&t, &Chain::regular("publish-8080-tcp"))
        .add_chain(&t, &Chain::base("dnat", Base::dnat_prerouting()))
        .add_chain(&t, &Chain::base("snat", Base::snat_postrouting()))
        .add_chain(&t, &Chain::base("input", Base::filter_input()))
        .add_chain(&t, &Chain::base("mangle", postrouting_mangle))
        .add_set(
            &t,
            &Set {
                name: "published".to_owned(),
                key: vec![Type::Protocol, Type::Port],
                data: Data::Verdict,
            },
        )
        .add_elements(
            &t,
            "published",
            &[Element::verdict(
                [Value::from(Protocol::Tcp), 8080.into()],
                Verdict::Goto("publish-8080-tcp".to_owned()),
            )],
        )
        .add_set(
            &t,
            &Set {
                name: "host-ports4".to_owned(),
                key: vec![Type::Ipv4, Type::Protocol, Type::Port],
                data: Data::Values(vec![Type::Ipv4, Type::Port]),
            },
        )
        .add_elements(
            &t,
            "host-ports4",
            &[Element::values(
                [
                    Value::from(ip("192.0.2.1")),
                    Protocol::Udp.into(),
                    53.into(),
                ],
                [Value::from(ip("172.31.0.2")), 5353.into()],
            )],
        )
        .add_set(
            &t,
            &Set {
                name: "members".to_owned(),
                key: vec![Type::Ipv6],
                data: Data::None,
            },
        )
        .add_elements(&t, "members", &[Element::key([Value::from(ip("fd00::2"))])])
        .add_timeout(&t, "idle-tcp", Protocol::Tcp, 7200)
        .add_timeout(&t, "idle-udp", Protocol::Udp, 60);
    let key = [Field::Protocol, Field::DestinationPort];
    batch
        .add_rule(
            &t,
            "dnat",
            &Rule::new("published ports")
                .to_this_host()
                .verdict_from("published", &key),
        )
        .add_rule(
            &t,
            "dnat",
            &Rule::new("one way").ipv4().verdict_from_own(
                &[(Field::Destination4, Type::Ipv4)],
                [Element::verdict(
                    [Value::from(ip("10.9.9.9"))],
                    Verdict::Jump("publish-8080-tcp".to_owned()),
                )],
            ),
        )
        .add_rule(
            &t,
            "dnat",
            &Rule::new("this host's ports").dnat_from(
                "host-ports4",
                &[Field::Destination4, Field::Protocol, Field::DestinationPort],
                false,
            ),
        )
        .add_rule(
            &t,
            "dnat",
            &Rule::new("names")
                .protocol(Protocol::Udp)
                .is(Field::DestinationPort, 53)
                .redirect(5353),
        )
        .add_rule(
            &t,
            "publish-8080-tcp",
            &Rule::new("in turn")
                .protocol(Protocol::Tcp)
                .dnat_in_turn(&v4, Some(80)),
        )
        .add_rule(
            &t,
            "publish-8080-tcp",
            &Rule::new("by hash").protocol(Protocol::Tcp).dnat_by_hash(
                &[Field::Source6],
                7,
                &v6,
                None,
            ),
        )
        .add_rule(
            &t,
            "publish-8080-tcp",
            &Rule::new("one")
                .protocol(Protocol::Tcp)
                .dnat(ip("fd00::2"), Some(80)),
        )
        .add_rule(
            &t,
            "snat",
            &Rule::new("masquerade")
                .from(subnet("172.16.0.0/12"))
                .not_to(subnet("10.0.0.0/24"))
                .counter()
                .masquerade(),
        )
        .add_rule(
            &t,
            "snat",
            &Rule::new("source")
                .has_any(Field::Status, status::DNAT)
                .output("ingress")
                .snat(ip("10.0.0.9")),
        )
        .add_rule(
            &t,
            "input",
            &Rule::new("answers")
                .has_any(Field::State, state::ESTABLISHED | state::RELATED)
                .counter()
                .verdict(Verdict::Accept),
        )
        .add_rule(
            &t,
            "input",
            &Rule::new("members alone")
                .input("eth0")
                .in_set("members", &[Field::Source6])
                .verdict(Verdict::Return),
        )
        .add_rule(
            &t,
            "input",
            &Rule::new("limits")
                .protocol(Protocol::Tcp)
                .timeout("idle-tcp"),
        )
        .add_rule(
            &t,
            "input",
            &Rule::new("no members")
                .protocol(Protocol::Tcp)
                .reject(Reject::TcpReset),
        )
        .add_rule(
            &t,
            "input",
            &Rule::new("nobody").reject(Reject::PortUnreachable),
        )
        .add_rule(
            &t,
            "mangle",
            &Rule::new("way back")
                .output("ingress")
                .set(Field::ConnectionMark, Value::number(5))
                .copy(Field::ConnectionMark, Field::Mark),
        );
    batch
}

#[test]
fn nft_reads_what_was_meant() {
    let netns = TestNetns::new(unique(PREFIX));
    commit(&netns, &all_kinds());
    let expected = r#"
        table inet towline-test {
        ct timeout idle-tcp {
        protocol tcp
        l3proto ip
        policy = { established : 7200 }
        }
        ct timeout idle-udp {
        protocol udp
        l3proto ip
        policy = { unreplied : 60, replied : 60 }
        }
        map published {
        type inet_proto . inet_service : verdict
        elements = { tcp . 8080 : goto publish-8080-tcp }
        }
        map host-ports4 {
        type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
        elements = { 192.0.2.1 . udp . 53 : 172.31.0.2 . 5353 }
        }
        set members {
        type ipv6_addr
        elements = { fd00::2 }
        }
        chain publish-8080-tcp {
        meta l4proto tcp meta nfproto ipv4 dnat ip to numgen inc mod 3 map { 0 : 10.0.0.2, 1 : 10.0.0.3, 2 : 10.0.0.4 }:80 comment "in turn"
        meta l4proto tcp dnat ip6 to jhash ip6 saddr mod 2 seed 0x7 map { 0 : fd00::2, 1 : fd00::3 } comment "by hash"
        meta l4proto tcp meta nfproto ipv6 dnat ip6 to [fd00::2]:80 comment "one"
        }
        chain dnat {
        type nat hook prerouting priority dstnat; policy accept;
        fib daddr type local meta l4proto . th dport vmap @published comment "published ports"
        ip daddr vmap { 10.9.9.9 : jump publish-8080-tcp } comment "one way"
        dnat ip to ip daddr . meta l4proto . th dport map @host-ports4 comment "this host's ports"
        udp dport 53 redirect to :5353 comment "names"
        }
        chain snat {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 172.16.0.0/12 ip daddr != 10.0.0.0/24 counter packets 0 bytes 0 masquerade comment "masquerade"
        ct status dnat oifname "ingress" meta nfproto ipv4 snat ip to 10.0.0.9 comment "source"
        }
        chain input {
        type filter hook input priority filter; policy accept;
        ct state established,related counter packets 0 bytes 0 accept comment "answers"
        iifname "eth0" ip6 saddr @members return comment "members alone"
        meta l4proto tcp ct timeout set "idle-tcp" comment "limits"
        meta l4proto tcp reject with tcp reset comment "no members"
        reject comment "nobody"
        }
        chain mangle {
        type filter hook postrouting priority mangle; policy accept;
        oifname "ingress" ct mark set 0x00000005 meta mark set ct mark comment "way back"
        }
        }"#;
    let listed = lines(&sh(&netns, "nft list table inet towline-test"));
    let expected = lines(expected);
    for (listed, expected) in listed.iter().zip(&expected) {
        assert_eq!(listed, expected);
    }
    assert_eq!(listed.len(), expected.len(), "{listed:#?}");
}

#[test]
fn labels_and_mac_addresses_are_copied_by_rules_that_the_kernel_takes() {
    let netns = TestNetns::new(unique(PREFIX));
    let netlink = Netlink::open(&netns).expect("a socket");
    netlink
        .add_veth("ingress", "other", &netns)
        .expect("a pair");
    let (inet, netdev) = (table(), Table::new(Family::Netdev, "towline-test"));
    let base = |hook| Base::new(ChainKind::Filter, hook, priority::MANGLE);
    let mut batch = Batch::new();
    batch
        .add_table(&inet)
        .add_chain(&inet, &Chain::base("in", base(Hook::Prerouting)))
        .add_chain(&inet, &Chain::base("out", base(Hook::Postrouting)))
        .add_rule(
            &inet,
            "in",
            &Rule::new("").copy(Field::SourceMac, Field::Label),
        )
        .add_rule(
            &inet,
            "out",
            &Rule::new("").copy(Field::Label, Field::Mark).copy_part(
                Field::Label,
                1,
                Field::Priority,
            ),
        )
        .add_table(&netdev)
        .add_chain(&netdev, &Chain::base("egress", Base::egress("ingress")))
        .add_rule(
            &netdev,
            "egress",
            &Rule::new("")
                .copy(Field::Mark, Field::DestinationMacHead)
                .copy(Field::Priority, Field::DestinationMacTail),
        );
    commit(&netns, &batch);
    let mut socket = socket(&netns);
    for (table, count) in [(&inet, 2), (&netdev, 1)] {
        assert_eq!(socket.rules(table).expect("a list").len(), count);
    }
}

#[test]
fn a_refused_change_is_named_and_nothing_is_done() {
    let netns = TestNetns::new(unique(PREFIX));
    let t = table();
    let mut batch = Batch::new();
    batch
        .add_table(&t)
        .add_chain(&t, &Chain::regular("one"))
        .add_rule(
            &t,
            "one",
            &Rule::new("to nowhere").verdict(Verdict::Jump("two".to_owned())),
        );
    let error = batch
        .commit(&mut socket(&netns))
        .expect_err("no such chain");
    assert!(error.is_absent());
    assert_eq!(
        error.to_string(),
        "cannot add rule \"to nowhere\" to chain inet towline-test one: No such file or directory (os error 2)"
    );
    let mut socket = socket(&netns);
    assert_eq!(socket.tables().expect("a list"), []);
    assert!(socket.snapshot(&t).expect("a snapshot").is_empty());
    assert_eq!(socket.chains(&t).expect("none"), []);

    // A ring of jumps is found when the transaction ends, and no part of it can be named.
    let mut ring = Batch::new();
    ring.add_table(&t);
    let hops = [("a", "b"), ("b", "a")];
    for (name, _) in hops {
        ring.add_chain(&t, &Chain::regular(name));
    }
    ring.add_chain(&t, &Chain::base("input", Base::filter_input()));
    for (from, to) in hops.into_iter().chain([("input", "a")]) {
        let jump = Rule::new("").verdict(Verdict::Jump(to.to_owned()));
        ring.add_rule(&t, from, &jump);
    }
    ring.commit(&mut socket).expect_err("a ring");
    assert_eq!(socket.tables().expect("a list"), []);
    commit(&netns, &Batch::new());
}

#[test]
fn a_snapshot_sees_changes_and_no_counters() {
    let netns = TestNetns::new(unique(PREFIX));
    commit(&netns, &all_kinds());
    let mut socket = socket(&netns);
    let (before, generation) = (
        socket.snapshot(&table()).expect("a snapshot"),
        socket.generation().expect("a number"),
    );
    assert!(!before.is_empty());
    // The answer to it is counted, and refused by the last rule.
    let _ = try_sh(&netns, "ping -c 1 -W 1 127.0.0.1");
    assert_eq!(socket.snapshot(&table()).expect("a snapshot"), before);
    assert_eq!(socket.generation().expect("a number"), generation);

    let rules = socket.rules(&table()).expect("a list");
    let answers = rules
        .iter()
        .find(|rule| rule.comment.as_deref() == Some("answers"))
        .expect("it stands");
    let mut batch = Batch::new();
    batch.delete_rule(&table(), &answers.chain, answers.handle);
    commit(&netns, &batch);
    assert_ne!(socket.snapshot(&table()).expect("a snapshot"), before);
    assert_ne!(socket.generation().expect("a number"), generation);

    commit(&netns, &all_kinds());
    assert_eq!(socket.snapshot(&table()).expect("a snapshot"), before);
    let mut batch = Batch::new();
    batch.delete_elements(
        &table(),
        "published",
        &[Element::key([Value::from(Protocol::Tcp), 8080.into()])],
    );
    commit(&netns, &batch);
    assert_ne!(socket.snapshot(&table()).expect("a snapshot"), before);
}

#[test]
fn many_elements_are_added_at_once_and_taken_away_again() {
    let netns = TestNetns::new(unique(PREFIX));
    let t = table();
    let set = Set {
        name: "many".to_owned(),
        key: vec![Type::Protocol, Type::Port],
        data: Data::Verdict,
    };
    let elements: Vec<_> = (1..=20_000)
        .map(|port| Element::verdict([Value::from(Protocol::Tcp), port.into()], Verdict::Accept))
        .collect();
    let keys: Vec<_> = (1..=20_000)
        .map(|port| Element::key([Value::from(Protocol::Tcp), port.into()]))
        .collect();
    let mut batch = Batch::new();
    batch
        .add_table(&t)
        .add_set(&t, &set)
        .add_elements(&t, "many", &elements);
    commit(&netns, &batch);
    let count = || {
        let listing = sh(&netns, "nft list map inet towline-test many");
        listing.matches(" : accept").count()
    };
    assert_eq!(count(), elements.len());
    let mut batch = Batch::new();
    batch.delete_elements(&t, "many", &keys);
    commit(&netns, &batch);
    assert_eq!(count(), 0);
}

#[test]
fn connections_are_listed_prolonged_and_forgotten() {
    let netns = TestNetns::new(unique(PREFIX));
    let t = table();
    let mut batch = Batch::new();
    batch
        .add_table(&t)
        .add_chain(&t, &Chain::base("dnat", Base::dnat_output()));
    for (address, target) in [("192.0.2.1", "127.0.0.1"), ("fd00::1", "::1")] {
        batch.add_rule(
            &t,
            "dnat",
            &Rule::new("")
                .protocol(Protocol::Tcp)
                .to(
                    format!("{address}/{}", if target == "::1" { 128 } else { 32 })
                        .parse()
                        .expect("a host"),
                )
                .dnat(ip(target), Some(8000)),
        );
    }
    commit(&netns, &batch);
    sh(&netns, "ip route add 192.0.2.0/24 dev lo");
    sh(&netns, "ip addr add fd00::1/128 dev lo");
    let limit = Duration::from_secs(30);
    let (streams, udp) = netns
        .run(|| {
            let streams: Vec<_> = [("127.0.0.1", "192.0.2.1"), ("::1", "fd00::1")]
                .into_iter()
                .map(|(listen, address)| {
                    let listener = TcpListener::bind((ip(listen), 8000)).expect("a port");
                    let stream = TcpStream::connect_timeout(&(ip(address), 80).into(), limit)
                        .expect("led to the listener");
                    (listener, stream)
                })
                .collect();
            let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
            udp.send_to(b"x", "127.0.0.1:9").expect("sent");
            (streams, udp)
        })
        .expect("inside");
    let mut socket = socket(&netns);
    for (source, address) in [("127.0.0.1", "192.0.2.1"), ("::1", "fd00::1")] {
        let filter = Filter::new()
            .protocol(Protocol::Tcp)
            .reply_source(ip(source))
            .reply_source_port(8000);
        let found = socket.connections(&filter).expect("a list");
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].original.destination, ip(address));
        assert_eq!(found[0].original.destination_port, 80);
        assert!(found[0].status & status::SEEN_REPLY != 0);
        socket
            .set_timeout(&found[0], Duration::from_secs(1_000_000))
            .expect("set");
        let prolonged = socket.connections(&filter).expect("a list");
        assert!(prolonged[0].timeout > Duration::from_secs(900_000));
        let to_it = Filter::new().original_destination(ip(address));
        assert_eq!(socket.delete_connections(&to_it).expect("forgotten"), 1);
        assert_eq!(socket.delete_connections(&to_it).expect("none"), 0);
        socket
            .set_timeout(&found[0], limit)
            .expect_err("it is gone");
    }
    let rest = socket
        .connections(&Filter::new().protocol(Protocol::Udp))
        .expect("a list");
    assert_eq!(rest.len(), 1, "{rest:?}");
    assert!(rest[0].status & status::SEEN_REPLY == 0, "nobody answered");
    drop((streams, udp));
}

/// A member that comes or goes is one transaction in each namespace with a client. The limit here only finds what is slow by
/// nature, as a program started for each is; `TOWLINE_TEST_NAMESPACES=1000` is for measuring.
#[test]
fn many_namespaces_are_changed_quickly() {
    let count = std::env::var("TOWLINE_TEST_NAMESPACES")
        .map_or(50, |count| count.parse().expect("a number of namespaces"));
    let namespaces: Vec<_> = (0..count).map(|_| TestNetns::new(unique(PREFIX))).collect();
    let t = table();
    let first = all_kinds();
    let mut change = Batch::new();
    let members = ["10.0.0.2", "10.0.0.3", "10.0.0.5", "10.0.0.6"].map(ip);
    let in_turn = Rule::new("in turn").protocol(Protocol::Tcp);
    change.flush_chain(&t, "publish-8080-tcp").add_rule(
        &t,
        "publish-8080-tcp",
        &in_turn.dnat_in_turn(&members, Some(80)),
    );
    for (what, batch) in [("made", &first), ("changed", &change)] {
        let start = Instant::now();
        for netns in &namespaces {
            commit(netns, batch);
        }
        let taken = start.elapsed();
        println!("{} namespaces {what} in {taken:?}", namespaces.len());
        let each = taken / u32::try_from(namespaces.len()).expect("not so many");
        assert!(each < Duration::from_millis(400), "{what}: {taken:?}");
    }
}
