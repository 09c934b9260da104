//! `towline lab load`: what sends and receives while the bench measures. Each is a process of its own, so that its CPU
//! time can be counted; each prints JSON lines, and ends by itself when the bench is gone.
//!
//! Datagrams are sent one by one (no UDP_SEGMENT), as fast as the path takes them. The sink looks every 300 µs instead
//! of being woken for each: waking it would cost as much as carrying the packet.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::bench::path::kernel::KernelEnd;
use crate::mmsg::{self, BATCH, Drain};
use crate::pinger;

/// Between two looks of the sink.
const SINK_PERIOD: Duration = Duration::from_micros(300);
/// When nothing came for so long after the sender ended, nothing will.
const SINK_IDLE: Duration = Duration::from_millis(50);
/// Receive buffer of the sink in bytes: room for what comes between two looks.
const SINK_BUFFER: usize = 16 << 20;
/// Different sizes before they repeat.
const SIZES: usize = 4096;
/// How long a silent peer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Threads that take connections, and threads that make them.
const GREETERS: usize = 4;
const KNOCKERS: usize = 8;

/// The kinds of load.
#[derive(Debug, clap::Subcommand)]
pub enum LoadCommand {
    /// Count datagrams until stdin ends
    Sink {
        /// Address to receive at, on a free port
        #[arg(long)]
        bind: IpAddr,
    },
    /// Send datagrams
    Send {
        /// The sink
        #[arg(long)]
        to: SocketAddr,
        /// Smallest payload in bytes
        #[arg(long)]
        min: u16,
        /// Largest payload in bytes
        #[arg(long)]
        max: u16,
        /// For how long
        #[arg(long)]
        seconds: u32,
    },
    /// Answer requests of one TCP connection
    Serve {
        /// Address to listen at
        #[arg(long)]
        bind: IpAddr,
        /// Port to listen at; 0: a free one
        #[arg(long, default_value_t = 0)]
        port: u16,
    },
    /// Answer one request of each of many TCP connections, and end it
    Greet {
        /// Address to listen at
        #[arg(long)]
        bind: IpAddr,
        /// Port to listen at; 0: a free one
        #[arg(long, default_value_t = 0)]
        port: u16,
    },
    /// Make a connection, send a request, wait for its answer, and again
    Knock {
        /// The greeter
        #[arg(long)]
        to: SocketAddr,
        /// Bytes of each request and each answer
        #[arg(long)]
        size: u16,
        /// For how long
        #[arg(long)]
        seconds: u32,
    },
    /// Make one end of the kernel's VXLAN
    Kernel(KernelEnd),
    /// Ping what stdin asks for, in namespaces of this machine
    Ping {
        /// How many pings for each pair
        #[arg(long)]
        count: u32,
    },
    /// Send a request, wait for its answer, and again
    Call {
        /// The server
        #[arg(long)]
        to: SocketAddr,
        /// Bytes of each request and each answer
        #[arg(long)]
        size: u16,
        /// For how long
        #[arg(long)]
        seconds: u32,
    },
}

/// Printed first by those that are sent to.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Listening {
    pub(crate) listening: SocketAddr,
}

/// What a sink received.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Received {
    pub(crate) datagrams: u64,
    /// From the first to the last.
    pub(crate) micros: u64,
}

/// What a sender sent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sent {
    pub(crate) datagrams: u64,
}

/// What a caller saw.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Called {
    pub(crate) transactions: u64,
    pub(crate) micros: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// Runs one of them to its end.
pub(crate) fn run(command: &LoadCommand) -> anyhow::Result<()> {
    match *command {
        LoadCommand::Kernel(ref end) => end.run(),
        LoadCommand::Sink { bind } => {
            let socket =
                UdpSocket::bind((bind, 0)).with_context(|| format!("can't receive at {bind}"))?;
            say(&Listening {
                listening: socket
                    .local_addr()
                    .context("a bound socket has an address")?,
            })?;
            let stop = Arc::new(AtomicBool::new(false));
            let at_end = Arc::clone(&stop);
            when_stdin_ends(move || at_end.store(true, Ordering::Relaxed));
            say(&sink(&socket, &stop)?)
        }
        LoadCommand::Send {
            to,
            min,
            max,
            seconds,
        } => say(&send(to, min, max, Duration::from_secs(seconds.into()))?),
        LoadCommand::Ping { count } => say(&pinger::serve(count)?),
        LoadCommand::Serve { bind, port } => serve(&listen(bind, port)?),
        LoadCommand::Greet { bind, port } => greet(&listen(bind, port)?),
        LoadCommand::Knock { to, size, seconds } => {
            say(&knock(to, size, Duration::from_secs(seconds.into()))?)
        }
        LoadCommand::Call { to, size, seconds } => {
            say(&call(to, size, Duration::from_secs(seconds.into()))?)
        }
    }
}

