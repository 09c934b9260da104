use std::sync::{Arc, Mutex, MutexGuard};

use proptest::prelude::*;

use super::*;

type Map = BTreeMap<String, String>;

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

fn apply(map: &mut Map, batch: &[Write]) {
    for Write { key, value } in batch {
        match value {
            Some(value) => drop(map.insert(key.clone(), value.clone())),
            None => drop(map.remove(key)),
        }
    }
}

fn batches() -> impl Strategy<Value = Vec<Vec<Write>>> {
    let key = (0..24u8).prop_map(|key| format!("row/{key}"));
    let value = proptest::option::of((0..2500usize, any::<char>()).prop_map(|(length, letter)| {
        let mut value = letter.to_string();
        value.extend(std::iter::repeat_n('x', length));
        value
    }));
    let write = (key, value).prop_map(|(key, value)| Write { key, value });
    prop::collection::vec(prop::collection::vec(write, 0..12), 1..24)
}

/// A disk in memory that forgets what was not synced, and fails when it is told to.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<Image>>);

#[derive(Debug, Default)]
struct Image {
    /// What survives a power loss.
    synced: Vec<u8>,
    /// What a running program reads.
    current: Vec<u8>,
    /// Steps from the one to the other.
    unsynced: Vec<Step>,
    /// Steps until the disk is full; `None`: never.
    room: Option<usize>,
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, Vec<u8>),
    Length(usize),
}

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

impl Step {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Length(length) => bytes.resize(*length, 0),
            Self::Write(offset, data) => {
                // A write may arrive where the growth before it did not.
                bytes.resize(bytes.len().max(offset + data.len()), 0);
                bytes[*offset..offset + data.len()].copy_from_slice(data);
            }
        }
    }

    /// The parts of it that arrive or not each for itself.
    fn sectors(&self) -> Vec<Self> {
        let Self::Write(offset, data) = self else {
            return vec![self.clone()];
        };
        let starts = (0..data.len()).step_by(SECTOR);
        starts
            .map(|start| {
                let end = data.len().min(start + SECTOR);
                Self::Write(offset + start, data[start..end].to_vec())
            })
            .collect()
    }
}

impl Disk {
    fn image(&self) -> MutexGuard<'_, Image> {
        self.0.lock().unwrap()
    }

    fn step(&self, step: Step) -> io::Result<()> {
        let mut image = self.image();
        match &mut image.room {
            Some(0) => return Err(ErrorKind::StorageFull.into()),
            Some(room) => *room -= 1,
            None => {}
        }
        step.apply(&mut image.current);
        image.unsynced.push(step);
        Ok(())
    }

    /// The disk after a power loss, where each sector not synced arrived or did not as `arrives` says.
    fn after_power_loss(&self, mut arrives: impl FnMut() -> bool) -> Self {
        let image = self.image();
        let mut synced = image.synced.clone();
        for sector in image.unsynced.iter().flat_map(Step::sectors) {
            if arrives() {
                sector.apply(&mut synced);
            }
        }
        Self(Arc::new(Mutex::new(Image {
            current: synced.clone(),
            synced,
            ..Image::default()
        })))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.image().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).unwrap();
        let image = self.image();
        let found = image.current.get(offset..offset + out.len());
        out.copy_from_slice(found.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.step(Step::Length(usize::try_from(length).unwrap()))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut image = self.image();
        image.synced = image.current.clone();
        image.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.step(Step::Write(usize::try_from(offset).unwrap(), data.to_vec()))
    }
}

fn on(disk: &Disk) -> Result<Database, StoreError> {
    database(disk.clone(), Path::new("disk"))
}

#[test]
fn what_was_committed_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = RedbStore::open(folder.path()).unwrap();
    store.commit(&[put("a", "1"), put("b", "2")]).unwrap();
    store.commit(&[remove("a"), put("b", "3")]).unwrap();
    assert!(matches!(
        RedbStore::open(folder.path()),
        Err(StoreError::InUse { .. })
    ));
    drop(store);
    let loaded = RedbStore::open(folder.path()).unwrap().load().unwrap();
    assert_eq!(loaded, Map::from([("b".into(), "3".into())]));
}

