//! The cluster's certificate authority: whoever holds it decides who is a member.

use std::fmt;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use time::OffsetDateTime;

use super::identity::{self, Identity, KeyRequest};
use super::{BACKDATED, PkiError, Role, cluster_of, digest};
use crate::host::{HostId, random_bytes};

/// How long an authority is dated: its dates are never looked at, so it must only outlive what it signs.
const YEARS_20: Duration = Duration::from_secs(20 * 365 * 24 * 3600);

/// A certificate authority with its key. [`fmt::Debug`] shows the cluster alone.
pub struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.cluster())
    }
}

impl Authority {
    /// The authority of a new cluster.
    pub fn create(unix: Duration) -> Result<Self, PkiError> {
        let key = KeyPair::generate().map_err(library("making a key"))?;
        let mut params = params(unix.saturating_sub(BACKDATED), unix + YEARS_20);
        params
            .distinguished_name
            .push(DnType::CommonName, "towline cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let certificate = params
            .self_signed(&key)
            .map_err(library("signing the authority"))?;
        Self::new(certificate.der().clone(), key)
    }

    fn new(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, PkiError> {
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(library("reading the authority's certificate"))?;
        Ok(Self {
            certificate,
            issuer,
        })
    }

    /// The authority that [`Self::to_pem`] wrote.
    pub fn from_pem(text: &str) -> Result<Self, PkiError> {
        let (certificates, key) = identity::read_pem(text)?;
        let [certificate] = <[CertificateDer<'static>; 1]>::try_from(certificates)
            .map_err(|_| PkiError::Missing("one certificate of an authority"))?;
        identity::check_pair(&certificate, &key)?;
        let is_authority = x509_parser::parse_x509_certificate(&certificate)
            .is_ok_and(|(_, parsed)| parsed.is_ca());
        if !is_authority {
            return Err(PkiError::Missing("the certificate of an authority"));
        }
        Self::new(certificate, key)
    }

    /// Certificate and key as PEM: the whole cluster's secret.
    #[must_use]
    pub fn to_pem(&self) -> String {
        identity::write_pem([&self.certificate], self.issuer.key())
    }

    /// The certificate, in DER.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The certificate's SHA-256 digest.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        digest(&self.certificate)
    }

    /// The cluster's name.
    #[must_use]
    pub fn cluster(&self) -> String {
        cluster_of(&self.digest())
    }

    /// Signs a host's own request. Nothing of what the request asks for is taken but its key, and that the asker holds it.
    pub fn sign(
        &self,
        request: &[u8],
        host: HostId,
        role: Role,
        unix: Duration,
        lifetime: Duration,
    ) -> Result<Vec<u8>, PkiError> {
        let request = CertificateSigningRequestDer::from(request);
        let request =
            CertificateSigningRequestParams::from_der(&request).map_err(|_| PkiError::Request)?;
        self.certify(&request.public_key, host, role, unix, lifetime)
            .map(|certificate| certificate.to_vec())
    }

    /// A new identity, key and all: for the manager's own host, and for tests.
    pub fn issue(
        &self,
        host: HostId,
        role: Role,
        unix: Duration,
        lifetime: Duration,
    ) -> Result<Identity, PkiError> {
        let request = KeyRequest::new()?;
        let certificate = self.certify(request.key(), host, role, unix, lifetime)?;
        request.into_identity(&certificate, &self.certificate)
    }

    fn certify(
        &self,
        key: &impl PublicKeyData,
        host: HostId,
        role: Role,
        unix: Duration,
        lifetime: Duration,
    ) -> Result<CertificateDer<'static>, PkiError> {
        let mut params = params(unix.saturating_sub(BACKDATED), unix + lifetime);
        let name = &mut params.distinguished_name;
        name.push(DnType::OrganizationName, self.cluster());
        name.push(DnType::OrganizationalUnitName, role.name());
        name.push(DnType::CommonName, host.to_string());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match role {
            Role::Worker => vec![ExtendedKeyUsagePurpose::ClientAuth],
            // Without this a worker's certificate would pass for a manager's.
            Role::Manager => vec![
                ExtendedKeyUsagePurpose::ClientAuth,
                ExtendedKeyUsagePurpose::ServerAuth,
            ],
        };
        let signed = params
            .signed_by(key, &self.issuer)
            .map_err(library("signing a certificate"))?;
        Ok(signed.der().clone())
    }
}

/// What all certificates have: a serial number of their own, and dates.
fn params(not_before: Duration, not_after: Duration) -> CertificateParams {
    let mut serial: [u8; 16] = random_bytes();
    // RFC 5280 §4.1.2.2: positive.
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.not_before = date(not_before);
    params.not_after = date(not_after);
    params.use_authority_key_identifier_extension = true;
    params
}

/// A date that a certificate can hold, whatever a clock shows.
fn date(unix: Duration) -> OffsetDateTime {
    const YEAR_9000: u64 = 221_845_392_000;
    let seconds = i64::try_from(unix.as_secs().min(YEAR_9000)).unwrap_or_default();
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn library(what: &'static str) -> impl Fn(rcgen::Error) -> PkiError {
    move |source| PkiError::Library { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{Certificate, LIFETIME};

    const NOW: Duration = Duration::from_secs(1_700_000_000);

    #[test]
    fn an_authority_survives_its_text_and_hides_from_debug() {
        let authority = Authority::create(NOW).unwrap();
        let text = authority.to_pem();
        let again = Authority::from_pem(&text).unwrap();
        assert_eq!(again.digest(), authority.digest());
        let key = text.split("PRIVATE KEY").nth(1).unwrap();
        assert!(!format!("{authority:?}").contains(&key[8..24]));
        // What one signs, both vouch for.
        let identity = again
            .issue(HostId::random(), Role::Worker, NOW, LIFETIME)
            .unwrap();
        assert_eq!(identity.certificate().cluster, authority.cluster());
    }

    #[test]
    fn a_text_that_is_no_authority_is_refused() {
        let authority = Authority::create(NOW).unwrap();
        let other = Authority::create(NOW).unwrap();
        let host = authority
            .issue(HostId::random(), Role::Manager, NOW, LIFETIME)
            .unwrap();
        let (_, other_key) = identity::read_pem(&other.to_pem()).unwrap();
        let mixed = identity::write_pem([authority.certificate()], &other_key);
        for text in [String::new(), "x".repeat(100), host.to_pem(), mixed] {
            let error = Authority::from_pem(&text).unwrap_err().to_string();
            assert!(!error.contains("PRIVATE"), "{error}");
        }
    }

    #[test]
    fn a_request_gets_the_name_the_manager_chose_and_nothing_it_asked_for() {
        let authority = Authority::create(NOW).unwrap();
        let host = HostId::random();
        // A request for a name, an authority and a server's use.
        let key = KeyPair::generate().unwrap();
        let mut greedy = CertificateParams::default();
        greedy
            .distinguished_name
            .push(DnType::OrganizationalUnitName, "manager");
        greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        greedy.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let request = greedy.serialize_request(&key).unwrap();
        let signed = authority
            .sign(request.der(), host, Role::Worker, NOW, LIFETIME)
            .unwrap();
        let certificate = Certificate::parse(&signed).unwrap();
        assert_eq!((certificate.host, certificate.role), (host, Role::Worker));
        let (_, parsed) = x509_parser::parse_x509_certificate(&signed).unwrap();
        assert!(!parsed.is_ca());
        let usage = parsed.extended_key_usage().unwrap().unwrap().value.clone();
        assert!(usage.client_auth && !usage.server_auth);
    }

    #[test]
    fn a_damaged_request_is_refused() {
        let authority = Authority::create(NOW).unwrap();
        let good = KeyRequest::new().unwrap().request().to_vec();
        let sign =
            |request: &[u8]| authority.sign(request, HostId::random(), Role::Worker, NOW, LIFETIME);
        assert!(sign(&good).is_ok());
        for place in (0..good.len()).step_by(3) {
            let mut bad = good.clone();
            bad[place] ^= 1;
            // Some bits of an encoding have no meaning; the key itself is covered by the signature.
            if let Ok(signed) = sign(&bad) {
                assert!(Certificate::parse(&signed).is_ok());
            }
            assert!(sign(&good[..place]).is_err());
        }
    }

    #[test]
    fn clocks_at_the_ends_of_time_make_certificates_too() {
        for unix in [
            Duration::ZERO,
            Duration::from_secs(u64::from(u32::MAX)),
            Duration::from_secs(1 << 40),
        ] {
            let authority = Authority::create(unix).unwrap();
            authority
                .issue(HostId::random(), Role::Worker, unix, LIFETIME)
                .unwrap();
        }
    }
}
