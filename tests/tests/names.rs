//! Names on whole hosts: what containers are answered at 127.0.0.11, and what nobody is.
//!
//! ```text
//!   container ──▶ 127.0.0.11:53 ──▶ its host's agent ──▶ 192.0.2.254, the switch: a server for the rest of the world
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use netns::Netns;
use towline_tests::dns::{SERVER, Upstream, dig, load, question};
use towline_tests::named::{LIMIT, Named, ok, wait_for};
use towline_tests::{sh, try_sh, wait_until};

#[test]
fn every_kind_of_name_has_its_answer_and_other_networks_have_none() {
    let named = Named::new();
    let world = named.world();
    let manager = named.host(0);
    manager.ok("service create --name web --network blue --publish 8080:80");
    manager.ok("service create --name rr --network blue --endpoint-mode dnsrr");
    let (c1, asker) = named.run(0, "c1", "--network blue --network-alias db --alias API.v1");
    let (c2, _) = named.run(1, "c2", "--network blue --network-alias db");
    let (m1, _) = named.run(1, "m1", "--service web");
    let (m2, _) = named.run(2, "m2", "--service web");
    let (r1, _) = named.run(1, "r1", "--service rr");
    let (r2, _) = named.run(2, "r2", "--service rr");
    let (c3, green) = named.run(2, "c3", "--network my.green");
    let (both, on_both) = named.run(0, "both", "--network my.green --network blue");
    let vips: Vec<String> = manager.json("service inspect web")[0]["vips"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vip| vip.as_str().unwrap().to_owned())
        .collect();
    let [vip, vip6] = vips.as_slice() else {
        panic!("an address of each family: {vips:?}");
    };
    // Sees all that comes below.
    let ip = |name: &str, network: &str| named.ips(0, name, network);
    for name in [&c2, &m1, &m2, &r1, &r2] {
        wait_until("the container's name", LIMIT, || {
            ok_or_empty(&asker, name).len() == 1
        });
    }
    wait_until("two members serve", LIMIT, || {
        dig(&asker, "tasks.web A").answers.len() == 2
    });
    wait_until("two members serve", LIMIT, || {
        dig(&asker, "tasks.rr A").answers.len() == 2
    });
    let [c1_v4, c1_v6] = ip(&c1, "blue").try_into().unwrap();
    let [c2_v4, _] = ip(&c2, "blue").try_into().unwrap();
    let members: Vec<String> = [&m1, &m2]
        .iter()
        .map(|name| ip(name, "blue")[0].clone())
        .collect();
    let mut of_rr: Vec<String> = [&r1, &r2]
        .iter()
        .map(|name| ip(name, "blue")[0].clone())
        .collect();
    of_rr.sort();
    let mut of_db = vec![c1_v4.clone(), c2_v4];
    of_db.sort();
    let mut tasks = members.clone();
    tasks.sort();

    let id = manager.json("ps --json");
    let id = id
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == c1.as_str())
        .unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let upper = c1.to_uppercase();
    for (asked, expected) in [
        (format!("{c1} A"), vec![c1_v4.clone()]),
        (format!("{upper} A"), vec![c1_v4.clone()]),
        (format!("{c1} AAAA"), vec![c1_v6.clone()]),
        (format!("{c1}.blue A"), vec![c1_v4.clone()]),
        (format!("{id} A"), vec![c1_v4.clone()]),
        (format!("{id}.BLUE A"), vec![c1_v4.clone()]),
        ("db A".to_owned(), of_db),
        ("api.v1 A".to_owned(), vec![c1_v4.clone()]),
        ("api.v1.blue. AAAA".to_owned(), vec![c1_v6.clone()]),
        ("web A".to_owned(), vec![vip.clone()]),
        ("web.blue AAAA".to_owned(), vec![vip6.clone()]),
        ("tasks.web A".to_owned(), tasks.clone()),
        ("tasks.web.blue A".to_owned(), tasks),
        ("rr A".to_owned(), of_rr.clone()),
        ("tasks.rr A".to_owned(), of_rr),
        (format!("-x {c1_v4}"), vec![format!("{c1}.blue.")]),
        (format!("-x {c1_v6}"), vec![format!("{c1}.blue.")]),
        (format!("-x {vip}"), vec!["web.blue.".to_owned()]),
        // Known names without a record of that kind.
        (format!("{c1} MX"), vec![]),
        ("web TXT".to_owned(), vec![]),
        ("web SRV".to_owned(), vec![]),
        ("_81._tcp.web SRV".to_owned(), vec![]),
    ] {
        for transport in ["", "+tcp ", "+noedns "] {
            let found = dig(&asker, &format!("{transport}{asked}"));
            assert_eq!(ok(&found), expected, "{transport}{asked}: {}", found.text);
            assert!(
                found.flags.contains("qr") && found.flags.contains("ra"),
                "{}",
                found.text
            );
        }
    }
    for port in ["_80._tcp.web", "_8080._tcp.web.blue"] {
        let mut expected = [&m1, &m2].map(|name| format!("0 1 80 {name}.blue."));
        expected.sort();
        let found = dig(&asker, &format!("{port} SRV"));
        assert_eq!(ok(&found), expected, "{}", found.text);
        for member in &members {
            assert!(
                found.text.contains(member.as_str()),
                "its address is added: {}",
                found.text
            );
        }
    }
    assert_eq!(dig(&asker, &format!("{c1} A")).ttl, Some(5));
    let turns: std::collections::BTreeSet<String> = (0..8)
        .map(|_| {
            let found = try_sh(&asker, "dig +short @127.0.0.11 rr A").stdout;
            String::from_utf8_lossy(&found)
                .lines()
                .next()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(turns.len(), 2, "both members come first at some time");
    for (asked, code, said) in [
        (format!("{c1} @127.0.0.11 A"), "NOERROR", c1_v4.as_str()),
        (format!("-t {c1} @127.0.0.11 AAAA"), "NOERROR", &c1_v6),
        (format!("-x {c1_v4} @127.0.0.11"), "NOERROR", &c1),
        (
            "_80._tcp.web @127.0.0.11 SRV".to_owned(),
            "NOERROR",
            "blue.",
        ),
        ("web @127.0.0.11 TXT".to_owned(), "NOERROR", "ANSWER: 0"),
        (
            "nobody.example @127.0.0.11 A".to_owned(),
            "NXDOMAIN",
            "ANSWER: 0",
        ),
    ] {
        let drill = sh(&asker, &format!("drill {asked}"));
        assert!(
            drill.contains(&format!("rcode: {code}")) && drill.contains(said),
            "{asked}: {drill}"
        );
    }

    // Names of other networks are asked for elsewhere, and nowhere is anybody who knows them.
    for asked in [
        format!("{c3} A"),
        format!("{c3}.my.green A"),
        "nobody A".to_owned(),
    ] {
        let found = dig(&asker, &asked);
        assert_eq!(found.status, "NXDOMAIN", "{}", found.text);
    }
    assert_eq!(dig(&green, "web A").status, "NXDOMAIN");
    assert!(world.asked().contains(&"nobody".to_owned()));
    let [c3_v4] = named.ips(2, &c3, "my.green").try_into().unwrap();
    let found = dig(&on_both, &format!("{c3} A"));
    assert_eq!(
        (ok(&found), found.ttl),
        ([c3_v4.clone()].as_slice(), Some(60))
    );
    let own = dig(&on_both, &format!("{both} A"));
    assert!(
        ok(&own)[0].starts_with("10.0.8."),
        "the first network's: {}",
        own.text
    );
    let own = dig(&on_both, &format!("{both}.blue A"));
    assert!(ok(&own)[0].starts_with("10.0.9."), "{}", own.text);
    let unused = dig(&asker, "-x 10.0.9.250");
    assert_eq!(unused.status, "NXDOMAIN");
    assert!(
        !world
            .asked()
            .iter()
            .any(|name| name.starts_with("250.9.0.10")),
        "{:?}",
        world.asked()
    );

    // A host asks too, on networks of its containers and on others.
    assert_eq!(named.ips(1, &c3, "my.green"), [c3_v4.as_str()]);
    assert_eq!(
        named
            .host(2)
            .ok(&format!("resolve {c3_v4} --network my.green"))
            .trim(),
        format!("{c3}.my.green")
    );
    let srv = named
        .host(1)
        .json("resolve _80._tcp.web --network blue --json");
    assert_eq!(srv["records"].as_array().unwrap().len(), 2, "{srv}");
    assert_eq!(
        named
            .host(0)
            .ok("resolve web --network blue --type aaaa")
            .trim(),
        *vip6
    );
    named.host(0).refused(
        "resolve nobody --network blue",
        1,
        &["nobody", "blue", "network inspect"],
    );
    named
        .host(0)
        .refused("resolve web --network red", 1, &["red"]);
}

fn ok_or_empty(netns: &Netns, name: &str) -> Vec<String> {
    let found = dig(netns, &format!("{name} A"));
    if found.status == "NOERROR" {
        found.answers
    } else {
        Vec::new()
    }
}

#[test]
fn a_container_has_files_of_its_own_and_may_serve_port_53_itself() {
    let mut named = Named::new();
    let _world = named.world();
    let (c1, asker) = named.run(
        0,
        "c1",
        "--network blue --dns-search corp.example --dns-option timeout:3",
    );
    let own = |name: &str| {
        let file = named.host(0).ok(&format!("exec {c1} cat {name}"));
        file.lines()
            .filter(|line| !line.starts_with('#'))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        own("/etc/resolv.conf"),
        [
            "nameserver 127.0.0.11",
            "search corp.example",
            "options timeout:3 ndots:0"
        ]
    );
    let ips = named.ips(0, &c1, "blue");
    let hosts = own("/etc/hosts");
    for ip in &ips {
        assert!(
            hosts
                .iter()
                .any(|line| line.starts_with(&format!("{ip}\t{c1} "))),
            "{hosts:?}"
        );
    }
    // The resolver of a program in the container goes that way.
    let (c2, _) = named.run(1, "c2", "--network blue");
    wait_until("the name of the other", LIMIT, || {
        !dig(&asker, &format!("{c2} A")).answers.is_empty()
    });
    let seen = named.host(0).ok(&format!("exec {c1} getent ahostsv4 {c2}"));
    assert!(seen.contains(&named.ips(0, &c2, "blue")[0]), "{seen}");

    // A server of its own, on every address; another container's clients ask it, and its own names go on.
    let server = Upstream::start(&asker, "0.0.0.0".parse().unwrap());
    let other = Netns::open(&c2).unwrap();
    let asked = sh(
        &other,
        &format!("dig +short +tries=1 +time=20 @{} ok.inside A", ips[0]),
    );
    assert_eq!(asked.trim(), "192.0.2.77");
    assert_eq!(server.asked(), ["ok.inside"]);
    assert_eq!(ok(&dig(&asker, &format!("{c1} A"))), [ips[0].clone()]);
    assert_eq!(server.asked().len(), 1);

    // Nothing is tracked for it, and nobody asks from outside: not by its address, not with a route to 127.0.0.11.
    let table = sh(&asker, "nft list table inet towline-names");
    assert_eq!(table.matches("notrack").count(), 4, "{table}");
    drop(server);
    assert_eq!(dig_at(&other, &ips[0]), "", "nobody serves there any more");
    sh(&asker, "sysctl -q -w net.ipv4.conf.all.route_localnet=1");
    sh(&other, "sysctl -q -w net.ipv4.conf.all.route_localnet=1");
    sh(&other, "ip addr del 127.0.0.1/8 dev lo");
    sh(
        &other,
        &format!("ip route replace 127.0.0.11 via {} dev eth0", ips[0]),
    );
    let ports = sh(&asker, "ss -Hlun src 127.0.0.11");
    let port: u16 = ports
        .split_whitespace()
        .find_map(|word| word.strip_prefix("127.0.0.11%lo:"))
        .unwrap()
        .parse()
        .unwrap();
    let stranger = other.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    stranger
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    for port in [53, port] {
        let _ = stranger.send_to(&question(7, &c1, 1), ("127.0.0.11", port));
    }
    assert!(
        stranger.recv(&mut [0; 512]).is_err(),
        "an answer from another's loopback"
    );

    // A killed agent leaves the table; the next one answers again, at other ports, in a table that is whole.
    named.cluster.hosts[0].kill_agent();
    named.cluster.hosts[0].start_agent();
    wait_for(&asker, &format!("{c1} A"), &[&ips[0]]);
    assert_eq!(ok(&dig(&asker, "+tcp ok.example A")), ["192.0.2.77"]);
    let table = sh(&asker, "nft list table inet towline-names");
    assert_eq!(table.matches("notrack").count(), 4, "{table}");

    // The sockets do not keep the namespace alive.
    let inode = asker.id();
    drop(asker);
    named.host(0).ok(&format!("rm -f {c1}"));
    wait_until("the namespace is gone", LIMIT, || !sockets_hold(inode));
    named.host(0).refused(
        "run --rm --network blue --network-alias a..b -- true",
        125,
        &["a..b", "alias"],
    );
    named
        .host(0)
        .refused("run --rm --network-alias a -- true", 125, &["--network"]);
    named
        .host(0)
        .refused("run --rm --dns-option= -- true", 125, &["option"]);
}

/// What another server answers; empty: nothing.
fn dig_at(netns: &Netns, server: &str) -> String {
    let output = try_sh(
        netns,
        &format!("dig +short +tries=1 +time=1 @{server} ok.inside A"),
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| !line.starts_with(';')).collect()
}

/// Whether any process is in a namespace.
fn sockets_hold(id: (u64, u64)) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let namespaces =
        processes.filter_map(|process| std::fs::metadata(process.path().join("ns/net")).ok());
    namespaces.into_iter().any(|ns| {
        use std::os::unix::fs::MetadataExt as _;
        (ns.dev(), ns.ino()) == id
    })
}

