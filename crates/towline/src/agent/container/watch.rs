//! Learns of processes' ends: one epoll over pidfds.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use rustix::event::epoll;

use super::held;

/// Ends reported at a time.
const BATCH: usize = 16;

/// Processes that containers depend on.
#[derive(Debug)]
pub(super) struct Watcher {
    epoll: OwnedFd,
    /// By process id: the container and the pidfd.
    watched: Mutex<HashMap<u32, (String, OwnedFd)>>,
}

impl Watcher {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self {
            epoll,
            watched: Mutex::default(),
        })
    }

    /// Reports `container` when the process behind `pidfd` ends. A second time is harmless.
    pub(super) fn watch(&self, container: &str, pid: u32, pidfd: OwnedFd) -> io::Result<()> {
        let mut watched = held(&self.watched);
        if watched.get(&pid).is_some_and(|(name, _)| name == container) {
            return Ok(());
        }
        epoll::add(
            &self.epoll,
            &pidfd,
            epoll::EventData::new_u64(pid.into()),
            epoll::EventFlags::IN,
        )?;
        watched.insert(pid, (container.to_owned(), pidfd));
        Ok(())
    }

    /// Waits until a process ends; the containers that depended on it.
    pub(super) fn ended(&self) -> io::Result<Vec<String>> {
        let mut events = Vec::with_capacity(BATCH);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            None,
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut watched = held(&self.watched);
        // Closing the pidfd takes it out of the epoll.
        Ok(events
            .iter()
            .filter_map(|event| watched.remove(&u32::try_from(event.data.u64()).ok()?))
            .map(|(container, _)| container)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::process::ProcessId;
    use std::process::Command;

    #[test]
    fn an_end_is_reported_once_and_only_its_own() {
        let watcher = Watcher::new().expect("epoll exists");
        let mut children: Vec<_> = (0..2)
            .map(|_| {
                Command::new("sleep")
                    .arg("60")
                    .spawn()
                    .expect("sleep exists")
            })
            .collect();
        for (child, name) in children.iter().zip(["a", "b"]) {
            for _ in 0..2 {
                let pidfd = ProcessId::of(child.id())
                    .and_then(|id| id.open())
                    .expect("ours")
                    .expect("runs");
                watcher
                    .watch(name, child.id(), pidfd)
                    .expect("may be watched");
            }
        }
        children[1].kill().expect("ours");
        assert_eq!(watcher.ended().expect("works"), ["b"]);
        children[0].kill().expect("ours");
        assert_eq!(watcher.ended().expect("works"), ["a"]);
        for mut child in children {
            child.wait().expect("ours");
        }
    }
}
