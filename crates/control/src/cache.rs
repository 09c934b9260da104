//! What an agent knew, for the agent after it: a file of the manager's own messages.
//!
//! An agent that starts while no manager answers takes its tables from here, so that its host forwards at once. The file holds
//! the messages that tables are made of ([`is_kept`]), as they came off the wire, behind one another:
//!
//! ```text
//!   magic "towcache1"  │ length u32 │ CRC-32 of length and body u32 │ body: one message │ length │ …
//! ```
//!
//! Reading them again makes the same tables, because rows are registers: an older one never overwrites a newer one, however
//! often it comes. What is appended is written ten times a second at most, and when the file has outgrown its tables it is written anew.
//!
//! Nothing here is precious. A file that is damaged loses what follows the damage, one of another cluster is thrown away, each
//! with a line in the log, and a manager that answers tells everything again. So nothing is fsynced either: a killed process
//! leaves the kernel's pages behind, and a power cut takes the containers along.
//!
//! The file's time of change says when a manager was last heard.

use std::fs::{File, FileTimes, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::{BufMut, Bytes, BytesMut};

use crate::limits::FRAME_MAX;
use crate::message::ToAgent;

const MAGIC: &[u8; 9] = b"towcache1";
const HEADER: usize = 8;
/// A file below this size is not written anew for its size.
const REWRITE_MIN: u64 = 256 * 1024;
/// How often the file's time follows a manager that is connected.
const TOUCH_EVERY: Duration = Duration::from_secs(1);
/// The wait after a write that failed.
const RETRY: Duration = Duration::from_secs(30);

/// Whether a table is made of this message.
#[must_use]
pub(crate) fn is_kept(message: &ToAgent) -> bool {
    match message {
        ToAgent::Welcome { .. }
        | ToAgent::Hosts { .. }
        | ToAgent::Network(_)
        | ToAgent::Services { .. }
        | ToAgent::Ingress(_)
        | ToAgent::Rows(_)
        | ToAgent::RowLost { .. }
        | ToAgent::Lease { .. } => true,
        // Whoever hears of a network's end writes the file anew, without it.
        ToAgent::NetworkRemoved { .. }
        | ToAgent::Joined { .. }
        | ToAgent::Peer { .. }
        | ToAgent::Reject { .. }
        | ToAgent::Heartbeat
        | ToAgent::Owned { .. }
        | ToAgent::Misdelivered { .. }
        | ToAgent::Corrections { .. }
        | ToAgent::Inspect { .. }
        | ToAgent::Reply { .. } => false,
    }
}

/// What an earlier agent left behind.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Its messages, in order.
    pub(crate) messages: Vec<ToAgent>,
    /// How long ago a manager was last heard, by the wall clock.
    pub(crate) age: Duration,
}

/// The open file.
#[derive(Debug)]
pub(crate) struct TableCache {
    path: PathBuf,
    file: Option<File>,
    pending: BytesMut,
    /// Bytes in the file, and right after it was last written anew.
    size: u64,
    base: u64,
    /// The file lacks something or holds too much.
    outdated: bool,
    touched: Duration,
    retry_at: Duration,
}

