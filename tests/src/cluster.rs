//! Whole hosts: a switch, namespaces on it, and a real agent in each.
//!
//! ```text
//!   PREFIX-sw   br0 192.0.2.254/24, 2001:db8:2::fe/64     switch and router
//!    ├── PREFIX-h1  eth0 192.0.2.1/24, 2001:db8:2::1/64   agent
//!    └── PREFIX-h2  eth0 192.0.2.2/24, 2001:db8:2::2/64   agent
//! ```

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use ipnet::IpNet;
use netns::{Netlink, Netns, Route};
use serde_json::Value;
use tempfile::TempDir;

use crate::mounts::OwnEtc;
use crate::{TestNetns, require_root, towline_bin, try_sh, unique, wait_until};

/// How long an agent may take to answer, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Hosts on one switch. All of it goes with the value.
pub struct Cluster {
    /// The hosts, in order.
    pub hosts: Vec<Host>,
    /// Switch and router.
    pub switch: TestNetns,
    prefix: String,
}

/// A host: a namespace with a real agent in it.
pub struct Host {
    /// Its namespace.
    pub netns: TestNetns,
    /// Its name in the cluster.
    pub name: String,
    /// Its underlay address.
    pub address: Ipv4Addr,
    agent: Option<Child>,
    agent_options: Vec<String>,
    /// Where the agent finds programs; none: where this test does.
    path: Option<PathBuf>,
    /// An `/etc` of its own; none: this machine's.
    etc: Option<OwnEtc>,
    folder: TempDir,
}

impl Cluster {
    /// Hosts with a running agent each, not yet joined.
    ///
    /// # Panics
    /// When anything of it can't be made.
    #[must_use]
    pub fn start(hosts: u8, agent_options: &[&str]) -> Self {
        require_root();
        let prefix = unique("tw");
        let switch = TestNetns::new(format!("{prefix}-sw"));
        let netlink = Netlink::open(&switch).expect("the switch's namespace stands");
        netlink.add_bridge("br0").expect("a bridge");
        for net in ["192.0.2.254/24", "2001:db8:2::fe/64"] {
            netlink
                .add_address("br0", net.parse().expect("a prefix"))
                .expect("an address");
        }
        netlink.set_up("br0").expect("the bridge comes up");
        netns::sysctl::set(&switch, "net/ipv4/ip_forward", "1").expect("IPv4 forwarding");
        netns::sysctl::set(&switch, "net/ipv6/conf/all/forwarding", "1").expect("IPv6 forwarding");
        let hosts = (1..=hosts)
            .map(|index| Host::start(&prefix, &switch, index, agent_options))
            .collect();
        Self {
            hosts,
            switch,
            prefix,
        }
    }

    /// Hosts that have joined: the first is the manager.
    ///
    /// # Panics
    /// When anything of it can't be made.
    #[must_use]
    pub fn joined(hosts: u8, agent_options: &[&str]) -> Self {
        let cluster = Self::start(hosts, agent_options);
        let (manager, others) = cluster.hosts.split_first().expect("a cluster has a host");
        let token = manager.json("init --json")["token"]
            .as_str()
            .expect("init shows the token")
            .to_owned();
        for host in others {
            host.ok(&format!("join --token {token} {}", manager.address));
        }
        for host in &cluster.hosts {
            host.wait_for_ingress();
        }
        cluster
    }

    /// A container's name that no other test uses.
    #[must_use]
    pub fn container(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }
}

