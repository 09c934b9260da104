//! Edge: a /sys that shows the network namespace a thread is in, as `ip netns exec` gives it.
#![allow(unsafe_code)]

use anyhow::Context;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

/// Gives the calling thread a mount namespace of its own with such a /sys. For a thread about to become a program.
pub(crate) fn mount_fresh() -> anyhow::Result<()> {
    // SAFETY: NEWNS parts this thread's mounts and working directory from the other threads'; no memory and no file
    // descriptor is parted, which is what makes the call unsafe with other flags. rustix has no safe form of it.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .context("can't make a mount namespace")?;
    // Slave, not private: a namespace that is deleted outside must go in here too.
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).context("can't keep mounts to this mount namespace")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("sysfs", "/sys", "sysfs", flags, None)
        .context("can't mount /sys for the namespace")
}
