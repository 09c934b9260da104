//! A container's own `/etc/resolv.conf` and `/etc/hosts`: files of its folder, mounted at their places.
//!
//! They are made once, so what is edited in them stays; of `hosts` the lines that have the container's own name follow its places. They
//! can't be mounted over by rename: a program of the container that replaces the file writes into it or fails, as with Docker.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::{ADDRESS, upstream};
use crate::agent::Agent;
use crate::agent::state::EndpointRecord;
use crate::shim::dns::{Dns, RESOLV_CONF};
use crate::shim::folder::{Folder, Spec};
use crate::shim::mount::{Mount, Source};

const HOSTS: &str = "/etc/hosts";
/// A container's own file, which its user may have written to, is followed up to so many bytes.
const HOSTS_MAX: u64 = 1 << 20;

/// Makes the files in a container's folder, after the host's own `resolv.conf`, and says where they are to be seen: but where its user has put something else.
///
/// # Errors
/// Names the file that can't be written.
pub(crate) fn mounts(
    folder: &Path,
    of_host: &Path,
    spec: &Spec,
    records: &[EndpointRecord],
) -> anyhow::Result<Vec<Mount>> {
    let files = [
        (
            RESOLV_CONF,
            resolv_conf(&spec.dns, &upstream::host(of_host)),
        ),
        (HOSTS, hosts(spec, records)),
    ];
    let mut mounts = Vec::new();
    for (target, text) in files {
        let target = PathBuf::from(target);
        if spec.mounts.iter().any(|mount| mount.target == target) {
            continue;
        }
        let name = target.file_name().context("a file's path")?;
        let file = folder.join(name);
        fs::write(&file, text).with_context(|| format!("can't write {}", file.display()))?;
        mounts.push(Mount {
            source: Source::Bind(file),
            target,
            readonly: false,
        });
    }
    Ok(mounts)
}

fn resolv_conf(own: &Dns, host: &Dns) -> String {
    let mut text = format!(
        "# made by towline: it answers for the cluster's names and asks others for the rest\nnameserver {ADDRESS}\n"
    );
    let search = if own.search.is_empty() {
        &host.search
    } else {
        &own.search
    };
    let search: Vec<&str> = search
        .iter()
        .map(String::as_str)
        .filter(|domain| *domain != ".")
        .collect();
    if !search.is_empty() {
        let _ = writeln!(text, "search {}", search.join(" "));
    }
    let mut options = if own.options.is_empty() {
        &host.options
    } else {
        &own.options
    }
    .clone();
    if !options.iter().any(|option| option.starts_with("ndots:")) {
        options.push("ndots:0".to_owned());
    }
    let _ = writeln!(text, "options {}", options.join(" "));
    text
}

fn hosts(spec: &Spec, records: &[EndpointRecord]) -> String {
    let mut text = "127.0.0.1\tlocalhost\n\
        ::1\tlocalhost ip6-localhost ip6-loopback\n\
        ff02::1\tip6-allnodes\n\
        ff02::2\tip6-allrouters\n"
        .to_owned();
    for ip in addresses(records) {
        text += &own_line(ip, spec);
    }
    text
}

/// Addresses by which a container may call itself.
fn addresses<'a>(
    records: impl IntoIterator<Item = &'a EndpointRecord>,
) -> impl Iterator<Item = IpAddr> {
    // Its own place on the network of published ports has no name.
    let named = records.into_iter().filter(|record| record.names.is_some());
    named.flat_map(|record| record.ips.iter().copied())
}

fn own_line(ip: IpAddr, spec: &Spec) -> String {
    format!("{ip}\t{} {}\n", spec.name, spec.id)
}

/// Lets a container's own `/etc/hosts` say which places it has, with that which is about to be one. Its lines of other names stay. The
/// caller holds the container's lock.
pub(crate) fn follow(agent: &Agent, folder: &Folder, spec: &Spec, next: Option<&EndpointRecord>) {
    let file = folder.path().join("hosts");
    let is_own = |mount: &Mount| mount.path() == Some(&file) && mount.target == Path::new(HOSTS);
    if !spec.mounts.iter().any(is_own) {
        return;
    }
    let ips: Vec<IpAddr> = agent
        .state
        .read(|state| addresses(state.places(&spec.name).chain(next)).collect());
    if let Err(error) = rewrite(&file, |text| with_addresses(text, &ips, spec)) {
        tracing::warn!(
            "container {}: {} is as it was: {error:#}",
            spec.name,
            file.display()
        );
    }
}

/// What the file says, with these addresses for the container's name and no others.
fn with_addresses(text: &[u8], ips: &[IpAddr], spec: &Spec) -> Vec<u8> {
    let mut missing = ips.to_vec();
    let mut after = Vec::with_capacity(text.len());
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        if let Some(ip) = own_address(line, spec) {
            // Said once of each, and of none that is gone.
            let Some(place) = missing.iter().position(|missing| *missing == ip) else {
                continue;
            };
            missing.remove(place);
        }
        after.extend_from_slice(line);
    }
    if !missing.is_empty() && after.last().is_some_and(|last| *last != b'\n') {
        after.push(b'\n');
    }
    for ip in missing {
        after.extend_from_slice(own_line(ip, spec).as_bytes());
    }
    after
}