/// Listens, says where, and ends the process with the bench.
fn listen(bind: IpAddr, port: u16) -> anyhow::Result<TcpListener> {
    let listener =
        TcpListener::bind((bind, port)).with_context(|| format!("can't listen at {bind}"))?;
    say(&Listening {
        listening: listener
            .local_addr()
            .context("a bound socket has an address")?,
    })?;
    when_stdin_ends(|| std::process::exit(0));
    Ok(listener)
}

fn say(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value).context("can't report to the bench")?;
    out.write_all(b"\n")
        .and_then(|()| out.flush())
        .context("can't report to the bench")
}

/// The bench holds the other end of stdin, and so does nobody once it is gone.
fn when_stdin_ends(then: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        then();
    });
}

fn sink(socket: &UdpSocket, stop: &AtomicBool) -> anyhow::Result<Received> {
    let buffer = socket2::SockRef::from(socket);
    // Beyond the system's limit for others; root may.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, SINK_BUFFER).is_err() {
        buffer
            .set_recv_buffer_size(SINK_BUFFER)
            .context("can't size the receive buffer")?;
    }
    let mut drain = Drain::new();
    let mut datagrams = 0;
    let (mut first, mut last) = (None, Instant::now());
    loop {
        let stopped = stop.load(Ordering::Relaxed);
        let batch = drain.all(socket).context("can't receive")?;
        let now = Instant::now();
        if batch.datagrams > 0 {
            datagrams += batch.datagrams;
            first.get_or_insert(now);
            last = now;
        } else if stopped && now.saturating_duration_since(last) > SINK_IDLE {
            break;
        }
        std::thread::sleep(SINK_PERIOD);
    }
    let span = first.map_or(Duration::ZERO, |first| last - first);
    Ok(Received {
        datagrams,
        micros: micros(span),
    })
}

fn send(to: SocketAddr, min: u16, max: u16, time: Duration) -> anyhow::Result<Sent> {
    if min > max {
        bail!("--min {min} is above --max {max}");
    }
    let any: IpAddr = if to.is_ipv4() {
        [0_u8; 4].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).context("can't open a socket")?;
    socket
        .connect(to)
        .with_context(|| format!("can't send to {to}"))?;
    let data = vec![0x5a; max.into()];
    let sizes = sizes(min, max);
    let payloads: Vec<&[u8]> = sizes.iter().map(|&size| &data[..size.into()]).collect();
    let end = Instant::now() + time;
    let mut datagrams = 0_u64;
    loop {
        for batch in payloads.chunks(BATCH) {
            match mmsg::send(&socket, batch) {
                Ok(count) => datagrams += count as u64,
                Err(error) if passing(&error) => {}
                Err(error) => return Err(error).with_context(|| format!("can't send to {to}")),
            }
            if Instant::now() >= end {
                return Ok(Sent { datagrams });
            }
        }
    }
}

/// Not the end: a full queue on the way, or the answer to an earlier datagram.
fn passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    ) || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Sizes between two bounds, both included; the same ones in every run, so that every path carries the same.
fn sizes(min: u16, max: u16) -> Vec<u16> {
    let span = u64::from(max - min) + 1;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        // xorshift64 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        min + u16::try_from((state >> 16) % span)
            .expect("below a span that fits 16 bits, or is 65536 from 0")
    })
    .take(SIZES)
    .collect()
}

fn serve(listener: &TcpListener) -> anyhow::Result<()> {
    let (mut stream, _) = listener.accept().context("can't take a connection")?;
    stream.set_nodelay(true).context("can't set TCP_NODELAY")?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => stream.write_all(&buffer[..len]).context("can't answer")?,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error).context("can't read a request"),
        }
    }
}

/// Answers by several threads, for ever. This side ends each connection, so that the other's port is free again at once.
fn greet(listener: &TcpListener) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        for _ in 0..GREETERS {
            scope.spawn(|| {
                let mut buffer = vec![0; usize::from(u16::MAX)];
                loop {
                    // A client that gives up ends nothing but its own connection.
                    if let Ok((mut stream, _)) = listener.accept()
                        && let Ok(len) = stream.read(&mut buffer)
                    {
                        let _ = stream.write_all(&buffer[..len]);
                    }
                }
            });
        }
    });
    Ok(())
}

/// As many connections as several threads make one after another.
fn knock(to: SocketAddr, size: u16, time: Duration) -> anyhow::Result<Called> {
    let start = Instant::now();
    let times = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..KNOCKERS)
            .map(|_| scope.spawn(move || knock_again(to, size, start + time)))
            .collect();
        let mut all = histogram()?;
        for thread in threads {
            let times = thread.join().expect("invariant: a knocker doesn't panic")?;
            all.add(times).context("the bounds are the same")?;
        }
        Ok::<_, anyhow::Error>(all)
    })?;
    Ok(called(&times, start.elapsed()))
}

