use std::io::{Read as _, Write as _};
use std::net::TcpStream as Stream;

use rustls::{ClientConnection, StreamOwned};
use socket2::{Domain, SockAddr, Socket, Type};

use super::*;
use crate::limits::{PENDING_PER_ADDRESS, PENDING_STRANGERS};

const CONNECTIONS: u16 = 10_000;
/// One of so many finishes its handshake and then says nothing: that is work for the attacker too.
const SHAKEN: u16 = 20;

/// A connection from one of the attacker's many addresses.
fn open(stand: &Stand, number: u16) -> Option<Stream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    // A host's connections are as likely to come from its containers: a few from its own address.
    let vtep = match number % 100 {
        0 => info(stand.at, 1).vtep,
        _ => info(stand.at, 1000 + number / 8).vtep,
    };
    socket
        .bind(&SockAddr::from(SocketAddr::new(vtep, 0)))
        .unwrap();
    // The manager may be busy; it must not be so for ever.
    socket
        .connect_timeout(&SockAddr::from(stand.at), PATIENCE)
        .ok()?;
    Some(socket.into())
}

/// Goes some way towards a hello, and no further.
fn half_open(stand: &Stand, number: u16) -> Option<Box<dyn Send>> {
    let mut stream = open(stand, number)?;
    if number.is_multiple_of(2) {
        return Some(Box::new(stream));
    }
    let config = tls::client_config(&identity_of_nobody(stand)).unwrap();
    let mut client = ClientConnection::new(config, tls::server_name()).unwrap();
    if number % SHAKEN == 1 {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut stream = StreamOwned::new(client, stream);
        // Evicted, perhaps.
        let _ = stream.conn.complete_io(&mut stream.sock);
        return Some(Box::new(stream));
    }
    let mut first = Vec::new();
    client.write_tls(&mut first).unwrap();
    let _ = stream.write_all(&first[..first.len() / 2]);
    Some(Box::new(stream))
}

/// Somebody who has a certificate: a member whose host was taken over.
fn identity_of_nobody(stand: &Stand) -> crate::Identity {
    identity(&stand.authority, 9999)
}

#[test]
fn ten_thousand_half_open_connections_harm_nobody() {
    raise_file_limit(u64::from(CONNECTIONS) + 2000);
    let stand = Stand::start(121);
    let one = stand.join(1);
    let vni = create(&one, "10.0.9.0/24");
    one.subscribe(vni);
    let before = resident();
    let held = std::thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            let opened = (0..CONNECTIONS).filter_map(|number| half_open(&stand, number));
            opened.collect::<Vec<_>>()
        });
        // Meanwhile a host joins from an address that nobody knew, and news go both ways.
        let two = stand.join(2);
        two.subscribe(vni);
        await_news(&one, &two, "c1");
        await_news(&two, &one, "c2");
        let held = attacker.join().unwrap();
        // And once all stand, another one.
        let three = stand.join(3);
        three.subscribe(vni);
        await_news(&three, &one, "c3");
        held
    });
    assert!(
        held.len() > usize::from(CONNECTIONS) * 9 / 10,
        "{}",
        held.len()
    );
    let pending = stand.manager.status().pending;
    let most = PENDING_STRANGERS + PENDING_PER_ADDRESS * 3;
    assert!(pending <= most, "{pending}");
    let grown = resident().saturating_sub(before);
    println!(
        "{} half-open connections, {pending} of them held: {} KiB more, both ends",
        held.len(),
        grown / 1024
    );
    assert!(grown < 256 << 20, "{grown}");
    // Who still says nothing goes.
    wait_until("silent connections end", || {
        stand.manager.status().pending == 0
    });
    drop(held);
    assert_eq!(stand.manager.status().connected, 1);
}

/// A container's connections come from its host's address: they must not keep the host's own agent out.
#[test]
fn a_hosts_own_address_is_not_taken_from_it() {
    let stand = Stand::start(122);
    let one = stand.join(1);
    let two = stand.join(2);
    two.shutdown();
    let mut held: Vec<Stream> = Vec::new();
    let address = SockAddr::from(SocketAddr::new(info(stand.at, 2).vtep, 0));
    for _ in 0..PENDING_PER_ADDRESS * 4 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&address).unwrap();
        socket
            .connect_timeout(&SockAddr::from(stand.at), PATIENCE)
            .unwrap();
        held.push(socket.into());
    }
    wait_until("the connections are seen", || {
        stand.manager.status().pending >= PENDING_PER_ADDRESS
    });
    let two = stand.join(2);
    let vni = create(&one, "10.0.9.0/24");
    one.subscribe(vni);
    await_news(&two, &one, "c1");
    // The oldest were closed.
    let mut first = held.remove(0);
    first.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(first.read(&mut [0]), Ok(0) | Err(_)));
}
