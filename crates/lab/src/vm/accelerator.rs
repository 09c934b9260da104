//! How a virtual machine's processor is had: by the kernel (KVM) where that really works, else by software (TCG).
//!
//! A machine that offers `/dev/kvm` may still be unable to run a guest: where it is itself a virtual machine, guests
//! can hang in their first instructions. So one is booted to see, once for each boot of this machine.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::image::Image;
use super::machine::{QEMU, quoted};
use crate::interrupt;

/// How long the first line of a kernel takes under KVM, many times over.
const FIRST_SIGN: Duration = Duration::from_secs(5);
/// How long it may take from there to its first program.
const BOOT: Duration = Duration::from_secs(20);
/// What a guest shows that was started only to see whether it boots.
const PROBED: &str = "towline lab guest: it boots";

/// Of which kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Accelerator {
    /// The kernel's virtual machines
    Kvm,
    /// Software emulation, which runs everywhere
    #[value(name = "tcg")]
    #[serde(rename = "tcg")]
    Software,
}

/// What was found, and why it is not KVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Probed {
    pub(crate) accelerator: Accelerator,
    /// Empty with KVM.
    pub(crate) why: String,
}

impl Accelerator {
    /// For people.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Software => "software emulation",
        }
    }

    /// QEMU's option. 64 MiB of translated code are enough for these guests; by itself it takes a gigabyte.
    pub(super) const fn option(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Software => "tcg,tb-size=64",
        }
    }

    /// The processor that a guest sees.
    pub(super) const fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Software => "max",
        }
    }
}

/// What was found since this machine booted, beside the image it was found with.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    boot: String,
    found: Probed,
}

/// Looks which one works here. A guest that is tried writes into `folder`.
pub(crate) fn probe(image: &Image, folder: &Path) -> anyhow::Result<Probed> {
    let software = |why: String| Probed {
        accelerator: Accelerator::Software,
        why,
    };
    if let Err(error) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Ok(software(format!("/dev/kvm can't be opened: {error}")));
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = image.folder().join("accelerator.json");
    let remembered = fs::read(&file)
        .ok()
        .and_then(|text| serde_json::from_slice::<Remembered>(&text).ok());
    if let Some(remembered) = remembered.filter(|remembered| remembered.boot == boot) {
        return Ok(remembered.found);
    }
    let found = match boots(image, folder)? {
        Ok(()) => Probed {
            accelerator: Accelerator::Kvm,
            why: String::new(),
        },
        Err(why) => software(why),
    };
    let remembered = Remembered { boot, found };
    let text = serde_json::to_vec(&remembered).context("words are plain data")?;
    // Where the image is another's it is looked for again each time.
    let _ = write_whole(&file, &text);
    Ok(remembered.found)
}

fn write_whole(file: &Path, text: &[u8]) -> std::io::Result<()> {
    let new = file.with_extension(format!("new-{}", std::process::id()));
    fs::write(&new, text)?;
    fs::rename(&new, file)
}

/// Whether a guest boots with KVM, or why not.
fn boots(image: &Image, folder: &Path) -> anyhow::Result<Result<(), String>> {
    let log = folder.join("kvm-probe.log");
    let mut child = Command::new(QEMU)
        .args([
            "-name",
            "towline-kvm-probe",
            "-machine",
            "pc",
            "-accel",
            "kvm",
        ])
        .args([
            "-cpu",
            Accelerator::Kvm.cpu(),
            "-m",
            "256",
            "-display",
            "none",
        ])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .arg("-kernel")
        .arg(image.kernel())
        .arg("-initrd")
        .arg(image.files())
        .args(["-append", "console=ttyS0 panic=-1 towline.probe=yes"])
        // By this path `lab down` finds it, if this process is killed meanwhile.
        .arg("-chardev")
        .arg(format!("file,id=console,path={}", quoted(&log)))
        .args(["-serial", "chardev:console"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("can't start {QEMU}"))?;
    let seen = watch(&log);
    // Harmless when it has ended.
    let _ = child.kill();
    let _ = child.wait();
    let _ = fs::remove_file(&log);
    seen
}

fn watch(log: &Path) -> anyhow::Result<Result<(), String>> {
    let start = Instant::now();
    loop {
        interrupt::check()?;
        let shown = fs::read(log).unwrap_or_default();
        let shown = String::from_utf8_lossy(&shown);
        if shown.contains(PROBED) {
            return Ok(Ok(()));
        }
        if shown.is_empty() && start.elapsed() > FIRST_SIGN {
            return Ok(Err(format!(
                "a guest shows nothing for {FIRST_SIGN:?} with KVM"
            )));
        }
        if start.elapsed() > BOOT {
            return Ok(Err(format!("a guest does not boot in {BOOT:?} with KVM")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
