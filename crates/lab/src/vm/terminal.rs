//! Edge: terminals: the one that somebody sits at here, and the one that a command has in a guest.
//!
//! Keys go through as they are pressed, so the guest's terminal is what makes a signal of Ctrl-C, and what echoes.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{self, OptionalActions, SpecialCodeIndex, Termios, Winsize};

use super::frame::{MAX_LEN, Size, Terminal};

/// Of a terminal that does not say its size.
const USUAL: Size = Size {
    rows: 24,
    columns: 80,
};

/// The terminal at this process' stdin, as a command elsewhere is to have one; the usual one where there is none.
pub(super) fn own() -> Terminal {
    Terminal {
        kind: std::env::var("TERM").unwrap_or_default(),
        size: own_size().unwrap_or(USUAL),
    }
}

/// How large it is, if it is one and says so.
pub(super) fn own_size() -> Option<Size> {
    let size = termios::tcgetwinsize(io::stdin()).ok()?;
    Some(Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
    .filter(|size| size.rows > 0 && size.columns > 0)
}

/// A terminal that passes on every key; put back when the value goes.
pub(super) struct Raw(Termios);

impl Raw {
    /// This process' stdin.
    pub(super) fn set() -> anyhow::Result<Self> {
        let before = termios::tcgetattr(io::stdin()).context("can't ask the terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)
            .context("can't set the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// A command's terminal: what somebody would see and type at.
#[derive(Debug)]
pub(super) struct Screen(File);

impl Screen {
    /// A new one, which `command` will have for its three streams, and for the signals of its keys.
    pub(super) fn of(command: &mut Command, terminal: &Terminal) -> io::Result<Self> {
        let screen =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::grantpt(&screen)?;
        rustix::pty::unlockpt(&screen)?;
        let name = rustix::pty::ptsname(&screen, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let inner: OwnedFd = rustix::fs::open(&*name, flags, Mode::empty())?;
        let screen = Self(File::from(screen));
        screen.resize(terminal.size)?;
        if !terminal.kind.is_empty() {
            command.env("TERM", &terminal.kind);
        }
        command
            .stdin(Stdio::from(inner.try_clone()?))
            .stdout(Stdio::from(inner.try_clone()?))
            .stderr(Stdio::from(inner));
        // SAFETY: between fork and exec only system calls are made, which are async-signal-safe and touch no memory of
        // this process. Safe code has no way to make the child, and not this process, the leader of a session.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                // Who starts this in the background ignores them, and a shell that ignored one can't trap it.
                for key in [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP] {
                    if libc::signal(key, libc::SIG_DFL) == libc::SIG_ERR {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
            });
        }
        Ok(screen)
    }

    /// The same terminal, for another thread.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Gives it another size; who runs in it is told by SIGWINCH.
    pub(super) fn resize(&self, size: Size) -> io::Result<()> {
        let size = Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(termios::tcsetwinsize(&self.0, size)?)
    }

    /// What nobody types any more: an end of input as Ctrl-D makes one, which on a begun line only ends the line.
    pub(super) fn end(&mut self) -> io::Result<()> {
        let key = termios::tcgetattr(&self.0)?.special_codes[SpecialCodeIndex::VEOF];
        io::Write::write_all(&mut self.0, &[key, key])
    }

    /// Hands on what is shown, until the command has ended or `to` wants no more. A program that the command has left behind
    /// may go on writing: nobody waits for it.
    pub(super) fn pump(&mut self, ended: &OwnedFd, mut to: impl FnMut(Vec<u8>) -> bool) {
        let mut buffer = vec![0; MAX_LEN];
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::IN),
            ];
            match rustix::event::poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            // All that was written before the end can be read now: asking moves it along (n_tty_poll).
            if !fds[0].revents().contains(PollFlags::IN) {
                return;
            }
            match self.0.read(&mut buffer) {
                Ok(len @ 1..) if to(buffer[..len].to_vec()) => {}
                // EIO: nobody has the terminal any more.
                _ => return,
            }
        }
    }
}

impl io::Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags};
    use std::io::Write;

    /// Runs a script in a terminal, types something once it shows something, and returns what is shown and how it ends.
    fn shown(script: &str, typed: &[u8]) -> (String, Option<i32>) {
        let size = Size {
            rows: 33,
            columns: 111,
        };
        let terminal = Terminal {
            kind: "vt220".to_owned(),
            size,
        };
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut screen = Screen::of(&mut command, &terminal).unwrap();
        let mut child = command.spawn().unwrap();
        // It has the terminal's other end no more than any guest.
        drop(command);
        let mut keys = screen.try_clone().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let mut shown = Vec::new();
        screen.pump(&ended, |bytes| {
            if shown.is_empty() {
                keys.write_all(typed).unwrap();
            }
            shown.extend(bytes);
            true
        });
        let status = child.wait().unwrap();
        (String::from_utf8(shown).unwrap(), status.code())
    }

    #[test]
    fn a_command_has_a_terminal_of_this_size_and_kind() {
        let (text, code) = shown(
            "stty size; echo $TERM; test -t 0 -a -t 1 -a -t 2; exit $((42 + $?))",
            b"",
        );
        assert_eq!((text.as_str(), code), ("33 111\r\nvt220\r\n", Some(42)));
    }

    #[test]
    fn keys_are_its_input_and_its_signals() {
        let (text, code) = shown("echo ready; read line; echo \"<$line>\"", b"a word\n");
        assert_eq!(
            (text.as_str(), code),
            ("ready\r\na word\r\n<a word>\r\n", Some(0))
        );
        let wait = "trap 'echo caught; exit 7' INT; echo ready; read line; echo not reached";
        let (text, code) = shown(wait, b"\x03");
        assert!(
            text.contains("caught") && !text.contains("not reached"),
            "{text}"
        );
        assert_eq!(code, Some(7));
    }

    #[test]
    fn what_a_command_leaves_behind_holds_nobody_up() {
        let (text, code) = shown("trap '' HUP; (sleep 600 & echo $!)", b"");
        assert_eq!(code, Some(0));
        let pid = text.trim().parse().ok().and_then(Pid::from_raw).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
}