impl TableCache {
    /// Reads the file at `path`, if there is one, and goes on from it. Never fails: what cannot be used is not used.
    pub(crate) fn open(path: PathBuf, cluster: &str) -> (Self, Option<Kept>) {
        let cache = Self {
            path,
            file: None,
            pending: BytesMut::new(),
            size: 0,
            base: 0,
            // The first tick writes the file, so that what is appended has something to follow.
            outdated: true,
            touched: Duration::ZERO,
            retry_at: Duration::ZERO,
        };
        let (bytes, age) = match read(&cache.path) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return (cache, None),
            Err(error) => {
                tracing::warn!(path = %cache.path.display(), %error, "cannot read the cached tables");
                return (cache, None);
            }
        };
        let (messages, end) = parse(&bytes);
        if end < bytes.len() {
            // One that was killed while it wrote leaves this too.
            tracing::warn!(
                path = %cache.path.display(), at = end, of = bytes.len(),
                "the cached tables end in the middle or are damaged: what follows is thrown away"
            );
        }
        let foreign = messages.iter().any(|message| matches!(message, ToAgent::Welcome { cluster: other, .. } if other != cluster));
        if foreign {
            tracing::warn!(path = %cache.path.display(), "the cached tables are another cluster's: thrown away");
            return (cache, None);
        }
        (cache, Some(Kept { messages, age }))
    }

    /// Adds a message, as it came, to what is to be written.
    pub(crate) fn record(&mut self, message: &[u8]) {
        // A file that is to be written anew gets it with all else.
        if !self.outdated {
            put(&mut self.pending, message);
        }
    }

    /// The file holds what is gone: it is to be written anew.
    pub(crate) fn outdate(&mut self) {
        self.outdated = true;
    }

    /// Whether [`Self::rewrite`] is due at `now`.
    pub(crate) fn wants_rewrite(&self, now: Duration) -> bool {
        let grown = self.size + self.pending.len() as u64 > REWRITE_MIN.max(self.base * 2);
        (self.outdated || grown) && now >= self.retry_at
    }

    /// Writes the file anew, beside the old one, and puts it in its place.
    pub(crate) fn rewrite(&mut self, messages: &[ToAgent], now: Duration) {
        let bytes = whole(messages.iter().map(ToAgent::encode));
        self.pending.clear();
        match replace(&self.path, &bytes) {
            Ok(file) => {
                self.file = Some(file);
                (self.size, self.base) = (bytes.len() as u64, bytes.len() as u64);
                self.outdated = false;
            }
            Err(error) => self.fail(&error, now),
        }
    }

    /// Writes what was recorded. `heard`: a manager is connected.
    pub(crate) fn flush(&mut self, heard: bool, now: Duration) {
        let Some(file) = self.file.as_mut().filter(|_| !self.outdated) else {
            return;
        };
        let mut done = Ok(());
        if !self.pending.is_empty() {
            done = file.write_all(&self.pending);
            self.size += self.pending.len() as u64;
            self.pending.clear();
        }
        if heard && now.saturating_sub(self.touched) >= TOUCH_EVERY {
            self.touched = now;
            let times = FileTimes::new().set_modified(SystemTime::now());
            done = done.and_then(|()| file.set_times(times));
        }
        if let Err(error) = done {
            self.fail(&error, now);
        }
    }

    /// A line for a person, and the whole file again later: what a failed write has left of it is not known.
    fn fail(&mut self, error: &io::Error, now: Duration) {
        tracing::warn!(
            path = %self.path.display(), %error,
            "cannot keep the tables: an agent that starts while no manager answers will not have them"
        );
        self.outdated = true;
        self.retry_at = now + RETRY;
    }
}

fn read(path: &Path) -> io::Result<(Vec<u8>, Duration)> {
    let mut file = File::open(path)?;
    // A clock that was set back makes the future of the past: then nothing is known of the age.
    let age = file.metadata()?.modified()?.elapsed().unwrap_or_default();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok((bytes, age))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    std::fs::rename(&temporary, path)?;
    Ok(file)
}

/// A file of these messages.
pub(crate) fn whole(messages: impl Iterator<Item = Bytes>) -> BytesMut {
    let mut bytes = BytesMut::from(&MAGIC[..]);
    for message in messages {
        put(&mut bytes, &message);
    }
    bytes
}

fn put(to: &mut BytesMut, message: &[u8]) {
    let length = u32::try_from(message.len()).expect("messages are below FRAME_MAX");
    to.put_u32(length);
    to.put_u32(checksum(length, message));
    to.put_slice(message);
}