#[test]
fn hostile_questions_are_bounded() {
    let named = Named::new();
    let world = named.world();
    let (c1, asker) = named.run(0, "c1", "--network blue");
    let many = |first: u8| {
        (first..first + 16)
            .map(|n| format!("--network-alias a{n}-{} ", "x".repeat(40)))
            .collect::<String>()
    };
    let (_, _) = named.run(1, "c2", &format!("--network blue {}", many(0)));
    wait_until("an alias of another host", LIMIT, || {
        !dig(&asker, &format!("a0-{} A", "x".repeat(40)))
            .answers
            .is_empty()
    });
    // All there is: never.
    for transport in ["", "+tcp "] {
        assert_eq!(
            dig(&asker, &format!("{transport}{c1} ANY")).status,
            "NOTIMP"
        );
        assert_eq!(
            dig(&asker, &format!("{transport}{c1} AXFR")).answers,
            Vec::<String>::new()
        );
    }
    assert_eq!(dig(&asker, &format!("-c CH {c1} TXT")).status, "REFUSED");
    assert_eq!(
        dig(&asker, &format!("+edns=1 +noednsneg {c1} A")).status,
        "BADVERS"
    );
    let huge = dig(&asker, &format!("+bufsize=65535 {c1} A"));
    assert_eq!(ok(&huge).len(), 1);
    assert!(huge.text.contains("udp: 4096"), "{}", huge.text);
    assert!(!world.asked().contains(&c1), "{:?}", world.asked());

    let socket = asker
        .run(|| UdpSocket::bind("127.0.0.1:0"))
        .unwrap()
        .unwrap();
    socket.connect(SERVER).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut buffer = [0; 4096];
    let good = question(1, &c1, 1);
    let mut answer = |query: &[u8]| {
        socket.send(query).unwrap();
        // What is no question is not answered: the good one behind it is.
        socket.send(&good).unwrap();
        let length = socket.recv(&mut buffer).unwrap();
        let first = buffer[..length].to_vec();
        if first[..2] != good[..2] {
            let _ = socket.recv(&mut buffer).unwrap();
        }
        first
    };
    let mut looped = question(2, "", 1);
    looped.splice(12..13, [0xc0, 12]);
    let mut forward = question(3, "", 1);
    forward.splice(12..13, [0xc0, 40]);
    let mut crowd = question(4, "web", 1);
    crowd[4..6].copy_from_slice(&[0xff, 0xff]);
    let mut records = question(5, "web", 1);
    records[10..12].copy_from_slice(&[0xff, 0xff]);
    for wrong in [&looped, &forward, &crowd, &records] {
        let answer = answer(wrong);
        assert_eq!(
            (answer[..2] == wrong[..2], answer[3] & 0xf),
            (true, 1),
            "FORMERR: {answer:?}"
        );
        assert!(answer.len() <= wrong.len(), "nothing is amplified");
    }
    let mut said = question(6, &c1, 1);
    said[2] |= 0x80;
    for silent in [&said[..], &[0; 11], &[]] {
        let answer = answer(silent);
        assert_eq!(answer[..2], good[..2], "no answer to {silent:?}");
    }

    // A flood of names that nobody knows, and nobody answers for: so many wait, the rest are refused at once; the cluster's own
    // names are answered all the while, in other containers and in this one.
    let flood = asker
        .run(|| UdpSocket::bind("127.0.0.1:0"))
        .unwrap()
        .unwrap();
    flood.connect(SERVER).unwrap();
    for n in 0..2000_u16 {
        let _ = flood.send(&question(n, &format!("silent{n}.example"), 1));
        if n % 50 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert_eq!(ok(&dig(&asker, &format!("{c1} A"))).len(), 1);
    let counters = || named.host(0).json("status --json")["cluster"]["names"].clone();
    wait_until("some are refused", LIMIT, || {
        counters()["refused"].as_u64() > Some(0)
    });
    assert_eq!(ok(&dig(&asker, &format!("{c1} A"))).len(), 1);
    wait_until("the flood is over", LIMIT, || {
        counters()["failed"].as_u64() >= Some(1000)
    });
    assert_eq!(ok(&dig(&asker, "ok.example A")), ["192.0.2.77"]);
}

/// The rate is the machine's matter: `TOWLINE_DNS_RATE` names another.
#[test]
fn no_question_is_lost() {
    let named = Named::new();
    let (_, asker) = named.run(0, "c1", "--network blue");
    let (c2, _) = named.run(1, "c2", "--network blue");
    wait_until("the other's name", LIMIT, || {
        !dig(&asker, &format!("{c2} A")).answers.is_empty()
    });
    let rate = std::env::var("TOWLINE_DNS_RATE").unwrap_or_default();
    let rate = if rate.is_empty() {
        1000
    } else {
        rate.parse().unwrap()
    };
    let start = Instant::now();
    let (sent, answered) = load(&asker, &c2, rate, Duration::from_secs(3));
    println!(
        "{sent} questions at {rate} a second, {answered} answered, {:?}",
        start.elapsed()
    );
    assert_eq!(sent, answered);
}
