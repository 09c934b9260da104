//! Open vSwitch with its userspace datapath, alone in a namespace: its own database, sockets and folder, so that it
//! shares nothing with one that runs on this machine, and needs no kernel module.
//!
//! ```text
//!   container ─ eth0 ═ veth ═ c0 ─ bri ─ vx0, vx1 …  (vxlan, one a remote)
//!                                          └ routed over brp ─ u0 ═ the underlay
//! ```

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use ipnet::IpNet;
use netns::Netns;
use tempfile::TempDir;
use vtep::Vni;

use crate::raw::PATIENCE;
use crate::wire::netlink;
use crate::{sh, wait_until};

/// Where Debian has the daemons, which need not be on the caller's path.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"];
/// Where Debian has the database's schema.
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// A running Open vSwitch. It ends with the value.
pub struct OpenVswitch {
    netns: Netns,
    folder: TempDir,
    daemons: Vec<Child>,
}

impl OpenVswitch {
    /// Starts it in `netns`, whose underlay interface `u0` gives its address away to the switch, as tunnels in userspace need it.
    ///
    /// # Panics
    /// When it is not installed or does not start.
    #[must_use]
    pub fn start(netns: &Netns, vtep: IpNet) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("towline-test-ovs-")
            .tempdir()
            .expect("a folder for Open vSwitch");
        let mut this = Self {
            netns: netns.clone(),
            folder,
            daemons: Vec::new(),
        };
        let database = this.path("conf.db");
        this.run("ovsdb-tool", &["create", &database, SCHEMA]);
        let socket = this.path("db.sock");
        let listen = format!("--remote=punix:{socket}");
        this.spawn("ovsdb-server", &[&database, &listen, "--no-chdir"]);
        wait_until("the switch's database answers", PATIENCE, || {
            std::path::Path::new(&socket).exists()
        });
        this.vsctl("--no-wait init");
        let connect = format!("unix:{socket}");
        this.spawn(
            "ovs-vswitchd",
            &[&connect, "--disable-system", "--no-chdir"],
        );
        this.vsctl("add-br brp -- set bridge brp datapath_type=netdev fail-mode=standalone");
        this.vsctl("add-port brp u0");
        this.vsctl("add-br bri -- set bridge bri datapath_type=netdev fail-mode=standalone");
        let links = netlink(netns);
        links
            .add_address("brp", vtep)
            .expect("the switch has made brp");
        links.set_up("brp").expect("the switch has made brp");
        this
    }

    /// Plugs an interface of its namespace in, as a container's port.
    ///
    /// # Panics
    /// When the switch refuses it.
    pub fn plug(&self, ifname: &str) {
        self.vsctl(&format!("add-port bri {ifname}"));
    }

    /// Adds a tunnel to another VTEP. Tunnels don't forward to each other.
    ///
    /// # Panics
    /// When the switch refuses it.
    pub fn add_remote(&self, vni: Vni, local: IpAddr, remote: IpAddr) {
        let name = format!("vx{}", remote.to_string().replace(['.', ':'], "-"));
        let vni = vni.get();
        self.vsctl(&format!(
            "add-port bri {name} -- set port {name} protected=true -- set interface {name} type=vxlan \
             options:remote_ip={remote} options:local_ip={local} options:key={vni}"
        ));
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn vsctl(&self, words: &str) {
        let database = format!("--db=unix:{}", self.path("db.sock"));
        let mut all = vec![database.as_str(), "--timeout=30"];
        all.extend(words.split_whitespace());
        self.run("ovs-vsctl", &all);
    }

    fn run(&self, program: &str, words: &[&str]) {
        let line = [&[program_path(program).as_str()], words]
            .concat()
            .join(" ");
        sh(&self.netns, &line);
    }

    fn spawn(&mut self, program: &str, words: &[&str]) {
        let mut command = Command::new(program_path(program));
        command
            .args(words)
            .arg(format!(
                "--unixctl={}",
                self.path(&format!("{program}.ctl"))
            ))
            .arg(format!(
                "--log-file={}",
                self.path(&format!("{program}.log"))
            ))
            .args(["-vconsole:off", "-vsyslog:off"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
            command.env(name, self.folder.path());
        }
        let child = self
            .netns
            .run(|| command.spawn())
            .expect("a running test's namespace")
            .unwrap_or_else(|error| panic!("can't start {program}: {error}"));
        self.daemons.push(child);
    }
}

impl Drop for OpenVswitch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in ["ovsdb-server.log", "ovs-vswitchd.log"] {
                let text = std::fs::read_to_string(self.path(log)).unwrap_or_default();
                let last: Vec<_> = text.lines().rev().take(20).collect();
                eprintln!("{log}, newest first:\n{}", last.join("\n"));
            }
        }
        // The switch before its database.
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn program_path(program: &str) -> String {
    FOLDERS
        .iter()
        .map(|folder| PathBuf::from(folder).join(program))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{program} is missing: run scripts/setup test"))
        .display()
        .to_string()
}
