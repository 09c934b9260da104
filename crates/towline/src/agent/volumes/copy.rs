//! Copies a tree of files as it is: owners, modes, times, extended attributes, symbolic and hard links, special files.
//!
//! Whoever may write to the source may change it meanwhile: every name is looked up below its own open folder, no
//! symbolic link is followed, and what a file has is read from the file that was opened. Other filesystems that are
//! mounted inside the source are left out, as `cp -x` does; extended attributes of links and special files too.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

/// How deep folders may be nested: each level holds two open folders.
const MAX_DEPTH: usize = 128;
/// Largest extended attribute, and largest list of their names, in bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const MAX_ATTRIBUTE: usize = 64 * 1024;

/// Bytes of a file that are copied before `wanted` is asked again: a second on a slow disk.
const CHUNK: u64 = 8 << 20;

/// Copies what is in `from` into `to`, which is empty, with the attributes of `from` itself; `wanted` is asked before each
/// entry and within long files.
///
/// # Errors
/// Names the entry that can't be copied. What was copied before stays.
pub(super) fn tree(from: &OwnedFd, to: &OwnedFd, wanted: &dyn Fn() -> bool) -> anyhow::Result<()> {
    let mut copier = Copier {
        root: to.as_fd(),
        device: rustix::fs::fstat(from)?.st_dev,
        links: HashMap::new(),
        wanted,
    };
    copier.folder(from, to, Path::new(""), 0)
}

/// Gives one folder what another has: owner, mode, times, extended attributes.
///
/// # Errors
/// When one of them can't be opened or written.
pub(super) fn folder_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let from = rustix::fs::openat(CWD, from, flags, Mode::empty())?;
    let to = rustix::fs::openat(CWD, to, flags, Mode::empty())?;
    attributes(&from, &to)
}

struct Copier<'a> {
    root: BorrowedFd<'a>,
    /// The filesystem that is copied.
    device: u64,
    /// Where a file with several names went first, by its number.
    links: HashMap<u64, PathBuf>,
    wanted: &'a dyn Fn() -> bool,
}

impl Copier<'_> {
    /// `path` is where it is, below the root.
    fn folder(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        path: &Path,
        depth: usize,
    ) -> anyhow::Result<()> {
        if depth > MAX_DEPTH {
            bail!(
                "{}: folders are nested deeper than {MAX_DEPTH}",
                path.display()
            );
        }
        for name in names(from).with_context(|| path.display().to_string())? {
            ask(self.wanted)?;
            let entry = path.join(as_path(&name));
            self.entry(from, to, &name, &entry, depth)
                .with_context(|| entry.display().to_string())?;
        }
        // Last: what was put in has changed its time.
        Ok(attributes(from, to)?)
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CString,
        path: &Path,
        depth: usize,
    ) -> anyhow::Result<()> {
        let stat = match rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW) {
            // It went away since the folder was read.
            Err(Errno::NOENT) => return Ok(()),
            other => other?,
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 && stat.st_dev == self.device {
            if let Some(first) = self.links.get(&stat.st_ino) {
                rustix::fs::linkat(self.root, first, to, name, AtFlags::empty())?;
                return Ok(());
            }
            self.links.insert(stat.st_ino, path.to_owned());
        }
        match kind {
            FileType::RegularFile => file(from, to, name, self.wanted)?,
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, Mode::RWXU)?;
                let inner_to = open(to, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                let inner_from = open(from, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                if rustix::fs::fstat(&inner_from)?.st_dev == self.device {
                    self.folder(&inner_from, &inner_to, path, depth + 1)?;
                } else {
                    attributes(&inner_from, &inner_to)?;
                }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target, to, name)?;
                own(to, name, &stat)?;
            }
            _ => {
                let mode = Mode::from_raw_mode(stat.st_mode);
                rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?;
                own(to, name, &stat)?;
                // The mask of new files may have taken some of it.
                rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
                rustix::fs::utimensat(to, name, &times(&stat)?, AtFlags::SYMLINK_NOFOLLOW)?;
            }
        }
        Ok(())
    }
}

