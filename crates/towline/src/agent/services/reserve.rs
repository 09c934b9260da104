//! Published ports of this host that no process and no container may have besides.
//!
//! A published port is taken before any socket sees it, so a process that has it would be robbed in silence, and one that comes later
//! would wait for nobody. Each port is therefore bound, without listening, for as long as it is published. One that is bound already,
//! or is a container's own, is not published here, and `status` says so.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use control::service::{Protocol, Publish, PublishOn};
use discovery::Place;
use netns::Netns;
use socket2::{Domain, Socket, Type};

/// What is reserved, and what could not be.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    ports: BTreeMap<(Protocol, u16), Number>,
}

/// One number, by what of the host it is published on, the widest first; or why it was not to be had there.
type Number = BTreeMap<Option<PublishOn>, Result<Held, String>>;

/// What keeps a port free.
#[derive(Debug)]
enum Held {
    /// These sockets.
    By { _sockets: Vec<Socket> },
    /// What the same number is kept with in a wider place.
    Around,
    /// Nothing yet: connections of who had it are still about to end.
    Soon,
}

impl Reserved {
    /// Reserves these ports and no others, but for those that are a container's own: `holder` names it. Those that were not
    /// to be had are tried again.
    pub(super) fn settle<'a>(
        &mut self,
        netns: &Netns,
        wanted: impl IntoIterator<Item = &'a Publish>,
        holder: impl Fn(&Publish) -> Option<String>,
    ) {
        let mut numbers = BTreeMap::<_, BTreeMap<_, &Publish>>::new();
        for publish in wanted {
            if let Some(number) = publish.published {
                let places = numbers.entry((publish.protocol, number)).or_default();
                places.insert(publish.on.clone(), publish);
            }
        }
        let mut before = std::mem::take(&mut self.ports);
        for (number, places) in numbers {
            // Sockets of narrow places would keep a wider one out: all of a number are let go of when one comes or goes.
            let before = before.remove(&number);
            let before = before.filter(|before| before.keys().eq(places.keys()));
            let mut before = before.unwrap_or_default();
            let mut now = Number::new();
            for (on, publish) in places {
                let held = match (before.remove(&on), holder(publish)) {
                    (_, Some(container)) => {
                        Err(format!("container {container} has it (run --publish)"))
                    }
                    (Some(held @ Ok(Held::By { .. })), None) => held,
                    _ if is_around(&now, on.as_ref()) => Ok(Held::Around),
                    _ => reserve(netns, publish),
                };
                now.insert(on, held);
            }
            self.ports.insert(number, now);
        }
    }

    /// Ports that somebody on this host has.
    pub(super) fn taken(&self) -> BTreeSet<Place> {
        let places = self.places().filter(|(_, held)| held.is_err());
        places.map(|(place, _)| place).collect()
    }

    /// What the operator should know, a sentence for each port that was not to be had.
    pub(super) fn problems(&self) -> Vec<String> {
        let problems = self.places().filter_map(|((protocol, number, on), held)| {
            let problem = held.as_ref().err()?;
            let on = on.map_or_else(String::new, |on| format!(" on {on}"));
            Some(format!(
                "port {number}/{protocol}{on} is published by a service, but {problem} on this host: it is left to that; \
                 clients reach the service by another host"
            ))
        });
        problems.collect()
    }

    fn places(&self) -> impl Iterator<Item = (Place, &Result<Held, String>)> {
        self.ports.iter().flat_map(|((protocol, number), places)| {
            let places = places.iter();
            places.map(|(on, held)| ((*protocol, *number, on.clone()), held))
        })
    }
}

/// Whether sockets that hold a number already would keep one for `on` out.
fn is_around(held: &Number, on: Option<&PublishOn>) -> bool {
    held.iter()
        .filter(|(_, held)| held.is_ok())
        .any(|(wider, _)| match (wider, on) {
            (Some(PublishOn::Address(wider)), Some(PublishOn::Address(ip))) => {
                wider.is_unspecified() && wider.is_ipv4() == ip.is_ipv4()
            }
            // Different interfaces have the number each for itself.
            (Some(PublishOn::Interface(_)), _) => false,
            _ => true,
        })
}

