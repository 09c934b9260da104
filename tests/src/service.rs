//! Members that say who they are and whom they see, and clients that ask them: for tests of services.
//!
//! ```text
//!   client ── "?\n" ──▶ member        a connection may ask as often as it likes
//!          ◀─ "NAME ADDRESS\n" ──     who answered, and the client's address as the member sees it
//! ```

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netns::Netns;
use socket2::{Domain, Socket, Type};

/// How long one answer may take, on a busy machine.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often a [`Load`] asks each target.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How often a thread of a member looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A member's server. It ends with the value.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Serves TCP on `port`, in both families, inside `netns`.
    ///
    /// # Panics
    /// When the port can't be had.
    #[must_use]
    pub fn tcp(netns: &Netns, name: &str, port: u16) -> Self {
        let name = name.to_owned();
        Self::accepting(netns, port, move |stream, peer, stopped| {
            converse(stream, peer, &name, stopped);
        })
    }

    /// Has a thread of its own for each connection to `port`.
    fn accepting(
        netns: &Netns,
        port: u16,
        serve: impl Fn(&TcpStream, SocketAddr, &AtomicBool) + Send + Sync + 'static,
    ) -> Self {
        let listener = netns
            .run(|| TcpListener::bind(("::", port)))
            .expect("the namespace of a running test can be entered")
            .expect("the port is free");
        listener.set_nonblocking(true).expect("a socket's flag");
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, serve) = (Arc::clone(&stop), Arc::new(serve));
        let accepting = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, peer)) => {
                        let (serve, stopped) = (Arc::clone(&serve), Arc::clone(&stopped));
                        std::thread::spawn(move || {
                            let _ = stream.set_nonblocking(false);
                            let _ = stream.set_read_timeout(Some(LOOK_EVERY));
                            serve(&stream, peer, &stopped);
                        });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Self {
            stop,
            threads: vec![accepting],
        }
    }

    /// Answers HTTP on `port`, in both families, inside `netns`: a GET of `path` with whatever `status` is then, all else with 404.
    ///
    /// # Panics
    /// When the port can't be had.
    #[must_use]
    pub fn http(netns: &Netns, port: u16, path: &str, status: &Arc<AtomicU16>) -> Self {
        let (line, status) = (format!("GET {path} HTTP/1."), Arc::clone(status));
        Self::accepting(netns, port, move |stream, _, stopped| {
            let mut lines = BufReader::new(stream).lines();
            let first = lines.next().and_then(Result::ok).unwrap_or_default();
            // To the end of what is asked, so that nothing unread resets the connection.
            while !stopped.load(Ordering::Relaxed) {
                match lines.next() {
                    Some(Ok(line)) if !line.is_empty() => {}
                    _ => break,
                }
            }
            let known = first.starts_with(&line);
            let status = if known {
                status.load(Ordering::Relaxed)
            } else {
                404
            };
            let answer = format!("HTTP/1.1 {status} as told\r\nContent-Length: 0\r\n\r\n");
            let _ = (&*stream).write_all(answer.as_bytes());
        })
    }

    /// Serves UDP on `port` of each of these addresses inside `netns`: an answer must come from the address that was asked.
    ///
    /// # Panics
    /// When the port can't be had.
    #[must_use]
    pub fn udp(netns: &Netns, name: &str, ips: &[IpAddr], port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = ips.iter().map(|&ip| {
            let socket = netns
                .run(|| UdpSocket::bind((ip, port)))
                .expect("the namespace of a running test can be entered")
                .expect("the port is free");
            socket
                .set_read_timeout(Some(LOOK_EVERY))
                .expect("a socket's time limit");
            let (stopped, name) = (Arc::clone(&stop), name.to_owned());
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while !stopped.load(Ordering::Relaxed) {
                    if let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                        let _ = socket.send_to(answer(&name, peer).as_bytes(), peer);
                    }
                }
            })
        });
        let threads = threads.collect();
        Self { stop, threads }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn answer(name: &str, peer: SocketAddr) -> String {
    format!("{name} {}\n", peer.ip().to_canonical())
}

