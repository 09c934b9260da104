//! The first contact: a new host has a token and no certificate, and asks a manager for one.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::dial::dial;
use crate::limits::HELLO_MAX;
use crate::message::{ToAgent, ToManager, VERSION};
use crate::pki::{Identity, KeyRequest, PkiError};
use crate::token::Token;
use crate::transport::{FrameError, read_frame, write_frame};

/// How long a manager may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a host has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No manager could be reached, or none of this cluster. One cause for each manager tried.
    #[error("{0}")]
    Unreachable(String),
    /// The manager said no, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The connection broke, or carried something else than an answer.
    #[error("the manager at {manager} did not answer: {cause}")]
    Broken {
        /// Which.
        manager: SocketAddr,
        /// What went wrong.
        cause: String,
    },
    /// The certificate is not what was asked for.
    #[error("the manager's answer cannot be used")]
    Pki(#[from] PkiError),
    /// The key cannot be used, or no thread can be had.
    #[error("failed to set the connection up: {0}")]
    Setup(String),
}

/// Asks the first of `managers` that answers from `bind` for a certificate. The manager must belong to the token's cluster, and
/// sees the secret only then. Blocks for some seconds at most; to be called from a plain thread in the host's namespace.
pub fn join(managers: &[SocketAddr], token: &Token, bind: IpAddr) -> Result<Identity, JoinError> {
    let setup = |error: &dyn std::fmt::Display| JoinError::Setup(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| setup(&error))?;
    let config = crate::tls::stranger_config(token.digest()).map_err(|error| setup(&error))?;
    let key = KeyRequest::new()?;
    runtime.block_on(async {
        let mut causes = Vec::new();
        for &manager in managers {
            match dial(bind, manager, config.clone()).await {
                Ok(stream) => return ask(stream, manager, token, key).await,
                Err(cause) => causes.push(cause),
            }
        }
        Err(JoinError::Unreachable(causes.join("; ")))
    })
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    manager: SocketAddr,
    token: &Token,
    key: KeyRequest,
) -> Result<Identity, JoinError> {
    let broken = |cause: String| JoinError::Broken { manager, cause };
    let message = ToManager::Join {
        version: VERSION,
        secret: token.secret().clone(),
        request: key.request().to_vec(),
    };
    let exchange = async {
        write_frame(&mut stream, &message.encode()).await?;
        stream.flush().await?;
        read_frame(&mut stream, HELLO_MAX).await
    };
    let answer: Result<_, FrameError> = timeout(PATIENCE, exchange)
        .await
        .map_err(|_| broken(format!("nothing came within {} s", PATIENCE.as_secs())))?;
    let answer = answer.map_err(|error| broken(error.to_string()))?;
    match ToAgent::decode(&answer) {
        Ok(ToAgent::Joined { certificate, ca }) => {
            let identity = key.into_identity(&certificate, &ca)?;
            if identity.digest() == token.digest() {
                Ok(identity)
            } else {
                Err(broken("it sent another cluster's authority".to_owned()))
            }
        }
        Ok(ToAgent::Reject { reason, .. }) => Err(JoinError::Refused(reason)),
        Ok(_) => Err(broken(
            "it sent something else than a certificate".to_owned(),
        )),
        Err(error) => Err(broken(error.to_string())),
    }
}