#[test]
fn a_store_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("manager");
    let _store = RedbStore::open(&inner).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&inner), 0o700);
    assert_eq!(mode(&inner.join("store")), 0o600);
    assert!(!inner.join("store.new").exists());
}

#[test]
fn a_making_that_a_crash_cut_short_is_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("store.new"), vec![0; 100_000]).unwrap();
    let mut store = RedbStore::open(folder.path()).unwrap();
    assert_eq!(store.load().unwrap(), Map::new());
}

#[test]
fn what_is_no_store_is_refused_and_left_alone() {
    for content in [
        &b""[..],
        b"towline1",
        &[0; 5000],
        b"redb\x1a\x0a\xa9\x0d\x0a",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        std::fs::write(&path, content).unwrap();
        let refused = RedbStore::open(folder.path()).map(drop).unwrap_err();
        assert!(
            matches!(
                refused,
                StoreError::Foreign { .. } | StoreError::Damaged { .. }
            ),
            "{refused}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    let folder = tempfile::tempdir().unwrap();
    let other = Database::create(folder.path().join("store")).unwrap();
    drop(other);
    assert!(matches!(
        RedbStore::open(folder.path()),
        Err(StoreError::Foreign { .. })
    ));
}

/// A changed file is refused, or the change was in what no batch uses any more: it never loads as something else.
#[test]
fn damage_is_never_taken_for_content() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut store = RedbStore::open(folder.path()).unwrap();
    for i in 0..40 {
        store
            .commit(&[put(&format!("key{i}"), &"x".repeat(i * 40))])
            .unwrap();
    }
    let whole = store.load().unwrap();
    drop(store);
    let bytes = std::fs::read(&path).unwrap();
    let used: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
    let mut refused = 0;
    for &at in used.iter().step_by(97) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&path, &damaged).unwrap();
        match RedbStore::open(folder.path()).and_then(|mut store| store.load()) {
            Ok(loaded) => assert_eq!(loaded, whole, "byte {at}"),
            Err(StoreError::Damaged { .. } | StoreError::Foreign { .. }) => refused += 1,
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
    assert!(refused > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// After a power loss at any moment, with any part of what was not synced on the disk, every batch that was acknowledged
    /// is there, and of the one that was not, all or nothing.
    #[test]
    fn a_power_loss_takes_nothing_acknowledged(batches in batches(), moment in any::<prop::sample::Index>(), seed in any::<u64>(), share in 0..=4u32) {
        let disk = Disk::default();
        let store = on(&disk).unwrap();
        commit(&store, &[]).unwrap();
        // The crash comes so many steps into the last batch.
        let (last, before) = batches.split_last().expect("at least one batch");
        let mut acknowledged = Map::new();
        for batch in before {
            commit(&store, batch).unwrap();
            apply(&mut acknowledged, batch);
        }
        let mut next = acknowledged.clone();
        apply(&mut next, last);
        disk.image().room = Some(moment.index(16));
        let committed = commit(&store, last).is_ok();

        let mut random = seed;
        let after = disk.after_power_loss(|| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % 4 < u64::from(share)
        });
        let loaded = load(&on(&after).unwrap()).unwrap();
        if committed {
            prop_assert_eq!(loaded, next);
        } else {
            prop_assert!(loaded == acknowledged || loaded == next);
        }
    }
}

#[test]
fn a_full_disk_is_named_and_goes_on_when_there_is_room() {
    let disk = Disk::default();
    let store = on(&disk).unwrap();
    commit(&store, &[put("a", "1")]).unwrap();
    let big = put("b", &"x".repeat(4 << 20));
    disk.image().room = Some(3);
    let cause = commit(&store, std::slice::from_ref(&big)).unwrap_err();
    let error = failure("write", Path::new("/var/lib/towline/manager/store"), cause);
    assert_eq!(
        error.to_string(),
        "no space left for /var/lib/towline/manager/store: make room, and the manager goes on by itself"
    );
    drop(store);
    disk.image().room = None;
    let store = on(&disk).unwrap();
    assert_eq!(load(&store).unwrap(), Map::from([("a".into(), "1".into())]));
    commit(&store, &[big]).unwrap();
    assert_eq!(load(&store).unwrap().len(), 2);
}
