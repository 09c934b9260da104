//! `towline lab console`: a virtual machine's serial console, where a shell runs.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::Context;

use super::machine::Machine;
use super::terminal::Raw;
use crate::name::{LabName, Role};
use crate::state::Folder;

/// Ends the session: Ctrl-], as with telnet.
const END: u8 = 0x1d;

/// Options of `lab console`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: towline lab console h1\n\nA shell runs there; Ctrl-] leaves it. Without a terminal, prints what the console has shown."
)]
pub struct ConsoleArgs {
    /// The lab's name
    #[arg(long, default_value = "lab")]
    name: LabName,
    /// A host of the lab that is a virtual machine; with or without 'lab-'
    #[arg(value_name = "HOST")]
    host: String,
}

/// Joins the terminal and the console.
pub(crate) fn run(args: &ConsoleArgs) -> anyhow::Result<ExitCode> {
    crate::require_rights("lab console", &args.name)?;
    let folder = Folder::of(&args.name);
    folder.open()?;
    let full = format!("{}-{}", args.name, args.host);
    let role = args.name.role(&args.host).or_else(|| args.name.role(&full));
    let Some(Role::Node(_, number)) = role else {
        anyhow::bail!(
            "'{}' is no host of lab '{}': its hosts are h1, h2 and so on",
            args.host,
            args.name
        );
    };
    let machine = Machine::open(&folder, &args.name, number)?;
    let shown = std::fs::read(machine.folder.join("console.log"))
        .with_context(|| format!("can't read what the console of {} has shown", machine.name))?;
    if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        io::stdout()
            .write_all(&shown)
            .context("can't write to stdout")?;
        return Ok(ExitCode::SUCCESS);
    }
    let socket = machine.folder.join("console.sock");
    let stream = UnixStream::connect(&socket)
        .with_context(|| format!("nobody is at {}", socket.display()))
        .map_err(|error| machine.explain(error))?;
    eprintln!("towline: console of {}; Ctrl-] leaves it", machine.name);
    let _raw = Raw::set()?;
    join(stream)?;
    Ok(ExitCode::SUCCESS)
}

/// Passes bytes both ways until either side ends it.
fn join(mut stream: UnixStream) -> anyhow::Result<()> {
    let mut from = stream.try_clone().context("can't share the console")?;
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            let mut out = io::stdout().lock();
            if out
                .write_all(&buffer[..len])
                .and_then(|()| out.flush())
                .is_err()
            {
                break;
            }
        }
    });
    let mut buffer = [0; 256];
    // A shell shows its prompt once it is spoken to.
    stream.write_all(b"\r").context("the console is gone")?;
    while let Ok(len @ 1..) = io::stdin().lock().read(&mut buffer) {
        let typed = &buffer[..len];
        let end = typed.iter().position(|&byte| byte == END);
        let failed = stream.write_all(&typed[..end.unwrap_or(len)]).is_err();
        if failed || end.is_some() || reader.is_finished() {
            break;
        }
    }
    // Gone already where the machine has ended.
    let _ = stream.shutdown(Shutdown::Both);
    let _ = reader.join();
    Ok(())
}
