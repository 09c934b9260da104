//! `towline lab exec`: a command inside a host or container of a lab.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;
use netns::Netns;

use crate::agent::{self, Host};
use crate::name::{Kind, LabName, Role};
use crate::spot::Spot;
use crate::state::{Folder, Settings};
use crate::{sysfs, up};

/// Options of `lab exec`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples: towline lab exec lab-h1 -- towline fdb\n\
                        \x20         towline lab exec -it lab-h1c1 -- sh\n\n\
                        Exit codes: those of the command; 126 it could not be executed, 127 it was not found.")]
pub struct ExecArgs {
    /// Standard input is connected, as without it; in a virtual machine the command gets no terminal but with -t
    #[arg(short, long)]
    interactive: bool,
    /// In a virtual machine: give the command a terminal [default: where stdin and stdout are one, and -i is not given]. Elsewhere it
    /// has the caller's
    #[arg(short, long)]
    tty: bool,
    /// The lab's name [default: the one that the host's or container's name begins with, else 'lab']
    #[arg(long)]
    name: Option<LabName>,
    /// A host or container of the lab, or its switch (lab-sw) or outside (lab-out); with or without 'lab-'
    #[arg(value_name = "HOST|CONTAINER")]
    target: String,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Becomes the command; returns only when that fails.
pub(crate) fn run(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let lab = match args.name.clone().or_else(|| LabName::owning(&args.target)) {
        Some(lab) => lab,
        None => "lab".parse()?,
    };
    crate::require_rights("lab exec", &lab)?;
    let folder = Folder::of(&lab);
    let state = folder.read();
    if let Some(settings) = state.map(|state| state.settings)
        && settings.vms > 0
        && let Some(spot) = guest(&lab, &folder, &settings, &in_full(&lab, &args.target))?
    {
        // A guest that is not ready takes no commands.
        folder.open()?;
        return relay(&spot, args);
    }
    let containers = folder.containers();
    let target = in_full(&lab, &args.target);
    let socket = match lab.role(&target) {
        Some(Role::Node(kind, host) | Role::Container(kind, host, _)) => {
            Some(folder.socket(kind, host))
        }
        Some(Role::Switch | Role::Outside) => None,
        None => match containers.iter().find(|(name, _)| *name == target) {
            Some((_, socket)) => Some(socket.clone()),
            None => return Err(unknown(&lab, &folder, &target)),
        },
    };
    if !Netns::exists(&target) {
        return Err(unknown(&lab, &folder, &target));
    }
    let netns = Netns::open(&target)?;
    let mut command = Command::new(&args.command[0]);
    command
        .args(&args.command[1..])
        .env("PATH", path_with_own_folder()?);
    match socket {
        Some(socket) => command.env("TOWLINE_SOCKET", socket),
        None => command.env_remove("TOWLINE_SOCKET"),
    };
    // The thread that is in the namespace becomes the program; the others end.
    let error = netns.run(|| sysfs::mount_fresh().map(|()| command.exec()))??;
    let program = Path::new(&args.command[0]).display();
    eprintln!("towline: can't execute {program} in {target}: {error}");
    Ok(ExitCode::from(if error.kind() == io::ErrorKind::NotFound {
        127
    } else {
        126
    }))
}

/// The place of this name, if it is a virtual machine or a container in one, whatever that is called.
fn guest(
    lab: &LabName,
    folder: &Folder,
    settings: &Settings,
    target: &str,
) -> anyhow::Result<Option<Spot>> {
    let (host, container) = match lab.role(target) {
        Some(Role::Node(Kind::Host, host)) => (host, None),
        Some(Role::Container(Kind::Host, host, _)) => (host, Some(target)),
        Some(_) => return Ok(None),
        None => {
            let manager = Host::of(lab, folder, settings, 1)?;
            let mut endpoints = up::endpoints(&manager)?.into_iter();
            let found = endpoints.find(|endpoint| endpoint.container == target);
            match found.and_then(|endpoint| lab.role(&endpoint.host)) {
                Some(Role::Node(_, host)) => (host, Some(target)),
                _ => return Ok(None),
            }
        }
    };
    if !settings.is_machine(host) {
        return Ok(None);
    }
    let host = Host::of(lab, folder, settings, host)?;
    Ok(Some(match container {
        None => host.spot,
        Some(name) => host.container(name)?,
    }))
}

/// Runs the command in a virtual machine, and exits as it does.
fn relay(spot: &Spot, args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let is_terminal = io::stdin().is_terminal();
    if args.tty && args.interactive && !is_terminal {
        anyhow::bail!(
            "stdin is not a terminal: leave -t out, or -i for a terminal that nobody sits at"
        );
    }
    let terminal = args.tty || !args.interactive && is_terminal && io::stdout().is_terminal();
    let mut words = Command::new(&args.command[0]);
    words.args(&args.command[1..]);
    let status = spot
        .spawn_attached(&mut words, terminal)?
        .wait()
        .context("can't wait for the command")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

/// `h1` of the lab `lab` is `lab-h1`.
fn in_full(lab: &LabName, target: &str) -> String {
    let full = format!("{lab}-{target}");
    if lab.role(target).is_none() && lab.role(&full).is_some() {
        full
    } else {
        target.to_owned()
    }
}

/// Why there is no such host or container, and which there are.
fn unknown(lab: &LabName, folder: &Folder, target: &str) -> anyhow::Error {
    let (settings, listed) = match (folder.open(), Netns::list()) {
        (Ok(state), Ok(listed)) => (state.settings, listed),
        (Err(error), _) => return error,
        (_, Err(error)) => return error.into(),
    };
    let mut names: Vec<String> = listed
        .into_iter()
        .filter(|name| lab.role(name).is_some())
        .collect();
    for host in (1..=settings.hosts).filter(|&host| settings.is_machine(host)) {
        names.push(lab.of(Role::Node(Kind::Host, host)));
        let containers = 1..=settings.containers;
        names.extend(containers.map(|index| lab.of(Role::Container(Kind::Host, host, index))));
    }
    names.extend(folder.containers().into_iter().map(|(name, _)| name));
    names.sort();
    names.dedup();
    anyhow::anyhow!("lab '{lab}' has no '{target}': it has {}", names.join(", "))
}

/// The running program's folder, then what PATH was: `towline` in the lab is this one.
fn path_with_own_folder() -> anyhow::Result<OsString> {
    let program = agent::program()?;
    let own = program
        .parent()
        .context("a program lies in a folder")?
        .to_owned();
    let old = std::env::var_os("PATH")
        .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::join_paths(std::iter::once(own).chain(std::env::split_paths(&old)))
        .context("this program's folder has a ':' in its name and can't stand in PATH")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_given_in_full_or_without_the_labs() {
        let lab: LabName = "lab".parse().expect("a name");
        for (target, meant) in [
            ("h1", "lab-h1"),
            ("lab-h1", "lab-h1"),
            ("h2c1", "lab-h2c1"),
            ("sw", "lab-sw"),
            ("web", "web"),
        ] {
            assert_eq!(in_full(&lab, target), meant);
        }
    }
}
