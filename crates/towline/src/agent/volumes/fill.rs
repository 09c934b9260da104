//! Fills an empty volume from the folder that it hides, as Docker fills one from an image.
//!
//! The copy is made beside the volume and synced; then it gets another name, which says that it is whole; then its
//! entries are moved into the volume. An agent that was killed before that name throws it away and begins again, one
//! killed after it goes on moving.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::{Context as _, bail};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::{DATA, copy, sync};

const COPYING: &str = "copying";
const COPIED: &str = "copied";

/// Copies what is in `target` into the volume in `folder`, when that is empty and `target` is a folder.
///
/// # Errors
/// What could not be copied; the volume is empty then.
pub(super) fn fill(
    folder: &Path,
    target: &Path,
    volumes: &Path,
    wanted: &dyn Fn() -> bool,
) -> anyhow::Result<()> {
    // Another may have been filling it until now.
    copy::ask(wanted)?;
    resume(folder)?;
    let is_empty = fs::read_dir(folder.join(DATA))?.next().is_none();
    if !is_empty || !target.is_dir() {
        return Ok(());
    }
    let source = target.canonicalize()?;
    if volumes.canonicalize()?.starts_with(&source) {
        bail!("the volumes themselves are in it: add 'volume-nocopy'");
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // No link that was put there since is followed.
    let from = rustix::fs::openat2(
        CWD,
        &source,
        flags,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?;
    let copying = folder.join(COPYING);
    fs::create_dir(&copying)?;
    let copied = (|| {
        let to = rustix::fs::openat(CWD, &copying, flags, Mode::empty())?;
        copy::tree(&from, &to, wanted)?;
        rustix::fs::syncfs(&to)?;
        // That may take long, and nothing ends it.
        copy::ask(wanted)
    })();
    if let Err(error) = copied {
        remove(&copying)?;
        return Err(error);
    }
    fs::rename(&copying, folder.join(COPIED))?;
    sync(folder)?;
    resume(folder)
}

/// Ends what an earlier agent began.
///
/// # Errors
/// When the disk doesn't let it.
pub(super) fn resume(folder: &Path) -> anyhow::Result<()> {
    remove(&folder.join(COPYING))?;
    let copied = folder.join(COPIED);
    match fs::symlink_metadata(&copied) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.map(drop)?,
    }
    let data = folder.join(DATA);
    for entry in fs::read_dir(&copied)? {
        let entry = entry?;
        let to = data.join(entry.file_name());
        match rustix::fs::renameat_with(CWD, entry.path(), CWD, &to, RenameFlags::NOREPLACE) {
            // Put there by somebody else meanwhile, who keeps it.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                let error = io::Error::from(error);
                return Err(error).with_context(|| format!("can't move {}", to.display()));
            }
        }
    }
    copy::folder_attributes(&copied, &data)?;
    remove(&copied)?;
    Ok(sync(folder)?)
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
