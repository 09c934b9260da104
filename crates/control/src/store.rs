//! Where a manager keeps what it must not forget: keys and values, changed in batches that happen whole or not at all.
//!
//! [`FileStore`] is one append-only file, read whole at the start, fsynced at each commit:
//!
//! ```text
//!   magic "towline1"  │ length u32 │ CRC-32 of length and body u32 │ body: JSON of one batch │ length │ …
//! ```
//!
//! A batch that a crash cut short can only be the last one, was never acknowledged, and is dropped at the next start. Damaged
//! content anywhere else is an error: acknowledged allocations are never forgotten in silence. When most of the file is outdated, it
//! is written anew beside the old one and put in its place in one step. The seam is [`Store`]: a database takes the file's place
//! without the manager noticing.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// One change of a batch: a key with its new value, or without one to remove it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

    /// Makes a batch durable. After an error, nothing of it is, and the store may be used again.
    fn commit(&mut self, batch: &[Write]) -> Result<(), StoreError>;
}

/// Why a store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("failed to {action} {path}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is no store.
    #[error("{path} is not a towline store: move it away, or name another state folder", path = .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The file is damaged before its end.
    #[error("{path} is damaged at byte {offset}: restore it from a backup", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
    },
    /// Another process has the file open as a store.
    #[error("{path} is in use by another process: stop the other agent first", path = .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

const MAGIC: &[u8; 8] = b"towline1";
const HEADER: usize = 8;
/// A file below this size is never rewritten.
const COMPACT_MIN: u64 = 256 * 1024;

/// A store in one file.
#[derive(Debug)]
pub struct FileStore {
    path: PathBuf,
    file: File,
    /// Where the last whole batch ends.
    end: u64,
    /// Bytes of keys and values that are current, to know when rewriting pays.
    live: u64,
    map: HashMap<String, String>,
}

impl FileStore {
    /// Opens `folder/store`, making both with access for their owner alone. One process at a time.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        use std::os::unix::fs::DirBuilderExt;
        let at_folder = |action| error(action, folder);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(at_folder("make"))?;
        let path = folder.join("store");
        let file = open_file(&path, false)?;
        lock(&file, &path)?;
        let mut store = Self {
            path,
            file,
            end: 0,
            live: 0,
            map: HashMap::new(),
        };
        store.read()?;
        sync_folder(folder)?;
        Ok(store)
    }

    /// Reads the whole file, and cuts off a batch that a crash left unfinished.
    fn read(&mut self) -> Result<(), StoreError> {
        let mut bytes = Vec::new();
        self.file
            .seek(SeekFrom::Start(0))
            .map_err(error("read", &self.path))?;
        self.file
            .read_to_end(&mut bytes)
            .map_err(error("read", &self.path))?;
        self.map.clear();
        self.live = 0;
        if bytes.len() < MAGIC.len() {
            // A crash in the very first write leaves a start of the magic, nothing else.
            if !MAGIC.starts_with(&bytes) {
                return Err(StoreError::Foreign {
                    path: self.path.clone(),
                });
            }
            self.file
                .set_len(0)
                .map_err(error("truncate", &self.path))?;
            self.write_at(0, MAGIC)?;
            self.end = MAGIC.len() as u64;
            return Ok(());
        }
        if !bytes.starts_with(MAGIC) {
            return Err(StoreError::Foreign {
                path: self.path.clone(),
            });
        }
        let mut offset = MAGIC.len();
        loop {
            match next_batch(&bytes[offset..]) {
                Next::Batch { batch, length } => {
                    self.remember(&batch);
                    offset += length;
                }
                Next::End => break,
                Next::Torn => {
                    tracing::warn!(path = %self.path.display(), offset, "dropped a batch that a crash cut short");
                    self.file
                        .set_len(offset as u64)
                        .map_err(error("truncate", &self.path))?;
                    self.file.sync_all().map_err(error("sync", &self.path))?;
                    break;
                }
                Next::Damaged => {
                    return Err(StoreError::Damaged {
                        path: self.path.clone(),
                        offset: offset as u64,
                    });
                }
            }
        }
        self.end = offset as u64;
        Ok(())
    }

    fn remember(&mut self, batch: &[Write]) {
        for Write { key, value } in batch {
            let old = match value {
                Some(value) => {
                    self.live += (key.len() + value.len()) as u64;
                    self.map.insert(key.clone(), value.clone())
                }
                None => self.map.remove(key),
            };
            if let Some(old) = old {
                self.live -= (key.len() + old.len()) as u64;
            }
        }
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let written = self
            .file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.write_all(bytes));
        let synced = written.and_then(|()| self.file.sync_data());
        synced.map_err(|source| {
            // What was half written must not stand between this batch and the next. Where even that fails, the next start
            // sees a torn end, because nothing is appended after a failed truncation but at the same offset.
            let _ = self.file.set_len(offset);
            StoreError::Io {
                action: "write",
                path: self.path.clone(),
                source,
            }
        })
    }

    /// Writes what is current into a new file and puts it in the old one's place.
    fn compact(&mut self) -> Result<(), StoreError> {
        let batch: Vec<Write> = self
            .map
            .iter()
            .map(|(key, value)| Write {
                key: key.clone(),
                value: Some(value.clone()),
            })
            .collect();
        let new_path = self.path.with_extension("new");
        let mut bytes = MAGIC.to_vec();
        // Parts, because a batch's length is 32 bits.
        for part in batch.chunks(4096) {
            bytes.extend(encode(part));
        }
        let mut file = open_file(&new_path, true)?;
        lock(&file, &new_path)?;
        file.write_all(&bytes)
            .and_then(|()| file.sync_all())
            .map_err(error("write", &new_path))?;
        std::fs::rename(&new_path, &self.path).map_err(error("replace", &self.path))?;
        self.file = file;
        self.end = bytes.len() as u64;
        if let Some(folder) = self.path.parent() {
            sync_folder(folder)?;
        }
        Ok(())
    }
}

