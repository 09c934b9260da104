//! Other tunnels that live in user space, each between two hosts of its own: end to end without containers or a bridge, which is the
//! least that each of them can be asked for.
//!
//! | path | as | protected |
//! |---|---|---|
//! | ovs | Open vSwitch, userspace datapath (`netdev`), VXLAN, on the switch's own port | no |
//! | tinc | tinc 1.0, switch mode, cipher and digest off | no |
//! | fastd | fastd, TAP mode, method `null` | no |
//! | wireguard-go | wireguard-go | yes: it has no other way |
//!
//! They run in the foreground, in folders of the lab, and end with the path.

use std::fs;
use std::net::IpAddr;
use std::path::{Path as FsPath, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ipnet::IpNet;
use netns::{Netlink, Netns};

use super::{Helpers, Path, PathKind};
use crate::bench::tool::Tool;
use crate::cpu::CpuGroup;
use crate::interrupt;
use crate::name::{Kind, LabName};
use crate::spot::Spot;
use crate::state::{Folder, State};
use crate::topology::{self, UPLINK, Underlay};

/// How long a peer may take to make its interface.
const PATIENCE: Duration = Duration::from_secs(10);
/// What every peer's tunnel carries of a link of 1,500 bytes.
const MTU: u32 = 1400;
const OVS_SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// One of the two hosts.
struct Station {
    /// 1 or 2, of this peer.
    number: u16,
    netns: Netns,
    underlay: IpAddr,
    folder: PathBuf,
}

/// Starts the peer on two hosts and joins them.
pub(super) fn make(
    kind: PathKind,
    lab: &LabName,
    folder: &Folder,
    state: &State,
) -> anyhow::Result<Path> {
    if state.settings.underlay != Underlay::V4 {
        bail!("peers are measured over an IPv4 underlay only");
    }
    for (program, package) in programs(kind) {
        crate::require_tool(program, package)?;
    }
    let group = CpuGroup::create(lab, kind.name())?;
    let stations = [1, 2]
        .into_iter()
        .map(|number| station(kind, number, lab, folder, state))
        .collect::<anyhow::Result<Vec<Station>>>()?;
    let [one, two] =
        <[Station; 2]>::try_from(stations).map_err(|_| anyhow::anyhow!("a peer has two hosts"))?;
    let mut helpers = Helpers::default();
    match kind {
        PathKind::Ovs => ovs(&one, &two, &group, &mut helpers)?,
        PathKind::Tinc => tinc(&one, &two, &group, &mut helpers)?,
        PathKind::Fastd => fastd(&one, &two, &group, &mut helpers)?,
        _ => wireguard(&one, &two, &group, &mut helpers)?,
    }
    Ok(Path {
        kind,
        address: ip(two.number),
        bind: ip(two.number),
        port_offset: 0,
        client: Spot::Here(one.netns),
        server: Spot::Here(two.netns),
        agents: Some(group),
        machines: Vec::new(),
        helpers,
    })
}

const fn programs(kind: PathKind) -> &'static [(&'static str, &'static str)] {
    match kind {
        PathKind::Ovs => &[("ovs-vswitchd", "openvswitch-switch")],
        PathKind::Tinc => &[("tincd", "tinc")],
        PathKind::Fastd => &[("fastd", "fastd")],
        _ => &[("wireguard-go", "wireguard-go"), ("wg", "wireguard-tools")],
    }
}

fn station(
    kind: PathKind,
    number: u16,
    lab: &LabName,
    folder: &Folder,
    state: &State,
) -> anyhow::Result<Station> {
    // Two hosts for each peer, in the order of the kinds.
    let place = PathKind::PEERS
        .iter()
        .position(|peer| *peer == kind)
        .unwrap_or(0);
    let host = 2 * u16::try_from(place).unwrap_or(0) + number;
    Ok(Station {
        number,
        netns: topology::make_host(lab, Kind::Peer, host, state.settings.wire)?,
        underlay: topology::address(Kind::Peer, host, Underlay::V4),
        folder: folder.host(Kind::Peer, host)?,
    })
}

/// A host's address in its tunnel.
fn ip(number: u16) -> IpAddr {
    let [_, low] = number.to_be_bytes();
    IpAddr::from([10, 98, 0, low])
}

