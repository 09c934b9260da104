//! Many hosts on one machine, and what is measured between them.
//!
//! `towline lab up` makes network namespaces for hosts, a switch between them, a router and an outside; starts a real
//! `towline agent` in each host; and makes a cluster, a network and containers by the same commands a user would give.
//!
//! ```text
//!    NAME-h1c1  NAME-h1c2        NAME-h2c1  NAME-h2c2          eth0: overlay 10.0.9.0/24
//!        └────┬────┘                 └────┬────┘               eth1: the host's gateway bridge
//!          NAME-h1 (agent)             NAME-h2 (agent)         eth0: underlay 192.0.2.0/24, 2001:db8:2::/64
//!             └──────────── NAME-sw ──────┘
//!                              └─ NAME-out                     198.51.100.1, 2001:db8:ff::1
//! ```
//!
//! With `--vms` the last hosts are virtual machines instead, with kernels of their own (`vm/`); where all of them are, no
//! root is needed.
//!
//! What this crate does NOT do: it knows no agent from the inside, only the program's commands and their `--json`; it
//! puts nothing on the machine it runs on but namespaces, the lab's folder, QEMU where it is asked for, control groups once it measures,
//! and for large labs a higher limit of neighbours; all of it goes with the last lab.
//! Everything is found again by name, so `lab down` needs no memory.
//!
//! System calls that safe Rust has no words for are in four files: `ethtool.rs`, `mmsg.rs`, `sysfs.rs`, `vm/terminal.rs`.

mod agent;
mod bench;
mod cpu;
mod down;
mod ethtool;
mod exec;
mod icmp;
mod interrupt;
mod limits;
mod load;
mod mmsg;
mod name;
mod output;
mod ping;
mod pinger;
mod process;
mod shapes;
mod spot;
mod state;
mod status;
mod sysfs;
mod topology;
mod up;
mod vm;

use std::process::ExitCode;

use anyhow::bail;

pub use bench::path::kernel::KernelEnd;
pub use bench::{BenchArgs, ReportArgs};
pub use exec::ExecArgs;
pub use load::LoadCommand;
pub use ping::PingArgs;
pub use status::StatusArgs;
pub use up::UpArgs;
pub use vm::{ConsoleArgs, GuestArgs, RelayArgs};

/// The network that every lab has.
const NETWORK: &str = "myoverlay";

/// The commands of `towline lab`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Bring up hosts, a network and containers, in network namespaces of this machine or in virtual machines
    Up(UpArgs),
    /// Ping between all containers, to the outside and to the gateways
    Ping(PingArgs),
    /// Measure throughput and latency beside the bare underlay and the kernel's VXLAN
    Bench(BenchArgs),
    /// Write what 'lab bench --json' printed into a page, with a plot
    Report(ReportArgs),
    /// Show what stands
    Status(StatusArgs),
    /// Run a command in a host or container
    Exec(ExecArgs),
    /// Enter the console of a host that is a virtual machine
    Console(ConsoleArgs),
    /// Take everything down
    Down(DownArgs),
    /// Generators and sinks of load, which the bench starts
    #[command(subcommand, hide = true)]
    Load(LoadCommand),
    /// What a virtual machine runs
    #[command(hide = true)]
    Guest(GuestArgs),
    /// What stands for a command that a virtual machine runs
    #[command(hide = true)]
    Relay(RelayArgs),
}

/// Options of `lab down`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: towline lab down\n\nProcesses in the lab's namespaces are killed. A second time, or after a crash, it takes away whatever is left."
)]
pub struct DownArgs {
    /// The lab's name
    #[arg(long, default_value = "lab")]
    name: name::LabName,
}

/// Runs one command of `towline lab` and says with which code to exit.
///
/// # Errors
/// One line for a person: the thing, the cause, what to do next.
pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(args) => {
            up::run(&args)?;
            status::show(args.lab(), args.json)?;
        }
        Command::Ping(args) => return ping::run(&args),
        Command::Bench(args) => bench::run(&args)?,
        Command::Report(args) => bench::page::run(&args)?,
        Command::Status(args) => status::run(&args)?,
        Command::Exec(args) => return exec::run(&args),
        Command::Down(args) => {
            let half_made = state::Folder::of(&args.name).is_half_made();
            if !down::run(&args.name)? {
                require_rights("lab down", &args.name)?;
                eprintln!("towline: there is nothing of lab '{}'", args.name);
            } else if half_made {
                eprintln!(
                    "towline: lab '{}' was left half made; what there was of it is taken away",
                    args.name
                );
            }
        }
        Command::Load(command) => load::run(&command)?,
        Command::Console(args) => return vm::console(&args),
        Command::Guest(args) => return vm::guest(&args),
        Command::Relay(args) => return vm::relay(&args),
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails early without the rights to make namespaces.
fn require_root(command: &str) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "'towline {command}' makes and enters network namespaces and needs root: run it with sudo"
        );
    }
    Ok(())
}

/// Fails early without the rights to work on this lab: root's, but where all its hosts are virtual machines of the caller, or
/// were to be.
fn require_rights(command: &str, lab: &name::LabName) -> anyhow::Result<()> {
    let own = state::Folder::of(lab);
    let allowed = rustix::process::geteuid().is_root()
        || own.is_half_made()
        || own
            .read()
            .is_some_and(|state| state.settings.only_machines());
    if !allowed {
        bail!(
            "'towline {command}' finds no lab '{lab}' of yours, and labs with hosts in network namespaces need root: run it with sudo"
        );
    }
    Ok(())
}

/// Fails early when a program that is needed isn't installed.
fn require_tool(program: &str, package: &str) -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // nft lies in /usr/sbin, which a user's PATH lacks on Debian.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    if folders
        .into_iter()
        .any(|folder| folder.join(program).is_file())
    {
        return Ok(());
    }
    bail!(
        "'{program}' is missing: install it with 'apt-get install {package}', or run scripts/setup"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Command,
    }

    #[test]
    fn the_parser_is_consistent_and_has_the_promised_defaults() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        for words in [
            "x up --hosts 3 --containers 2 --name lab --subnet 10.0.9.0/24 --wire mtu --underlay 4",
            "x up --wire gso --underlay 6 --json",
            "x ping --count 5",
            "x bench --rounds 5 --seconds 2 --only tcp1,tcp4,udp64,udpmix,rr --paths underlay,kernel,towline,plain",
            "x bench --paths local-kernel,local",
            "x report --page docs/performance.md --command scripts/bench --commit abc run.json",
            "x exec --name lab lab-h1 -- towline fdb --json",
            "x down --name other",
            "x up --hosts 3 --vms 3 --image target/vm/image --memory 256 --first-port 42000",
            "x console h1",
            "x exec -it lab-h1 -- sh",
            "x relay --name lab --host 1 --terminal -- sh",
            "x relay --name lab --host 1 --netns lab-h1c1 -- ls -l",
        ] {
            Cli::try_parse_from(words.split(' '))
                .unwrap_or_else(|error| panic!("{words}: {error}"));
        }
        for words in [
            "x up --name a/b",
            "x up --hosts 0",
            "x up --hosts 201",
            "x exec lab-h1",
            "x up --vms 1",
            "x up --vms 1 --image i --memory 64",
            "x up --first-port 0",
            "x bench --only all",
            "x report",
        ] {
            Cli::try_parse_from(words.split(' ')).expect_err(words);
        }
    }

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        require_tool("sh", "dash").unwrap();
        let error = require_tool("no-such-tool", "tools")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no-such-tool") && error.contains("apt-get install tools"),
            "{error}"
        );
    }
}
