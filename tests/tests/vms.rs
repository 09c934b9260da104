//! Hosts that are virtual machines: a kernel that is not this machine's, beside hosts in namespaces, and the kernel's own
//! VXLAN in a guest against a VTEP outside of it.
//!
//! Ignored by default: they need QEMU and an image, whose folder stands in `TOWLINE_VM_IMAGE`. `scripts/test vm` makes it.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use netns::{Netlink, Netns};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use towline_tests::lab::{Lab, one_line, pairs};
use towline_tests::terminal::Sitting;
use towline_tests::wire::{Endpoint, Options, Setup, ping};
use towline_tests::{TestNetns, sh, towline_bin, wait_until};
use vtep::stats::DropReason;

const LIMIT: Duration = Duration::from_secs(120);
/// Where the kernel's VXLAN listens in a guest whose agent has the usual port.
const PORT: u16 = 8472;
const BYTES: usize = 2 << 20;

/// The folder of what guests boot.
fn image() -> String {
    std::env::var("TOWLINE_VM_IMAGE")
        .expect("TOWLINE_VM_IMAGE names an image: run 'scripts/test vm'")
}

/// Options of a lab with virtual machines.
fn with_machines(options: &str) -> String {
    format!("{options} --image {}", image())
}

/// Runs a command in a host or container of the lab, and returns what it printed.
fn exec(lab: &Lab, part: &str, words: &[&str]) -> String {
    let output = Command::new(towline_bin())
        .args(["lab", "exec", "--name", &lab.name, &lab.part(part), "--"])
        .args(words)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{part}: {words:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn status(lab: &Lab, part: &str) -> Value {
    serde_json::from_str(&exec(lab, part, &["towline", "status", "--json"])).unwrap()
}

/// One host in a namespace, one on a kernel of its own; both on one underlay, whose virtual cards leave checksums and
/// segments to others.
#[test]
#[ignore = "needs QEMU and an image: scripts/test vm"]
fn a_namespace_and_a_virtual_machine_are_one_cluster() {
    let lab = Lab::new();
    let up = lab.json(
        "up",
        &with_machines("--hosts 2 --vms 1 --containers 2 --wire gso"),
    );
    let hosts = up["hosts"].as_array().unwrap();
    assert_eq!(hosts[0]["vm"], Value::Null);
    let own = sh(&Netns::current().unwrap(), "uname -r");
    let kernel = hosts[1]["vm"]["kernel"].as_str().unwrap();
    assert!(!kernel.is_empty() && kernel != own.trim(), "{kernel}");

    let report = lab.json("ping", "--count 3");
    assert_eq!(report["ok"], true);
    assert_eq!(pairs(&report, "pairs", 3).len(), 12);
    assert_eq!(pairs(&report, "egress", 3).len(), 4);
    assert_eq!(pairs(&report, "gateways", 3).len(), 4);
    let said = lab.done("ping", "--count 1");
    let last = said.lines().last().unwrap();
    let sum = format!("{}: 2 hosts, 4 containers, 12/12 pairs ok", lab.name);
    assert_eq!(last, sum);

    // What a kernel lacks is found out, and said: a TAP takes UDP super-frames from Linux 6.2 on.
    let offload = |part: &str| {
        let status = status(&lab, part);
        let backends = status["cluster"]["datapath"]["backends"]
            .as_array()
            .unwrap()
            .clone();
        let found = backends.iter().find(|one| one["backend"] == "offload");
        found.unwrap()["features"].clone()
    };
    let guest = offload("h2");
    assert_eq!(guest["checksum"], true, "{guest}");
    assert_eq!(guest["tcp4"], true, "{guest}");
    let (major, minor) = version(kernel);
    assert_eq!(guest["udp"], (major, minor) >= (6, 2), "{kernel}: {guest}");

    // What one kernel leaves to a network card, the other's Towline must not take for broken: bulk both ways.
    let inside = server(&lab, &lab.part("h2c1"), [10, 0, 9, 4].into());
    echo(inside, &Netns::open(&lab.part("h1c1")).unwrap());
    let drops = |part: &str| status(&lab, part)["cluster"]["drops"].clone();
    for part in ["h1", "h2"] {
        let drops = drops(part);
        assert!(drops.is_object(), "{drops}");
        for reason in [DropReason::Malformed, DropReason::SuperFrame] {
            let count = drops[reason.name()].as_u64().unwrap_or(0);
            assert_eq!(count, 0, "{part}: {drops}");
        }
    }

    commands_with_and_without_a_terminal(&lab);

    // The bench is one table, whichever kind the ends are.
    let bench = "--only rr --paths underlay,kernel,towline --rounds 1 --seconds 1";
    let report = lab.json("bench", bench);
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 3);
    for row in results {
        assert!(row["median"].as_f64().unwrap() > 0.0, "{row}");
    }
    let refused = lab.refused("bench", "--only rr --paths plain --rounds 1");
    assert!(refused.contains("virtual machine"), "{refused}");

    kernel_vxlan(&lab);

    lab.done("down", "");
    lab.assert_gone();
}

/// Major and minor number of a kernel's release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// In a guest: a terminal for who sits at one, whose keys are the program's; and for all else every byte as it is.
fn commands_with_and_without_a_terminal(lab: &Lab) {
    let script = "trap 'stty size' WINCH; trap 'echo caught; exit 42' INT; stty size; echo $TERM; while :; do sleep 0.1; done";
    let mut sitting = Sitting::at(
        lab.command("exec", "h2c1 -- sh -c")
            .arg(script)
            .env("TERM", "vt220"),
        33,
        111,
    );
    sitting.wait_for("33 111\r\nvt220\r\n");
    sitting.resize(44, 122);
    sitting.wait_for("44 122\r\n");
    sitting.press(b"\x03");
    sitting.wait_for("caught");
    assert_eq!(sitting.wait().code(), Some(42));
    assert!(sitting.is_usual(), "the terminal is put back");

    // A terminal is asked for, or not wanted, as with other programs.
    let mut sitting = Sitting::at(&mut lab.command("exec", "-i h2 -- tty"), 24, 80);
    sitting.wait_for("not a tty");
    assert_eq!(sitting.wait().code(), Some(1));
    let output = lab
        .command("exec", "-t h2 -- tty")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim_end(),
        "/dev/pts/0"
    );
    let output = lab
        .command("exec", "-it h2 -- tty")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(one_line(&output, 1).contains("stdin is not a terminal"));

    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let mut cat = lab.command("exec", "h2 -- sh -c");
    let mut cat = cat
        .arg("cat; echo err >&2; exit 7")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = cat.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            input.write_all(&bytes).unwrap();
            drop(input);
        });
        cat.wait_with_output().unwrap()
    });
    assert!(output.stdout == bytes, "other bytes came back");
    assert_eq!(
        (&output.stderr[..], output.status.code()),
        (&b"err\n"[..], Some(7))
    );
}

