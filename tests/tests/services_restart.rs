//! Agents that start after members have come or gone without them: what becomes of open connections.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use netns::conntrack::Filter;
use netns::nftables::Protocol;
use netns::{NetfilterSocket, Netns};
use towline_tests::service::{ANSWER_LIMIT, Asking, Server, any};
use towline_tests::wait_until;
use towline_tests::web::{LIMIT, Web, at, seen};

/// What is remembered in a namespace of connections of these protocols, by who answers them.
fn remembered(netns: &Netns, protocol: Protocol) -> Vec<IpAddr> {
    let mut socket = NetfilterSocket::open(netns).unwrap();
    let connections = socket
        .connections(&Filter::new().protocol(protocol))
        .unwrap();
    let translated = connections
        .into_iter()
        .filter(|connection| connection.original.destination != connection.reply.source);
    translated
        .map(|connection| connection.reply.source)
        .collect()
}

/// Connections to members, and flows of datagrams, each with the name of who answers it.
struct Open {
    connections: Vec<(Asking, String)>,
    flows: Vec<(UdpSocket, String)>,
}

impl Open {
    /// A few of each kind to each target; the targets of datagrams are those with port 53.
    fn new(from: &Netns, targets: &[SocketAddr], datagrams: &[SocketAddr]) -> Self {
        let open = || {
            let targets = targets.iter().flat_map(|&target| [target; 4]);
            let connections = targets.map(|target| {
                let mut asking = Asking::connect(target, ANSWER_LIMIT).unwrap();
                let member = asking.ask().unwrap().member;
                (asking, member)
            });
            let flows = datagrams.iter().flat_map(|&target| [target; 4]);
            let flows = flows.map(|target| {
                let socket = UdpSocket::bind((any(target), 0)).unwrap();
                socket.connect(target).unwrap();
                socket.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
                let member = ask_again(&socket).unwrap();
                (socket, member)
            });
            Self {
                connections: connections.collect(),
                flows: flows.collect(),
            }
        };
        from.run(open).unwrap()
    }

    /// Those to `living` go on; those to others are over, without anybody waiting.
    fn end_but_those_to(&mut self, living: &str) {
        let mut ended = [0, 0];
        for (asking, member) in &mut self.connections {
            let answer = asking.ask();
            if member == living {
                assert_eq!(answer.unwrap().member, living, "it goes on");
            } else {
                let error = answer.expect_err("its member is gone");
                let over = [ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof];
                assert!(over.contains(&error.kind()), "{error}");
                ended[0] += 1;
            }
        }
        for (socket, member) in &self.flows {
            assert_eq!(ask_again(socket).unwrap(), living, "first {member}");
            ended[1] += usize::from(member != living);
        }
        assert!(ended.iter().all(|count| *count > 0), "{ended:?}");
    }
}

fn ask_again(socket: &UdpSocket) -> std::io::Result<String> {
    socket.send(b"?\n")?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer)?;
    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
    Ok(answer.split(' ').next().unwrap_or_default().to_owned())
}

/// Addresses of a container of this host.
fn ips_of(web: &Web, host: usize, name: &str) -> Vec<IpAddr> {
    let listed = web.cluster.hosts[host].json("ps --json");
    let mut listed = listed.as_array().unwrap().iter();
    let own = listed.find(|container| container["name"] == name).unwrap();
    let places = own["endpoints"].as_array().unwrap().iter();
    let ips = places.flat_map(|place| place["ips"].as_array().unwrap());
    ips.map(|ip| ip.as_str().unwrap().parse().unwrap())
        .collect()
}

/// Two members on the first host, a client's container on the second, and what is open to them from there and from outside.
struct Led {
    web: Web,
    udp: BTreeMap<String, Server>,
    client: Netns,
}

impl Led {
    fn new() -> Self {
        let web = Web::new(2, &[], "--publish 8053:53/udp");
        let client = web.add_client(1, "client");
        Self {
            web,
            udp: BTreeMap::new(),
            client,
        }
    }

    fn add(&mut self, name: &str) -> String {
        let name = self.web.add(0, name);
        let ips = ips_of(&self.web, 0, &name);
        let server = Server::udp(&self.web.members[&name].netns, &name, &ips, 53);
        self.udp.insert(name.clone(), server);
        name
    }

    fn open(&self) -> [Open; 2] {
        let (host, vips) = (&self.web.cluster.hosts[1], self.web.vips());
        let by_vip = vips.map(|vip| (vip.ip(), 53).into());
        [
            Open::new(self.web.client(), &self.web.ports(1), &at(host, 8053)),
            Open::new(&self.client, &vips, &by_vip),
        ]
    }

    /// Where what is open is remembered.
    fn namespaces(&self) -> [&Netns; 2] {
        [&self.web.cluster.hosts[1].netns, &self.client]
    }
}

#[test]
fn an_agent_that_starts_ends_connections_to_who_left_meanwhile() {
    let mut led = Led::new();
    let [leaves, stays] = ["leaves", "stays"].map(|name| led.add(name));
    led.web.wait_serving(&[0, 1], 2);
    let mut open = led.open();
    let gone = ips_of(&led.web, 0, &leaves);
    led.web.cluster.hosts[1].kill_agent();
    // Nor does the next agent know what this one knew.
    std::fs::remove_file(led.web.cluster.hosts[1].state_dir().join("tables")).unwrap();
    led.web.cluster.hosts[0].ok(&format!("rm -f --drain-timeout 0s {leaves}"));
    led.web.members.remove(&leaves);
    led.web.cluster.hosts[1].start_agent();
    for netns in led.namespaces() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            wait_until("nobody remembers who left", LIMIT, || {
                let known = remembered(netns, protocol);
                !known.iter().any(|ip| gone.contains(ip))
            });
        }
    }
    for open in &mut open {
        open.end_but_those_to(&stays);
    }
}

#[test]
fn an_agent_that_knows_less_than_the_rules_do_ends_no_connection() {
    let mut led = Led::new();
    let first = led.add("first");
    led.web.wait_serving(&[0, 1], 1);
    let kept = led.web.cluster.hosts[1].state_dir().join("tables");
    let holds = |word: &str| {
        let bytes = std::fs::read(&kept).unwrap_or_default();
        bytes
            .windows(word.len())
            .any(|some| some == word.as_bytes())
    };
    wait_until("the first member is kept", LIMIT, || holds(&first));
    let old = std::fs::read(&kept).unwrap();
    let second = led.add("second");
    led.web.wait_serving(&[0, 1], 2);
    let mut open = led.open();
    led.web.cluster.hosts[1].kill_agent();
    // As if the machine had been switched off before it was written.
    std::fs::write(&kept, old).unwrap();
    led.web.cluster.hosts[0].kill_agent();
    led.web.cluster.hosts[1].start_agent();
    wait_until("the first member alone is known", LIMIT, || {
        seen(&led.web.cluster.hosts[1])["members"] == 1
    });
    led.web.cluster.hosts[0].start_agent();
    led.web.wait_serving(&[0, 1], 2);
    for open in &mut open {
        for (asking, member) in &mut open.connections {
            let answer = asking.ask().map(|answer| answer.member);
            assert_eq!(answer.ok().as_ref(), Some(&*member), "it goes on");
        }
        for (socket, member) in &open.flows {
            assert_eq!(ask_again(socket).ok().as_ref(), Some(member), "it goes on");
        }
        let to = |name: &String| open.connections.iter().any(|(_, member)| member == name);
        assert!(to(&first) && to(&second), "both are asked");
    }
}