fn converse(mut stream: &TcpStream, peer: SocketAddr, name: &str, stop: &AtomicBool) {
    let answer = answer(name, peer);
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {
                if stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

/// Who answered, and as whom the member saw the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The member.
    pub member: String,
    /// The client's address there.
    pub client: IpAddr,
}

fn parse(line: &str) -> std::io::Result<Answer> {
    let wrong = || std::io::Error::new(ErrorKind::InvalidData, format!("answered {line:?}"));
    let (member, client) = line.trim_end().split_once(' ').ok_or_else(wrong)?;
    Ok(Answer {
        member: member.to_owned(),
        client: client.parse().map_err(|_| wrong())?,
    })
}

/// An open connection to a member. Made in the calling thread's namespace.
#[derive(Debug)]
pub struct Asking(BufReader<TcpStream>);

impl Asking {
    /// Connects.
    ///
    /// # Errors
    /// When nobody takes the connection in time.
    pub fn connect(target: SocketAddr, limit: Duration) -> std::io::Result<Self> {
        Self::connect_from(0, target, limit)
    }

    /// Connects from this port, which may be in use for other targets; 0: from any.
    ///
    /// # Errors
    /// When nobody takes the connection in time.
    pub fn connect_from(port: u16, target: SocketAddr, limit: Duration) -> std::io::Result<Self> {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if port != 0 {
            socket.bind(&SocketAddr::new(any(target), port).into())?;
        }
        socket.connect_timeout(&target.into(), limit)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks.
    ///
    /// # Errors
    /// When no answer comes in time, or something else than one.
    pub fn ask(&mut self) -> std::io::Result<Answer> {
        self.0.get_mut().write_all(b"?\n")?;
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        parse(&line)
    }

    /// From now on an answer is waited for no longer than this.
    ///
    /// # Panics
    /// When `limit` is zero.
    pub fn give_up_after(&mut self, limit: Duration) {
        let stream = self.0.get_ref();
        stream
            .set_read_timeout(Some(limit))
            .expect("a limit that is not zero");
    }

    /// This end of the connection.
    ///
    /// # Panics
    /// When it has none: it was connected.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.0.get_ref().local_addr().expect("a connected socket")
    }
}

/// One connection with one question, in the calling thread's namespace.
///
/// # Errors
/// When any of it fails or takes longer than `limit`.
pub fn ask(target: SocketAddr, limit: Duration) -> std::io::Result<Answer> {
    Asking::connect(target, limit)?.ask()
}

/// No address in particular, of the target's family.
#[must_use]
pub fn any(target: SocketAddr) -> IpAddr {
    match target {
        SocketAddr::V4(_) => [0, 0, 0, 0].into(),
        SocketAddr::V6(_) => [0u16; 8].into(),
    }
}

/// One datagram with one question, from a port of its own, in the calling thread's namespace.
///
/// # Errors
/// When no answer comes within `limit`, or none from `target`.
pub fn ask_udp(target: SocketAddr, limit: Duration) -> std::io::Result<Answer> {
    let socket = UdpSocket::bind((any(target), 0))?;
    // A connected socket takes answers from the address that was asked alone.
    socket.connect(target)?;
    socket.set_read_timeout(Some(limit))?;
    socket.send(b"?\n")?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer)?;
    parse(&String::from_utf8_lossy(&buffer[..length]))
}

/// Asks `count` times by `threads` threads inside `netns`; how often each member answered, and all addresses that were seen.
///
/// # Panics
/// When one question is not answered.
#[must_use]
pub fn shares(
    netns: &Netns,
    target: SocketAddr,
    count: usize,
    threads: usize,
) -> (BTreeMap<String, usize>, Vec<IpAddr>) {
    let found = Mutex::new((BTreeMap::new(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                netns
                    .run(|| {
                        for _ in 0..count / threads {
                            let answer = ask(target, ANSWER_LIMIT)
                                .unwrap_or_else(|error| panic!("{target}: {error}"));
                            let mut found = found.lock().expect("nobody panics with it");
                            *found.0.entry(answer.member).or_insert(0) += 1;
                            if !found.1.contains(&answer.client) {
                                found.1.push(answer.client);
                            }
                        }
                    })
                    .expect("the namespace of a running test can be entered");
            });
        }
    });
    found.into_inner().expect("nobody panics with it")
}

/// Clients that ask again and again, each time by a new connection, until they are stopped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Asked>>>,
}

/// One question of a [`Load`].
#[derive(Debug)]
pub struct Asked {
    /// When it began.
    pub at: Instant,
    /// Whom it was for.
    pub target: SocketAddr,
    /// What came of it.
    pub result: Result<Answer, String>,
}

impl Load {
    /// Asks each of `targets` fifty times a second from inside `netns`, whether those before are answered or not. A question fails
    /// after `limit`.
    #[must_use]
    pub fn start(netns: &Netns, targets: &[SocketAddr], limit: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = targets.iter().map(|&target| {
            let (netns, stop) = (netns.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                netns
                    .run(|| ask_on(target, limit, &stop))
                    .expect("the namespace of a running test can be entered")
            })
        });
        let threads = threads.collect();
        Self { stop, threads }
    }

    /// Ends it; all that was asked.
    ///
    /// # Panics
    /// When a client did.
    #[must_use]
    pub fn stop(self) -> Vec<Asked> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = self.threads.into_iter();
        threads
            .flat_map(|thread| thread.join().expect("a client doesn't panic"))
            .collect()
    }
}

/// Each question has a thread of its own, which is in the namespace of the one that starts it.
fn ask_on(target: SocketAddr, limit: Duration, stop: &AtomicBool) -> Vec<Asked> {
    let asked = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            scope.spawn(|| {
                let at = Instant::now();
                let result = ask(target, limit).map_err(|error| error.to_string());
                let mut asked = asked.lock().expect("nobody panics with it");
                asked.push(Asked { at, target, result });
            });
            std::thread::sleep(ASK_EVERY);
        }
    });
    asked.into_inner().expect("nobody panics with it")
}

/// Panics with the failures among `asked` that began at `from` or later.
///
/// # Panics
/// When there is one, or nothing was asked since.
pub fn none_failed(asked: &[Asked], from: Instant, what: &str) {
    let since = || asked.iter().filter(|asked| asked.at >= from);
    let failed: Vec<String> = since()
        .filter_map(|asked| {
            let error = asked.result.as_ref().err()?;
            let after = asked.at.duration_since(from);
            Some(format!("{} after {after:?}: {error}", asked.target))
        })
        .collect();
    assert!(since().count() > 0, "{what}: nothing was asked");
    assert!(
        failed.is_empty(),
        "{what}: {} of {} failed: {:?}",
        failed.len(),
        since().count(),
        failed.iter().take(5).collect::<Vec<_>>()
    );
}
