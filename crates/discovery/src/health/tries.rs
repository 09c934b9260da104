//! Tries by TCP and HTTP. The far side is a container's program: it may be slow, silent, or send without end.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use netns::Netns;

/// Bytes of an answer that are looked at: a status line is shorter.
const MOST: usize = 512;

/// Whether a connection can be made.
pub(super) fn tcp(netns: &Netns, ip: IpAddr, port: u16, limit: Duration) -> Result<(), String> {
    connect(netns, ip, port, limit).map(|_| ())
}

/// Whether a GET is answered with a status from 200 to 399. Redirections are not followed.
pub(super) fn http(
    netns: &Netns,
    ip: IpAddr,
    port: u16,
    path: &str,
    limit: Duration,
) -> Result<(), String> {
    let until = Instant::now() + limit;
    let mut stream = connect(netns, ip, port, limit)?;
    let address = SocketAddr::new(ip, port);
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: towline\r\nConnection: close\r\n\r\n"
    );
    let failed = |error: std::io::Error| format!("no HTTP answer from port {port}: {error}");
    let remaining = || {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(format!("no HTTP answer from port {port} within {limit:?}"))
        } else {
            Ok(left)
        }
    };
    stream
        .set_write_timeout(Some(remaining()?))
        .map_err(failed)?;
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = Vec::new();
    let mut buffer = [0; MOST];
    while answer.len() < MOST && !answer.contains(&b'\n') {
        stream
            .set_read_timeout(Some(remaining()?))
            .map_err(failed)?;
        match stream.read(&mut buffer).map_err(failed)? {
            0 => break,
            count => answer.extend_from_slice(&buffer[..count]),
        }
    }
    match status_of(&answer) {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("HTTP status {status} for {path}")),
        None => Err(format!("what port {port} answers is no HTTP")),
    }
}

fn connect(netns: &Netns, ip: IpAddr, port: u16, limit: Duration) -> Result<TcpStream, String> {
    let address = SocketAddr::new(ip, port);
    netns
        .run(|| TcpStream::connect_timeout(&address, limit))
        .map_err(|error| error.to_string())?
        .map_err(|error| format!("can't connect to port {port}: {error}"))
}

/// The status of an HTTP/1 answer (RFC 9112 §4): `HTTP/1.1 200 OK`.
fn status_of(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\n').next()?;
    let rest = line.strip_prefix(b"HTTP/1.")?;
    let [b'0' | b'1', b' ', a, b, c, rest @ ..] = rest else {
        return None;
    };
    let ends = matches!(rest, [] | [b' ' | b'\r', ..]);
    let digits = [a, b, c].into_iter().try_fold(0, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| u16::from(digit - b'0'))?;
        Some(number * 10 + digit)
    })?;
    ends.then_some(digits)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const LIMIT: Duration = Duration::from_secs(30);

    /// Answers one connection with these bytes.
    fn server(answer: &'static [u8]) -> u16 {
        let listener = TcpListener::bind((HERE, 0)).expect("a port of the loopback");
        let port = listener.local_addr().expect("it is bound").port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the try");
            let mut request = [0; 1024];
            let count = stream.read(&mut request).expect("a request");
            assert!(request[..count].starts_with(b"GET /health HTTP/1.1\r\n"));
            stream.write_all(answer).expect("the try reads");
        });
        port
    }

    fn ask(answer: &'static [u8]) -> Result<(), String> {
        let netns = Netns::current().expect("/proc is mounted");
        http(&netns, HERE, server(answer), "/health", LIMIT)
    }

    #[test]
    fn statuses_from_200_to_399_are_well() {
        assert_eq!(ask(b"HTTP/1.1 200 OK\r\n\r\n"), Ok(()));
        assert_eq!(ask(b"HTTP/1.0 302 Found\r\nLocation: /\r\n\r\n"), Ok(()));
        assert_eq!(ask(b"HTTP/1.1 204\r\n\r\n"), Ok(()));
        let error = ask(b"HTTP/1.1 503 Busy\r\n\r\n").expect_err("503");
        assert_eq!(error, "HTTP status 503 for /health");
        for answer in [
            &b"220 smtp ready\r\n"[..],
            b"",
            b"HTTP/1.1 2000 OK\r\n",
            b"HTTP/1.1 20",
            b"\n",
        ] {
            let error = ask(answer).expect_err("no HTTP");
            assert!(error.contains("no HTTP"), "{error}");
        }
    }

    #[test]
    fn an_endless_answer_without_a_line_ends() {
        static ENDLESS: [u8; 4096] = [b'x'; 4096];
        assert!(ask(&ENDLESS).is_err());
    }

    #[test]
    fn a_closed_port_is_not_well() {
        let listener = TcpListener::bind((HERE, 0)).expect("a port of the loopback");
        let port = listener.local_addr().expect("it is bound").port();
        let netns = Netns::current().expect("/proc is mounted");
        assert_eq!(tcp(&netns, HERE, port, LIMIT), Ok(()));
        drop(listener);
        let error = tcp(&netns, HERE, port, LIMIT).expect_err("nobody listens");
        assert!(
            error.starts_with(&format!("can't connect to port {port}")),
            "{error}"
        );
    }
}
