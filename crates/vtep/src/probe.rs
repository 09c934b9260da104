//! Small datagrams that test whether a host reaches another's VXLAN port, and at what size.
//!
//! ```text
//!  0        4                   20     22                       size − IP and UDP headers
//!  | "TLPB" | nonce, 16 bytes   | size | zeros …                |
//! ```
//!
//! The first byte has the I flag clear, so a VTEP that knows no probes drops one. A probe is never answered on the wire:
//! whoever expects one registers its nonce and learns of it in its own process; all others are counted and dropped.
//! Knowing the nonce is the proof that a probe is meant.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::vxlan::PROBE_MAGIC;

/// What names one expected probe.
pub type Nonce = [u8; 16];

/// Bytes before the padding.
const HEADER_LEN: usize = 4 + 16 + 2;
/// Probes of one nonce that wait to be looked at; more are dropped.
const QUEUE_PROBES: usize = 64;

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

/// A probe that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeSeen {
    /// Who sent it.
    pub from: SocketAddr,
    /// Bytes of its IP packet.
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

    /// Takes a payload that begins with [`PROBE_MAGIC`]; says whether anybody expects it. A probe whose size is not the one it
    /// names, or with a nonce nobody expects, counts for nothing.
    pub fn handle(&self, from: SocketAddr, payload: &[u8]) -> bool {
        let Some(nonce) = payload
            .get(4..20)
            .and_then(|bytes| Nonce::try_from(bytes).ok())
        else {
            return false;
        };
        let Some(size) = payload
            .get(20..HEADER_LEN)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u16::from_be_bytes)
        else {
            return false;
        };
        if payload.len() + outer_headers(&from) != usize::from(size) {
            return false;
        }
        let expected = self.expected.load();
        let Some(watch) = expected.get(&nonce) else {
            return false;
        };
        watch.try_send(ProbeSeen { from, size }).is_ok()
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
            assert!(!registry.handle(from, &probe));
            let watch = registry.expect(NONCE);
            let other = registry.expect([1; 16]);
            assert!(registry.handle(from, &probe));
            assert_eq!(
                watch.recv_timeout(Duration::ZERO),
                Some(ProbeSeen { from, size: 1500 })
            );
            assert_eq!(other.recv_timeout(Duration::ZERO), None);
            drop(watch);
            assert!(!registry.handle(from, &probe));
        }
    }

    #[test]
    fn cut_or_padded_probes_count_for_nothing() {
        let from: SocketAddr = "192.0.2.1:50000".parse().unwrap();
        let registry = Arc::new(ProbeRegistry::default());
        let watch = registry.expect(NONCE);
        let mut probe = payload(&from, &NONCE, 100).unwrap();
        for length in 0..probe.len() {
            assert!(!registry.handle(from, &probe[..length]), "{length}");
        }
        probe.push(0);
        assert!(!registry.handle(from, &probe));
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
