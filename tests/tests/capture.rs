//! `towline capture` on hosts with real agents: live lines, pcapng files as tshark reads them, drops with their reasons, and
//! every way a capture ends. And the counters of ports and remotes in `status` and `fdb`.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use netns::{Netlink, Netns};
use serde_json::Value;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{sh, wait_until};

const LIMIT: Duration = Duration::from_secs(20);
const C2: Ipv4Addr = Ipv4Addr::new(10, 0, 9, 3);
/// An address that the network has and no container.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 9, 77);

/// Two containers on two hosts, c1 at 10.0.9.2 and c2 at 10.0.9.3.
struct Pair {
    cluster: Cluster,
    names: [String; 2],
}

impl Pair {
    fn new() -> Self {
        let cluster = Cluster::joined(2, &[]);
        cluster.hosts[0].ok("network create --subnet 10.0.9.0/24 blue");
        let names = [cluster.container("c1"), cluster.container("c2")];
        for (host, name) in cluster.hosts.iter().zip(&names) {
            host.ok(&format!(
                "run -d --name {name} --network blue -- sleep infinity"
            ));
        }
        let pair = Self { cluster, names };
        // Both hosts know both containers.
        pair.ping(C2);
        pair
    }

    fn host(&self) -> &Host {
        &self.cluster.hosts[0]
    }

    fn c1(&self) -> Netns {
        Netns::open(&self.names[0]).unwrap()
    }

    fn ping(&self, to: Ipv4Addr) {
        sh(&self.c1(), &format!("ping -c 3 -i 0.05 -W 5 {to}"));
    }

    /// Has c1 send a packet from an address that is not its own.
    fn spoof(&self) {
        let c1 = self.c1();
        let netlink = Netlink::open(&c1).unwrap();
        let net = format!("{NOBODY}/32").parse().unwrap();
        netlink.add_address("eth0", net).unwrap();
        let socket = c1.run(|| UdpSocket::bind((NOBODY, 0))).unwrap().unwrap();
        socket.send_to(b"not mine", (C2, 9)).unwrap();
    }
}