fn checksum(length: u32, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length.to_be_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// The messages up to the first that is not whole, and where that one begins.
pub(crate) fn parse(bytes: &[u8]) -> (Vec<ToAgent>, usize) {
    let mut messages = Vec::new();
    let Some(mut rest) = bytes.strip_prefix(MAGIC) else {
        return (messages, 0);
    };
    while let Some((message, length)) = next(rest) {
        messages.push(message);
        rest = &rest[length..];
    }
    (messages, bytes.len() - rest.len())
}

fn next(bytes: &[u8]) -> Option<(ToAgent, usize)> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let [length, sum] = [&header[..4], &header[4..]].map(|field| {
        u32::from_be_bytes(
            field
                .try_into()
                .expect("half of a header of eight is four bytes"),
        )
    });
    let body = rest.get(..usize::try_from(length).ok().filter(|&n| n <= FRAME_MAX)?)?;
    if checksum(length, body) != sum {
        return None;
    }
    Some((ToAgent::decode(body).ok()?, HEADER + body.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::epoch::Epoch;
    use crate::host::HostId;

    const CLUSTER: &str = "0123456789abcdef";

    fn welcome(cluster: &str) -> ToAgent {
        ToAgent::Welcome {
            cluster: cluster.to_owned(),
            manager: HostId::from_bytes([1; 16]),
            heartbeat: Duration::from_millis(500),
            last_epoch: Epoch::new(1, 7),
            ingress: None,
            warnings: Vec::new(),
        }
    }

    fn lost(counter: u64) -> ToAgent {
        ToAgent::RowLost {
            vni: vtep::Vni::MAX,
            epoch: Epoch::new(1, counter),
        }
    }

    fn kept(path: &Path) -> Option<Vec<ToAgent>> {
        let (_, kept) = TableCache::open(path.to_owned(), CLUSTER);
        kept.map(|kept| kept.messages)
    }

    #[test]
    fn what_was_recorded_is_read_again_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tables");
        let (mut cache, none) = TableCache::open(path.clone(), CLUSTER);
        assert!(none.is_none() && cache.wants_rewrite(Duration::ZERO));
        cache.rewrite(&[welcome(CLUSTER)], Duration::ZERO);
        for counter in 1..4 {
            cache.record(&lost(counter).encode());
        }
        cache.flush(true, Duration::from_secs(9));
        let all = vec![welcome(CLUSTER), lost(1), lost(2), lost(3)];
        assert_eq!(kept(&path), Some(all));
        cache.rewrite(&[welcome(CLUSTER), lost(9)], Duration::ZERO);
        assert_eq!(kept(&path), Some(vec![welcome(CLUSTER), lost(9)]));
        let (_, opened) = TableCache::open(path, CLUSTER);
        assert!(opened.unwrap().age < Duration::from_secs(3600));
    }

    #[test]
    fn a_file_that_has_outgrown_its_tables_is_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (mut cache, _) = TableCache::open(folder.path().join("tables"), CLUSTER);
        cache.rewrite(&[welcome(CLUSTER)], Duration::ZERO);
        let mut written = 0;
        while !cache.wants_rewrite(Duration::ZERO) {
            cache.record(&lost(1).encode());
            written += 1;
            assert!(written < 100_000, "a file grows without end");
        }
        cache.flush(false, Duration::ZERO);
        cache.rewrite(&[welcome(CLUSTER)], Duration::ZERO);
        assert!(!cache.wants_rewrite(Duration::ZERO));
    }

    #[test]
    fn another_clusters_tables_are_thrown_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tables");
        let (mut cache, _) = TableCache::open(path.clone(), CLUSTER);
        cache.rewrite(&[welcome("ffffffffffffffff"), lost(1)], Duration::ZERO);
        assert_eq!(kept(&path), None);
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_the_cache_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (mut cache, _) = TableCache::open(folder.path().join("none/tables"), CLUSTER);
        cache.rewrite(&[welcome(CLUSTER)], Duration::ZERO);
        cache.record(&lost(1).encode());
        cache.flush(true, Duration::ZERO);
        assert!(
            !cache.wants_rewrite(Duration::ZERO),
            "not again ten times a second"
        );
        assert!(cache.wants_rewrite(RETRY));
    }

    proptest! {
        /// A kill may leave any start of the file, a broken disk any bytes: what is before is taken, what follows is not.
        #[test]
        fn damage_costs_what_follows_it(count in 1..20u64, place in any::<prop::sample::Index>(), flip in 1..=255u8, cut: bool) {
            let mut bytes = BytesMut::from(&MAGIC[..]);
            let mut ends = vec![bytes.len()];
            for counter in 0..count {
                put(&mut bytes, &lost(counter).encode());
                ends.push(bytes.len());
            }
            let place = place.index(bytes.len());
            if cut {
                bytes.truncate(place);
            } else {
                bytes[place] ^= flip;
            }
            let whole = ends.iter().filter(|&&end| end <= place).count().saturating_sub(1);
            let (messages, _) = parse(&bytes);
            let expected: Vec<ToAgent> = (0..whole as u64).map(lost).collect();
            prop_assert_eq!(messages, expected);
        }

        #[test]
        fn any_bytes_at_all_are_read(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut file = MAGIC.to_vec();
            file.extend(bytes);
            let (_, end) = parse(&file);
            prop_assert!(end <= file.len());
        }
    }
}