/// Whether `publish` could be had now.
///
/// # Errors
/// Why not, as part of a sentence.
pub(super) fn could_be(netns: &Netns, publish: &Publish) -> Result<(), String> {
    reserve(netns, publish).map(drop)
}

fn reserve(netns: &Netns, publish: &Publish) -> Result<Held, String> {
    let bound = netns.run(|| addresses(publish).map(|at| bind(publish, at)).collect());
    let bound: Result<Vec<Option<Socket>>, String> =
        bound.map_err(|error| format!("this host's namespace cannot be entered ({error})"))?;
    let bound = bound?;
    let all = bound.iter().all(Option::is_some);
    Ok(if all {
        Held::By {
            _sockets: bound.into_iter().flatten().collect(),
        }
    } else {
        Held::Soon
    })
}

/// Where a published port is.
fn addresses(publish: &Publish) -> impl Iterator<Item = SocketAddr> {
    let port = publish.published.unwrap_or_default();
    let ips: Vec<IpAddr> = match publish.on {
        Some(PublishOn::Address(ip)) => vec![ip],
        Some(PublishOn::Interface(_)) | None => {
            vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]
        }
    };
    ips.into_iter().map(move |ip| SocketAddr::new(ip, port))
}

/// A socket that has the port; none where it is free, but connections of who had it last are still about to end.
fn bind(publish: &Publish, at: SocketAddr) -> Result<Option<Socket>, String> {
    match try_bind(publish, at, false) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // Sockets that may share it are no listening ones.
            let shared = publish.protocol == Protocol::Tcp && try_bind(publish, at, true).is_ok();
            if shared {
                Ok(None)
            } else {
                Err(format!(
                    "another program has it ('ss -tulpn sport = :{}' names it)",
                    at.port()
                ))
            }
        }
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            Err(format!("there is no address {}", at.ip()))
        }
        // A host without IPv6.
        Err(error) if error.raw_os_error() == Some(no_such_family()) => Ok(None),
        Err(error) => Err(format!("it cannot be bound ({error})")),
    }
}

/// `EAFNOSUPPORT`.
const fn no_such_family() -> i32 {
    rustix::io::Errno::AFNOSUPPORT.raw_os_error()
}