/// A capture that runs.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    /// Starts it and waits until the agent hands in copies.
    fn start(host: &Host, args: &str) -> Self {
        let mut command = host.command(&format!("capture {args}"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = host.netns.run(|| command.spawn()).unwrap().unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            // Ends with the program; what a file capture writes to stdout is no text and not read.
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { child, lines }
    }

    /// The next line that has all of these words; lines before it are passed over.
    fn line(&self, words: &[&str]) -> String {
        let mut seen = Vec::new();
        loop {
            let Ok(line) = self.lines.recv_timeout(LIMIT) else {
                panic!("no line with {words:?} in:\n{}", seen.join("\n"))
            };
            if words.iter().all(|word| line.contains(word)) {
                return line;
            }
            seen.push(line);
        }
    }

    /// Pings until a line with these words shows that the capture has begun.
    fn begun(&self, pair: &Pair) {
        let mut seen = false;
        wait_until("the capture shows a ping", LIMIT, || {
            pair.ping(C2);
            seen |= self.lines.try_iter().any(|line| line.contains("ICMP"));
            seen
        });
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// The exit code and what was said on stderr.
    fn end(mut self) -> (Option<i32>, String) {
        let mut code = None;
        wait_until("the capture ends", LIMIT, || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        let mut said = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        (code.unwrap().code(), said)
    }
}

fn tshark(file: &Path, args: &[&str]) -> String {
    let output = Command::new("tshark")
        .arg("-r")
        .arg(file)
        .args(args)
        .output()
        .expect("tshark is installed: apt-get install tshark");
    assert!(
        output.status.success(),
        "tshark: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn live_lines_show_each_place_and_each_drop() {
    let pair = Pair::new();
    let [c1, c2] = &pair.names;
    let h2 = &pair.cluster.hosts[1].name;
    let running = Running::start(pair.host(), "");
    running.begun(&pair);
    pair.ping(C2);
    let (from, to) = (format!("from {c1} "), format!("to {c1} "));
    let remote = format!("{h2} (192.0.2.2:4789)");
    running.line(&[
        &from,
        "10.0.9.2 > 10.0.9.3 ICMP echo request",
        &format!("send to {remote}"),
    ]);
    let line = running.line(&[&format!("to {h2} ["), "vni 4096", "echo request", ": sent"]);
    assert!(
        line.contains("192.0.2.1:") && line.contains(" > 192.0.2.2:4789"),
        "{line}"
    );
    running.line(&[
        &format!("from {h2} ["),
        "> 192.0.2.1:4789",
        "echo reply",
        &format!("deliver to {c1}"),
    ]);
    running.line(&[&to, "10.0.9.3 > 10.0.9.2 ICMP echo reply", ": delivered"]);
    pair.spoof();
    running.line(&[
        &from,
        "10.0.9.77 > 10.0.9.3 UDP",
        "drop guard-ip: A container sent",
    ]);
    // What is no VXLAN, from a host that is none of ours.
    let outsider = pair
        .cluster
        .switch
        .run(|| UdpSocket::bind("192.0.2.254:0"))
        .unwrap()
        .unwrap();
    outsider.send_to(&[0; 20], "192.0.2.1:4789").unwrap();
    running.line(&["from 192.0.2.254 [", "drop no-vni-flag"]);
    running.signal("-INT");
    let (code, said) = running.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(" captured, 0 missed"), "{said}");

    // The same numbers are on the books.
    let status = pair.host().json("status --json");
    let port = port_of(&status, c1);
    assert_eq!(
        (&port["network"], &port["interface"]),
        (&"blue".into(), &"eth0".into())
    );
    assert!(
        port["frames_in"].as_u64() > Some(6) && port["frames_out"].as_u64() > Some(6),
        "{port}"
    );
    assert!(port["drops"]["guard-ip"].as_u64() >= Some(1), "{port}");
    let entry = &status["cluster"]["remotes"][0];
    assert_eq!(
        (&entry["remote"], &entry["host"]),
        (&"192.0.2.2".into(), &h2.as_str().into())
    );
    assert!(
        entry["datagrams_in"].as_u64() > Some(6) && entry["datagrams_out"].as_u64() > Some(6),
        "{entry}"
    );
    assert_eq!(entry["send_failures"], serde_json::json!({}));
    let text = pair.host().ok("status");
    assert!(
        text.contains("FRAMES IN") && text.contains("SEND FAILURES") && text.contains("guard-ip"),
        "{text}"
    );
    let fdb = pair.host().json("fdb --json");
    let of = |kind: &str| -> Value {
        // Not those of the hosts themselves, on the network of published ports.
        let mut entries = fdb.as_array().unwrap().iter();
        let of = |entry: &&Value| entry["kind"] == kind && entry["network"] != "ingress";
        entries.find(of).unwrap()["traffic"].clone()
    };
    assert!(
        of("local")["dropped"].as_u64() >= Some(1) && of("remote")["in"].as_u64() > Some(6),
        "{fdb}"
    );
    assert_eq!(of("gateway"), Value::Null);
    assert!(!pair.host().ok("fdb").contains(c2) || pair.host().ok("fdb").contains(h2));
}

#[test]
fn a_file_opens_in_tshark_with_both_layers_and_comments() {
    let pair = Pair::new();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blue.pcapng");
    let running = Running::start(
        pair.host(),
        &format!("--network blue -w {}", file.display()),
    );
    let seen = || tshark(&file, &["-T", "fields", "-e", "frame.comment"]);
    wait_until("the file has a ping", LIMIT, || {
        pair.ping(C2);
        file.exists() && seen().contains("sent")
    });
    pair.spoof();
    wait_until("the file has the drop", LIMIT, || {
        seen().contains("guard-ip")
    });
    running.signal("-TERM");
    let (code, said) = running.end();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );

    let fields = ["-T", "fields", "-E", "separator=|", "-E", "occurrence=a"];
    let wanted = [
        "-e",
        "frame.interface_name",
        "-e",
        "frame.encap_type",
        "-e",
        "vxlan.vni",
        "-e",
        "ip.src",
        "-e",
        "icmp.type",
        "-e",
        "frame.comment",
    ];
    let text = tshark(&file, &[&fields[..], &wanted[..]].concat());
    let port = format!("blue/{}", pair.names[0]);
    let has = |parts: &[&str]| {
        assert!(
            text.lines()
                .any(|line| parts.iter().all(|part| line.contains(part))),
            "no packet with {parts:?} in:\n{text}"
        );
    };
    // 1: Ethernet; 7: raw IP, in tshark's own numbers.
    has(&[&port, "|1||10.0.9.2|8|send to "]);
    has(&["underlay 192.0.2.1|7|4096|192.0.2.1,10.0.9.2|8|sent"]);
    has(&["underlay 192.0.2.1|7|4096|192.0.2.2,10.0.9.3|0|deliver to "]);
    has(&[&port, "|1||10.0.9.3|0|delivered"]);
    has(&[&port, "|10.0.9.77||drop guard-ip: "]);
    // The outer headers made anew, and the inner ones, are right to the last checksum. At a port they may be partial.
    let check = [
        "-o",
        "ip.check_checksum:TRUE",
        "-o",
        "udp.check_checksum:TRUE",
        "-Y",
    ];
    let bad = "frame.encap_type == 7 && (ip.checksum.status == 0 || udp.checksum.status == 0 || \
               icmp.checksum.status == 0 || _ws.malformed)";
    assert_eq!(tshark(&file, &[&check[..], &[bad]].concat()), "");
}

/// What `status` says of a container's port.
fn port_of<'a>(status: &'a Value, container: &str) -> &'a Value {
    let ports = status["cluster"]["ports"].as_array().unwrap();
    let own = ports.iter().find(|port| port["container"] == container);
    own.unwrap_or_else(|| panic!("{container} has no port in {ports:?}"))
}

