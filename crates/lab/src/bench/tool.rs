//! A program that the bench starts in a namespace or a virtual machine: its CPU time counted, its output read, its end awaited.
//! None outlives the bench's interest in it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

use crate::cpu::CpuGroup;
use crate::interrupt;
use crate::spot::Spot;

/// How long a tool may take to start, and to end after its time.
const PATIENCE: Duration = Duration::from_secs(15);

/// A running program. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Tool {
    name: String,
    child: Child,
    lines: Receiver<String>,
}

impl Tool {
    /// Starts it in `spot`, counted in `group`; a virtual machine's time is counted as a whole.
    pub(crate) fn start(
        spot: &Spot,
        group: Option<&CpuGroup>,
        command: &mut Command,
    ) -> anyhow::Result<Self> {
        let name = command
            .get_program()
            .to_string_lossy()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let streams = [Stdio::piped(), Stdio::piped(), Stdio::piped()];
        let mut child = spot.spawn(command, streams)?;
        let stdout = child.stdout.take();
        let (send, lines) = channel();
        std::thread::spawn(move || {
            // Ends with the program, or with the interest in its lines.
            for line in stdout
                .into_iter()
                .flat_map(|stdout| BufReader::new(stdout).lines().map_while(Result::ok))
            {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let tool = Self { name, child, lines };
        if let (Some(group), Spot::Here(_)) = (group, spot) {
            group.add(tool.child.id())?;
        }
        Ok(tool)
    }

    /// Waits for a line that `matches`, by which it says that it is ready.
    pub(crate) fn wait_for(&mut self, matches: impl Fn(&str) -> bool) -> anyhow::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next_line(deadline)? {
                Some(line) if matches(&line) => return Ok(line),
                Some(_) => {}
                None => {
                    self.child
                        .wait()
                        .with_context(|| format!("can't wait for {}", self.name))?;
                    let errors = self.errors();
                    bail!("{} ended early: {errors}", self.name);
                }
            }
        }
    }

    /// Closes its stdin and reads what it prints until it ends, which is to be after `seconds` of work.
    pub(crate) fn finish(mut self, seconds: u32) -> anyhow::Result<String> {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(seconds.into()) + PATIENCE;
        let mut text = String::new();
        while let Some(line) = self.next_line(deadline)? {
            text.push_str(&line);
            text.push('\n');
        }
        let status = self
            .child
            .wait()
            .with_context(|| format!("can't wait for {}", self.name))?;
        if !status.success() && text.trim().is_empty() {
            let errors = self.errors();
            bail!("{} failed ({status}): {errors}", self.name);
        }
        Ok(text)
    }

    /// The same, of a tool whose last line is JSON of one shape.
    pub(crate) fn finish_json<T: DeserializeOwned>(self, seconds: u32) -> anyhow::Result<T> {
        let name = self.name.clone();
        let text = self.finish(seconds)?;
        serde_json::from_str(text.lines().last().unwrap_or_default())
            .with_context(|| format!("{name} reports no result: '{}'", text.trim()))
    }

    /// Its next line; `None` when there are no more.
    fn next_line(&self, deadline: Instant) -> anyhow::Result<Option<String>> {
        loop {
            interrupt::check()?;
            match self.lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => return Ok(Some(line)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                    bail!("{} is stuck: does the path carry its packets?", self.name)
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// What an ended one wrote to stderr.
    fn errors(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            // Whatever can be read is all there is to say.
            let _ = stderr.read_to_string(&mut text);
        }
        text.trim().trim_start_matches("towline: ").to_owned()
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // Harmless when it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