impl Store for FileStore {
    fn load(&mut self) -> Result<BTreeMap<String, String>, StoreError> {
        self.read()?;
        Ok(self
            .map
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    fn commit(&mut self, batch: &[Write]) -> Result<(), StoreError> {
        let bytes = encode(batch);
        self.write_at(self.end, &bytes)?;
        self.end += bytes.len() as u64;
        self.remember(batch);
        if self.end > COMPACT_MIN && self.end > 4 * self.live {
            // The batch is durable already: a failure here costs disk space, not the acknowledgement.
            if let Err(error) = self.compact() {
                tracing::warn!(%error, "failed to rewrite the store; it goes on growing");
            }
        }
        Ok(())
    }
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

enum Next {
    Batch { batch: Vec<Write>, length: usize },
    End,
    Torn,
    Damaged,
}

/// The first batch of `bytes`, which reach to the end of the file.
fn next_batch(bytes: &[u8]) -> Next {
    if bytes.is_empty() {
        return Next::End;
    }
    // A power loss may leave a tail whose length was kept and whose content was not.
    if bytes.iter().all(|byte| *byte == 0) {
        return Next::Torn;
    }
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Next::Torn;
    };
    let [a, b, c, d, sum @ ..] = *header;
    let Ok(length) = usize::try_from(u32::from_be_bytes([a, b, c, d])) else {
        return Next::Torn;
    };
    let Some(body) = rest.get(..length) else {
        return Next::Torn;
    };
    let batch = (checksum(body) == u32::from_be_bytes(sum))
        .then(|| serde_json::from_slice(body).ok())
        .flatten();
    match batch {
        Some(batch) => Next::Batch {
            batch,
            length: HEADER + length,
        },
        None if rest.len() == length => Next::Torn,
        None => Next::Damaged,
    }
}

fn encode(batch: &[Write]) -> Vec<u8> {
    let body = serde_json::to_vec(batch).expect("strings always serialise");
    let length = u32::try_from(body.len())
        .expect("a batch is bounded by the messages of one turn, far below 4 GiB");
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(checksum(&body).to_be_bytes());
    bytes.extend(body);
    bytes
}

/// Over the length too, so that a batch cannot be read with another's length.
fn checksum(body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(body.len() as u64).to_be_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn open_file(path: &Path, truncate: bool) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(truncate)
        .mode(0o600);
    options.open(path).map_err(error("open", path))
}

fn lock(file: &File, path: &Path) -> Result<(), StoreError> {
    file.try_lock().map_err(|refused| match refused {
        std::fs::TryLockError::WouldBlock => StoreError::InUse {
            path: path.to_path_buf(),
        },
        std::fs::TryLockError::Error(source) => StoreError::Io {
            action: "lock",
            path: path.to_path_buf(),
            source,
        },
    })
}

fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(error("sync", folder))
}

fn error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> StoreError {
    let path = path.to_path_buf();
    move |source| StoreError::Io {
        action,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> Write {
        Write {
            key: key.into(),
            value: Some(value.into()),
        }
    }

    fn remove(key: &str) -> Write {
        Write {
            key: key.into(),
            value: None,
        }
    }

    #[test]
    fn what_was_committed_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = FileStore::open(folder.path()).unwrap();
        store.commit(&[put("a", "1"), put("b", "2")]).unwrap();
        store.commit(&[remove("a"), put("b", "3")]).unwrap();
        assert!(matches!(
            FileStore::open(folder.path()),
            Err(StoreError::InUse { .. })
        ));
        drop(store);
        let loaded = FileStore::open(folder.path()).unwrap().load().unwrap();
        assert_eq!(loaded, BTreeMap::from([("b".into(), "3".into())]));
    }

    /// A crash may leave any start of what was being written: each must load as the state after some number of batches, and
    /// no batch that ends before the cut may be missing.
    #[test]
    fn cut_at_every_byte_leaves_exactly_the_whole_batches() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let mut states = vec![(MAGIC.len() as u64, BTreeMap::new())];
        let mut store = FileStore::open(folder.path()).unwrap();
        for i in 0..6 {
            let mut batch = vec![put(&format!("key{}", i % 5), &"x".repeat(i * 3))];
            if i % 3 == 0 {
                batch.push(remove(&format!("key{}", (i + 1) % 5)));
            }
            store.commit(&batch).unwrap();
            states.push((store.end, store.load().unwrap()));
        }
        drop(store);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            for tail in [&[][..], &[0; 40]] {
                std::fs::write(&path, [&whole[..cut], tail].concat()).unwrap();
                let expected = states
                    .iter()
                    .rev()
                    .find(|(end, _)| *end <= cut as u64)
                    .map(|(_, state)| state.clone());
                match FileStore::open(folder.path()).and_then(|mut store| store.load()) {
                    Ok(loaded) => assert_eq!(loaded, expected.unwrap_or_default(), "cut at {cut}"),
                    Err(StoreError::Foreign { .. }) => {
                        assert!(cut < MAGIC.len() && !tail.is_empty(), "cut at {cut}")
                    }
                    // Zeros after half a batch may complete its length; then it is damage, and said so.
                    Err(StoreError::Damaged { .. }) => assert!(!tail.is_empty(), "cut at {cut}"),
                    Err(error) => panic!("cut at {cut}: {error}"),
                }
            }
        }
    }

    #[test]
    fn damage_before_the_end_is_never_taken_for_an_older_state() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let mut store = FileStore::open(folder.path()).unwrap();
        store.commit(&[put("a", "1")]).unwrap();
        let first_end = usize::try_from(store.end).unwrap();
        store.commit(&[put("b", "2")]).unwrap();
        drop(store);
        let whole = std::fs::read(&path).unwrap();
        for offset in MAGIC.len() + HEADER..first_end {
            let mut bytes = whole.clone();
            bytes[offset] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            let refused = FileStore::open(folder.path());
            assert!(
                matches!(refused, Err(StoreError::Damaged { offset: 8, .. })),
                "{offset}: {refused:?}"
            );
        }
        std::fs::write(&path, "something else").unwrap();
        assert!(matches!(
            FileStore::open(folder.path()),
            Err(StoreError::Foreign { .. })
        ));
    }

    #[test]
    fn a_file_of_outdated_values_is_rewritten() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = FileStore::open(folder.path()).unwrap();
        let long = "x".repeat(16 * 1024);
        for i in 0..40 {
            store
                .commit(&[put("a", &long), put("i", &i.to_string())])
                .unwrap();
            assert!(store.end <= COMPACT_MIN + 20 * 1024);
        }
        store.commit(&[put("after", "1")]).unwrap();
        let before = store.load().unwrap();
        drop(store);
        let after = FileStore::open(folder.path()).unwrap().load().unwrap();
        assert_eq!(before, after);
        assert_eq!(after["i"], "39");
        assert_eq!(after["after"], "1");
    }
}
