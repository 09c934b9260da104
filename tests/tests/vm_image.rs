//! What virtual machines boot, as `scripts/vm-image` makes it: whole or not at all, and anew when anything of it has changed;
//! and what is said where it can't be.
//!
//! Ignored by default, as `vms.rs` is: `scripts/test vm` runs them.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use towline_tests::lab::{Lab, one_line};
use towline_tests::{towline_bin, wait_until};

const LIMIT: Duration = Duration::from_secs(120);

/// `scripts/vm-image`, with a build's folder of its own. Ctrl-C ends it, also where these tests were started in the background.
fn maker(build: &Path) -> Command {
    let mut command = Command::new("/usr/bin/env");
    command
        .arg("--default-signal=INT")
        .arg(scripts().join("vm-image"))
        .env("CARGO_TARGET_DIR", build);
    command
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts")
}

/// A build's folder that has the guests' kernel, and no image.
fn build() -> tempfile::TempDir {
    let made = std::env::var("TOWLINE_VM_IMAGE")
        .expect("TOWLINE_VM_IMAGE names an image: run 'scripts/test vm'");
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("vm");
    std::fs::create_dir(&cache).unwrap();
    let mut kernels = 0;
    for entry in std::fs::read_dir(Path::new(&made).parent().unwrap()).unwrap() {
        let name = entry.as_ref().unwrap().file_name();
        if name.to_str().unwrap().starts_with("linux-image-") {
            symlink(entry.unwrap().path(), cache.join(name)).unwrap();
            kernels += 1;
        }
    }
    assert_ne!(kernels, 0, "no kernel beside {made}");
    folder
}

/// What is in a build's folder for virtual machines, beside kernels.
fn made(build: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(build.join("vm"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("linux-image-"))
        .collect();
    names.sort();
    names
}

fn done(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Starts to make an image, and returns while it is half made.
fn half_made(build: &Path) -> Child {
    let child = maker(build)
        .arg("/bin/true")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let is_growing = || {
        let begun = made(build)
            .into_iter()
            .find(|name| name.starts_with(".making-"));
        begun.is_some_and(|name| {
            build
                .join("vm")
                .join(name)
                .join("root/lib/modules/load")
                .is_file()
        })
    };
    wait_until("an image is half made", LIMIT, is_growing);
    child
}

/// Ends a run as a terminal does: all of its processes get the signal.
fn end(child: Child, signal: Signal) -> Output {
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process_group(group, signal).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
#[ignore = "needs QEMU and an image: scripts/test vm"]
fn an_image_appears_whole_or_not_at_all() {
    let build = build();
    let nothing: [&str; 0] = [];
    let output = end(half_made(build.path()), Signal::INT);
    assert!(!output.status.success());
    assert_eq!(output.stdout, b"", "no folder is promised");
    assert_eq!(made(build.path()), nothing);

    end(half_made(build.path()), Signal::KILL);
    let left = made(build.path());
    assert!(
        matches!(&left[..], [name] if name.starts_with(".making-")),
        "{left:?}"
    );

    // What was left goes, what another run makes at this moment stays; and of two that make the same, both have it.
    let other = half_made(build.path());
    let image = PathBuf::from(done(maker(build.path()).arg("/bin/true")));
    let other = other.wait_with_output().unwrap();
    assert!(
        other.status.success(),
        "{}",
        String::from_utf8_lossy(&other.stderr)
    );
    assert_eq!(
        String::from_utf8(other.stdout).unwrap().trim(),
        image.to_str().unwrap()
    );
    assert_eq!(
        made(build.path()),
        [image.file_name().unwrap().to_str().unwrap()]
    );
    for file in ["vmlinuz", "initrd"] {
        assert!(
            image.join(file).metadata().unwrap().len() > 1 << 20,
            "{file}"
        );
    }
}

#[test]
#[ignore = "needs QEMU and an image: scripts/test vm"]
fn another_library_makes_another_image() {
    let build = build();
    let folder = build.path();
    let compile = |source: &str, words: &[&str]| {
        std::fs::write(folder.join("code.c"), source).unwrap();
        done(
            Command::new("cc")
                .current_dir(folder)
                .arg("code.c")
                .args(words),
        );
    };
    let library = |answer: u8| {
        let source = format!("int answer(void) {{ return {answer}; }}");
        compile(&source, &["-shared", "-fPIC", "-o", "libanswer.so"]);
    };
    library(1);
    let source = "int answer(void); int main(void) { return answer(); }";
    let here = format!("-Wl,-rpath,{}", folder.display());
    compile(source, &["-L.", "-lanswer", &here, "-o", "program"]);
    let key = || done(maker(folder).arg("--key").arg(folder.join("program")));

    let first = key();
    assert!(
        first.len() == 16 && first.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{first}"
    );
    assert_eq!(key(), first);
    library(2);
    let second = key();
    assert_ne!(second, first, "the program's library is another");
    library(1);
    assert_eq!(key(), first);
    compile(
        "int answer(void); int main(void) { return 1 + answer(); }",
        &["-L.", "-lanswer", &here, "-o", "program"],
    );
    assert!(![first, second].contains(&key()), "the program is another");
    let nothing: [&str; 0] = [];
    assert_eq!(made(folder), nothing, "a key makes no image");
}

#[test]
#[ignore = "needs QEMU and an image: scripts/test vm"]
fn without_qemu_it_is_said_which_package_has_it() {
    let build = build();
    // All programs that are in the PATH of now but QEMU's.
    let programs = tempfile::tempdir().unwrap();
    for folder in std::env::split_paths(&std::env::var_os("PATH").unwrap()) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if !entry.file_name().as_encoded_bytes().starts_with(b"qemu-") {
                // The first of a name counts.
                let _ = symlink(entry.path(), programs.path().join(entry.file_name()));
            }
        }
    }
    let output = maker(build.path())
        .arg(towline_bin())
        .env("PATH", programs.path())
        .output()
        .unwrap();
    let line = one_line(&output, 3);
    assert!(
        line.contains("'qemu-system-x86_64' is missing")
            && line.contains("package qemu-system-x86"),
        "{line}"
    );
    let output = Command::new(scripts().join("vm"))
        .args(["up", "--hosts", "1"])
        .env("CARGO_TARGET_DIR", build.path())
        .env("TOWLINE_BIN", towline_bin())
        .env("PATH", programs.path())
        .output()
        .unwrap();
    assert_eq!(
        one_line(&output, 3),
        line,
        "by the verb that people use too"
    );

    let lab = Lab::new();
    let image = std::env::var("TOWLINE_VM_IMAGE").unwrap();
    let mut up = lab.command("up", &format!("--hosts 1 --vms 1 --image {image}"));
    let line = one_line(&up.env("PATH", programs.path()).output().unwrap(), 1);
    assert!(line.contains("apt-get install qemu-system-x86"), "{line}");
    lab.assert_gone();
}