impl Host {
    fn start(prefix: &str, switch: &Netns, index: u8, agent_options: &[&str]) -> Self {
        let name = format!("{prefix}-h{index}");
        let netns = TestNetns::new(&name);
        let port = format!("p{index}");
        let netlink = Netlink::open(switch).expect("the switch's namespace stands");
        netlink
            .add_veth(&port, "eth0", &netns)
            .expect("a veth pair");
        netlink
            .set_master(&port, Some("br0"))
            .expect("a port of the bridge");
        netlink.set_up(&port).expect("the port comes up");
        let address = Ipv4Addr::new(192, 0, 2, index);
        let address6 = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, index.into());
        let inside = Netlink::open(&netns).expect("the host's namespace stands");
        for net in [
            IpNet::new(address.into(), 24),
            IpNet::new(address6.into(), 64),
        ] {
            inside
                .add_address("eth0", net.expect("a prefix"))
                .expect("an address");
        }
        inside.set_up("eth0").expect("eth0 comes up");
        for (dst, via) in [("0.0.0.0/0", "192.0.2.254"), ("::/0", "2001:db8:2::fe")] {
            inside
                .add_route(&Route {
                    dst: dst.parse().expect("a prefix"),
                    via: Some(via.parse::<IpAddr>().expect("an address")),
                    dev: Some("eth0".to_owned()),
                    metric: None,
                })
                .expect("a default route");
        }
        let mut host = Self {
            netns,
            name,
            address,
            agent: None,
            agent_options: agent_options
                .iter()
                .map(|&option| option.to_owned())
                .collect(),
            path: None,
            etc: None,
            folder: tempfile::Builder::new()
                .prefix("towline-test-")
                .tempdir()
                .expect("a folder for the agent"),
        };
        host.start_agent();
        host
    }

    /// Waits until the host has its place on the network of published ports: a link-local address comes last.
    ///
    /// # Panics
    /// When it has not in time.
    pub fn wait_for_ingress(&self) {
        wait_until("a place on the ingress network", START_LIMIT, || {
            let seen = try_sh(&self.netns, "ip -o addr show dev towline_ingress");
            let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
            seen.contains("inet ") && seen.contains("fe80")
        });
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Panics
    /// When it ends or does not answer in time, with its log.
    pub fn start_agent(&mut self) {
        assert!(self.agent.is_none(), "{}: an agent runs already", self.name);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("agent.log"))
            .expect("a log in the host's folder");
        let mut command = self.program();
        command
            .arg("agent")
            .args(["--name", &self.name])
            .arg("--state-dir")
            .arg(self.folder.path().join("state"))
            .args(&self.agent_options)
            .env("TOWLINE_SOCKET", self.socket())
            .envs(self.path.iter().map(|path| ("PATH", path)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log can be shared"))
            .stderr(log);
        let child = self
            .netns
            .run(|| command.spawn())
            .expect("the host's namespace stands")
            .expect("towline starts");
        self.agent = Some(child);
        let answers = || self.towline("status").status.success();
        let deadline = std::time::Instant::now() + START_LIMIT;
        while !answers() {
            assert!(
                std::time::Instant::now() < deadline,
                "{}: the agent does not answer:\n{}",
                self.name,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The next agent is started with these options.
    pub fn set_agent_options(&mut self, options: &[&str]) {
        self.agent_options = options.iter().map(|&option| option.to_owned()).collect();
    }

    /// The next agent finds programs in this folder alone.
    pub fn set_path(&mut self, folder: &std::path::Path) {
        self.path = Some(folder.to_owned());
    }

    /// The host has an `/etc` of its own from now on: the next agent, and all commands.
    pub fn set_etc(&mut self, etc: OwnEtc) {
        self.etc = Some(etc);
    }

    /// The host's own `/etc`, as its programs see it.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn etc(&self) -> &OwnEtc {
        self.etc.as_ref().expect("the host has an /etc of its own")
    }

    /// `towline`, where the host's programs run.
    fn program(&self) -> Command {
        match &self.etc {
            Some(etc) => etc.command(towline_bin()),
            None => Command::new(towline_bin()),
        }
    }

    /// Kills the agent with SIGKILL and waits until it is gone.
    ///
    /// # Panics
    /// When none runs.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().expect("an agent runs");
        agent.kill().expect("our own child can be killed");
        agent.wait().expect("our own child can be awaited");
    }

    /// The agent's process.
    ///
    /// # Panics
    /// When none runs.
    #[must_use]
    pub fn agent_pid(&self) -> u32 {
        self.agent.as_ref().expect("an agent runs").id()
    }

    /// Whether the agent has ended by itself, or was killed by somebody else; given a moment to do so.
    ///
    /// # Panics
    /// When none was started.
    pub fn agent_has_ended(&mut self) -> bool {
        let agent = self.agent.as_mut().expect("an agent was started");
        let deadline = std::time::Instant::now() + Duration::from_millis(500);
        loop {
            if agent.try_wait().expect("our own child").is_some() {
                return true;
            }
            if std::time::Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Forgets an agent that has ended, so that another can be started.
    pub fn reap_agent(&mut self) {
        self.agent = None;
    }

    /// Asks the agent as a command does, without starting one: a request of its API, and the answer or the refusal.
    ///
    /// # Errors
    /// What the agent says no with.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn ask(&self, request: &Value) -> Result<Value, String> {
        let mut stream = UnixStream::connect(self.socket()).expect("the agent listens");
        let mut line = serde_json::to_vec(request).expect("JSON");
        line.push(b'\n');
        stream.write_all(&line).expect("the agent reads");
        let mut answer = String::new();
        BufReader::new(stream)
            .read_line(&mut answer)
            .expect("the agent answers");
        let mut answer: Value = serde_json::from_str(&answer).expect("the agent answers in JSON");
        match answer.get("error").and_then(Value::as_str) {
            Some(refusal) => Err(refusal.to_owned()),
            None => Ok(answer["ok"].take()),
        }
    }

    /// Where the agent listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// Where the agent keeps its state.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// What the agent has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("agent.log")).unwrap_or_default()
    }

    /// The command `towline ARGS` on this host, ready to be started; words of `args` are split at spaces.
    #[must_use]
    pub fn command(&self, args: &str) -> Command {
        let mut command = self.program();
        command
            .args(args.split_whitespace())
            .env("TOWLINE_SOCKET", self.socket());
        command
    }

    /// Runs `towline ARGS` on this host.
    ///
    /// # Panics
    /// When it can't be started.
    #[must_use]
    pub fn towline(&self, args: &str) -> Output {
        let mut command = self.command(args);
        self.netns
            .run(|| command.output())
            .expect("the host's namespace stands")
            .expect("towline starts")
    }

    /// Runs `towline ARGS`, which must succeed, and returns what it printed.
    ///
    /// # Panics
    /// When it fails, with what it said and the agent's log.
    pub fn ok(&self, args: &str) -> String {
        let output = self.towline(args);
        assert!(
            output.status.success(),
            "{}: towline {args}: {}\n{}\nagent:\n{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `towline ARGS`, which must succeed, and reads what it printed as JSON.
    ///
    /// # Panics
    /// When it fails or prints something else.
    #[must_use]
    pub fn json(&self, args: &str) -> Value {
        let text = self.ok(args);
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("towline {args} printed no JSON: {error}\n{text}"))
    }

    /// Runs `towline ARGS`, which must fail with `code` and one line that has every word of `says`.
    ///
    /// # Panics
    /// When it does anything else.
    pub fn refused(&self, args: &str, code: i32, says: &[&str]) {
        let output = self.towline(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{}: towline {args}: {stderr}",
            self.name
        );
        assert_eq!(
            stderr.trim_end().lines().count(),
            1,
            "towline {args}: not one line: {stderr}"
        );
        for word in says {
            assert!(
                stderr.contains(word),
                "towline {args}: '{word}' is not in: {stderr}"
            );
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // In order when all is well, so that this way of ending is tested a hundred times; by force when it is not.
        if self.agent.is_some() {
            let left = self.towline("leave --force");
            if !left.status.success() && !std::thread::panicking() {
                eprintln!("{}: {}", self.name, String::from_utf8_lossy(&left.stderr));
            }
            self.kill_agent();
        }
        for pid in processes_of(&self.folder.path().display().to_string()) {
            kill(pid);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The manager last: the others tell it that they go.
        while let Some(host) = self.hosts.pop() {
            drop(host);
        }
        for name in Netns::list().unwrap_or_default() {
            if name.starts_with(&self.prefix) && name != self.switch.name() {
                eprintln!("the container {name} outlived its host");
                let _ = Netns::delete(&name);
            }
        }
    }
}

/// Processes with `word` in their command line.
fn processes_of(word: &str) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(word))
        })
        .collect()
}

fn kill(pid: i32) {
    let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    wait_until("a killed process is gone", Duration::from_secs(5), || {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z"))
            || !std::path::Path::new(&format!("/proc/{pid}")).exists()
    });
}
