//! Small datagrams that test whether a host reaches another's VXLAN port, and at what size.
//!
//! ```text
//!  0        4                   20     22                       size − IP and UDP headers
//!  | "TLPB" | nonce, 16 bytes   | size | zeros …                |
//!  | "TLPA" | nonce, 16 bytes   | size |                          the answer of a member
//! ```
//!
//! The first byte has the I flag clear, so a VTEP that knows no probes drops one. Whoever expects a probe registers its nonce and
//! learns of it in its own process. One that nobody expects is answered when a member sent it, and a stranger's is counted
//! and dropped. An answer is never longer than the probe, and goes to the member's VXLAN port, where it counts for nothing unless its
//! nonce is expected there: knowing the nonce is the proof that a probe is meant.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::vxlan::{PROBE_ANSWER_MAGIC, PROBE_MAGIC};

/// What names one expected probe.
pub type Nonce = [u8; 16];

/// Bytes before the padding.
const HEADER_LEN: usize = 4 + 16 + 2;
/// Probes of one nonce that wait to be looked at; more are dropped.
const QUEUE_PROBES: usize = 1024;

/// Outer IP and UDP headers, in bytes.
const fn outer_headers(remote: &SocketAddr) -> usize {
    match remote {
        SocketAddr::V4(_) => 20 + 8,
        SocketAddr::V6(_) => 40 + 8,
    }
}

/// The payload of a probe whose IP packet has `size` bytes.
///
/// # Errors
/// `InvalidInput` when `size` has no room for a probe.
pub fn payload(to: &SocketAddr, nonce: &Nonce, size: u16) -> io::Result<Vec<u8>> {
    let length = usize::from(size).saturating_sub(outer_headers(to));
    if length < HEADER_LEN {
        let least = outer_headers(to) + HEADER_LEN;
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a probe of {size} bytes is too small: it needs {least}"),
        ));
    }
    let mut payload = vec![0; length];
    payload[..4].copy_from_slice(&PROBE_MAGIC);
    payload[4..20].copy_from_slice(nonce);
    payload[20..HEADER_LEN].copy_from_slice(&size.to_be_bytes());
    Ok(payload)
}

/// What a member's probe is answered with.
pub type Answer = [u8; HEADER_LEN];

/// What a payload that begins as a probe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// Somebody here expected it and has been told.
    Expected,
    /// A whole probe that nobody here expects: send this to the member it came from.
    Asks(Answer),
    /// Damaged, or an answer to nothing.
    Unexpected,
}

/// A probe that arrived, or the answer of the host where it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeSeen {
    /// Who sent what came here.
    pub from: SocketAddr,
    /// Bytes of the probe's IP packet.
    pub size: u16,
}

/// Waits for probes of one nonce; dropping it ends that.
#[derive(Debug)]
pub struct ProbeWatch {
    nonce: Nonce,
    seen: Receiver<ProbeSeen>,
    registry: Arc<ProbeRegistry>,
}

impl ProbeWatch {
    /// The next probe, waiting at most `timeout` for it; `None` when none came.
    #[must_use]
    pub fn recv_timeout(&self, timeout: Duration) -> Option<ProbeSeen> {
        self.seen.recv_timeout(timeout).ok()
    }
}

impl Drop for ProbeWatch {
    fn drop(&mut self) {
        self.registry.expected.rcu(|expected| {
            let mut expected = HashMap::clone(expected);
            expected.remove(&self.nonce);
            expected
        });
    }
}

/// The nonces that somebody expects.
#[derive(Debug, Default)]
pub struct ProbeRegistry {
    expected: ArcSwap<HashMap<Nonce, Sender<ProbeSeen>>>,
}

impl ProbeRegistry {
    /// Expects probes of this nonce from now on. A second watch of the same nonce takes over from the first.
    #[must_use]
    pub fn expect(self: &Arc<Self>, nonce: Nonce) -> ProbeWatch {
        let (sender, seen) = bounded(QUEUE_PROBES);
        self.expected.rcu(|expected| {
            let mut expected = HashMap::clone(expected);
            expected.insert(nonce, sender.clone());
            expected
        });
        ProbeWatch {
            nonce,
            seen,
            registry: Arc::clone(self),
        }
    }

