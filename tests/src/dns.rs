//! Asking for names from inside a container, a server for the names of the rest of the world, and more questions than a person asks.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netns::Netns;

use crate::try_sh;

/// Where containers ask.
pub const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11)), 53);
/// How often a thread looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What `dig` printed.
#[derive(Clone, Debug)]
pub struct Dig {
    /// `NOERROR`, `NXDOMAIN`, …; empty: there was no answer.
    pub status: String,
    /// `qr rd ra …`
    pub flags: String,
    /// The answers' data, sorted.
    pub answers: Vec<String>,
    /// The first answer's TTL.
    pub ttl: Option<u32>,
    /// All of it.
    pub text: String,
}

/// Asks 127.0.0.11 with `dig`, inside `netns`.
#[must_use]
pub fn dig(netns: &Netns, args: &str) -> Dig {
    let output = try_sh(netns, &format!("dig +tries=1 +time=20 @127.0.0.11 {args}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let after = |word: &str, end: char| {
        let rest = text.split_once(word)?.1;
        Some(rest.split(end).next()?.trim().to_owned())
    };
    let answers = text
        .lines()
        .skip_while(|line| !line.starts_with(";; ANSWER"));
    let answers = answers.skip(1).take_while(|line| !line.is_empty());
    let records: Vec<Vec<String>> = answers
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect();
    let ttl = records.first().and_then(|words| words.get(1)?.parse().ok());
    let data = records
        .iter()
        .filter_map(|words| Some(words.get(4..)?.join(" ")));
    let mut answers: Vec<String> = data.collect();
    answers.sort();
    Dig {
        status: after("status: ", ',').unwrap_or_default(),
        flags: after(";; flags: ", ';').unwrap_or_default(),
        answers,
        ttl,
        text,
    }
}

/// The bytes of a plain question of class IN.
///
/// # Panics
/// When a label is longer than 63 bytes.
#[must_use]
pub fn question(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).expect("a label of at most 63 bytes"));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

/// Asks for `name` as fast as `rate` a second for that long, and returns how many questions were sent, and how many answered with
/// records within two seconds of the last.
///
/// # Panics
/// When the socket can't be had.
#[must_use]
pub fn load(netns: &Netns, name: &str, rate: u32, time: Duration) -> (u32, u32) {
    let socket = netns
        .run(|| UdpSocket::bind("127.0.0.1:0"))
        .expect("the namespace of a running test can be entered")
        .expect("a port");
    socket.connect(SERVER).expect("an address of the namespace");
    // A client that is slow to read loses nothing either.
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20).expect("root may");
    let receiving = socket.try_clone().expect("one socket more");
    receiving
        .set_read_timeout(Some(LOOK_EVERY))
        .expect("a socket's time limit");
    let total = u32::try_from(u128::from(rate) * time.as_millis() / 1000)
        .expect("a rate that can be counted");
    let last = Arc::new(Mutex::new(None::<Instant>));
    let ended = Arc::clone(&last);
    let answers = std::thread::spawn(move || {
        let (mut buffer, mut count) = ([0; 512], 0);
        while count < total {
            match receiving.recv(&mut buffer) {
                // No error, and a record at least.
                Ok(length) if length > 12 && buffer[3] & 0xf == 0 && buffer[7] > 0 => count += 1,
                Ok(_) => {}
                Err(_) => {
                    let ended = *ended.lock().unwrap_or_else(PoisonError::into_inner);
                    if ended.is_some_and(|at| at.elapsed() > Duration::from_secs(2)) {
                        break;
                    }
                }
            }
        }
        count
    });
    let start = Instant::now();
    for n in 0..total {
        let due = start + Duration::from_secs(1) * n / rate;
        // Small bursts, as the clock allows.
        while let Some(left) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(left.max(Duration::from_micros(100)));
        }
        let id = u16::try_from(n % 65_536).expect("below 65,536");
        let _ = socket.send(&question(id, name, 1));
    }
    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    (total, answers.join().expect("a thread that only counts"))
}

