//! Reaching a manager: TCP from the right address, then TLS, and a line that says which of them failed.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, ClientConfig, Error as TlsError};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::tls;

/// How long one manager is given to take a connection, and as long again for the handshake.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes of a TCP segment: fit for the least IPv6 MTU (RFC 8200 §5), less the headers of IP and TCP. A path may drop larger
/// packets in silence, and then the first long message would end the connection.
const SEGMENT_MAX: u32 = 1280 - 40 - 20;

/// An encrypted connection from `bind` to a manager, or why there is none, naming the manager.
pub(crate) async fn dial(
    bind: IpAddr,
    manager: SocketAddr,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, String> {
    let said = |error: io::Error| format!("TCP to {manager} from {bind}: {error}");
    let seconds = PATIENCE.as_secs();
    let stream = timeout(PATIENCE, tcp(bind, manager))
        .await
        .map_err(|_| format!("TCP to {manager} from {bind}: no answer within {seconds} s"))?;
    let stream = stream.map_err(said)?;
    let connector = TlsConnector::from(config);
    timeout(PATIENCE, connector.connect(tls::server_name(), stream))
        .await
        .map_err(|_| format!("{manager} takes TCP and says nothing: is it another program?"))?
        .map_err(|error| explain(manager, &error))
}

async fn tcp(bind: IpAddr, manager: SocketAddr) -> io::Result<TcpStream> {
    let socket = if manager.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // Both ways: what is announced limits the manager's segments too.
    socket2::SockRef::from(&socket).set_tcp_mss(SEGMENT_MAX)?;
    socket.bind(SocketAddr::new(bind, 0))?;
    let stream = socket.connect(manager).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A failure on a connection to a manager in an operator's words.
pub(crate) fn explain(manager: SocketAddr, error: &io::Error) -> String {
    let cause = error
        .get_ref()
        .and_then(|cause| cause.downcast_ref::<TlsError>());
    match cause {
        Some(TlsError::InvalidCertificate(CertificateError::UnknownIssuer)) => format!(
            "the manager at {manager} belongs to another cluster: check the address and the token"
        ),
        Some(TlsError::InvalidCertificate(_)) => {
            format!("{manager} shows a certificate that is no manager's of this cluster")
        }
        Some(TlsError::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError,
        )) => format!(
            "the manager at {manager} does not know this host's certificate: \
             run `towline leave --force`, and join again with a token"
        ),
        Some(TlsError::InvalidMessage(_) | TlsError::PeerIncompatible(_)) => {
            format!(
                "{manager} does not speak towline's control protocol: is it another program, or an older release?"
            )
        }
        _ if error.kind() == io::ErrorKind::UnexpectedEof
            || error.kind() == io::ErrorKind::ConnectionReset =>
        {
            format!(
                "{manager} closed the connection before it said who it is: it is stopping, busy, or another program"
            )
        }
        _ => format!("{manager}: {error}"),
    }
}
