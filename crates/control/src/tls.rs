//! TLS 1.3 on the control port: who is let through the handshake, and what the other side is known by then.
//!
//! A manager shows a certificate with the manager's role and, with it, its authority's; the other side knows the authority by
//! its digest, which a token carries and an identity holds, so joining and reconnecting check the same thing. An agent shows its
//! host's certificate. Who shows none may still finish the handshake, to ask for a certificate and for nothing else (`server.rs`).
//! Dates are not looked at here; [`crate::pki`] says why. Sessions are not resumed: every connection proves its key anew.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};

use crate::pki::{Certificate, Identity, PkiError, Role, digest};

/// The name in the handshake's first message. Managers have many addresses and none of them is proved by TLS.
const SERVER_NAME: &str = "manager.towline.internal";

/// What a manager serves with.
pub(crate) fn server_config(identity: &Identity) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let roots = Arc::new(roots(identity.ca())?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let chain = vec![identity.certificate_der().clone(), identity.ca().clone()];
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(HostVerifier(verifier)))
        .with_single_cert(chain, identity.private_key())?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// What an agent connects with, to the managers of its own authority.
pub(crate) fn client_config(identity: &Identity) -> Result<Arc<ClientConfig>, Error> {
    let chain = vec![identity.certificate_der().clone()];
    let config =
        client_builder(identity.digest())?.with_client_auth_cert(chain, identity.private_key())?;
    Ok(without_resumption(config))
}

/// What a host connects with that has nothing yet but a token's digest.
pub(crate) fn stranger_config(digest: [u8; 32]) -> Result<Arc<ClientConfig>, Error> {
    Ok(without_resumption(
        client_builder(digest)?.with_no_client_auth(),
    ))
}

/// The name to give to a connector.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("the constant is a DNS name")
}

/// The certificate that the other side of a finished handshake has shown.
pub(crate) fn peer(chain: Option<&[CertificateDer<'_>]>) -> Result<Option<Certificate>, PkiError> {
    chain
        .and_then(<[_]>::first)
        .map(|der| Certificate::parse(der))
        .transpose()
}

fn client_builder(
    digest: [u8; 32],
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, Error> {
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ManagerVerifier { digest, algorithms })))
}

fn without_resumption(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca: &CertificateDer<'_>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned())?;
    Ok(roots)
}

/// The moment at which a certificate is looked at: its own first, because dates are not what decides.
fn any_time(certificate: &CertificateDer<'_>) -> Result<(Certificate, UnixTime), Error> {
    let parsed = Certificate::parse(certificate)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let time = UnixTime::since_unix_epoch(parsed.not_before);
    Ok((parsed, time))
}

/// Lets a manager of one authority through.
#[derive(Debug)]
struct ManagerVerifier {
    digest: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ManagerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = intermediates
            .iter()
            .find(|der| digest(der) == self.digest)
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let (certificate, time) = any_time(end_entity)?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &roots(ca)?,
            &[],
            time,
            self.algorithms.all,
        )?;
        if certificate.role != Role::Manager {
            return Err(Error::InvalidCertificate(CertificateError::InvalidPurpose));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        not_spoken()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The answer to TLS 1.2, which no configuration here offers.
fn not_spoken() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
}

/// Lets hosts of one authority through, whatever their dates, and who shows nothing.
#[derive(Debug)]
struct HostVerifier(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for HostVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Strangers need not be told whose port this is.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let (_, time) = any_time(end_entity)?;
        self.0.verify_client_cert(end_entity, &[], time)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        not_spoken()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::{ClientConnection, ServerConnection};

    use super::*;
    use crate::host::HostId;
    use crate::pki::{Authority, LIFETIME};

    const NOW: Duration = Duration::from_secs(1_700_000_000);

    fn issue(authority: &Authority, role: Role) -> Identity {
        authority
            .issue(HostId::random(), role, NOW, LIFETIME)
            .unwrap()
    }

    /// Plays a whole handshake; what the server knows of the client then.
    fn shake(
        server: &Identity,
        client: Arc<ClientConfig>,
    ) -> Result<Option<Certificate>, (&'static str, Error)> {
        let mut server = ServerConnection::new(server_config(server).unwrap()).unwrap();
        let mut client = ClientConnection::new(client, server_name()).unwrap();
        for _ in 0..4 {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).unwrap();
            }
            server.read_tls(&mut &bytes[..]).unwrap();
            server
                .process_new_packets()
                .map_err(|error| ("server", error))?;
            bytes.clear();
            while server.wants_write() {
                server.write_tls(&mut bytes).unwrap();
            }
            client.read_tls(&mut &bytes[..]).unwrap();
            client
                .process_new_packets()
                .map_err(|error| ("client", error))?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok(peer(server.peer_certificates()).unwrap())
    }

    #[test]
    fn each_side_is_known_by_its_certificate() {
        let authority = Authority::create(NOW).unwrap();
        let manager = issue(&authority, Role::Manager);
        for role in [Role::Worker, Role::Manager] {
            let host = issue(&authority, role);
            let known = shake(&manager, client_config(&host).unwrap()).unwrap();
            assert_eq!(known.as_ref(), Some(host.certificate()));
        }
        let stranger = stranger_config(authority.digest()).unwrap();
        assert_eq!(shake(&manager, stranger).unwrap(), None);
    }

    /// Conformance H12: another cluster's authority, on either side.
    #[test]
    fn another_cluster_is_refused_by_both_sides() {
        let (ours, theirs) = (
            Authority::create(NOW).unwrap(),
            Authority::create(NOW).unwrap(),
        );
        let manager = issue(&ours, Role::Manager);
        let unknown = |result: Result<Option<Certificate>, (&str, Error)>, side: &str| {
            assert!(
                matches!(
                    &result,
                    Err((by, Error::InvalidCertificate(_))) if *by == side
                ),
                "{result:?}"
            );
        };
        // The joining host does not show its secret to a manager of another authority.
        unknown(
            shake(&manager, stranger_config(theirs.digest()).unwrap()),
            "client",
        );
        unknown(
            shake(
                &manager,
                client_config(&issue(&theirs, Role::Worker)).unwrap(),
            ),
            "client",
        );
        // A host that believes our manager, with a certificate that is not ours.
        let mut mixed = ClientConfig::clone(&client_config(&issue(&theirs, Role::Worker)).unwrap());
        mixed
            .dangerous()
            .set_certificate_verifier(Arc::new(ManagerVerifier {
                digest: ours.digest(),
                algorithms: provider().signature_verification_algorithms,
            }));
        unknown(shake(&manager, Arc::new(mixed)), "server");
    }

    #[test]
    fn a_worker_cannot_pose_as_a_manager() {
        let authority = Authority::create(NOW).unwrap();
        let impostor = issue(&authority, Role::Worker);
        let host = issue(&authority, Role::Worker);
        for config in [
            client_config(&host).unwrap(),
            stranger_config(authority.digest()).unwrap(),
        ] {
            let result = shake(&impostor, config);
            assert!(
                matches!(result, Err(("client", Error::InvalidCertificate(_)))),
                "{result:?}"
            );
        }
    }

    #[test]
    fn dates_open_and_close_nothing() {
        let authority = Authority::create(NOW).unwrap();
        let ages = [Duration::ZERO, NOW * 2];
        for unix in ages {
            let old = |role| {
                authority
                    .issue(HostId::random(), role, unix, Duration::from_secs(1))
                    .unwrap()
            };
            shake(
                &old(Role::Manager),
                client_config(&old(Role::Worker)).unwrap(),
            )
            .unwrap();
        }
    }
}
