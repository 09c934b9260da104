//! `towline lab guest`: inside a virtual machine, runs what the lab asks for.
//!
//! It listens on the link that leads to the lab alone, and hears nobody who does not begin with the secret that QEMU
//! was given for this guest.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use netns::Netns;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::frame::{Frame, MAX_LEN, Request, SECRET_LEN};
use super::terminal::Screen;

/// Where a guest listens, on its link to the lab.
pub(super) const PORT: u16 = 4788;
/// How long somebody who connects may take to say the secret and what is wanted.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the console shows once commands are taken.
pub(super) const READY: &str = "towline lab guest: ready";

/// Options of `lab guest`.
#[derive(Debug, clap::Args)]
pub struct GuestArgs {
    /// Address to listen at
    #[arg(long)]
    bind: Ipv4Addr,
    /// File with the secret
    #[arg(long)]
    secret: PathBuf,
    /// File to say on that commands are taken
    #[arg(long, default_value = "/dev/console")]
    console: PathBuf,
}

/// Serves until the machine is switched off.
pub(crate) fn run(args: &GuestArgs) -> anyhow::Result<ExitCode> {
    let secret = read_secret(&args.secret)?;
    let listener = TcpListener::bind((args.bind, PORT))
        .with_context(|| format!("can't listen at {}:{PORT}", args.bind))?;
    std::fs::write(&args.console, format!("{READY}\n"))
        .with_context(|| format!("can't write to {}", args.console.display()))?;
    loop {
        // A connection that broke before it was taken is nobody's loss.
        let Ok((stream, from)) = listener.accept() else {
            continue;
        };
        std::thread::spawn(move || {
            if let Err(error) = serve(stream, &secret) {
                eprintln!("towline lab guest: {}: {error:#}", from.ip());
            }
        });
    }
}

fn read_secret(path: &Path) -> anyhow::Result<[u8; SECRET_LEN]> {
    let bytes = std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
    bytes
        .try_into()
        .ok()
        .with_context(|| format!("{} does not hold {SECRET_LEN} bytes", path.display()))
}

/// A running command that ends with the interest in it.
struct Running {
    pid: Pid,
    /// Its id may have passed to another process.
    ended: bool,
}

/// Runs one connection's command to its end.
fn serve(mut stream: TcpStream, secret: &[u8; SECRET_LEN]) -> anyhow::Result<()> {
    stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .context("can't set up the connection")?;
    let mut said = [0; SECRET_LEN];
    stream
        .read_exact(&mut said)
        .context("the secret did not come")?;
    if said != *secret {
        bail!("somebody connected with another secret");
    }
    let Some(Frame::Request(request)) = Frame::read(&mut stream).context("no request came")? else {
        bail!("something else than a request came");
    };
    stream
        .set_read_timeout(None)
        .context("can't set up the connection")?;
    let answers = Arc::new(Mutex::new(
        stream.try_clone().context("can't share the connection")?,
    ));
    let (mut child, streams) = match start(&request) {
        Ok(started) => started,
        Err((code, why)) => return say(&answers, &Frame::Failed(code, why)),
    };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.context("invariant: a child has a process id")?;
    let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .context("can't watch for a command's end")?;
    let running = Arc::new(Mutex::new(Running { pid, ended: false }));
    let input = match &streams {
        Streams::Pipes => child.stdin.take().map(Input::Pipe),
        Streams::Screen(screen) => Some(Input::Screen(
            screen.try_clone().context("can't share a terminal")?,
        )),
    };
    std::thread::spawn({
        let running = Arc::clone(&running);
        move || {
            feed(stream, input);
            let running = running.lock().unwrap_or_else(PoisonError::into_inner);
            if !running.ended {
                // Its group: what a shell has started goes too. Gone by itself at this moment: no loss.
                let _ = rustix::process::kill_process_group(running.pid, Signal::KILL);
            }
        }
    });
    match streams {
        Streams::Pipes => {
            let (output, errors) = (child.stdout.take(), child.stderr.take());
            std::thread::scope(|scope| {
                scope.spawn(|| pump(output, Frame::Output, &answers));
                scope.spawn(|| pump(errors, Frame::Errors, &answers));
            });
        }
        Streams::Screen(mut screen) => {
            screen.pump(&ended, |bytes| say(&answers, &Frame::Output(bytes)).is_ok());
        }
    }
    let status = reap(&mut child, &running)?;
    let by_signal = || status.signal().map_or(1, |signal| 128 + signal);
    let code = status.code().unwrap_or_else(by_signal);
    say(&answers, &Frame::Exit(u8::try_from(code).unwrap_or(1)))
}

