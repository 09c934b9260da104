//! Join tokens and the cluster's authority, for operators.

use std::path::Path;

use control::{Lasts, Request, Response, Role, Token};
use vtep::vxlan::DEFAULT_PORT;

use super::network::unexpected;
use super::{Agent, Member, keys};
use crate::api::{CaExported, JoinToken, TokenWanted};

/// Shows a join token, after changing it where that is wanted.
pub(super) fn token(agent: &Agent, wanted: &TokenWanted) -> anyhow::Result<JoinToken> {
    let member = agent.member()?;
    show(&member, wanted.role, wanted.rotate, wanted.lasts)
}

/// The token that new workers join with.
pub(super) fn worker_token(member: &Member) -> anyhow::Result<JoinToken> {
    show(member, Role::Worker, false, None)
}

fn show(
    member: &Member,
    role: Role,
    rotate: bool,
    lasts: Option<Lasts>,
) -> anyhow::Result<JoinToken> {
    let answer = member.control.request(Request::Token {
        role,
        rotate,
        lasts,
    })?;
    let Response::Token { secret, expires_in } = answer else {
        return Err(unexpected());
    };
    let token = Token::new(member.keys()?.identity.digest(), secret);
    let manager = member.control.status().connected_to;
    let at = manager.unwrap_or_else(|| member.settled.control_address());
    let target = if at.port() == DEFAULT_PORT {
        at.ip().to_string()
    } else {
        at.to_string()
    };
    Ok(JoinToken {
        role: role.name().to_owned(),
        join_command: format!("towline join --token {token} {target}"),
        token: token.to_string(),
        expires_in,
    })
}

/// Writes the cluster's authority to a file.
pub(super) fn export(agent: &Agent, path: &Path) -> anyhow::Result<CaExported> {
    agent.member()?.keys()?;
    Ok(CaExported {
        cluster: keys::export(&agent.config, path)?,
        file: path.display().to_string(),
    })
}
