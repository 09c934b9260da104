//! Tests the path between a joining host and its manager: UDP both ways, and how large.
//!
//! ```text
//!   joining host                         manager
//!     ProbeExpect(there) ───── TCP ──────▶ listens for `there`
//!     probes(there, sizes) ─── UDP ──────▶ notes the sizes that arrive
//!     ProbeReply(there, back) ─ TCP ─────▶
//!     listens for `back` ◀──── UDP ─────── probes(back, sizes)
//!     sizes that arrived ◀──── TCP ───────
//! ```

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;
use control::{AgentHandle, HostId, Prober, Request, Response};
use vtep::datapath::Datapath;
use vtep::probe::ProbeWatch;

use super::network::unexpected;

/// Sizes tried besides the link's own MTU, in bytes of IP packet.
const SIZES: [u16; 10] = [8950, 4000, 1500, 1492, 1476, 1460, 1450, 1400, 1340, 1280];
/// A lost probe is no proof: each direction is tried this often.
const ROUNDS: usize = 3;
const PATIENCE: Duration = Duration::from_millis(400);
/// Probes that a manager waits for at once, and for how long.
const MAX_EXPECTED: usize = 64;
const EXPECT_FOR: Duration = Duration::from_secs(10);

/// Finds the largest packet that passes both ways.
///
/// # Errors
/// Names the direction and the port that lets nothing through.
pub(super) fn probe(
    control: &AgentHandle,
    datapath: &Arc<dyn Datapath>,
    own: SocketAddr,
    manager: SocketAddr,
    link_mtu: u16,
) -> anyhow::Result<u16> {
    let sizes = sizes(link_mtu);
    let (mut sent, mut received) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..ROUNDS {
        // A host id is 16 bytes of the kernel's randomness, as a nonce must be.
        let (there, back) = (*HostId::random().as_bytes(), *HostId::random().as_bytes());
        let watch = datapath.expect_probe(back);
        control.request(Request::ProbeExpect { nonce: there })?;
        for &size in &sizes {
            // Larger than a link on the way: that is what is being found out.
            if let Err(error) = datapath.send_probe(manager, there, size) {
                tracing::debug!("a probe of {size} bytes to {manager} was not sent: {error}");
            }
        }
        let request = Request::ProbeReply {
            nonce: there,
            to: own,
            back_nonce: back,
            sizes: sizes.clone(),
        };
        let Response::ProbeSizes(arrived) = control.request(request)? else {
            return Err(unexpected());
        };
        sent.extend(arrived);
        received.extend(gather(&watch, sizes.len(), PATIENCE));
        if sent.len() >= sizes.len() && received.len() >= sizes.len() {
            break;
        }
    }
    match (sent.last(), received.last()) {
        (Some(&there), Some(&back)) => Ok(there.min(back)),
        (None, Some(_)) => bail!(
            "UDP port {} of the manager {} does not hear this host: let UDP from {} in there",
            manager.port(),
            manager.ip(),
            own.ip()
        ),
        (Some(_), None) => bail!(
            "UDP port {} of this host ({}) does not hear the manager: let UDP from {} in here",
            own.port(),
            own.ip(),
            manager.ip()
        ),
        (None, None) => bail!(
            "UDP passes in neither direction: let UDP port {} in on the manager {}, and UDP port {} here ({})",
            manager.port(),
            manager.ip(),
            own.port(),
            own.ip()
        ),
    }
}

fn sizes(link_mtu: u16) -> Vec<u16> {
    let smaller = SIZES.into_iter().filter(|&size| size < link_mtu);
    std::iter::once(link_mtu).chain(smaller).collect()
}

/// Sizes that arrive until all have or nothing more comes in time.
fn gather(watch: &ProbeWatch, expected: usize, patience: Duration) -> BTreeSet<u16> {
    let deadline = Instant::now() + patience;
    let mut seen = BTreeSet::new();
    while seen.len() < expected {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(probe) = watch.recv_timeout(left) else {
            break;
        };
        seen.insert(probe.size);
    }
    seen
}

/// A manager's side: its host's datapath hears and sends the probes.
pub(super) struct DatapathProber {
    datapath: Arc<dyn Datapath>,
    expected: Mutex<HashMap<[u8; 16], (Instant, ProbeWatch)>>,
}

impl DatapathProber {
    pub(super) fn new(datapath: Arc<dyn Datapath>) -> Self {
        Self {
            datapath,
            expected: Mutex::new(HashMap::new()),
        }
    }
}

impl Prober for DatapathProber {
    fn expect(&self, nonce: [u8; 16]) {
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        expected.retain(|_, (since, _)| since.elapsed() < EXPECT_FOR);
        if expected.len() < MAX_EXPECTED {
            expected.insert(nonce, (Instant::now(), self.datapath.expect_probe(nonce)));
        }
    }

    fn reply(
        &self,
        nonce: [u8; 16],
        to: SocketAddr,
        back_nonce: [u8; 16],
        sizes: &[u16],
    ) -> Vec<u16> {
        let watch = self
            .expected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&nonce);
        let seen = watch
            .map(|(_, watch)| gather(&watch, sizes.len(), PATIENCE))
            .unwrap_or_default();
        for &size in sizes {
            if let Err(error) = self.datapath.send_probe(to, back_nonce, size) {
                tracing::debug!("a probe of {size} bytes to {to} was not sent: {error}");
            }
        }
        seen.into_iter().collect()
    }
}

/// What to tell the operator of a path that takes less than the link does.
pub(super) fn narrow_path(path_mtu: u16, link_mtu: u16, vtep: IpAddr) -> Option<String> {
    let overhead = vtep::vxlan::overhead(
        vtep::vxlan::Family::of(vtep),
        vtep::vxlan::Protection::Cleartext,
    );
    (path_mtu < link_mtu).then(|| {
        format!(
            "this host's link takes packets of {link_mtu} bytes, but only {path_mtu} bytes pass to the manager and back: \
             create networks with --mtu {} or less",
            path_mtu.saturating_sub(overhead)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_links_own_size_is_tried_first_and_nothing_larger() {
        assert_eq!(
            sizes(1500),
            [1500, 1492, 1476, 1460, 1450, 1400, 1340, 1280]
        );
        assert_eq!(sizes(1280), [1280]);
        assert_eq!(sizes(9000)[..3], [9000, 8950, 4000]);
        assert!(sizes(u16::MAX).len() <= 16);
    }

    #[test]
    fn a_narrow_path_names_the_mtu_to_use() {
        let v4 = IpAddr::from([192, 0, 2, 1]);
        assert_eq!(narrow_path(1500, 1500, v4), None);
        let text = narrow_path(1400, 1500, v4).expect("narrow");
        assert!(text.contains("--mtu 1350"), "{text}");
    }
}
