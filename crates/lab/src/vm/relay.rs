//! `towline lab relay`: stands on this machine for a command that runs in a guest.
//!
//! Its stdin, stdout, stderr and exit code are the command's, and when it is killed the command is. So whatever starts
//! programs in a host of the lab starts them in a guest by the same code.

use std::io::{self, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use super::frame::{Frame, MAX_LEN, Request};
use super::machine::Machine;
use super::terminal::{self, Raw};
use crate::agent;
use crate::name::LabName;
use crate::state::Folder;

/// What the relay itself exits with when the guest breaks off, as ssh does.
const BROKEN: u8 = 255;

/// Options of `lab relay`.
#[derive(Debug, clap::Args)]
pub struct RelayArgs {
    /// The lab's name
    #[arg(long)]
    name: LabName,
    /// The host's number
    #[arg(long)]
    host: u16,
    /// Network namespace of the guest to run it in
    #[arg(long)]
    netns: Option<String>,
    /// Give the command a terminal, of the size of this one
    #[arg(long)]
    terminal: bool,
    /// The command and its arguments
    #[arg(
        last = true,
        required = true,
        value_name = "CMD",
        allow_hyphen_values = true
    )]
    command: Vec<String>,
}

/// Runs the command and exits as it does.
pub(crate) fn run(args: &RelayArgs) -> anyhow::Result<ExitCode> {
    let machine = Machine::open(&Folder::of(&args.name), &args.name, args.host)?;
    let request = Request {
        command: args.command.clone(),
        netns: args.netns.clone(),
        terminal: args.terminal.then(terminal::own),
    };
    // Put back before anything else is said.
    let raw = match args.terminal && io::stdin().is_terminal() {
        true => Some(Raw::set()?),
        false => None,
    };
    let ended = relay(&machine, request);
    drop(raw);
    match ended {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(error) => {
            eprintln!("towline: {:#}", machine.explain(error));
            Ok(ExitCode::from(BROKEN))
        }
    }
}

/// A command of this machine that stands for `command` in the guest; with a terminal there if that is wanted.
pub(crate) fn command(
    machine: &Machine,
    netns: Option<&str>,
    terminal: bool,
    command: &Command,
) -> anyhow::Result<Command> {
    let own = agent::program()?;
    let mut relay = Command::new(&own);
    relay
        .args(["lab", "relay", "--name", &machine.lab.to_string()])
        .args(["--host", &machine.number.to_string()]);
    if let Some(netns) = netns {
        relay.args(["--netns", netns]);
    }
    if terminal {
        relay.arg("--terminal");
    }
    relay.arg("--");
    // The guest has the same program, in its PATH.
    if command.get_program() == own.as_os_str() {
        relay.arg("towline");
    } else {
        relay.arg(command.get_program());
    }
    relay.args(command.get_args());
    Ok(relay)
}

fn relay(machine: &Machine, request: Request) -> anyhow::Result<u8> {
    let mut stream = connect(machine)?;
    let has_terminal = request.terminal.is_some();
    Frame::Request(request)
        .write(&mut stream)
        .context("can't ask the guest")?;
    let input = stream.try_clone().context("can't share a connection")?;
    let input = Arc::new(Mutex::new(input));
    if has_terminal {
        let mut signals = Signals::new([SIGWINCH]).context("can't watch for SIGWINCH")?;
        let input = Arc::clone(&input);
        std::thread::spawn(move || {
            for _ in signals.forever() {
                if let Some(size) = terminal::own_size() {
                    let _ = say(&input, &Frame::Resize(size));
                }
            }
        });
    }
    // Both end with the process: a read of a terminal can't be broken off.
    std::thread::spawn(move || feed(&input));
    loop {
        match Frame::read(&mut stream).context("the guest broke the connection")? {
            Some(Frame::Output(bytes)) => pass(&mut io::stdout().lock(), &bytes)?,
            Some(Frame::Errors(bytes)) => pass(&mut io::stderr().lock(), &bytes)?,
            Some(Frame::Exit(code)) => return Ok(code),
            Some(Frame::Failed(code, why)) => {
                eprintln!("towline: {}: {why}", machine.name);
                return Ok(code);
            }
            Some(other) => bail!("the guest says something that it should not: {other:?}"),
            None => bail!("the guest ended the connection before the command's end"),
        }
    }
}

/// Connects, and says the secret.
pub(super) fn connect(machine: &Machine) -> anyhow::Result<TcpStream> {
    let to = (Ipv4Addr::LOCALHOST, machine.port);
    let mut stream = match machine.outside()? {
        None => TcpStream::connect(to),
        Some(netns) => netns.run(|| TcpStream::connect(to))?,
    }
    .context("nobody takes commands for the guest")?;
    stream
        .set_nodelay(true)
        .and_then(|()| stream.write_all(&machine.secret))
        .context("can't greet the guest")?;
    Ok(stream)
}

fn say(to: &Mutex<TcpStream>, frame: &Frame) -> io::Result<()> {
    // A message is written whole or the connection is at its end.
    frame.write(&mut *to.lock().unwrap_or_else(PoisonError::into_inner))
}

fn feed(to: &Mutex<TcpStream>) {
    let mut buffer = vec![0; MAX_LEN];
    let mut stdin = io::stdin().lock();
    loop {
        let frame = match stdin.read(&mut buffer) {
            Ok(0) | Err(_) => Frame::InputEnd,
            Ok(len) => Frame::Input(buffer[..len].to_vec()),
        };
        // A guest that hears no more is told of where its answers are read.
        if say(to, &frame).is_err() || frame == Frame::InputEnd {
            return;
        }
    }
}

/// A reader that went away ends the relay, and with it the command.
fn pass(to: &mut impl Write, bytes: &[u8]) -> anyhow::Result<()> {
    to.write_all(bytes)
        .and_then(|()| to.flush())
        .context("can't pass on what the command prints")
}
