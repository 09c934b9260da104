//! `towline capture`: frames and datagrams as they pass, live or as a pcapng file.

mod line;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, IsTerminal, Read, Write};
use std::net::{IpAddr, Shutdown};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context as _, bail};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Context, USAGE, failure, unexpected};
use crate::api::capture::{Capture, End, Event, Seen};
use crate::api::{Request, Response};
use crate::pcapng::{Direction, LinkType, Packet, Writer};

/// Instead of a file's name.
const STDOUT: &str = "-";
/// The agent sends no line longer than this, and no packet.
const LINE_MAX: u64 = 1 << 16;
const PACKET_MAX: usize = 1 << 17;

const HELP: &str = "\
Frames are seen where a container's port is (from and to the container), datagrams where the underlay
is (from and to a remote host). Each comes with its verdict, or with the reason why it was dropped.
In a file, each port is an interface with Ethernet frames, and the underlay one with IP packets; the
verdict is the packet's comment. The outer IP and UDP headers are made anew: addresses, ports, ECN,
lengths and checksums are those of the wire, TTL and identification are not known.

A capture never slows the data path down: what comes faster than it is read is missed, and counted.

Examples:
  towline capture --port c1
  towline capture --remote 192.0.2.2 -c 100 -w /tmp/h2.pcapng
  towline capture -w - | wireshark -k -i -";

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    /// Only this container's frames and the datagrams they travel in: its name or id, or a port's number
    /// as 'towline status' shows it
    #[arg(long, value_name = "CONTAINER|ID")]
    port: Option<String>,
    /// Only datagrams from and to the host with this VTEP address, and frames sent to it
    #[arg(long, value_name = "ADDR")]
    remote: Option<IpAddr>,
    /// Only this network, by name or id
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// End after so many [default: go on until interrupted]
    #[arg(short, long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Write a pcapng file instead of lines; '-' is stdout
    #[arg(short, long, value_name = "FILE")]
    write: Option<PathBuf>,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let to_stdout = args.write.as_deref() == Some(Path::new(STDOUT));
    if to_stdout && io::stdout().is_terminal() {
        return Err(failure(
            USAGE,
            "a capture file on a terminal helps nobody: name a file after -w, or pipe it to 'wireshark -k -i -'",
        ));
    }
    let mut client = context.client()?;
    let request = Request::Capture(Capture {
        port: args.port,
        remote: args.remote,
        network: args.network,
        count: args.count,
    });
    let Response::Capturing = client.request(&request)? else {
        return Err(unexpected());
    };
    let mut stream = client.into_stream();
    end_on_signal(stream.get_ref())?;
    let (ended, seen) = match &args.write {
        None => {
            let mut lines = Lines(io::stdout().lock());
            follow(&mut stream, &mut lines)
        }
        Some(path) => {
            let mut pcap =
                Pcap::create(path).with_context(|| format!("can't write {}", path.display()))?;
            follow(&mut stream, &mut pcap)
        }
    };
    match ended {
        Ok(Some(end)) => {
            eprintln!("towline: {} captured, {} missed", end.captured, end.missed);
            if end.left {
                bail!("this host has left its cluster, or its agent is being stopped");
            }
            Ok(ExitCode::SUCCESS)
        }
        Ok(None) => bail!(
            "the agent ended while it captured, after {seen} frames and datagrams: 'towline status' says whether it runs again"
        ),
        // Who read the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => {
            Ok(ExitCode::SUCCESS)
        }
        Err(Failure::Output(error)) => Err(error).context("can't write what was captured"),
        Err(Failure::Agent(error)) => Err(error).context("can't understand the agent"),
    }
}

/// The first signal ends the capture in order, a second one at once.
fn end_on_signal(stream: &UnixStream) -> anyhow::Result<()> {
    let stream = stream
        .try_clone()
        .context("can't share the connection to the agent")?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("can't watch for signals")?;
    thread::spawn(move || {
        let mut signals = signals.forever();
        if signals.next().is_some() {
            // The agent may have ended already.
            let _ = stream.shutdown(Shutdown::Write);
        }
        if signals.next().is_some() {
            std::process::exit(130);
        }
    });
    Ok(())
}

/// Where what is seen goes.
trait Sink {
    fn put(&mut self, seen: &Seen, bytes: &[u8]) -> io::Result<()>;
    fn flush(&mut self) -> io::Result<()>;
}

/// Which side failed.
enum Failure {
    Output(io::Error),
    Agent(io::Error),
}

/// Passes on what the agent sends. Says how it ended, which is nothing when the agent died, and how many came.
fn follow(
    stream: &mut BufReader<impl Read>,
    sink: &mut impl Sink,
) -> (Result<Option<End>, Failure>, u64) {
    let mut count = 0;
    let mut bytes = Vec::new();
    let ended = loop {
        match next(stream, &mut bytes) {
            Ok(Some(Event::Seen(seen))) => {
                count += 1;
                let mut put = sink.put(&seen, &bytes);
                if stream.buffer().is_empty() {
                    put = put.and_then(|()| sink.flush());
                }
                if let Err(error) = put {
                    break Err(Failure::Output(error));
                }
            }
            Ok(Some(Event::End(end))) => break Ok(Some(end)),
            Ok(None) => break Ok(None),
            Err(error) => break Err(Failure::Agent(error)),
        }
    };
    // Also when the agent is gone: what came is to be whole.
    let flushed = sink.flush().map_err(Failure::Output);
    (ended.and_then(|end| flushed.map(|()| end)), count)
}

