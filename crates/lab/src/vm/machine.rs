//! A virtual machine of a lab: the QEMU process, and what is known of it in its host's folder.
//!
//! ```text
//!   eth0   the underlay: a TAP on the lab's switch, or, where all hosts are virtual machines, QEMU's multicast socket
//!          on loopback, which needs no rights
//!   eth1   198.51.100.0/24 in QEMU itself: where the lab's commands come in, and, without a switch, the outside
//!   ttyS0  a shell, and all that the kernel says: console.sock, console.log
//! ```
//!
//! Nothing but QEMU's own processes stands on this machine, and all of it ends with them.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use netns::{Netlink, Netns};
use serde::{Deserialize, Serialize};

use super::accelerator::Accelerator;
use super::frame::SECRET_LEN;
use super::guest::{PORT, READY};
use super::image::Image;
use super::relay;
use crate::interrupt;
use crate::name::{Kind, LabName, Role};
use crate::process::Process;
use crate::state::Folder;
use crate::topology::{self, OUTSIDE_V4, Wire};

/// The program.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
/// The guest's address on its link to the lab.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 15);
/// How long a guest may take to boot: software emulation on a busy machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
/// How long QEMU may take to make its TAP.
const TAP_PATIENCE: Duration = Duration::from_secs(15);
/// Lines of a dead guest's console that an error shows.
const CONSOLE_TAIL: usize = 8;
/// What QEMU's own network uses as the group of the underlay: of the range for use within one organisation (RFC 2365 §6.2).
pub(super) const GROUP: Ipv4Addr = Ipv4Addr::new(239, 192, 47, 89);

/// What a lab's virtual machines have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// MiB of each.
    pub(crate) memory: u16,
    /// How the processor is had.
    pub(crate) accelerator: Accelerator,
    /// The first of the ports on loopback: the underlay's by UDP, and after it one for each machine by TCP. None: the
    /// machines are on the lab's own switch, in whose namespace no port is taken.
    pub(crate) ports: Option<u16>,
}

/// What is written down of one.
#[derive(Debug, Serialize, Deserialize)]
struct Noted {
    process: Process,
    port: u16,
    switched: bool,
}

/// A virtual machine that was started.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// The lab it is of.
    pub(super) lab: LabName,
    /// The host's number.
    pub(super) number: u16,
    /// The host's name.
    pub(crate) name: String,
    /// Where its folder is.
    pub(super) folder: PathBuf,
    /// The port of loopback that leads to it.
    pub(super) port: u16,
    /// What it wants to hear first.
    pub(super) secret: [u8; SECRET_LEN],
    /// QEMU.
    pub(crate) process: Process,
    switched: bool,
}

impl Machine {
    /// One that was started.
    pub(crate) fn open(folder: &Folder, lab: &LabName, number: u16) -> anyhow::Result<Self> {
        let name = lab.of(Role::Node(Kind::Host, number));
        let path = folder.host_path(Kind::Host, number);
        let noted = fs::read(path.join("machine.json"))
            .ok()
            .and_then(|text| serde_json::from_slice::<Noted>(&text).ok());
        let noted = noted.with_context(|| format!("{name} is no virtual machine of this lab"))?;
        let secret = fs::read(path.join("secret"))
            .ok()
            .and_then(|bytes| bytes.try_into().ok());
        Ok(Self {
            lab: lab.clone(),
            number,
            secret: secret.with_context(|| format!("the secret of {name} is lost"))?,
            name,
            folder: path,
            port: noted.port,
            process: noted.process,
            switched: noted.switched,
        })
    }

    /// Starts a machine, and returns before it has booted.
    pub(crate) fn start(
        folder: &Folder,
        lab: &LabName,
        number: u16,
        image: &Image,
        shape: &Shape,
        wire: Wire,
    ) -> anyhow::Result<Self> {
        let path = folder.host(Kind::Host, number)?;
        write_secret(&path.join("secret"))?;
        let name = lab.of(Role::Node(Kind::Host, number));
        let log = File::create(path.join("qemu.log"))
            .with_context(|| format!("can't write into {}", path.display()))?;
        let switch = match shape.ports {
            None => Some(Netns::open(&lab.of(Role::Switch))?),
            Some(_) => None,
        };
        let port = shape.ports.map_or(PORT, |first| first + number);
        let mut command = Command::new(QEMU);
        command
            .args(arguments(&name, number, &path, image, shape, wire))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        let child = match &switch {
            Some(switch) => switch.run(|| command.spawn())?,
            None => command.spawn(),
        }
        .with_context(|| format!("can't start {QEMU}"))?;
        let noted = Noted {
            process: Process::of(child.id()).with_context(|| format!("{QEMU} vanished"))?,
            port,
            switched: switch.is_some(),
        };
        let text = serde_json::to_vec(&noted).context("numbers are plain data")?;
        fs::write(path.join("machine.json"), text)
            .with_context(|| format!("can't write into {}", path.display()))?;
        let machine = Self::open(folder, lab, number)?;
        if let Some(switch) = switch {
            machine
                .plug(&switch)
                .map_err(|error| machine.explain(error))?;
        }
        Ok(machine)
    }