#[test]
fn filters_and_counts() {
    let pair = Pair::new();
    let host = pair.host();
    let [c1, c2] = &pair.names;
    let status = host.json("status --json");
    let number = port_of(&status, c1)["port"].to_string();
    for (filter, never) in [
        (format!("--port {c1}"), None),
        (format!("--port {number} --network blue"), None),
        ("--remote 192.0.2.2".to_owned(), Some(format!("to {c1} "))),
    ] {
        let running = Running::start(pair.host(), &format!("{filter} -c 5"));
        let mut lines = Vec::new();
        wait_until("five lines", LIMIT, || {
            pair.ping(C2);
            lines.extend(running.lines.try_iter());
            lines.len() >= 5
        });
        let (code, said) = running.end();
        assert_eq!(code, Some(0), "{filter}: {said}");
        assert!(said.contains("5 captured"), "{filter}: {said}");
        if let Some(never) = never {
            assert!(!lines.iter().any(|line| line.contains(&never)), "{lines:?}");
        }
    }
    host.refused(&format!("capture --port {c2}"), 1, &[c2, "towline "]);
    host.refused(
        "capture --network nothing",
        1,
        &["nothing", "towline network ls"],
    );
    let refused = host.towline("capture -c 0");
    assert_eq!(refused.status.code(), Some(2));
    host.refused(
        "capture -w /nowhere/at/all -c 1",
        1,
        &["can't write /nowhere/at/all"],
    );
}

#[test]
fn a_capture_outlives_neither_reader_nor_agent_and_stops_nobody() {
    let mut pair = Pair::new();
    // A reader that does not read: the agent and the data path go on, and what does not fit is missed.
    let paused = Running::start(pair.host(), "");
    paused.begun(&pair);
    paused.signal("-STOP");
    // Flooding may lose a few on a busy machine, whoever looks on.
    let said = sh(&pair.c1(), &format!("ping -q -f -c 20000 -s 1000 {C2}"));
    let received = said
        .lines()
        .find_map(|line| {
            line.split(", ")
                .find_map(|part| part.strip_suffix(" received"))
        })
        .unwrap();
    assert!(received.parse::<u32>().unwrap() > 19_800, "{said}");
    assert!(pair.host().ok("status").contains("cluster"));
    paused.signal("-CONT");
    paused.signal("-INT");
    let (code, said) = paused.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains(" 0 missed"), "{said}");

    // A reader that goes away without a word.
    let gone = Running::start(pair.host(), "");
    gone.begun(&pair);
    gone.signal("-KILL");
    assert_eq!(gone.end().0, None);
    pair.ping(C2);

    // A host that leaves its cluster, and an agent that dies: both captures are told apart from one that was ended.
    let running = Running::start(pair.host(), "");
    running.begun(&pair);
    pair.cluster.hosts[0].kill_agent();
    let (code, said) = running.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the agent ended while it captured"), "{said}");
    pair.cluster.hosts[0].start_agent();
    pair.ping(C2);
    let host = &pair.cluster.hosts[1];
    let running = Running::start(host, "");
    running.begun(&pair);
    host.ok("leave --force");
    let (code, said) = running.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("this host has left its cluster"), "{said}");
}
