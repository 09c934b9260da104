//! A store in one file: a table of a redb database, one transaction for each batch, synced to the disk before it counts.
//!
//! ```text
//!   FOLDER/store       the database              0600
//!   FOLDER/store.new   one that is being made    gone when it is ready
//!   FOLDER/lock        held while a store is open
//! ```
//!
//! redb copies on write and keeps two roots with checksums: after a crash the newer whole one counts, so a batch that was being
//! written is there whole or not at all, and every batch before it is. The whole file is checked each time it is opened, because
//! acknowledged allocations must not be forgotten in silence. After a failed commit the database is opened anew by the next
//! [`Store::load`].

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageBackend,
    StorageError, TableDefinition,
};

use super::{Store, StoreError, Write};

const TABLE: TableDefinition<'_, &str, &str> = TableDefinition::new("towline");
/// Pages kept in memory: the manager itself holds what is read often.
const CACHE: usize = 4 << 20;

/// A store in one file.
#[derive(Debug)]
pub struct RedbStore {
    path: PathBuf,
    /// `None` after a failure, until it is opened anew.
    database: Option<Database>,
    /// After the database, so that it goes last.
    _lock: File,
}

impl RedbStore {
    /// Opens `folder/store`, making both with access for their owner alone. One at a time.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(error("make", folder))?;
        let path = folder.join("store");
        let lock = lock(&folder.join("lock"), &path)?;
        if !path.try_exists().map_err(error("open", &path))? {
            make(folder, &path)?;
        }
        let database = Some(open(&path)?);
        Ok(Self {
            path,
            database,
            _lock: lock,
        })
    }

    /// What is committed, and nothing kept of a database that failed.
    fn read(&mut self) -> Result<BTreeMap<String, String>, StoreError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open(&self.path)?,
        };
        let loaded = load(&database).map_err(|cause| failure("read", &self.path, cause))?;
        self.database = Some(database);
        Ok(loaded)
    }
}

impl Store for RedbStore {
    fn load(&mut self) -> Result<BTreeMap<String, String>, StoreError> {
        self.read()
    }

    fn commit(&mut self, batch: &[Write]) -> Result<(), StoreError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open(&self.path)?,
        };
        commit(&database, batch).map_err(|cause| failure("write", &self.path, cause))?;
        self.database = Some(database);
        Ok(())
    }
}

fn load(database: &Database) -> Result<BTreeMap<String, String>, redb::Error> {
    let table = database.begin_read()?.open_table(TABLE)?;
    let mut map = BTreeMap::new();
    for entry in table.iter()? {
        let (key, value) = entry?;
        map.insert(key.value().to_owned(), value.value().to_owned());
    }
    Ok(map)
}

fn commit(database: &Database, batch: &[Write]) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    {
        let mut table = transaction.open_table(TABLE)?;
        for Write { key, value } in batch {
            match value {
                Some(value) => table.insert(key.as_str(), value.as_str())?,
                None => table.remove(key.as_str())?,
            };
        }
    }
    Ok(transaction.commit()?)
}

/// Makes an empty store beside its place, then puts it there: a crash leaves a whole store or none.
fn make(folder: &Path, path: &Path) -> Result<(), StoreError> {
    let new = folder.join("store.new");
    match std::fs::remove_file(&new) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => {
            return Err(error("remove", &new)(cause));
        }
        _ => {}
    }
    let file = file(&new, true)?;
    let database = database(backend(file, &new)?, &new)?;
    commit(&database, &[]).map_err(|cause| failure("write", &new, cause))?;
    drop(database);
    std::fs::rename(&new, path).map_err(error("rename", &new))?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(error("sync", folder))
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let file = file(path, false)?;
    // An empty file would be taken for one to begin with; a store is never empty.
    if file.metadata().map_err(error("read", path))?.len() == 0 {
        return Err(StoreError::Foreign {
            path: path.to_owned(),
        });
    }
    let database = database(backend(file, path)?, path)?;
    let tables = database
        .begin_read()
        .map_err(redb::Error::from)
        .and_then(|read| Ok(read.open_table(TABLE).map(drop)?));
    match tables {
        Ok(()) => Ok(database),
        Err(
            redb::Error::TableDoesNotExist(_)
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TableIsMultimap(_),
        ) => Err(StoreError::Foreign {
            path: path.to_owned(),
        }),
        Err(cause) => Err(failure("read", path, cause)),
    }
}

fn database(backend: impl StorageBackend, path: &Path) -> Result<Database, StoreError> {
    let opened = Builder::new()
        .set_cache_size(CACHE)
        .set_check_integrity_on_open(true)
        .create_with_backend(backend);
    opened.map_err(|cause| match cause {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            StoreError::InUse {
                path: path.to_owned(),
            }
        }
        // How redb says that the file does not begin as one of its own.
        DatabaseError::Storage(StorageError::Io(cause))
            if cause.kind() == ErrorKind::InvalidData =>
        {
            StoreError::Foreign {
                path: path.to_owned(),
            }
        }
        other => failure("open", path, other.into()),
    })
}

fn backend(file: File, path: &Path) -> Result<FileBackend, StoreError> {
    FileBackend::new(file).map_err(|cause| failure("open", path, cause.into()))
}

fn file(path: &Path, create_new: bool) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(create_new)
        .mode(0o600)
        .open(path)
        .map_err(error("open", path))
}

/// Takes the lock that stands for the store at `path`.
fn lock(lock: &Path, path: &Path) -> Result<File, StoreError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(lock)
        .map_err(error("open", lock))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse {
            path: path.to_owned(),
        }),
        Err(TryLockError::Error(cause)) => Err(error("lock", lock)(cause)),
    }
}

fn failure(action: &'static str, path: &Path, cause: redb::Error) -> StoreError {
    match cause {
        redb::Error::Io(cause) => error(action, path)(cause),
        other => StoreError::Damaged {
            path: path.to_owned(),
            cause: other.to_string(),
        },
    }
}

fn error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> StoreError {
    let path = path.to_path_buf();
    move |cause| match cause.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            StoreError::Full { path: path.clone() }
        }
        ErrorKind::UnexpectedEof => StoreError::Damaged {
            path: path.clone(),
            cause: "it ends too early".to_owned(),
        },
        _ => StoreError::Io {
            action,
            path: path.clone(),
            cause,
        },
    }
}

#[cfg(test)]
mod tests;