/// The names in a folder.
fn names(folder: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn as_path(name: &CString) -> &Path {
    use std::os::unix::ffi::OsStrExt as _;
    Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()))
}

/// Opens what is in a folder, and never what a link leads to; a pipe does not make it wait.
fn open(folder: &OwnedFd, name: &CString, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)
}

/// Fails once nobody waits for the copy.
pub(super) fn ask(wanted: &dyn Fn() -> bool) -> anyhow::Result<()> {
    if !wanted() {
        bail!("nobody waits for it any more");
    }
    Ok(())
}

fn file(
    from: &OwnedFd,
    to: &OwnedFd,
    name: &CString,
    wanted: &dyn Fn() -> bool,
) -> anyhow::Result<()> {
    let from = open(from, name, OFlags::RDONLY)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&from)?.st_mode);
    if kind != FileType::RegularFile {
        bail!("it was replaced while it was copied: try again");
    }
    let to = open(to, name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
    let (from, mut to) = (File::from(from), File::from(to));
    // By copy_file_range(2), where the filesystem has it without moving bytes.
    while io::copy(&mut (&from).take(CHUNK), &mut to)? > 0 {
        ask(wanted)?;
    }
    Ok(attributes(&OwnedFd::from(from), &OwnedFd::from(to))?)
}

/// Owner, extended attributes, mode and times, in this order: each takes away something of the one after it.
fn attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    let (owner, group) = owners(&stat);
    rustix::fs::fchown(to, owner, group)?;
    extended_attributes(from, to)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    rustix::fs::futimens(to, &times(&stat)?)?;
    Ok(())
}