    /// Puts the TAP that QEMU makes on the switch.
    fn plug(&self, switch: &Netns) -> anyhow::Result<()> {
        let link = Netlink::open(switch)?;
        let tap = tap(self.number);
        let deadline = Instant::now() + TAP_PATIENCE;
        while link.link(&tap)?.is_none() {
            interrupt::check()?;
            if !self.process.alive() {
                bail!("{QEMU} ended before it had made its link");
            }
            if Instant::now() > deadline {
                bail!("{QEMU} has made no link after {TAP_PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        topology::plug(&link, &tap)
    }

    /// Waits until it takes commands.
    pub(crate) fn wait_ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        let log = self.folder.join("console.log");
        loop {
            interrupt::check()?;
            // Not by trying to connect: QEMU takes the connection, and asks the guest again only after seconds.
            if fs::read_to_string(&log).is_ok_and(|text| text.contains(READY)) {
                return relay::connect(self).map(drop);
            }
            if !self.process.alive() {
                return Err(self.explain(anyhow::anyhow!("it did not boot")));
            }
            if Instant::now() > deadline {
                bail!(
                    "{} has not booted after {BOOT_PATIENCE:?}; the end of its console: {}",
                    self.name,
                    self.console_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Where QEMU's own ports are, when that is not here.
    pub(super) fn outside(&self) -> anyhow::Result<Option<Netns>> {
        Ok(if self.switched {
            Some(Netns::open(&self.lab.of(Role::Switch))?)
        } else {
            None
        })
    }

    /// What an error of a dead machine is really of.
    pub(crate) fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        if self.process.alive() {
            return error;
        }
        let said = fs::read_to_string(self.folder.join("qemu.log")).unwrap_or_default();
        let qemu = match said.trim() {
            "" => String::new(),
            said => format!(" ({})", last_lines(said, 2)),
        };
        anyhow::anyhow!(
            "{}: the virtual machine has died{qemu}: {error:#}; the end of its console: {}",
            self.name,
            self.console_tail()
        )
    }

    /// The end of what the console has shown, on one line.
    fn console_tail(&self) -> String {
        let shown = fs::read(self.folder.join("console.log")).unwrap_or_default();
        match last_lines(&String::from_utf8_lossy(&shown), CONSOLE_TAIL) {
            text if text.is_empty() => "(nothing)".to_owned(),
            text => text,
        }
    }
}

/// The last lines that say something, without what moves a terminal's cursor, and without the functions that a kernel names
/// as it dies (`name+0x14e/0x1e6`): what it died of stands above them.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<String> = text
        .lines()
        .map(|line| {
            let plain = line.chars().filter(|letter| !letter.is_control());
            plain.collect::<String>().trim().to_owned()
        })
        .filter(|line| !line.is_empty() && !is_function(line))
        .collect();
    lines[lines.len().saturating_sub(count)..].join("; ")
}

fn is_function(line: &str) -> bool {
    line.contains("+0x") && line.contains("/0x")
}

/// The TAP's name on the switch, after the host as the switch names its other ports.
fn tap(number: u16) -> String {
    format!("h{number}")
}

fn write_secret(path: &Path) -> anyhow::Result<()> {
    let mut secret = [0; SECRET_LEN];
    getrandom::fill(&mut secret).context("the kernel gives no random bytes")?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(&secret))
        .with_context(|| format!("can't write {}", path.display()))
}

/// QEMU's command line. Its folder and its machine's name stand in it: `lab down` finds it by them.
fn arguments(
    name: &str,
    number: u16,
    folder: &Path,
    image: &Image,
    shape: &Shape,
    wire: Wire,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| {
        arguments.extend([OsString::from(option), OsString::from(value)]);
    };
    let path = |file: &str| quoted(&folder.join(file));
    add("-name", name.to_owned());
    add("-machine", "pc".to_owned());
    add("-accel", shape.accelerator.option().to_owned());
    add("-cpu", shape.accelerator.cpu().to_owned());
    add("-m", shape.memory.to_string());
    add("-display", "none".to_owned());
    add("-kernel", image.kernel().display().to_string());
    add("-initrd", image.files().display().to_string());
    add("-append", kernel_line(name, number, shape));
    add(
        "-chardev",
        format!(
            "socket,id=console,path={},server=on,wait=off,logfile={}",
            path("console.sock"),
            path("console.log")
        ),
    );
    add("-serial", "chardev:console".to_owned());
    add(
        "-fw_cfg",
        format!("name=opt/towline/secret,file={}", path("secret")),
    );
    add(
        "-netdev",
        match shape.ports {
            Some(first) => {
                format!("socket,id=underlay,mcast={GROUP}:{first},localaddr=127.0.0.1")
            }
            None => format!(
                "tap,id=underlay,ifname={},script=no,downscript=no",
                tap(number)
            ),
        },
    );
    let [_, low] = number.to_be_bytes();
    let cut = match wire {
        // Larger packets are cut by the guest itself, as it would for a plain card.
        Wire::Mtu => ["guest", "host"]
            .map(|side| format!(",{side}_tso4=off,{side}_tso6=off,{side}_ufo=off"))
            .concat(),
        Wire::Gso => String::new(),
    };
    add(
        "-device",
        format!("virtio-net-pci,netdev=underlay,mac=52:54:00:74:6c:{low:02x},romfile={cut}"),
    );
    let port = shape.ports.map_or(PORT, |first| first + number);
    add(
        "-netdev",
        format!(
            "user,id=lab,restrict=on,ipv6=off,net=198.51.100.0/24,host={OUTSIDE_V4},\
             hostfwd=tcp:127.0.0.1:{port}-{ADDRESS}:{PORT}"
        ),
    );
    add(
        "-device",
        "virtio-net-pci,netdev=lab,mac=52:54:00:74:6d:01,romfile=".to_owned(),
    );
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    arguments
}

/// What the kernel is told, and the guest's first program reads: `scripts/vm-image` has it.
fn kernel_line(name: &str, number: u16, shape: &Shape) -> String {
    let underlay: Vec<String> = topology::nets(number)
        .iter()
        .map(ToString::to_string)
        .collect();
    let router: Vec<String> = match shape.ports {
        None => topology::routers().iter().map(IpAddr::to_string).collect(),
        Some(_) => vec![OUTSIDE_V4.to_string()],
    };
    format!(
        "console=ttyS0 loglevel=4 panic=-1 net.ifnames=0 towline.name={name} towline.underlay={} towline.router={} \
         towline.lab={ADDRESS}",
        underlay.join(","),
        router.join(",")
    )
}

/// A path within an option of QEMU, where a comma stands for itself when it is doubled.
pub(crate) fn quoted(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(shape: &Shape, wire: Wire) -> String {
        let image = Image::at(Path::new("/image"));
        let words = arguments("lab-h2", 2, Path::new("/run/a,b/h2"), &image, shape, wire);
        let words: Vec<String> = words
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect();
        words.join(" ")
    }

    #[test]
    fn without_a_switch_all_of_it_is_on_loopback() {
        let shape = Shape {
            memory: 256,
            accelerator: Accelerator::Software,
            ports: Some(42000),
        };
        let line = line(&shape, Wire::Mtu);
        for part in [
            "mcast=239.192.47.89:42000,localaddr=127.0.0.1",
            "hostfwd=tcp:127.0.0.1:42002-198.51.100.15:4788",
            "-accel tcg,tb-size=64",
            "-m 256",
            "path=/run/a,,b/h2/console.sock",
            "towline.underlay=192.0.2.2/24,2001:db8:2::2/64 towline.router=198.51.100.1 ",
            "mac=52:54:00:74:6c:02",
            "host_tso4=off",
        ] {
            assert!(line.contains(part), "{part} is not in: {line}");
        }
    }

    #[test]
    fn on_the_labs_switch_it_is_another_port_of_it() {
        let shape = Shape {
            memory: 384,
            accelerator: Accelerator::Kvm,
            ports: None,
        };
        let line = line(&shape, Wire::Gso);
        for part in [
            "tap,id=underlay,ifname=h2,script=no",
            "towline.router=192.0.2.254,2001:db8:2::fe ",
            "-accel kvm -cpu host",
        ] {
            assert!(line.contains(part), "{part} is not in: {line}");
        }
        assert!(
            !line.contains("tso4=off") && !line.contains("mcast"),
            "{line}"
        );
    }

    #[test]
    fn the_end_of_a_console_is_plain_text() {
        let text = "one\r\n\u{1b}[6ntwo\r\n\r\n   \nthree\n";
        assert_eq!(last_lines(text, 2), "[6ntwo; three");
        assert_eq!(last_lines(text, 9), "one; [6ntwo; three");
        assert_eq!(last_lines("", 3), "");
        let panic = "Kernel panic - not syncing: VFS\n Call Trace:\n  dump_stack_lvl+0x44/0x5c\n  ? rest_init+0xd0/0xd0\n";
        let said = "Kernel panic - not syncing: VFS; Call Trace:";
        assert_eq!(last_lines(panic, 2), said);
    }
}