/// The address of a line that the agent has written; none of any other.
fn own_address(line: &[u8], spec: &Spec) -> Option<IpAddr> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_whitespace();
    let ip = words.next()?.parse().ok()?;
    (words.eq([spec.name.as_str(), spec.id.as_str()])).then_some(ip)
}

/// Changes a file in its place, because it is mounted. One write has all of it, and what becomes shorter ends in empty lines until it is
/// cut: who reads meanwhile finds no half of a line.
fn rewrite(path: &Path, change: impl FnOnce(&[u8]) -> Vec<u8>) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > HOSTS_MAX {
        bail!("it is no file, or longer than {HOSTS_MAX} bytes");
    }
    let mut before = Vec::new();
    file.by_ref().take(HOSTS_MAX).read_to_end(&mut before)?;
    let mut after = change(&before);
    if after == before {
        return Ok(());
    }
    let length = after.len();
    after.resize(length.max(before.len()), b'\n');
    file.write_all_at(&after, 0)?;
    if after.len() > length {
        file.set_len(u64::try_from(length)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_own_words_count_before_the_hosts() {
        let host = Dns {
            servers: vec!["192.0.2.53".parse().unwrap()],
            search: vec!["a.example".to_owned(), "b.example".to_owned()],
            options: vec!["rotate".to_owned()],
        };
        let lines = |own: &Dns| {
            let text = resolv_conf(own, &host);
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(
            lines(&Dns::default()),
            [
                "nameserver 127.0.0.11",
                "search a.example b.example",
                "options rotate ndots:0"
            ]
        );
        let own = Dns {
            servers: vec!["9.9.9.9".parse().unwrap()],
            search: vec![".".to_owned()],
            options: vec!["ndots:2".to_owned()],
        };
        assert_eq!(lines(&own), ["nameserver 127.0.0.11", "options ndots:2"]);
    }

    fn spec() -> Spec {
        serde_json::from_value(serde_json::json!({
            "id": "0123456789ab", "name": "c1", "command": [], "remove": false, "created": 0, "phase": "ready",
            "client": null, "netns": null,
        }))
        .unwrap()
    }

    #[test]
    fn own_addresses_follow_and_other_lines_stay() {
        let ips = |ips: &[&str]| ips.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<_>>();
        let made = "127.0.0.1\tlocalhost\n10.0.9.2\tc1 0123456789ab\nfd00::2\tc1 0123456789ab\n";
        for (text, own, expected) in [
            (made, &["10.0.9.2", "fd00::2"][..], made),
            (
                made,
                &["10.0.9.2", "fd00::2", "10.0.8.2"],
                &format!("{made}10.0.8.2\tc1 0123456789ab\n"),
            ),
            (made, &[], "127.0.0.1\tlocalhost\n"),
            // A person's lines, in whatever form, also of its own addresses.
            (
                "# c1 0123456789ab\n10.0.9.2 c1\n10.0.9.2 c1 0123456789ab more\nnonsense c1 0123456789ab\n  10.0.9.9  c1\t0123456789ab",
                &["10.0.9.3"],
                "# c1 0123456789ab\n10.0.9.2 c1\n10.0.9.2 c1 0123456789ab more\nnonsense c1 0123456789ab\n10.0.9.3\tc1 0123456789ab\n",
            ),
            (
                "no end",
                &["10.0.9.3"],
                "no end\n10.0.9.3\tc1 0123456789ab\n",
            ),
            ("", &["10.0.9.3"], "10.0.9.3\tc1 0123456789ab\n"),
        ] {
            let after = with_addresses(text.as_bytes(), &ips(own), &spec());
            assert_eq!(
                String::from_utf8_lossy(&after),
                expected,
                "{text:?} {own:?}"
            );
        }
        let raw = with_addresses(b"\xff\xfe c1\n", &ips(&["10.0.9.3"]), &spec());
        assert!(raw.starts_with(b"\xff\xfe c1\n"));
    }

    #[test]
    fn a_file_is_changed_in_its_place() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hosts");
        fs::write(&file, "a long line\n").unwrap();
        let inode = fs::metadata(&file).unwrap().ino();
        for text in ["short\n", "a line that is longer than before\n", ""] {
            rewrite(&file, |_| text.as_bytes().to_vec()).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        assert_eq!(fs::metadata(&file).unwrap().ino(), inode);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(
            rewrite(&link, <[u8]>::to_vec).is_err(),
            "not the file that is mounted"
        );
        assert!(rewrite(folder.path(), <[u8]>::to_vec).is_err());
    }
}