/// A server in the guest h2, in one of its namespaces, that sends back what comes over one connection.
fn server(lab: &Lab, netns: &str, address: IpAddr) -> Child {
    Command::new(towline_bin())
        .args(["lab", "relay", "--name", &lab.name, "--host", "2"])
        .args(["--netns", netns, "--", "towline", "lab", "load", "serve"])
        .args(["--bind", &address.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Sends bytes from `client` to a server that sends them back, and compares them.
fn echo(mut server: Child, client: &Netns) {
    let mut line = String::new();
    let mut out = BufReader::new(server.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let listening: Value = serde_json::from_str(&line).unwrap();
    let to: SocketAddr = listening["listening"].as_str().unwrap().parse().unwrap();
    let stream = client
        .run(|| TcpStream::connect_timeout(&to, LIMIT))
        .unwrap()
        .unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let sent: Vec<u8> = (0..=250).cycle().take(BYTES).collect();
    let mut got = vec![0; BYTES];
    std::thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&sent).unwrap());
        (&stream).read_exact(&mut got).unwrap();
    });
    assert!(got == sent, "other bytes came back");
    drop(stream);
    // It ends with its stdin.
    drop(server.stdin.take());
    assert!(server.wait().unwrap().success());
}

/// A VTEP of this machine on the lab's switch, and in the guest the kernel's device.
fn kernel_vxlan(lab: &Lab) {
    let switch = Netns::open(&lab.part("sw")).unwrap();
    let host = TestNetns::new(lab.part("x"));
    let container = TestNetns::new(lab.part("xc"));
    let link = Netlink::open(&switch).unwrap();
    link.add_veth("x", "u0", &host).unwrap();
    link.set_master("x", Some("br0")).unwrap();
    link.set_up("x").unwrap();
    let inside = Netlink::open(&host).unwrap();
    inside
        .add_address("u0", "192.0.2.240/24".parse().unwrap())
        .unwrap();
    inside.set_up("u0").unwrap();

    let (ours, theirs) = (Endpoint::new(4242, 2), Endpoint::new(4242, 3));
    // By their paths: busybox' shell takes its own `ip`, which knows no vxlan.
    let script = format!(
        "ip=/usr/sbin/ip; $ip link add vxk type vxlan id 4242 local 192.0.2.2 dev eth0 dstport {PORT} nolearning udpcsum && \
         $ip link set vxk address {} mtu {} && \
         /usr/sbin/bridge fdb append {} dev vxk dst 192.0.2.240 && /usr/sbin/bridge fdb append 00:00:00:00:00:00 dev vxk dst 192.0.2.240 && \
         $ip netns add vxk && $ip link set vxk netns vxk && $ip netns exec vxk $ip address add {}/24 dev vxk && \
         $ip netns exec vxk $ip link set vxk up && $ip netns exec vxk $ip link set lo up",
        theirs.mac(),
        theirs.mtu,
        ours.mac(),
        theirs.ip()
    );
    exec(lab, "h2", &["sh", "-ec", &script]);

    let setup = Setup::OFFLOAD;
    let options = Options {
        port: PORT,
        ..Options::default()
    };
    let vtep: IpAddr = [192, 0, 2, 240].into();
    let datapath = (setup.start_with)((*host).clone(), vtep, options).unwrap();
    ours.attach(&*datapath, &container, setup.backend);
    datapath.apply(&theirs.at(SocketAddr::new([192, 0, 2, 2].into(), PORT)));
    ping(&container, theirs.ip(), 3);

    // A virtual card completes the checksums of what is in a tunnel, and no other; the outer ones are left to this machine.
    echo(server(lab, "vxk", theirs.ip()), &container);
    let counters = datapath.counters();
    for reason in [
        DropReason::Oversize,
        DropReason::SuperFrame,
        DropReason::Malformed,
    ] {
        let count = counters.drops.get(reason);
        assert_eq!(count, 0, "{}: {counters:?}", reason.name());
    }
}

