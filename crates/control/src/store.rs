//! Where a manager keeps what it must not forget: keys and values, changed in batches that happen whole or not at all.
//!
//! The seam is [`Store`]: [`RedbStore`] is one file, [`MemoryStore`] its twin for tests. A manager holds all of it in memory and
//! reads a store only when it begins; what a store must do well is to make a batch durable before anybody is told of it.

mod redb;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

pub use self::redb::RedbStore;

/// One change of a batch: a key with its new value, or without one to remove it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The key.
    pub key: String,
    /// The value, JSON in all uses of this crate; `None` removes the key.
    pub value: Option<String>,
}

/// A durable map that changes in atomic batches.
pub trait Store: Send {
    /// Everything that was committed.
    fn load(&mut self) -> Result<BTreeMap<String, String>, StoreError>;

    /// Makes a batch durable. After an error it is durable whole or not at all, which only [`Self::load`] tells.
    fn commit(&mut self, batch: &[Write]) -> Result<(), StoreError>;
}

/// Why a store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("failed to {action} {path}: {cause}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The file system, or what this user may have of it, is full.
    #[error("no space left for {path}: make room, and the manager goes on by itself", path = .path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// The file is no store.
    #[error("{path} is not a towline store: move it away, or name another state folder", path = .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The file was changed by something else than a store.
    #[error(
        "{path} is damaged ({cause}): restore it from a backup, or move it away, and the manager learns from its hosts what runs",
        path = .path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        cause: String,
    },
    /// Another process has the file open as a store.
    #[error("{path} is in use by another process: stop the other agent first", path = .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// A store that forgets when its last clone goes: for tests, where a clone outlives a manager as a disk outlives a process.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore(Arc<Mutex<BTreeMap<String, String>>>);

impl Store for MemoryStore {
    fn load(&mut self) -> Result<BTreeMap<String, String>, StoreError> {
        Ok(self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone())
    }

    fn commit(&mut self, batch: &[Write]) -> Result<(), StoreError> {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for Write { key, value } in batch {
            match value {
                Some(value) => map.insert(key.clone(), value.clone()),
                None => map.remove(key),
            };
        }
        Ok(())
    }
}