    /// Takes a payload that begins as a probe or as an answer. A probe whose size is not the one it names counts for nothing.
    pub fn handle(&self, from: SocketAddr, payload: &[u8]) -> Arrived {
        let Some((header, padding)) = payload.split_first_chunk::<HEADER_LEN>() else {
            return Arrived::Unexpected;
        };
        let size = u16::from_be_bytes([header[20], header[21]]);
        let is_answer = header.starts_with(&PROBE_ANSWER_MAGIC);
        let whole = match is_answer {
            true => padding.is_empty(),
            false => payload.len() + outer_headers(&from) == usize::from(size),
        };
        if !whole {
            return Arrived::Unexpected;
        }
        let mut nonce = Nonce::default();
        nonce.copy_from_slice(&header[4..20]);
        let expected = self.expected.load();
        match expected.get(&nonce) {
            Some(watch) if watch.try_send(ProbeSeen { from, size }).is_ok() => Arrived::Expected,
            Some(_) => Arrived::Unexpected,
            None if is_answer => Arrived::Unexpected,
            None => {
                let mut answer = *header;
                answer[..4].copy_from_slice(&PROBE_ANSWER_MAGIC);
                Arrived::Asks(answer)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: Nonce = [9; 16];

    #[test]
    fn a_probe_is_seen_by_who_expects_it_alone() {
        for from in ["192.0.2.1:50000", "[2001:db8::1]:50000"] {
            let from: SocketAddr = from.parse().unwrap();
            let registry = Arc::new(ProbeRegistry::default());
            let probe = payload(&from, &NONCE, 1500).unwrap();
            assert_eq!(probe.len() + outer_headers(&from), 1500);
            assert!(matches!(registry.handle(from, &probe), Arrived::Asks(_)));
            let watch = registry.expect(NONCE);
            let other = registry.expect([1; 16]);
            assert_eq!(registry.handle(from, &probe), Arrived::Expected);
            assert_eq!(
                watch.recv_timeout(Duration::ZERO),
                Some(ProbeSeen { from, size: 1500 })
            );
            assert_eq!(other.recv_timeout(Duration::ZERO), None);
            drop(watch);
            assert!(matches!(registry.handle(from, &probe), Arrived::Asks(_)));
        }
    }

    #[test]
    fn a_members_answer_is_seen_by_who_asked() {
        let (here, there) = (
            Arc::new(ProbeRegistry::default()),
            Arc::new(ProbeRegistry::default()),
        );
        let (asker, other): (SocketAddr, SocketAddr) = (
            "192.0.2.1:50000".parse().unwrap(),
            "192.0.2.2:4789".parse().unwrap(),
        );
        let watch = here.expect(NONCE);
        let probe = payload(&other, &NONCE, 1400).unwrap();
        let Arrived::Asks(answer) = there.handle(asker, &probe) else {
            panic!("nobody there expects it");
        };
        assert_eq!(there.handle(asker, &answer), Arrived::Unexpected);
        assert_eq!(here.handle(other, &answer[..21]), Arrived::Unexpected);
        assert_eq!(here.handle(other, &answer), Arrived::Expected);
        let seen = ProbeSeen {
            from: other,
            size: 1400,
        };
        assert_eq!(watch.recv_timeout(Duration::ZERO), Some(seen));
    }

    #[test]
    fn cut_or_padded_probes_count_for_nothing() {
        let from: SocketAddr = "192.0.2.1:50000".parse().unwrap();
        let registry = Arc::new(ProbeRegistry::default());
        let watch = registry.expect(NONCE);
        let mut probe = payload(&from, &NONCE, 100).unwrap();
        for length in 0..probe.len() {
            let arrived = registry.handle(from, &probe[..length]);
            assert_eq!(arrived, Arrived::Unexpected, "{length}");
        }
        probe.push(0);
        assert_eq!(registry.handle(from, &probe), Arrived::Unexpected);
        assert_eq!(watch.recv_timeout(Duration::ZERO), None);
    }

    #[test]
    fn the_smallest_probe() {
        let to = "192.0.2.1:4789".parse().unwrap();
        assert!(payload(&to, &NONCE, 50).is_ok());
        let error = payload(&to, &NONCE, 49).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a probe of 49 bytes is too small: it needs 50"
        );
    }
}
