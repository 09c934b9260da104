//! The key files: this host's identity, and on managers' hosts the cluster's authority.
//!
//! `identity.pem` and `authority.pem` in the state folder, for root's eyes alone, each replaced as a whole. They are apart from
//! the state file and from the manager's store, so that either can be lost or put back without the other.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use control::{Authority, Identity};

use super::state::replace;
use crate::config::Config;

/// What a host in a cluster holds.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    /// This host's own.
    pub(super) identity: Arc<Identity>,
    /// The cluster's, where this host runs a manager or may come to.
    pub(super) authority: Option<Arc<Authority>>,
}

fn identity_path(config: &Config) -> PathBuf {
    config.state_dir.join("identity.pem")
}

fn authority_path(config: &Config) -> PathBuf {
    config.state_dir.join("authority.pem")
}

impl Keys {
    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// A file that is missing or damaged, by name.
    pub(super) fn load(config: &Config) -> anyhow::Result<Self> {
        let path = identity_path(config);
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read this host's key {}: put it back, or run 'towline leave --force' and join again",
                path.display()
            )
        })?;
        let identity = Identity::from_pem(&text).with_context(|| {
            format!("{} is damaged: put a good copy back, or run 'towline leave --force' and join again", path.display())
        })?;
        Ok(Self {
            identity: Arc::new(identity),
            authority: load_authority(config)?,
        })
    }

    /// Writes the files.
    ///
    /// # Errors
    /// When the state folder cannot be written.
    pub(super) fn save(&self, config: &Config) -> anyhow::Result<()> {
        save_identity(config, &self.identity)?;
        match &self.authority {
            Some(authority) => replace(&authority_path(config), authority.to_pem().as_bytes()),
            None => Ok(()),
        }
    }
}

/// Writes this host's identity.
///
/// # Errors
/// When the state folder cannot be written.
pub(super) fn save_identity(config: &Config, identity: &Identity) -> anyhow::Result<()> {
    replace(&identity_path(config), identity.to_pem().as_bytes())
}

/// This host's copy of the cluster's authority, if it has one.
///
/// # Errors
/// A file that cannot be read or is damaged.
pub(super) fn load_authority(config: &Config) -> anyhow::Result<Option<Arc<Authority>>> {
    let path = authority_path(config);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(Arc::new(authority(&text, &path)?))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Removes the files; those that are not there are no error.
///
/// # Errors
/// A file that cannot be removed: it holds a key.
pub(super) fn remove(config: &Config) -> anyhow::Result<()> {
    for path in [identity_path(config), authority_path(config)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// An authority that an operator kept, for a new cluster of the same name.
///
/// # Errors
/// A file that cannot be read or holds no authority.
pub(super) fn import(path: &Path) -> anyhow::Result<Authority> {
    let text = fs::read_to_string(path).with_context(|| {
        format!(
            "cannot read {}: name a file that 'towline ca export' wrote",
            path.display()
        )
    })?;
    authority(&text, path)
}

/// Writes the cluster's authority to a file of the operator's, which must not exist. The cluster's name.
///
/// # Errors
/// Where this host has no authority, or the file exists or cannot be written.
pub(super) fn export(config: &Config, path: &Path) -> anyhow::Result<String> {
    let Some(authority) = load_authority(config)? else {
        bail!(
            "this host does not hold the cluster's authority: run 'towline ca export' on a manager's host \
             ('towline host ls' shows which)"
        );
    };
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let mut file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!(
                "{} exists already: name another file, nothing is overwritten",
                path.display()
            )
        }
        Err(error) => return Err(error).with_context(|| format!("cannot make {}", path.display())),
    };
    let cluster = authority.cluster();
    let text = format!(
        "The certificate authority of Towline cluster {cluster}: certificate and private key.\n\
         Whoever has this file can make any host a member. Restore: towline init --ca FILE\n{}",
        authority.to_pem()
    );
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all());
    if let Err(error) = written {
        // Half a key is of no use, and might be taken for a backup.
        let _ = fs::remove_file(path);
        return Err(error).with_context(|| format!("cannot write {}", path.display()));
    }
    Ok(cluster)
}

fn authority(text: &str, path: &Path) -> anyhow::Result<Authority> {
    Authority::from_pem(text).with_context(|| {
        format!(
            "{} is not the authority of a cluster: name a file that 'towline ca export' wrote",
            path.display()
        )
    })
}