fn try_bind(publish: &Publish, at: SocketAddr, share: bool) -> io::Result<Socket> {
    let kind = match publish.protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(at), kind, None)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(share)?;
    if let Some(PublishOn::Interface(name)) = &publish.on {
        socket.bind_device(Some(name.as_bytes()))?;
    }
    socket.bind(&at.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::service::PublishMode;
    use std::net::{TcpListener, UdpSocket};

    fn publish(protocol: Protocol, port: u16) -> Publish {
        Publish {
            target: 80,
            published: Some(port),
            protocol,
            mode: PublishMode::Ingress,
            on: None,
        }
    }

    fn on(ip: &str, port: u16) -> Publish {
        Publish {
            on: Some(PublishOn::Address(ip.parse().expect("an address"))),
            ..publish(Protocol::Tcp, port)
        }
    }

    fn nobody(_: &Publish) -> Option<String> {
        None
    }

    #[test]
    fn a_containers_own_port_is_left_to_it_until_it_goes() {
        let netns = Netns::current().expect("every thread has one");
        let free = TcpListener::bind(("::1", 0)).and_then(|socket| socket.local_addr());
        let port = free.expect("a port is free").port();
        let wanted = [publish(Protocol::Tcp, port)];
        let mut reserved = Reserved::default();
        reserved.settle(&netns, &wanted, |_| Some("c1".to_owned()));
        assert_eq!(reserved.taken(), [(Protocol::Tcp, port, None)].into());
        assert!(reserved.problems()[0].contains("container c1"));
        assert!(TcpListener::bind(("::1", port)).is_ok(), "not bound");
        reserved.settle(&netns, &wanted, nobody);
        assert!(reserved.taken().is_empty());
    }

    #[test]
    fn a_port_of_another_program_is_left_to_it() {
        let netns = Netns::current().expect("every thread has one");
        let tcp = TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
        let udp = UdpSocket::bind(("127.0.0.1", 0)).expect("a port is free");
        let tcp = (tcp.local_addr().expect("bound").port(), tcp);
        let udp = (udp.local_addr().expect("bound").port(), udp);
        let wanted = [publish(Protocol::Tcp, tcp.0), publish(Protocol::Udp, udp.0)];
        let mut reserved = Reserved::default();
        reserved.settle(&netns, &wanted, nobody);
        let taken = [(Protocol::Tcp, tcp.0, None), (Protocol::Udp, udp.0, None)];
        assert_eq!(reserved.taken(), taken.into());
        assert!(reserved.problems()[0].contains(&tcp.0.to_string()));
        assert!(could_be(&netns, &wanted[0]).is_err());
        drop((tcp, udp));
        reserved.settle(&netns, &wanted, nobody);
        assert!(reserved.taken().is_empty(), "tried again");
    }

    #[test]
    fn what_is_reserved_no_other_program_gets() {
        let netns = Netns::current().expect("every thread has one");
        let free = TcpListener::bind(("::1", 0)).and_then(|socket| socket.local_addr());
        let port = free.expect("a port is free").port();
        let wanted = [publish(Protocol::Tcp, port)];
        let mut reserved = Reserved::default();
        reserved.settle(&netns, &wanted, nobody);
        assert!(reserved.taken().is_empty());
        assert!(TcpListener::bind(("127.0.0.1", port)).is_err());
        assert!(TcpListener::bind(("::1", port)).is_err());
        // A second time keeps what there is, and none wanted lets go of it.
        reserved.settle(&netns, &wanted, nobody);
        reserved.settle(&netns, &[], nobody);
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok());
    }

    #[test]
    fn one_number_on_two_addresses_is_two_ports() {
        let netns = Netns::current().expect("every thread has one");
        let other = TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
        let port = other.local_addr().expect("bound").port();
        let [v4, v6] = [on("127.0.0.1", port), on("::1", port)];
        for wanted in [[v4.clone(), v6.clone()], [v6, v4.clone()]] {
            let mut reserved = Reserved::default();
            reserved.settle(&netns, &wanted, nobody);
            let taken = (Protocol::Tcp, port, v4.on.clone());
            assert_eq!(reserved.taken(), [taken].into());
            let problems = reserved.problems();
            assert!(problems[0].contains("127.0.0.1"), "{problems:?}");
            assert!(TcpListener::bind(("::1", port)).is_err(), "reserved");
        }
    }

    #[test]
    fn own_places_of_one_number_do_not_keep_each_other_out() {
        let netns = Netns::current().expect("every thread has one");
        let free = TcpListener::bind(("0.0.0.0", 0)).and_then(|socket| socket.local_addr());
        let port = free.expect("a port is free").port();
        let [narrow, wide] = [on("127.0.0.1", port), on("0.0.0.0", port)];
        let mut reserved = Reserved::default();
        for wanted in [vec![&narrow], vec![&narrow, &wide], vec![&wide]] {
            reserved.settle(&netns, wanted, nobody);
            assert_eq!(reserved.problems(), [""; 0]);
            assert!(TcpListener::bind(("127.0.0.1", port)).is_err(), "reserved");
        }
    }

    #[test]
    fn an_address_that_is_not_here_is_said() {
        let netns = Netns::current().expect("every thread has one");
        let mut elsewhere = publish(Protocol::Udp, 40_999);
        elsewhere.on = Some(PublishOn::Address([203, 0, 113, 77].into()));
        let problem = could_be(&netns, &elsewhere).expect_err("a documentation address");
        assert!(problem.contains("203.0.113.77"), "{problem}");
    }
}
