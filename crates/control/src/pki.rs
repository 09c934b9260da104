//! Who is who: the cluster's certificate authority, and the certificates that hosts show each other.
//!
//! ```text
//!   authority (P-256, made by `init`)  ──signs──▶  host certificate: O = cluster, OU = worker | manager, CN = host id
//! ```
//!
//! A cluster *is* its authority: the cluster's name is the start of the authority's SHA-256 digest, and a [`Token`](crate::Token)
//! carries the digest whole. A host makes its own key, which never leaves it, and has it signed with a token's secret; the
//! manager chooses the host's id, so nobody can ask for another's. Certificates last 90 days and are dated 24 hours back, and an
//! agent renews its own after two thirds of that time ([`Identity::renewal_due`]).
//!
//! Clocks of hosts may be wrong, so dates decide little. An agent asks of a manager only a certificate of its authority with the
//! manager's role: every manager holds the authority's key and could date itself as it likes. A manager asks of a host the same
//! and that it was not removed; dates count only for a certificate that is not the last one its list has for that host
//! (`manager/hosts.rs`). This file and the two below it are pure; sockets are `tls.rs`, files are the program's.

mod authority;
mod identity;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use x509_parser::parse_x509_certificate;

use crate::host::{HostId, write_hex};
pub use authority::Authority;
pub use identity::{Identity, KeyRequest};

/// How long a host's certificate is good for, unless the operator says otherwise.
pub const LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// How far back certificates are dated: a clock may be slow by as much.
pub const BACKDATED: Duration = Duration::from_secs(24 * 3600);

/// What a certificate lets its host be.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A host that runs containers.
    Worker,
    /// A host that may also run the cluster's manager.
    Manager,
}

impl Role {
    /// As it stands in certificates and commands.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Manager => "manager",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a host's certificate says. Times are since 1970-01-01 UTC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Whose it is.
    pub host: HostId,
    /// What that host may be.
    pub role: Role,
    /// The cluster that signed it.
    pub cluster: String,
    /// Its serial number in hexadecimal digits: no two certificates of a cluster have the same.
    pub serial: String,
    /// Not valid before.
    pub not_before: Duration,
    /// Not valid after.
    pub not_after: Duration,
}

impl Certificate {
    /// Reads a certificate in DER. Whether a cluster's authority signed it is for the caller to know.
    pub fn parse(der: &[u8]) -> Result<Self, PkiError> {
        let (rest, parsed) = parse_x509_certificate(der).map_err(|_| PkiError::Certificate)?;
        if !rest.is_empty() {
            return Err(PkiError::Certificate);
        }
        let subject = parsed.subject();
        let text = |mut names: Box<
            dyn Iterator<Item = &x509_parser::x509::AttributeTypeAndValue<'_>> + '_,
        >| {
            names
                .next()
                .and_then(|name| name.as_str().ok().map(str::to_owned))
        };
        let host = text(Box::new(subject.iter_common_name()))
            .and_then(|id| id.parse().ok())
            .ok_or(PkiError::Certificate)?;
        let role = match text(Box::new(subject.iter_organizational_unit())).as_deref() {
            Some("worker") => Role::Worker,
            Some("manager") => Role::Manager,
            _ => return Err(PkiError::Certificate),
        };
        let cluster = text(Box::new(subject.iter_organization())).ok_or(PkiError::Certificate)?;
        let time = |time: x509_parser::time::ASN1Time| {
            Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
        };
        Ok(Self {
            host,
            role,
            cluster,
            serial: Hex(parsed.raw_serial()).to_string(),
            not_before: time(parsed.validity().not_before),
            not_after: time(parsed.validity().not_after),
        })
    }

    /// Whether its dates hold at this moment.
    #[must_use]
    pub fn holds_at(&self, unix: Duration) -> bool {
        (self.not_before..=self.not_after).contains(&unix)
    }
}

/// Why something is no certificate, key or authority of ours. No text holds a key.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// No certificate of a host.
    #[error("not a host's certificate")]
    Certificate,
    /// A request that cannot be signed.
    #[error("not a certificate request")]
    Request,
    /// A text without the certificates and the key that it should have.
    #[error("it does not hold {0}")]
    Missing(&'static str),
    /// A certificate and a key that are not a pair.
    #[error("the key is not the certificate's")]
    Pair,
    /// The library refused.
    #[error("{what} failed")]
    Library {
        /// What was tried.
        what: &'static str,
        /// Its answer.
        source: rcgen::Error,
    },
}

/// The time of day, which may be wrong, and jump.
#[derive(Clone)]
pub struct WallClock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl WallClock {
    /// A clock that shows the time since 1970-01-01 UTC.
    pub fn new(clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self(Arc::new(clock))
    }

    /// The time since 1970-01-01 UTC.
    #[must_use]
    pub fn unix(&self) -> Duration {
        (self.0)()
    }
}

impl Default for WallClock {
    /// The system's.
    fn default() -> Self {
        // A clock before 1970 is as wrong as one at 1970.
        Self::new(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
        })
    }
}

impl fmt::Debug for WallClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WallClock({:?})", self.unix())
    }
}

/// Bytes as hexadecimal digits.
pub(crate) struct Hex<'b>(pub(crate) &'b [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, self.0)
    }
}

/// The SHA-256 digest of an authority's certificate: what a token names a cluster by.
pub(crate) fn digest(ca: &[u8]) -> [u8; 32] {
    ring::digest::digest(&ring::digest::SHA256, ca)
        .as_ref()
        .try_into()
        .expect("SHA-256 has 32 bytes")
}

/// The name of the cluster with this digest: 16 hexadecimal digits.
pub(crate) fn cluster_of(digest: &[u8; 32]) -> String {
    Hex(&digest[..8]).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_certificate_are_refused() {
        let authority = Authority::create(Duration::from_secs(1_700_000_000)).unwrap();
        assert!(matches!(
            Certificate::parse(b""),
            Err(PkiError::Certificate)
        ));
        assert!(
            Certificate::parse(authority.certificate()).is_err(),
            "the authority is no host"
        );
        let identity = authority
            .issue(
                HostId::random(),
                Role::Worker,
                Duration::from_secs(1_700_000_000),
                LIFETIME,
            )
            .unwrap();
        let whole = identity.certificate_der().to_vec();
        for cut in 0..whole.len() {
            assert!(Certificate::parse(&whole[..cut]).is_err(), "{cut}");
        }
        assert!(Certificate::parse(&[whole, vec![0]].concat()).is_err());
    }

    #[test]
    fn dates_hold_from_the_first_to_the_last_second() {
        let now = Duration::from_secs(1_700_000_000);
        let certificate = Authority::create(now)
            .unwrap()
            .issue(HostId::random(), Role::Worker, now, LIFETIME)
            .unwrap()
            .certificate()
            .clone();
        assert_eq!(certificate.not_before, now - BACKDATED);
        assert_eq!(certificate.not_after, now + LIFETIME);
        assert!(certificate.holds_at(now - BACKDATED) && certificate.holds_at(now + LIFETIME));
        let second = Duration::from_secs(1);
        assert!(!certificate.holds_at(now - BACKDATED - second));
        assert!(!certificate.holds_at(now + LIFETIME + second));
    }
}
