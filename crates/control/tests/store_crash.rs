//! A process that writes the store is killed with SIGKILL, again and again: what it acknowledged is there.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use control::store::Write;
use control::{RedbStore, Store};

/// Tells the process that this test starts which folder to write to.
const FOLDER: &str = "TOWLINE_TEST_STORE";
const ROUNDS: u64 = 40;
/// Batches that a round lets the writer acknowledge before it is killed, at most.
const BATCHES: u64 = 24;

/// The same numbers in both processes.
fn random(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The batch of this number: a few values of changing length, some removed, and the number itself.
fn batch(number: u64) -> Vec<Write> {
    let mut writes: Vec<Write> = (0..random(number) % 12)
        .map(|write| {
            let dice = random(number << 8 | write);
            let length = usize::try_from(dice % 5000).unwrap();
            Write {
                key: format!("row/{}", dice >> 32 & 0x3f),
                value: (!dice.is_multiple_of(4))
                    .then(|| format!("{number}:{}", "x".repeat(length))),
            }
        })
        .collect();
    writes.push(Write {
        key: "number".to_owned(),
        value: Some(number.to_string()),
    });
    writes
}

fn number(map: &BTreeMap<String, String>) -> u64 {
    map.get("number").map_or(0, |text| text.parse().unwrap())
}

/// Commits batch after batch and says so, until it is killed.
fn write_for_ever(folder: &Path) {
    let mut store = RedbStore::open(folder).unwrap();
    let first = number(&store.load().unwrap()) + 1;
    let mut out = std::io::stdout().lock();
    for number in first.. {
        store.commit(&batch(number)).unwrap();
        writeln!(out, "\nacknowledged {number}").unwrap();
    }
}

#[test]
fn a_killed_writer_has_lost_nothing_that_it_acknowledged() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        write_for_ever(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let (mut model, mut done) = (BTreeMap::new(), 0);
    for round in 0..ROUNDS {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "a_killed_writer_has_lost_nothing_that_it_acknowledged",
            ])
            .arg("--nocapture")
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let acknowledged = lines.map_while(Result::ok).filter_map(|line| {
            let number = line.strip_prefix("acknowledged ")?;
            Some(number.parse::<u64>().unwrap())
        });
        let mut last = done;
        let patience = random(round) % BATCHES;
        for (seen, number) in (0..).zip(acknowledged) {
            last = number;
            if seen == patience {
                // Into the middle of what comes next, wherever that is.
                std::thread::sleep(Duration::from_micros(random(!round) % 1500));
                writer.kill().unwrap();
            }
        }
        writer.wait().unwrap();

        let loaded = RedbStore::open(folder.path()).unwrap().load().unwrap();
        let found = number(&loaded);
        assert!(
            found == last || found == last + 1,
            "round {round}: {last} was acknowledged, {found} is there"
        );
        for number in done + 1..=found {
            for Write { key, value } in batch(number) {
                match value {
                    Some(value) => model.insert(key, value),
                    None => model.remove(&key),
                };
            }
        }
        assert_eq!(loaded, model, "round {round}, batch {found}");
        done = found;
    }
    assert!(done > ROUNDS, "only {done} batches in {ROUNDS} rounds");
}
