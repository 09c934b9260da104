//! `towline logs`: what a container's command printed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use super::{Context, unexpected};
use crate::api::container::{Located, Request, Response};
use crate::api::{self};
use crate::shim::folder::Folder;
use crate::shim::process::wait_ended;

/// How often a followed log is looked at; it is a plain file, whose growth no poll reports.
const INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline logs -f c1")]
pub(crate) struct Args {
    /// Go on until the container ends
    #[arg(short, long)]
    follow: bool,
    /// The container's name, or the beginning of its id
    container: String,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = api::Request::Container(Request::Locate {
        name: args.container.clone(),
    });
    let api::Response::Container(Response::Located(located)) =
        context.client()?.request(&request)?
    else {
        return Err(unexpected());
    };
    let path = Folder::at(&located.folder).log();
    let log = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ExitCode::SUCCESS),
        other => other.with_context(|| format!("can't read the log {}", path.display()))?,
    };
    match show(log, args.follow.then_some(located)) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        other => other
            .map(|()| ExitCode::SUCCESS)
            .context("can't print the log"),
    }
}

/// Prints the log, and what is added to it while `followed` runs.
fn show(mut log: File, followed: Option<Located>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let shim: Option<OwnedFd> = match followed {
        Some(located) => match Folder::at(located.folder).running()? {
            Some(running) => running.shim.open()?,
            None => None,
        },
        None => None,
    };
    loop {
        // Asked before the rest is read, so that nothing printed before the end is missed.
        let ended = shim
            .as_ref()
            .map_or(Ok(true), |shim| wait_ended(shim, Duration::ZERO))?;
        io::copy(&mut (&mut log).take(u64::MAX), &mut out)?;
        out.flush()?;
        match &shim {
            Some(shim) if !ended => wait_ended(shim, INTERVAL)?,
            _ => return Ok(()),
        };
    }
}