/// A server of names at an address, with these habits by the start of the name that it is asked for:
///
/// | name | answer |
/// |---|---|
/// | `ok…` | 192.0.2.77 |
/// | `big…` | by UDP that it is truncated, by TCP a hundred addresses |
/// | `fail…` | SERVFAIL |
/// | `refuse…` | REFUSED |
/// | `liar…` | with another number, then another question, then 192.0.2.77 |
/// | `silent…` | nothing |
/// | all else | NXDOMAIN |
#[derive(Debug)]
pub struct Upstream {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<(String, u16)>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Upstream {
    /// Serves port 53 of `ip` inside `netns`.
    ///
    /// # Panics
    /// When the port can't be had.
    #[must_use]
    pub fn start(netns: &Netns, ip: IpAddr) -> Self {
        let sockets = netns.run(|| {
            Ok::<_, std::io::Error>((UdpSocket::bind((ip, 53))?, TcpListener::bind((ip, 53))?))
        });
        let (udp, tcp) = sockets
            .expect("the namespace of a running test can be entered")
            .expect("port 53 is free");
        udp.set_read_timeout(Some(LOOK_EVERY))
            .expect("a socket's time limit");
        tcp.set_nonblocking(true).expect("a socket's flag");
        let stop = Arc::new(AtomicBool::new(false));
        let asked: Arc<Mutex<Vec<(String, u16)>>> = Arc::default();
        let (stopped, seen) = (Arc::clone(&stop), Arc::clone(&asked));
        let by_udp = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = udp.recv_from(&mut buffer) {
                    for reply in replies(&buffer[..length], from.port(), &seen, false) {
                        let _ = udp.send_to(&reply, from);
                    }
                }
            }
        });
        let (stopped, seen) = (Arc::clone(&stop), Arc::clone(&asked));
        let by_tcp = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match tcp.accept() {
                    Ok((stream, from)) => {
                        let _ = serve(stream, from.port(), &seen);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    Err(_) => {}
                }
            }
        });
        Self {
            stop,
            asked,
            threads: vec![by_udp, by_tcp],
        }
    }

    /// The names that were asked for, in order.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.seen().into_iter().map(|(name, _)| name).collect()
    }

    /// The ports from which a name was asked for.
    #[must_use]
    pub fn ports(&self, name: &str) -> BTreeSet<u16> {
        let seen = self.seen().into_iter();
        seen.filter(|(asked, _)| asked == name)
            .map(|(_, port)| port)
            .collect()
    }

    fn seen(&self) -> Vec<(String, u16)> {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(
    mut stream: TcpStream,
    port: u16,
    asked: &Mutex<Vec<(String, u16)>>,
) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut query)?;
    for reply in replies(&query, port, asked, true) {
        let length = u16::try_from(reply.len()).map_err(std::io::Error::other)?;
        stream.write_all(&length.to_be_bytes())?;
        stream.write_all(&reply)?;
    }
    Ok(())
}

fn replies(query: &[u8], port: u16, asked: &Mutex<Vec<(String, u16)>>, tcp: bool) -> Vec<Vec<u8>> {
    let Some((name, end)) = name_of(query) else {
        return Vec::new();
    };
    let seen = (name.clone(), port);
    asked
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(seen);
    let reply = |flags: u8, code: u8, records: u8| {
        let mut reply = query[..end].to_vec();
        reply[2] = 0x81 | flags;
        reply[3] = 0x80 | code;
        reply[6..12].copy_from_slice(&[0, records, 0, 0, 0, 0]);
        for n in 0..records {
            // The name at byte 12, type A, class IN, 60 seconds, 4 bytes.
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            reply.extend([192, 0, 2, 77 + n]);
        }
        reply
    };
    let starts = |with: &str| name.starts_with(with);
    if starts("ok") {
        vec![reply(0, 0, 1)]
    } else if starts("big") && tcp {
        vec![reply(0, 0, 100)]
    } else if starts("big") {
        vec![reply(2, 0, 0)]
    } else if starts("fail") {
        vec![reply(0, 2, 0)]
    } else if starts("refuse") {
        vec![reply(0, 5, 0)]
    } else if starts("liar") {
        let (mut number, mut other) = (reply(0, 0, 3), reply(0, 0, 3));
        number[0] ^= 0xff;
        other[13] = b'x';
        vec![number, other, reply(0, 0, 1)]
    } else if starts("silent") {
        Vec::new()
    } else {
        vec![reply(0, 3, 0)]
    }
}

/// The name that is asked for, and where the question ends.
fn name_of(query: &[u8]) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    let mut at = 12;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_lowercase());
        at += length;
    }
    (query.len() >= at + 4).then(|| (labels.join("."), at + 4))
}
