//! A host's identity: its key, its certificate, and the authority that signed it.

use std::fmt;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::parse_x509_certificate;

use super::{BACKDATED, Certificate, PkiError, cluster_of, digest};

/// A key that a host has made for itself, and the request to sign it.
pub struct KeyRequest {
    key: KeyPair,
    request: Vec<u8>,
}

impl KeyRequest {
    /// A new key.
    pub fn new() -> Result<Self, PkiError> {
        let failed = |source| PkiError::Library {
            what: "making a key",
            source,
        };
        let key = KeyPair::generate().map_err(failed)?;
        let request = CertificateParams::default()
            .serialize_request(&key)
            .map_err(failed)?;
        let request = request.der().to_vec();
        Ok(Self { key, request })
    }

    /// The request (PKCS #10, DER), which holds no secret.
    #[must_use]
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    pub(super) fn key(&self) -> &KeyPair {
        &self.key
    }

    /// With the signed certificate and the authority's, an identity.
    pub fn into_identity(self, certificate: &[u8], ca: &[u8]) -> Result<Identity, PkiError> {
        Identity::new(certificate.to_vec().into(), ca.to_vec().into(), self.key)
    }
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRequest")
    }
}

/// A host's key with its certificate and the authority's. [`fmt::Debug`] shows the certificate alone.
pub struct Identity {
    certificate_der: CertificateDer<'static>,
    ca: CertificateDer<'static>,
    key: KeyPair,
    certificate: Certificate,
}

impl Identity {
    fn new(
        certificate_der: CertificateDer<'static>,
        ca: CertificateDer<'static>,
        key: KeyPair,
    ) -> Result<Self, PkiError> {
        let certificate = Certificate::parse(&certificate_der)?;
        check_pair(&certificate_der, &key)?;
        Ok(Self {
            certificate_der,
            ca,
            key,
            certificate,
        })
    }

    /// The identity that [`Self::to_pem`] wrote.
    pub fn from_pem(text: &str) -> Result<Self, PkiError> {
        let (certificates, key) = read_pem(text)?;
        let [certificate, ca] = <[CertificateDer<'static>; 2]>::try_from(certificates)
            .map_err(|_| PkiError::Missing("a host's certificate and its authority's"))?;
        Self::new(certificate, ca, key)
    }

    /// Both certificates and the key as PEM: this host's secret.
    #[must_use]
    pub fn to_pem(&self) -> String {
        write_pem([&self.certificate_der, &self.ca], &self.key)
    }

    /// What the certificate says.
    #[must_use]
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The certificate, in DER.
    #[must_use]
    pub fn certificate_der(&self) -> &CertificateDer<'static> {
        &self.certificate_der
    }

    /// The authority's certificate, in DER.
    #[must_use]
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// The authority's SHA-256 digest.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        digest(&self.ca)
    }

    /// The cluster's name.
    #[must_use]
    pub fn cluster(&self) -> String {
        cluster_of(&self.digest())
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.serialize_der().into())
    }

    /// How long its certificate was meant to last.
    pub(crate) fn lifetime(&self) -> Duration {
        let Certificate {
            not_before,
            not_after,
            ..
        } = self.certificate;
        not_after
            .saturating_sub(not_before)
            .saturating_sub(BACKDATED)
    }

    /// Whether it is time for a new certificate: two thirds of its time are over, or the clock shows a time before its first
    /// day. A clock that is wrong for good says so again and again; who asks for a new one waits between two askings.
    #[must_use]
    pub fn renewal_due(&self, unix: Duration) -> bool {
        let Certificate {
            not_before,
            not_after,
            ..
        } = self.certificate;
        unix < not_before || unix >= not_after.saturating_sub(self.lifetime() / 3)
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        // A serial number, and the key it is for, exist once.
        (&self.certificate_der, &self.ca) == (&other.certificate_der, &other.ca)
    }
}

impl Eq for Identity {}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.certificate).finish()
    }
}

/// A key that is not the certificate's would be noticed only when nobody believes it any more.
pub(super) fn check_pair(certificate: &[u8], key: &KeyPair) -> Result<(), PkiError> {
    let (_, parsed) = parse_x509_certificate(certificate).map_err(|_| PkiError::Certificate)?;
    if parsed.public_key().raw == key.subject_public_key_info() {
        Ok(())
    } else {
        Err(PkiError::Pair)
    }
}

pub(super) fn write_pem<'c>(
    certificates: impl IntoIterator<Item = &'c CertificateDer<'static>>,
    key: &KeyPair,
) -> String {
    let blocks = certificates.into_iter().map(|der| {
        let block = pem::Pem::new("CERTIFICATE", der.to_vec());
        pem::encode_config(
            &block,
            pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
        )
    });
    blocks.chain([key.serialize_pem()]).collect()
}

/// Certificates and the one key of a text; what stands between them is passed over.
pub(super) fn read_pem(text: &str) -> Result<(Vec<CertificateDer<'static>>, KeyPair), PkiError> {
    let blocks = pem::parse_many(text).map_err(|_| PkiError::Missing("readable PEM"))?;
    let (certificates, others): (Vec<_>, Vec<_>) = blocks
        .into_iter()
        .partition(|block| block.tag() == "CERTIFICATE");
    let certificates = certificates
        .into_iter()
        .map(|block| block.into_contents().into())
        .collect();
    let [key] = <[pem::Pem; 1]>::try_from(others)
        .ok()
        .filter(|[key]| key.tag() == "PRIVATE KEY")
        .ok_or(PkiError::Missing("one private key"))?;
    let key = PrivatePkcs8KeyDer::from(key.into_contents());
    let key =
        KeyPair::try_from(&key).map_err(|_| PkiError::Missing("a private key of a known kind"))?;
    Ok((certificates, key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostId;
    use crate::pki::{Authority, LIFETIME, Role};

    const NOW: Duration = Duration::from_secs(1_700_000_000);

    fn identity(lifetime: Duration) -> Identity {
        let authority = Authority::create(NOW).unwrap();
        authority
            .issue(HostId::random(), Role::Worker, NOW, lifetime)
            .unwrap()
    }

    #[test]
    fn an_identity_survives_its_text_and_hides_from_debug() {
        let identity = identity(LIFETIME);
        let text = identity.to_pem();
        let again = Identity::from_pem(&text).unwrap();
        assert_eq!(again.certificate(), identity.certificate());
        assert_eq!(
            (again.digest(), again.to_pem()),
            (identity.digest(), text.clone())
        );
        let secret = text.split("PRIVATE KEY-----\n").nth(1).unwrap();
        assert!(!format!("{identity:?}").contains(&secret[..16]));
        for bad in [
            "",
            &text[..text.len() / 2],
            &text.replace("CERTIFICATE", "X"),
        ] {
            assert!(Identity::from_pem(bad).is_err());
        }
    }

    #[test]
    fn renewed_after_two_thirds_and_when_the_clock_jumps() {
        let day = Duration::from_secs(24 * 3600);
        let identity = identity(LIFETIME);
        assert!(!identity.renewal_due(NOW));
        assert!(!identity.renewal_due(NOW + 59 * day));
        assert!(identity.renewal_due(NOW + 60 * day));
        assert!(
            identity.renewal_due(NOW + 1000 * day),
            "the clock jumped ahead"
        );
        assert!(
            !identity.renewal_due(NOW - day),
            "a clock that is slow by a day is no reason"
        );
        assert!(identity.renewal_due(Duration::ZERO), "no clock at all");
    }
}
