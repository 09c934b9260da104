//! What a container is to find at places of its own: as a client asks for it, and the rules that hold for all of it.
//!
//! The rules and most of the words are Docker's.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use anyhow::bail;
use serde::{Deserialize, Serialize};

/// Most mounts of one container.
const MAX_MOUNTS: usize = 64;
/// Longest path in bytes (PATH_MAX of Linux, without its end).
const MAX_PATH: usize = 4095;
/// Longest name of a volume in bytes, as of a file.
const MAX_NAME: usize = 255;

/// One mount that a container is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountWanted {
    /// What is mounted.
    pub(crate) source: Wanted,
    /// Where the container finds it.
    pub(crate) target: String,
    /// Whether the container can't write there.
    pub(crate) readonly: bool,
}

/// What is to be mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Wanted {
    /// A file or folder of this host.
    Bind {
        /// Its path.
        source: String,
        /// Make a folder of it when it is missing.
        create: bool,
    },
    /// A volume of this host, made when it is missing.
    Volume {
        /// Its name; none: a random one, for this container alone.
        name: Option<String>,
        /// Leave an empty one empty.
        nocopy: bool,
        /// Labels of one that is made.
        labels: BTreeMap<String, String>,
    },
    /// Memory.
    Tmpfs {
        /// Most bytes; none: half of the memory.
        size: Option<u64>,
        /// Permissions of its root.
        mode: Option<u32>,
    },
}

impl Wanted {
    fn kind(&self) -> &'static str {
        match self {
            Self::Bind { .. } => "bind",
            Self::Volume { .. } => "volume",
            Self::Tmpfs { .. } => "tmpfs",
        }
    }
}

/// Checks what a container is to have, and gives each target its shortest form.
///
/// # Errors
/// Names the mount and what is wrong with it.
pub(crate) fn check(mounts: &mut [MountWanted]) -> anyhow::Result<()> {
    if mounts.len() > MAX_MOUNTS {
        bail!(
            "{} mounts were asked for: a container has at most {MAX_MOUNTS}",
            mounts.len()
        );
    }
    for index in 0..mounts.len() {
        let (before, rest) = mounts.split_at_mut(index);
        let Some(mount) = rest.first_mut() else { break };
        if let Err(error) = check_one(mount) {
            bail!(
                "invalid mount config for type \"{}\": {error}",
                mount.source.kind()
            );
        }
        if before.iter().any(|other| other.target == mount.target) {
            bail!("ContainerSpec: duplicate mount point: {}", mount.target);
        }
    }
    Ok(())
}

fn check_one(mount: &mut MountWanted) -> anyhow::Result<()> {
    if mount.target.is_empty() {
        bail!("field Target must not be empty");
    }
    check_path(&mount.target)?;
    let target = Path::new(&mount.target);
    if !target.is_absolute() {
        bail!(
            "invalid mount path: '{}' mount path must be absolute",
            mount.target
        );
    }
    let target = clean(target);
    if target == Path::new("/") {
        bail!("invalid specification: destination can't be '/'");
    }
    if let Some(target) = target.to_str() {
        mount.target = target.to_owned();
    }
    match &mount.source {
        Wanted::Bind { source, .. } => {
            if source.is_empty() {
                bail!("field Source must not be empty");
            }
            check_path(source)?;
            if !Path::new(source).is_absolute() {
                bail!("invalid bind mount source, must be an absolute path: {source}");
            }
        }
        Wanted::Volume { name: None, .. } if mount.readonly => {
            bail!("must not set ReadOnly mode when using anonymous volumes");
        }
        Wanted::Volume { name, .. } => {
            if let Some(name) = name {
                check_name(name)?;
            }
        }
        Wanted::Tmpfs { mode, .. } => {
            if let Some(mode) = mode.filter(|mode| mode & !0o7777 != 0) {
                bail!("invalid tmpfs mode {mode:o}: at most 7777");
            }
        }
    }
    Ok(())
}

/// Refuses a name that can't be a volume's.
///
/// # Errors
/// Says which names can.
pub(crate) fn check_name(name: &str) -> anyhow::Result<()> {
    if name.starts_with('/') {
        bail!("invalid volume mount source, must not be an absolute path: {name}");
    }
    let allowed = |c: char| c.is_ascii_alphanumeric();
    let valid = name.starts_with(allowed)
        && name
            .chars()
            .all(|c| allowed(c) || matches!(c, '_' | '.' | '-'));
    if !valid {
        bail!(
            "{} includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. \
             If you intended to pass a host directory, use absolute path",
            control::quote(name)
        );
    }
    if name.len() < 2 {
        bail!("volume name is too short, names should be at least two alphanumeric characters");
    }
    if name.len() > MAX_NAME {
        bail!("volume name is too long: at most {MAX_NAME} characters");
    }
    Ok(())
}

fn check_path(path: &str) -> anyhow::Result<()> {
    if path.len() > MAX_PATH {
        bail!("a path is too long: at most {MAX_PATH} bytes");
    }
    if path.contains(char::is_control) {
        bail!(
            "{} is no path that can be mounted: it has control characters",
            control::quote(path)
        );
    }
    Ok(())
}

/// The shortest form of an absolute path, by its text alone: without `.`, `..` and doubled slashes.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_get_their_shortest_form() {
        for (text, short) in [("/a//b/", "/a/b"), ("/a/../b/./c", "/b/c"), ("/../..", "/")] {
            assert_eq!(clean(Path::new(text)), Path::new(short));
        }
    }

    #[test]
    fn what_a_client_may_send_is_bounded() {
        let mount = |target: String| MountWanted {
            source: Wanted::Tmpfs {
                size: None,
                mode: None,
            },
            target,
            readonly: false,
        };
        let mut many: Vec<_> = (0..=MAX_MOUNTS).map(|n| mount(format!("/m{n}"))).collect();
        assert!(check(&mut many).is_err());
        many.pop();
        assert!(check(&mut many).is_ok());
        assert!(check(&mut [mount(format!("/{}", "x".repeat(MAX_PATH)))]).is_err());
        let error = check(&mut [mount("/a\nb".into())]).expect_err("two lines");
        assert!(!error.to_string().contains('\n'), "{error}");
        assert!(check_name(&"x".repeat(MAX_NAME)).is_ok());
        assert!(check_name(&"x".repeat(MAX_NAME + 1)).is_err());
    }
}