/// A `lab up` of one guest that boots, and what the lab wrote down of the guest.
fn booting(lab: &Lab) -> (Child, Value) {
    let mut up = lab.command("up", &with_machines("--hosts 1 --vms 1 --accelerator tcg"));
    let up = up
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (up, noted(lab))
}

/// What the lab has written down of its guest h1, once it has.
fn noted(lab: &Lab) -> Value {
    let noted = lab.folder().join("h1/machine.json");
    let mut machine = None;
    wait_until("the guest has started", LIMIT, || {
        let text = std::fs::read(&noted).unwrap_or_default();
        machine = serde_json::from_slice(&text).ok();
        machine.is_some()
    });
    machine.unwrap()
}

/// The process of a guest.
fn qemu(noted: &Value) -> Pid {
    let pid = noted["process"]["pid"].as_i64().unwrap();
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

/// `scripts/vm`, of this lab and with the images that are there, in a group of processes as a terminal would make one, with Ctrl-C
/// also where these tests were started in the background.
fn script(lab: &Lab, words: &str) -> Command {
    let image = image();
    let build = Path::new(&image).ancestors().nth(2).unwrap();
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
    let mut command = Command::new("/usr/bin/env");
    command
        .arg("--default-signal=INT")
        .arg(scripts.join("vm"))
        .args(words.split(' '))
        .env("TOWLINE_VM_NAME", &lab.name)
        .env("TOWLINE_BIN", towline_bin())
        .env("CARGO_TARGET_DIR", build)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command
}

/// The same at `up`, once its guest runs: what runs, and the guest's process.
fn coming_up(lab: &Lab) -> (Child, Pid) {
    let up = script(lab, "up --hosts 1 --containers 0 --accelerator tcg")
        .spawn()
        .unwrap();
    (up, qemu(&noted(lab)))
}

fn end(child: Child, signal: Signal) -> String {
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process_group(group, signal).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert_eq!(output.stdout, b"", "no matrix is shown");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_gone(process: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero()));
    stat.map_or(true, |stat| stat.contains(") Z "))
}