/// Those that the destination's filesystem does not take are left out, as in Docker.
fn extended_attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let mut names = vec![0; MAX_ATTRIBUTE];
    let length = match rustix::fs::flistxattr(from, &mut names[..]) {
        Err(Errno::NOTSUP) => return Ok(()),
        other => other?,
    };
    names.truncate(length);
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; MAX_ATTRIBUTE];
        let length = match rustix::fs::fgetxattr(from, name, &mut value[..]) {
            // Removed meanwhile, or not for us to read.
            Err(Errno::NODATA | Errno::NOTSUP) => continue,
            other => other?,
        };
        let value = value.get(..length).unwrap_or_default();
        match rustix::fs::fsetxattr(to, name, value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn own(folder: &OwnedFd, name: &CString, stat: &Stat) -> io::Result<()> {
    let (owner, group) = owners(stat);
    rustix::fs::chownat(folder, name, owner, group, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

fn owners(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
}

fn times(stat: &Stat) -> io::Result<Timestamps> {
    let out_of_range = || io::Error::other("it has an impossible time");
    let nanoseconds = |value: u64| i64::try_from(value).map_err(|_| out_of_range());
    Ok(Timestamps {
        last_access: Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: nanoseconds(stat.st_atime_nsec)?,
        },
        last_modification: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: nanoseconds(stat.st_mtime_nsec)?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{fgetxattr, fsetxattr};
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn opened(path: &Path) -> OwnedFd {
        File::open(path).expect("a folder").into()
    }

    fn copied(from: &Path, to: &Path) -> anyhow::Result<()> {
        tree(&opened(from), &opened(to), &|| true)
    }

    #[test]
    fn what_is_copied_is_as_it_was() {
        let (from, to) = (
            tempfile::tempdir().expect("a folder"),
            tempfile::tempdir().expect("a folder"),
        );
        let at = |path: &str| from.path().join(path);
        fs::create_dir_all(at("sub/inner")).expect("folders");
        fs::write(at("sub/file"), vec![7; 300_000]).expect("a file");
        fs::set_permissions(at("sub/file"), fs::Permissions::from_mode(0o6751)).expect("modes");
        fs::hard_link(at("sub/file"), at("again")).expect("a hard link");
        symlink("/etc/shadow", at("link")).expect("a link");
        symlink("nowhere", at("broken")).expect("a link");
        rustix::fs::mknodat(
            CWD,
            at("pipe"),
            FileType::Fifo,
            Mode::from_raw_mode(0o640),
            0,
        )
        .expect("a pipe");
        fs::set_permissions(at("sub"), fs::Permissions::from_mode(0o1770)).expect("modes");
        let old = File::options()
            .write(true)
            .open(at("sub/file"))
            .expect("a file");
        old.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000))
            .expect("a time");

        // Where the filesystem has none, there is none to copy.
        let named = File::open(at("sub/file")).expect("a file");
        let kept = fsetxattr(&named, c"user.kept", b"so", XattrFlags::empty()).is_ok();

        copied(from.path(), to.path()).expect("copied");
        let now = |path: &str| to.path().join(path);
        if kept {
            let copy = File::open(now("sub/file")).expect("there");
            let mut value = [0; 8];
            let length = fgetxattr(&copy, c"user.kept", &mut value);
            assert_eq!(length.map(|length| &value[..length]), Ok(&b"so"[..]));
        }
        let file = fs::metadata(now("sub/file")).expect("there");
        assert_eq!(
            (file.len(), file.mode() & 0o7777, file.mtime()),
            (300_000, 0o6751, 1_000_000)
        );
        assert_eq!(
            file.ino(),
            fs::metadata(now("again")).expect("there").ino(),
            "one file with two names"
        );
        assert_eq!(
            fs::read_link(now("link")).expect("a link"),
            Path::new("/etc/shadow")
        );
        assert_eq!(
            fs::read_link(now("broken")).expect("a link"),
            Path::new("nowhere")
        );
        assert_eq!(
            fs::metadata(now("sub")).expect("there").mode() & 0o7777,
            0o1770
        );
        assert!(now("sub/inner").is_dir());
        let pipe = fs::symlink_metadata(now("pipe")).expect("there");
        let kind = FileType::from_raw_mode(pipe.mode());
        assert_eq!((kind, pipe.mode() & 0o7777), (FileType::Fifo, 0o640));
        let same = |path: &Path| {
            fs::metadata(path)
                .map(|m| (m.mode(), m.uid(), m.gid()))
                .expect("there")
        };
        assert_eq!(same(from.path()), same(to.path()), "the folder itself too");
    }

    #[test]
    fn folders_without_end_and_readers_that_went_away_end_it() {
        let (from, to) = (
            tempfile::tempdir().expect("a folder"),
            tempfile::tempdir().expect("a folder"),
        );
        let mut deep = from.path().to_owned();
        for _ in 0..=MAX_DEPTH {
            deep.push("d");
        }
        fs::create_dir_all(&deep).expect("folders");
        let error = copied(from.path(), to.path()).expect_err("too deep");
        assert!(format!("{error:#}").contains("nested deeper"), "{error:#}");
        let to = tempfile::tempdir().expect("a folder");
        let error =
            tree(&opened(from.path()), &opened(to.path()), &|| false).expect_err("nobody waits");
        assert!(format!("{error:#}").contains("nobody waits"), "{error:#}");
    }

    #[test]
    fn a_long_file_is_copied_whole_and_ends_when_nobody_waits() {
        let folder = || tempfile::tempdir().expect("a folder");
        let (from, to) = (folder(), folder());
        let length = 2 * CHUNK + 3;
        let long = File::create(from.path().join("long")).expect("a file");
        long.set_len(length).expect("a long file, of holes");
        std::os::unix::fs::FileExt::write_all_at(&long, b"end", length - 3).expect("written");
        copied(from.path(), to.path()).expect("copied");
        let copy = fs::read(to.path().join("long")).expect("there");
        assert_eq!(copy.len() as u64, length);
        assert!(copy.ends_with(b"\0end"));

        // Until the first part of it is there.
        let to = folder();
        let asked = std::cell::Cell::new(0);
        let wanted = || asked.replace(asked.get() + 1) == 0;
        tree(&opened(from.path()), &opened(to.path()), &wanted).expect_err("nobody waits");
        let begun = fs::metadata(to.path().join("long")).expect("there");
        assert_eq!(begun.len(), CHUNK);
    }
}