fn knock_again(to: SocketAddr, size: u16, end: Instant) -> anyhow::Result<Histogram<u64>> {
    let mut times = histogram()?;
    let mut buffer = vec![0; size.into()];
    loop {
        let begun = Instant::now();
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)
            .with_context(|| format!("can't connect to {to}"))?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .context("can't set a time limit")?;
        stream
            .write_all(&buffer)
            .with_context(|| format!("can't send a request to {to}"))?;
        stream
            .read_exact(&mut buffer)
            .with_context(|| format!("{to} doesn't answer"))?;
        // Until the other side has ended it.
        let _ = stream.read(&mut [0]);
        let now = Instant::now();
        record(&mut times, now - begun);
        if now >= end {
            return Ok(times);
        }
    }
}

/// Nanoseconds, up to 10 s, to three digits.
fn histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 10_000_000_000, 3).context("the bounds are in order")
}

fn record(times: &mut Histogram<u64>, time: Duration) {
    times.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
}

fn called(times: &Histogram<u64>, elapsed: Duration) -> Called {
    let at = |quantile| micros_f64(times.value_at_quantile(quantile));
    Called {
        transactions: times.len(),
        micros: micros(elapsed),
        p50_us: at(0.5),
        p99_us: at(0.99),
    }
}

fn call(to: SocketAddr, size: u16, time: Duration) -> anyhow::Result<Called> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)
        .with_context(|| format!("can't connect to {to}"))?;
    stream.set_nodelay(true).context("can't set TCP_NODELAY")?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .context("can't set a time limit")?;
    let mut buffer = vec![0; size.into()];
    let mut times = histogram()?;
    let start = Instant::now();
    let mut sent_at = start;
    let elapsed = loop {
        stream
            .write_all(&buffer)
            .with_context(|| format!("can't send a request to {to}"))?;
        stream
            .read_exact(&mut buffer)
            .with_context(|| format!("{to} doesn't answer"))?;
        let now = Instant::now();
        record(&mut times, now - sent_at);
        if now - start >= time {
            break now - start;
        }
        sent_at = now;
    };
    Ok(called(&times, elapsed))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn micros_f64(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_fill_their_span_and_repeat() {
        let mixed = sizes(64, 263);
        assert_eq!(mixed.len(), SIZES);
        assert!(mixed.iter().all(|size| (64..=263).contains(size)));
        assert!(mixed.contains(&64) && mixed.contains(&263));
        assert_eq!(mixed, sizes(64, 263));
        assert!(sizes(64, 64).iter().all(|&size| size == 64));
        assert_eq!(sizes(0, u16::MAX).len(), SIZES);
        let mean = mixed.iter().map(|&size| f64::from(size)).sum::<f64>() / 4096.0;
        assert!((155.0..172.0).contains(&mean), "{mean}");
    }

    #[test]
    fn what_is_sent_arrives_at_the_sink() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = socket.local_addr().unwrap();
        let stop = AtomicBool::new(false);
        let (received, sent) = std::thread::scope(|scope| {
            let sink = scope.spawn(|| sink(&socket, &stop).unwrap());
            let sent = send(to, 64, 263, Duration::from_millis(50)).unwrap();
            stop.store(true, Ordering::Relaxed);
            (sink.join().unwrap(), sent)
        });
        assert!(
            received.datagrams > 100 && received.datagrams <= sent.datagrams,
            "{received:?} {sent:?}"
        );
        assert!(received.micros > 10_000, "{received:?}");
        assert!(send(to, 9, 8, Duration::ZERO).is_err());
    }

    #[test]
    fn connections_are_made_one_after_another_by_each_thread() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        // Ends with the test's process.
        std::thread::spawn(move || greet(&listener));
        let called = knock(to, 64, Duration::from_millis(50)).unwrap();
        assert!(called.transactions >= KNOCKERS as u64, "{called:?}");
        assert!(called.p50_us <= called.p99_us, "{called:?}");
    }

    #[test]
    fn requests_are_answered_and_timed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let called = std::thread::scope(|scope| {
            scope.spawn(|| serve(&listener).unwrap());
            call(to, 64, Duration::from_millis(50)).unwrap()
        });
        assert!(
            called.transactions > 10 && called.micros >= 50_000,
            "{called:?}"
        );
        assert!(
            called.p50_us > 0.0 && called.p50_us <= called.p99_us,
            "{called:?}"
        );
        let gone = listener.local_addr().unwrap();
        drop(listener);
        assert!(
            call(gone, 64, Duration::ZERO)
                .unwrap_err()
                .to_string()
                .contains("can't connect")
        );
    }
}
