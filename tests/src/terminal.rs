//! A terminal that a test sits at: it reads what a command shows there, presses keys, and changes the window's size.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// How long anything may take to be shown.
const LIMIT: Duration = Duration::from_secs(120);

/// A terminal and the command at it, which is killed when the value goes.
pub struct Sitting {
    screen: File,
    shown: String,
    command: Child,
}

impl Sitting {
    /// Starts a command at a new terminal of this size.
    #[must_use]
    pub fn at(command: &mut Command, rows: u16, columns: u16) -> Self {
        let screen =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        unlockpt(&screen).unwrap();
        let name = ptsname(&screen, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let inner = rustix::fs::open(&*name, flags, Mode::empty()).unwrap();
        tcsetwinsize(&screen, size(rows, columns)).unwrap();
        let [input, output, errors] = [(); 3].map(|()| Stdio::from(inner.try_clone().unwrap()));
        let started = command
            .stdin(input)
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn();
        // This process holds the other end no longer than the command.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self {
            screen: File::from(screen),
            shown: String::new(),
            command: started.unwrap(),
        }
    }

    /// Reads what is shown until `text` is in it.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_for(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        while !self.shown.contains(text) {
            let mut fds = [PollFd::new(&self.screen, PollFlags::IN)];
            let limit = Timespec::try_from(LIMIT).unwrap();
            let ready = rustix::event::poll(&mut fds, Some(&limit)).unwrap();
            assert!(ready > 0, "'{text}' is not shown: {}", self.shown);
            // EIO, once nobody has the other end.
            let len = self.screen.read(&mut buffer).unwrap_or(0);
            assert!(len > 0, "'{text}' was not shown: {}", self.shown);
            self.shown
                .push_str(&String::from_utf8_lossy(&buffer[..len]));
        }
    }

    /// Presses these keys.
    pub fn press(&mut self, keys: &[u8]) {
        self.screen.write_all(keys).unwrap();
    }

    /// Gives the window another size. A terminal tells the session that it leads; this one leads none, so the command is told here.
    pub fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(&self.screen, size(rows, columns)).unwrap();
        kill_process_group(Pid::from_child(&self.command), Signal::WINCH).unwrap();
    }

    /// Whether it reads by lines and echoes, as a shell expects of it.
    #[must_use]
    pub fn is_usual(&self) -> bool {
        let modes = tcgetattr(&self.screen).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Waits for the command's end.
    pub fn wait(&mut self) -> ExitStatus {
        self.command.wait().unwrap()
    }
}

impl Drop for Sitting {
    fn drop(&mut self) {
        if let Ok(None) = self.command.try_wait() {
            let _ = kill_process_group(Pid::from_child(&self.command), Signal::KILL);
            let _ = self.command.wait();
        }
    }
}

const fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
