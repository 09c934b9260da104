//! Hosts that are virtual machines: with a kernel of their own, which need not be this machine's.
//!
//! `lab up --vms N` makes the last N hosts so. A guest begins with [`mod@guest`], which runs what it is asked to; on this
//! side [`mod@relay`] stands for each such command. So the cluster, the matrix and the bench are those of any lab.
//!
//! What this does NOT do: it makes no image (`scripts/vm-image` does), keeps no disk, and lets nobody in from elsewhere:
//! all ports are on loopback or in the lab's switch, and a guest hears only who knows its secret.

mod accelerator;
mod console;
mod frame;
mod guest;
mod image;
mod machine;
mod relay;
mod resources;
mod terminal;

pub use console::ConsoleArgs;
pub use guest::GuestArgs;
pub use relay::RelayArgs;

pub(crate) use accelerator::{Accelerator, probe};
pub(crate) use console::run as console;
pub(crate) use guest::run as guest;
pub(crate) use image::Image;
pub(crate) use machine::{Machine, QEMU, Shape, quoted};
pub(crate) use relay::{command as stand_in, run as relay};
pub(crate) use resources::{check, choose_ports};