fn ovs(
    one: &Station,
    two: &Station,
    group: &CpuGroup,
    helpers: &mut Helpers,
) -> anyhow::Result<()> {
    for (own, other) in [(one, two), (two, one)] {
        let path = |name: &str| own.folder.join(name).display().to_string();
        let (database, socket) = (path("conf.db"), path("db.sock"));
        own.run(Command::new("ovsdb-tool").args(["create", &database, OVS_SCHEMA]))?;
        let mut daemon = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command
                .args(arguments)
                .arg("--no-chdir")
                .arg(format!("--unixctl={}", path(&format!("{program}.ctl"))))
                .arg(format!("--log-file={}", path(&format!("{program}.log"))))
                .args(["-vconsole:off", "-vsyslog:off"]);
            for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
                command.env(name, &own.folder);
            }
            helpers.tools.push(own.start(group, &mut command)?);
            anyhow::Ok(())
        };
        daemon(
            "ovsdb-server",
            &[&database, &format!("--remote=punix:{socket}")],
        )?;
        wait_for(
            "the switch's database",
            || Ok(FsPath::new(&socket).exists()),
        )?;
        let control = |words: &str| {
            let mut command = Command::new("ovs-vsctl");
            command
                .arg(format!("--db=unix:{socket}"))
                .arg("--timeout=10");
            own.run(command.args(words.split(' '))).map(drop)
        };
        control("--no-wait init")?;
        daemon(
            "ovs-vswitchd",
            &[&format!("unix:{socket}"), "--disable-system"],
        )?;
        let bridge = |name| {
            control(&format!(
                "add-br {name} -- set bridge {name} datapath_type=netdev fail-mode=standalone"
            ))
        };
        // Tunnels in userspace need the underlay's address on a bridge of the switch.
        bridge("under")?;
        control(&format!("add-port under {UPLINK}"))?;
        let link = Netlink::open(&own.netns)?;
        let net = IpNet::new_assert(own.underlay, 24);
        link.del_address(UPLINK, net)?;
        link.add_address("under", net)?;
        link.set_up("under")?;
        bridge("over")?;
        control(&format!(
            "add-port over vx0 -- set interface vx0 type=vxlan options:remote_ip={} options:local_ip={} options:key=42 -- \
             set interface over mtu_request={MTU}",
            other.underlay, own.underlay
        ))?;
        own.raise("over")?;
    }
    Ok(())
}

fn tinc(
    one: &Station,
    two: &Station,
    group: &CpuGroup,
    helpers: &mut Helpers,
) -> anyhow::Result<()> {
    const INTERFACE: &str = "tinc0";
    for (own, other) in [(one, two), (two, one)] {
        fs::create_dir_all(own.folder.join("hosts")).context("can't make tinc's folder")?;
        own.write(
            "tinc.conf",
            &format!(
                "Name = h{}\nConnectTo = h{}\nMode = switch\nInterface = {INTERFACE}\nBindToAddress = {}\n",
                own.number, other.number, own.underlay
            ),
        )?;
        let name = format!("hosts/h{}", own.number);
        own.run(
            Command::new("tincd")
                .arg("-c")
                .arg(&own.folder)
                .arg("-K2048"),
        )?;
        let key = own.read(&name)?;
        own.write(
            &name,
            &format!(
                "Address = {}\nCipher = none\nDigest = none\n{key}",
                own.underlay
            ),
        )?;
    }
    for (own, other) in [(one, two), (two, one)] {
        let name = format!("hosts/h{}", other.number);
        own.write(&name, &other.read(&name)?)?;
    }
    for own in [one, two] {
        let mut command = Command::new("tincd");
        command.arg("-D").arg("-c").arg(&own.folder);
        command.arg(format!("--pidfile={}", own.folder.join("pid").display()));
        helpers.tools.push(own.start(group, &mut command)?);
        own.raise(INTERFACE)?;
    }
    Ok(())
}