/// The next event, and its bytes; none at the end, also when the agent died in the middle of one.
fn next(stream: &mut BufReader<impl Read>, bytes: &mut Vec<u8>) -> io::Result<Option<Event>> {
    let gone = |error: &io::Error| {
        matches!(
            error.kind(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
        )
    };
    let mut line = Vec::new();
    match stream.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
        Err(error) if !gone(&error) => return Err(error),
        _ if line.last() != Some(&b'\n') => return Ok(None),
        _ => {}
    }
    let event = serde_json::from_slice(&line)?;
    bytes.clear();
    if let Event::Seen(seen) = &event {
        if seen.length > PACKET_MAX {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("it announces a packet of {} bytes", seen.length),
            ));
        }
        bytes.resize(seen.length, 0);
        match stream.read_exact(bytes) {
            Err(error) if gone(&error) => return Ok(None),
            other => other?,
        }
    }
    Ok(Some(event))
}

/// One line each.
struct Lines<W>(W);

impl<W: Write> Sink for Lines<W> {
    fn put(&mut self, seen: &Seen, bytes: &[u8]) -> io::Result<()> {
        writeln!(self.0, "{}", line::line(seen, bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A pcapng file with an interface for each port, and one for the underlay.
struct Pcap {
    writer: Writer<Box<dyn Write>>,
    interfaces: HashMap<(bool, String), u32>,
}

impl Pcap {
    fn create(path: &Path) -> io::Result<Self> {
        let out: Box<dyn Write> = if path == Path::new(STDOUT) {
            Box::new(BufWriter::new(io::stdout()))
        } else {
            // Others' traffic is nobody else's business.
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            Box::new(BufWriter::new(options.open(path)?))
        };
        let application = concat!("towline ", env!("CARGO_PKG_VERSION"));
        let mut writer = Writer::new(out, application)?;
        // A reader at the other end of a pipe sees at once that it is a capture.
        writer.flush()?;
        Ok(Self {
            writer,
            interfaces: HashMap::new(),
        })
    }
}

impl Sink for Pcap {
    fn put(&mut self, seen: &Seen, bytes: &[u8]) -> io::Result<()> {
        let outer = seen.place.is_outer();
        let key = (outer, seen.interface.clone());
        let interface = match self.interfaces.get(&key) {
            Some(interface) => *interface,
            None => {
                let (description, link_type) = if outer {
                    ("datagrams from and to other hosts", LinkType::Raw)
                } else {
                    ("frames from and to a container", LinkType::Ethernet)
                };
                let number = self.writer.add_interface(&key.1, description, link_type)?;
                self.interfaces.insert(key, number);
                number
            }
        };
        let direction = if seen.place.is_inbound() {
            Direction::Inbound
        } else {
            Direction::Outbound
        };
        self.writer.packet(&Packet {
            interface,
            time_ns: seen.time_ns,
            direction,
            comment: &seen.verdict,
            bytes,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::capture::Place;

    struct Count(usize);

    impl Sink for Count {
        fn put(&mut self, seen: &Seen, bytes: &[u8]) -> io::Result<()> {
            assert_eq!(seen.length, bytes.len());
            self.0 += 1;
            Ok(())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event(length: usize) -> Vec<u8> {
        let seen = Seen {
            time_ns: 1,
            place: Place::FromPort,
            interface: "net/c1".into(),
            peer: "c1".into(),
            network: None,
            vni: None,
            verdict: "answer".into(),
            reason: None,
            frame_at: Some(0),
            length,
        };
        let mut line = serde_json::to_vec(&Event::Seen(Box::new(seen))).expect("plain data");
        line.push(b'\n');
        // A frame may have line ends in it.
        line.resize(line.len() + length, b'\n');
        line
    }

    fn followed(stream: &[u8]) -> (Result<Option<End>, Failure>, u64) {
        follow(&mut BufReader::new(stream), &mut Count(0))
    }

    #[test]
    fn the_end_and_the_death_of_the_agent_are_told_apart() {
        let mut stream = [event(60), event(1500)].concat();
        let (ended, count) = followed(&stream);
        assert!(matches!(ended, Ok(None)) && count == 2);
        // In the middle of a packet, and of a line.
        for cut in [stream.len() - 7, event(60).len() + 9] {
            let (ended, count) = followed(&stream[..cut]);
            assert!(matches!(ended, Ok(None)) && count == 1);
        }
        let end = End {
            captured: 2,
            missed: 5,
            left: false,
        };
        stream.extend(serde_json::to_vec(&Event::End(end)).expect("plain data"));
        stream.push(b'\n');
        let (ended, count) = followed(&stream);
        assert!(matches!(ended, Ok(Some(got)) if got == end) && count == 2);
    }

    #[test]
    fn nonsense_is_refused() {
        for stream in [&b"{}\n"[..], b"what\n", &event(PACKET_MAX + 1)] {
            assert!(matches!(followed(stream).0, Err(Failure::Agent(_))));
        }
    }
}