/// Ctrl-C takes back what is half made. What a killed run leaves is said by each verb, and goes with the next `up` or `down`.
#[test]
#[ignore = "needs QEMU and an image: scripts/test vm"]
fn a_run_that_was_ended_half_way_leaves_nothing_for_good() {
    let lab = Lab::new();
    let (up, _) = coming_up(&lab);
    let said = end(up, Signal::INT);
    assert!(said.contains("interrupted"), "{said}");
    lab.assert_gone();

    let (up, orphan) = coming_up(&lab);
    end(up, Signal::KILL);
    assert!(!is_gone(orphan), "a guest does not end by itself");
    for verb in ["status", "ping", "exec h1 -- true", "console h1"] {
        let output = script(&lab, verb).output().unwrap();
        let line = one_line(&output, 1);
        for part in ["was killed", "lab up", "lab down"] {
            assert!(line.contains(part), "{verb}: {line}");
        }
    }
    std::fs::remove_file(lab.folder().join("h1/machine.json")).unwrap();
    let (up, next) = coming_up(&lab);
    assert!(is_gone(orphan), "the guest of the run before is gone");
    let said = end(up, Signal::KILL);
    assert!(
        said.contains("left half made") && said.contains("taken away"),
        "{said}"
    );
    let output = script(&lab, "down").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && said.contains("left half made"),
        "{said}"
    );
    assert!(is_gone(next));
    lab.assert_gone();

    // Killed while it looks whether a guest boots with KVM, where there is such a device: that guest is found too.
    let folder = tempfile::tempdir().unwrap();
    for file in ["vmlinuz", "initrd"] {
        symlink(Path::new(&image()).join(file), folder.path().join(file)).unwrap();
    }
    let options = format!("--hosts 1 --vms 1 --image {}", folder.path().display());
    let mut up = lab.command("up", &options);
    let up = up
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    wait_until("a guest has started", LIMIT, || {
        lab.folder().join("kvm-probe.log").exists() || lab.folder().join("h1/machine.json").exists()
    });
    let group = Pid::from_raw(i32::try_from(up.id()).unwrap()).unwrap();
    rustix::process::kill_process(group, Signal::KILL).unwrap();
    up.wait_with_output().unwrap();
    lab.done("down", "");
    lab.assert_gone();
}

/// A guest that ends is told of by name, with the end of its console; one that can't boot takes the whole lab with it.
#[test]
#[ignore = "needs QEMU and an image: scripts/test vm"]
fn a_dead_machine_is_told_of_with_the_end_of_its_console() {
    let lab = Lab::new();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        format!("{}/vmlinuz", image()),
        folder.path().join("vmlinuz"),
    )
    .unwrap();
    std::fs::write(folder.path().join("initrd"), "no files").unwrap();
    let options = format!(
        "--hosts 1 --vms 1 --accelerator tcg --image {}",
        folder.path().display()
    );
    let refused = lab.refused("up", &options);
    for part in ["h1: the virtual machine has died", "Kernel panic"] {
        assert!(refused.contains(part), "{part} is not in: {refused}");
    }
    lab.assert_gone();

    let (up, machine) = booting(&lab);
    rustix::process::kill_process(qemu(&machine), Signal::KILL).unwrap();
    let line = one_line(&up.wait_with_output().unwrap(), 1);
    assert!(line.contains("has died"), "{line}");
    assert!(line.contains("its console"), "{line}");
    lab.assert_gone();
}

#[test]
#[ignore = "needs QEMU and an image: scripts/test vm"]
fn what_can_not_be_is_refused_and_leaves_nothing() {
    let lab = Lab::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let cases = [
        ("--hosts 2 --vms 3".to_owned(), "more than --hosts 2"),
        ("--hosts 17 --vms 17".to_owned(), "too many"),
        (
            "--hosts 1 --vms 1 --memory 65535000".to_owned(),
            "65535000 is not in",
        ),
        ("--hosts 16 --vms 16 --memory 65535".to_owned(), "are free"),
        (
            format!(
                "--hosts 1 --vms 1 --accelerator tcg --first-port {}",
                port - 1
            ),
            "is taken",
        ),
    ];
    for (options, said) in cases {
        let output = lab.try_run("up", &with_machines(&options));
        assert!(!output.status.success(), "{options}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains(said), "{options}: {errors}");
        lab.assert_gone();
    }
    let refused = lab.refused("up", "--hosts 1 --vms 1 --image /no/such/image");
    assert!(refused.contains("scripts/vm image"), "{refused}");
    lab.assert_gone();

    // Ctrl-C while the guest boots.
    let (up, _) = booting(&lab);
    sh(
        &Netns::current().unwrap(),
        &format!("kill -INT {}", up.id()),
    );
    let line = one_line(&up.wait_with_output().unwrap(), 1);
    assert!(line.contains("interrupted"), "{line}");
    lab.assert_gone();
}