/// Waits for the command's end. Its id stays its own until it is noted that nobody may kill it any more.
fn reap(child: &mut Child, running: &Mutex<Running>) -> anyhow::Result<ExitStatus> {
    let pid = running.lock().unwrap_or_else(PoisonError::into_inner).pid;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    while let Err(error) = rustix::process::waitid(WaitId::Pid(pid), options) {
        if error != rustix::io::Errno::INTR {
            return Err(error).context("can't wait for a command");
        }
    }
    let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
    running.ended = true;
    child.wait().context("can't wait for a command")
}

/// Passes on what the command writes, until it writes no more or nobody wants it.
fn pump(from: Option<impl Read>, frame: fn(Vec<u8>) -> Frame, answers: &Mutex<TcpStream>) {
    let mut buffer = vec![0; MAX_LEN];
    let Some(mut from) = from else { return };
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if say(answers, &frame(buffer[..len].to_vec())).is_err() {
            break;
        }
    }
}

fn say(to: &Mutex<TcpStream>, frame: &Frame) -> anyhow::Result<()> {
    let mut stream = to.lock().unwrap_or_else(PoisonError::into_inner);
    frame
        .write(&mut *stream)
        .context("the lab has broken the connection")
}

/// Where a command's streams lead.
enum Streams {
    Pipes,
    Screen(Screen),
}

/// Where what is sent to a command goes.
enum Input {
    Pipe(ChildStdin),
    Screen(Screen),
}

impl Input {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes),
            Self::Screen(screen) => screen.write_all(bytes),
        }
    }
}

/// Hands what comes to the command's stdin, until the connection ends.
fn feed(mut stream: TcpStream, mut input: Option<Input>) {
    loop {
        match Frame::read(&mut stream) {
            Ok(Some(Frame::Input(bytes))) => {
                // A command that reads no more is served all the same.
                if let Some(to) = &mut input
                    && to.write(&bytes).is_err()
                {
                    input = None;
                }
            }
            Ok(Some(Frame::InputEnd)) => {
                // A pipe ends with its writer. A terminal may be gone already.
                if let Some(Input::Screen(screen)) = &mut input {
                    let _ = screen.end();
                } else {
                    input = None;
                }
            }
            Ok(Some(Frame::Resize(size))) => {
                if let Some(Input::Screen(screen)) = &input {
                    let _ = screen.resize(size);
                }
            }
            // The lab says nothing else here.
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return,
        }
    }
}

/// Starts the command, or says with which code to exit and why, as a shell does.
fn start(request: &Request) -> Result<(Child, Streams), (u8, String)> {
    let failed = |error: &dyn std::fmt::Display| (125, error.to_string());
    let Some((program, arguments)) = request.command.split_first() else {
        return Err((125, "there is no command".to_owned()));
    };
    let netns = match &request.netns {
        Some(name) => Netns::open(name),
        None => Netns::current(),
    }
    .map_err(|error| failed(&error))?;
    let mut command = Command::new(program);
    command.args(arguments);
    let streams = match &request.terminal {
        None => {
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0);
            Streams::Pipes
        }
        Some(terminal) => Streams::Screen(
            Screen::of(&mut command, terminal)
                .map_err(|error| failed(&format_args!("can't make a terminal: {error}")))?,
        ),
    };
    let child = netns
        .run(|| command.spawn())
        .map_err(|error| failed(&error))?
        .map_err(|error| {
            let code = match error.kind() {
                io::ErrorKind::NotFound => 127,
                _ => 126,
            };
            (code, format!("can't execute {program}: {error}"))
        })?;
    Ok((child, streams))
}
