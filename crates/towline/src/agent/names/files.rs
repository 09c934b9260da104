//! A container's own `/etc/resolv.conf` and `/etc/hosts`: files of its folder, mounted at their places.
//!
//! They are made once, so what is edited in them stays. They can't be mounted over by rename: a program of the container that
//! replaces the file writes into it or fails, as with Docker.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::{ADDRESS, upstream};
use crate::agent::state::EndpointRecord;
use crate::shim::dns::{Dns, RESOLV_CONF};
use crate::shim::folder::Spec;
use crate::shim::mount::{Mount, Source};

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
        ("/etc/hosts", hosts(spec, records)),
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
    // Its own place on the network of published ports has no name.
    let named = records.iter().filter(|record| record.names.is_some());
    for ip in named.flat_map(|record| &record.ips) {
        let _ = writeln!(text, "{ip}\t{} {}", spec.name, spec.id);
    }
    text
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
}
