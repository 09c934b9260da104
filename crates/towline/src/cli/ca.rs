//! `towline ca`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

use super::{Context, output};
use crate::api::{Request, Response};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Keep a copy of the cluster's certificate authority, to begin again with it should every manager be lost
    #[command(after_help = "Example: towline ca export /root/cluster-ca.pem\n\n\
                            The file holds the private key that makes hosts members: keep it offline. It is apart from the \
                            manager's store, which needs no copy: hosts register again what runs on them. \
                            'towline init --ca FILE' begins a cluster with it, and the hosts of the old one come back to it.")]
    Export {
        /// The file to write; one that exists is not overwritten
        file: PathBuf,
    },
}

pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    let Command::Export { file } = command;
    let file = absolute(file)?;
    let Response::CaExported(done) = context.client()?.request(&Request::CaExport(file))? else {
        return Err(super::unexpected());
    };
    output::line(&done.file)?;
    output::warnings(&[format!(
        "{} holds the private key of cluster {}: whoever has it can make any host a member; keep it offline",
        done.file, done.cluster
    )]);
    Ok(ExitCode::SUCCESS)
}

/// The agent has another working folder.
pub(crate) fn absolute(path: PathBuf) -> anyhow::Result<PathBuf> {
    std::path::absolute(&path).with_context(|| format!("cannot use the path '{}'", path.display()))
}
