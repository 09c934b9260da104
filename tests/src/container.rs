//! Containers of a host as tests ask for them: started with a script, looked at, and gone without a trace.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use netns::{Netlink, Netns};
use serde_json::Value;

use crate::cluster::{Cluster, Host};
use crate::wait_until;

/// For all that comes true by itself, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);

/// `towline ARGS -- sh -c SCRIPT` on this host.
#[must_use]
pub fn script(host: &Host, args: &str, script: &str) -> Command {
    let mut command = host.command(args);
    command.args(["--", "sh", "-c", script]);
    command
}

/// What it did, with its end awaited.
#[must_use]
pub fn output(host: &Host, mut command: Command) -> Output {
    host.netns.run(|| command.output()).unwrap().unwrap()
}

/// Starts it with all three streams as pipes.
#[must_use]
pub fn spawn(host: &Host, mut command: Command) -> Child {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    host.netns.run(|| command.spawn()).unwrap().unwrap()
}

/// The exit code of `towline ARGS`.
#[must_use]
pub fn code(host: &Host, args: &str) -> i32 {
    host.towline(args)
        .status
        .code()
        .expect("towline exits by itself")
}

/// Sends a signal to a process.
pub fn signal(name: &str, pid: u32) {
    assert!(
        Command::new("kill")
            .args(["-s", name, &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

/// The container of this name as `ps -a` shows it.
#[must_use]
pub fn container(host: &Host, name: &str) -> Option<Value> {
    let all = host.json("ps -a --json");
    all.as_array()
        .unwrap()
        .iter()
        .find(|container| container["name"] == name)
        .cloned()
}

/// The process of a container's command.
#[must_use]
pub fn pid(host: &Host, name: &str) -> u32 {
    let container = container(host, name).expect("it was started");
    u32::try_from(
        container["pid"]
            .as_u64()
            .unwrap_or_else(|| panic!("no process: {container}")),
    )
    .unwrap()
}

/// A number of `/proc/PID/stat`, counted as in proc(5).
#[must_use]
pub fn stat(pid: u32, field: usize) -> u32 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = text.rsplit_once(')').unwrap();
    rest.split_whitespace()
        .nth(field - 3)
        .unwrap()
        .parse()
        .unwrap()
}

/// Whether the process runs; a zombie does not.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

/// Interfaces on the host that containers brought along.
#[must_use]
pub fn host_interfaces(host: &Host) -> Vec<String> {
    let links = Netlink::open(&host.netns).unwrap().links().unwrap();
    links
        .into_iter()
        .map(|link| link.name)
        .filter(|name| name.starts_with("tl"))
        .collect()
}

/// Containers that hold an address of `network`, as the manager sees it.
#[must_use]
pub fn holders(host: &Host, network: &str) -> String {
    let inspected = host.json(&format!("network inspect {network}"));
    let network = inspected.get(0).unwrap_or(&inspected);
    network
        .get("endpoints")
        .or_else(|| network.get("containers"))
        .expect("inspect lists endpoints")
        .to_string()
}

/// Nothing of the container `name` is left: not on the host, not in the cluster.
pub fn assert_gone(host: &Host, network: &str, name: &str) {
    wait_until(&format!("{name} is gone"), LIMIT, || {
        container(host, name).is_none() && !Netns::exists(name)
    });
    assert_eq!(host_interfaces(host), Vec::<String>::new());
    wait_until("the address is free", LIMIT, || {
        !holders(host, network).contains(name)
    });
    wait_until("its folder is gone", LIMIT, || {
        !host.state_dir().join("containers").join(name).exists()
    });
}

/// A host with the network `myoverlay`.
#[must_use]
pub fn one_host() -> Cluster {
    let cluster = Cluster::joined(1, &[]);
    cluster.hosts[0].ok("network create --subnet 10.0.9.0/24 -d overlay myoverlay");
    cluster
}

/// What the script prints in a container with these options.
pub fn prints(host: &Host, args: &str, text: &str) -> String {
    let output = output(host, script(host, args, text));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args}: {text}: {error}");
    String::from_utf8(output.stdout).unwrap()
}