fn fastd(
    one: &Station,
    two: &Station,
    group: &CpuGroup,
    helpers: &mut Helpers,
) -> anyhow::Result<()> {
    const INTERFACE: &str = "fastd0";
    const PORT: u16 = 10_000;
    let mut keys = Vec::new();
    for own in [one, two] {
        let made = own.run(Command::new("fastd").arg("--generate-key"))?;
        keys.push((word_after(&made, "Secret:")?, word_after(&made, "Public:")?));
    }
    for (own, other) in [(one, two), (two, one)] {
        let (secret, _) = &keys[usize::from(own.number) - 1];
        let (_, public) = &keys[usize::from(other.number) - 1];
        own.write(
            "fastd.conf",
            &format!(
                "log level error;\nmode tap;\ninterface \"{INTERFACE}\";\nmethod \"null\";\nmtu {MTU};\nbind {}:{PORT};\n\
                 secret \"{secret}\";\npeer \"other\" {{ key \"{public}\"; remote {}:{PORT}; }}\n",
                own.underlay, other.underlay
            ),
        )?;
        let mut command = Command::new("fastd");
        command.arg("-c").arg(own.folder.join("fastd.conf"));
        helpers.tools.push(own.start(group, &mut command)?);
        own.raise(INTERFACE)?;
    }
    Ok(())
}

fn wireguard(
    one: &Station,
    two: &Station,
    group: &CpuGroup,
    helpers: &mut Helpers,
) -> anyhow::Result<()> {
    const PORT: &str = "51820";
    // Its control socket has the interface's name, in a folder that the whole machine shares.
    let interface = |own: &Station| format!("wg{}-{}", std::process::id(), own.number);
    for own in [one, two] {
        let secret = own.run(Command::new("wg").arg("genkey"))?;
        own.write("key", &secret)?;
        let mut command = Command::new("wireguard-go");
        command
            .args(["-f", &interface(own)])
            .env("WG_PROCESS_FOREGROUND", "1")
            .env("LOG_LEVEL", "error");
        helpers.tools.push(own.start(group, &mut command)?);
        own.raise(&interface(own))?;
        let socket = PathBuf::from(format!("/var/run/wireguard/{}.sock", interface(own)));
        helpers.files.push(socket.clone());
        wait_for("wireguard-go", || Ok(socket.exists()))?;
        let key = own.folder.join("key");
        let mut command = Command::new("wg");
        command.args(["set", &interface(own), "listen-port", PORT, "private-key"]);
        own.run(command.arg(key))?;
    }
    for (own, other) in [(one, two), (two, one)] {
        let public =
            other.run(Command::new("wg").args(["show", &interface(other), "public-key"]))?;
        let endpoint = format!("{}:{PORT}", other.underlay);
        let mut command = Command::new("wg");
        command.args(["set", &interface(own), "peer", public.trim()]);
        own.run(command.args(["allowed-ips", "0.0.0.0/0", "endpoint", &endpoint]))?;
    }
    Ok(())
}

impl Station {
    /// Starts a program that carries the path.
    fn start(&self, group: &CpuGroup, command: &mut Command) -> anyhow::Result<Tool> {
        Tool::start(&Spot::Here(self.netns.clone()), Some(group), command)
    }

    /// Waits for the tunnel's interface, and gives it its address.
    fn raise(&self, interface: &str) -> anyhow::Result<()> {
        let link = Netlink::open(&self.netns)?;
        wait_for(interface, || Ok(link.link(interface)?.is_some()))?;
        link.set_mtu(interface, MTU)?;
        link.add_address(interface, IpNet::new_assert(ip(self.number), 24))?;
        link.set_up(interface)?;
        Ok(())
    }

    /// Runs a program in the host to its end; what it printed.
    fn run(&self, command: &mut Command) -> anyhow::Result<String> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null());
        let output: Output = self
            .netns
            .run(|| command.output())?
            .with_context(|| format!("can't run {program}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{program} failed: {}", said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
    }

    fn read(&self, name: &str) -> anyhow::Result<String> {
        let path = self.folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))
    }
}

fn wait_for(what: &str, ready: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !ready()? {
        interrupt::check()?;
        if Instant::now() > deadline {
            bail!("{what} is not there after {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The word that follows `label` in what a program printed.
fn word_after(text: &str, label: &str) -> anyhow::Result<String> {
    let mut words = text.split_whitespace();
    words
        .find(|word| *word == label)
        .and_then(|_| words.next())
        .map(str::to_owned)
        .with_context(|| format!("no '{label}' in what was printed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_out_of_what_is_printed() {
        let text = "Secret: abc\nPublic: def\n";
        assert_eq!(word_after(text, "Public:").unwrap(), "def");
        assert!(word_after("Public:", "Public:").is_err());
    }
}
