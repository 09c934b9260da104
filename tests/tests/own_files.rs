//! A container's own `/etc/resolv.conf` and `/etc/hosts`, and what else it was given from its host, whatever becomes of the
//! host's files below them.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use towline_tests::cluster::{Cluster, Host};
use towline_tests::mounts::OwnEtc;
use towline_tests::wait_until;

const LIMIT: Duration = Duration::from_secs(30);
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// What the container's own file has, and the host's has not.
const OWN: &str = "nameserver 127.0.0.11";

/// A host with files of its own that may be replaced.
fn host() -> Cluster {
    let mut cluster = Cluster::joined(1, &[]);
    let host = &mut cluster.hosts[0];
    host.kill_agent();
    host.set_etc(OwnEtc::new());
    let etc = host.etc();
    for name in ["resolv.conf", "hosts"] {
        let _ = fs::remove_file(etc.file(name));
        fs::write(etc.file(name), "# the host's\n").unwrap();
    }
    host.start_agent();
    host.ok("network create --subnet 10.0.9.0/24 blue");
    cluster
}

/// As DHCP clients and editors do.
fn replace(host: &Host, name: &str) {
    let new = host.etc().file("towline-test.new");
    fs::write(&new, "# the host's, new\n").unwrap();
    fs::rename(new, host.etc().file(name)).unwrap();
}

/// The container's first process.
fn pid(host: &Host, name: &str) -> String {
    let all = host.json("ps --json");
    let mut all = all.as_array().unwrap().iter();
    all.find(|row| row["name"] == name).unwrap()["pid"].to_string()
}

/// What a container sees, asked of the kernel alone.
fn seen(pid: &str, file: &str) -> String {
    let output = Command::new("nsenter")
        .args(["--target", pid, "--mount", "--", "cat", file])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn wait_for(pid: &str, file: &str, word: &str) {
    wait_until(&format!("{file} says {word:?}"), LIMIT, || {
        seen(pid, file).contains(word)
    });
}

#[test]
fn whoever_replaces_the_hosts_files_takes_nothing_from_containers() {
    let mut cluster = host();
    let own_etc = cluster.hosts[0].etc().file("");
    let etc = |name: &str| own_etc.join(name);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("given"), "given\n").unwrap();
    fs::create_dir(folder.path().join("folder")).unwrap();
    fs::write(folder.path().join("folder/file"), "inside\n").unwrap();
    let at = folder.path().display().to_string();
    let (plain, theirs) = (cluster.container("plain"), cluster.container("theirs"));
    let host = &cluster.hosts[0];
    host.ok(&format!(
        "run -d --name {plain} --network blue -- sleep infinity"
    ));
    // Its user has put something else there, and on two more places.
    host.ok(&format!(
        "run -d --name {theirs} --network blue -v {at}/given:{RESOLV_CONF} -v {at}/given:/etc/towline-test:ro \
         -v {at}/folder:/etc/towline-folder -- sleep infinity"
    ));
    let (plain_pid, theirs_pid) = (pid(host, &plain), pid(host, &theirs));
    let address = host.json(&format!("resolve {plain} --network blue --json"));
    let address = address["records"][0]["address"].as_str().unwrap();
    assert!(seen(&plain_pid, "/etc/hosts").contains(address));
    let all_stand = |what: &str| {
        println!("{what}");
        wait_for(&plain_pid, RESOLV_CONF, OWN);
        wait_for(&plain_pid, "/etc/hosts", address);
        wait_for(&theirs_pid, RESOLV_CONF, "given");
        wait_for(&theirs_pid, "/etc/hosts", &theirs);
        wait_for(&theirs_pid, "/etc/towline-test", "given");
        wait_for(&theirs_pid, "/etc/towline-folder/file", "inside");
    };
    all_stand("as they were started");
    for name in ["resolv.conf", "hosts", "towline-test"] {
        replace(host, name);
        all_stand(&format!("{name} is replaced"));
    }
    // Read-only as before, and only what was.
    let write = |pid: &str, file: &str| {
        let output = Command::new("nsenter")
            .args(["--target", pid, "--mount", "--", "sh", "-c"])
            .arg(format!("echo 192.0.2.9 edited >> {file}"))
            .output()
            .unwrap();
        output.status.success()
    };
    assert!(!write(&theirs_pid, "/etc/towline-test"));
    assert!(write(&plain_pid, "/etc/hosts"));

    // Removed and made again; the folder too.
    for name in ["resolv.conf", "hosts"] {
        fs::remove_file(etc(name)).unwrap();
        fs::write(etc(name), "# the host's, again\n").unwrap();
    }
    fs::remove_dir(etc("towline-folder")).unwrap();
    fs::create_dir(etc("towline-folder")).unwrap();
    all_stand("removed and made again");
    assert!(
        seen(&plain_pid, "/etc/hosts").contains("edited"),
        "it is the same file"
    );

    // A link in its place, what it leads to replaced, and a link to elsewhere.
    fs::create_dir(etc("resolve")).unwrap();
    fs::write(etc("resolve/stub"), "# a stub\n").unwrap();
    fs::write(etc("resolve/other"), "# another\n").unwrap();
    let link = |target: &str| {
        let _ = fs::remove_file(etc("link"));
        symlink(target, etc("link")).unwrap();
        fs::rename(etc("link"), etc("resolv.conf")).unwrap();
    };
    link("resolve/stub");
    all_stand("a link is in its place");
    replace(host, "resolve/stub");
    all_stand("what the link leads to is replaced");
    link("../etc/resolve/other");
    all_stand("the link leads elsewhere");

    // While no agent runs, nobody puts anything back: the kernel does take it away.
    cluster.hosts[0].kill_agent();
    let host = &cluster.hosts[0];
    replace(host, "resolve/other");
    replace(host, "hosts");
    wait_for(&plain_pid, RESOLV_CONF, "the host's, new");
    wait_for(&plain_pid, "/etc/hosts", "the host's, new");
    cluster.hosts[0].start_agent();
    let host = &cluster.hosts[0];
    all_stand("a new agent");
    replace(host, "hosts");
    all_stand("replaced again");

    // What a container has mounted there itself stays; what it has unmounted comes back.
    let inside = |pid: &str, words: &[&str]| {
        let mut command = Command::new("nsenter");
        command.args(["--target", pid, "--mount", "--"]).args(words);
        assert!(command.status().unwrap().success(), "{words:?}");
    };
    let given = format!("{at}/given");
    inside(&plain_pid, &["mount", "--bind", &given, "/etc/hosts"]);
    inside(&plain_pid, &["umount", RESOLV_CONF]);
    wait_for(&plain_pid, RESOLV_CONF, OWN);
    assert_eq!(seen(&plain_pid, "/etc/hosts"), "given\n");

    // One that is started now has its own at once, and all of them go without a trace.
    let late = cluster.container("late");
    host.ok(&format!(
        "run -d --name {late} --network blue -- sleep infinity"
    ));
    assert!(seen(&pid(host, &late), RESOLV_CONF).contains(OWN));
    host.ok(&format!("rm -f {plain} {theirs} {late}"));
    let mounted = host
        .etc()
        .command("cat")
        .arg("/proc/self/mountinfo")
        .output()
        .unwrap();
    let mounted = String::from_utf8_lossy(&mounted.stdout).into_owned();
    assert!(!mounted.contains("/containers/"), "{mounted}");
    assert!(!etc("towline-folder").exists(), "made for the container");
    for name in ["hosts", "towline-test"] {
        let text = fs::read_to_string(etc(name)).unwrap();
        assert_eq!(text, "# the host's, new\n", "nothing of a container's");
    }
}

/// What a container's own hosts file says of its own name, sorted.
fn own_addresses(pid: &str, name: &str) -> Vec<String> {
    let text = seen(pid, "/etc/hosts");
    let lines = text.lines().filter(|line| line.contains(name));
    let mut ips: Vec<String> = lines
        .map(|line| line.split_whitespace().next().unwrap().to_owned())
        .collect();
    ips.sort();
    ips
}

/// Ends who looks at it when it goes.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_hosts_file_follows_a_containers_networks() {
    let mut cluster = Cluster::joined(1, &[]);
    let (c1, theirs) = (cluster.container("c1"), cluster.container("theirs"));
    let host = &cluster.hosts[0];
    host.ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 blue");
    host.ok("network create --subnet 10.0.8.0/24 green");
    host.ok("network create --subnet 10.0.7.0/24 --internal inner");
    let given = tempfile::NamedTempFile::new().unwrap();
    fs::write(given.path(), "given\n").unwrap();
    host.ok(&format!(
        "run -d --name {c1} --network blue --ip 10.0.9.9 -- sleep infinity"
    ));
    host.ok(&format!(
        "run -d --name {theirs} --network blue -v {}:/etc/hosts -- sleep infinity",
        given.path().display()
    ));
    let (pid_c1, pid_theirs) = (pid(host, &c1), pid(host, &theirs));
    assert_eq!(own_addresses(&pid_c1, &c1)[0], "10.0.9.9");
    let file = format!("/proc/{pid_c1}/root/etc/hosts");
    let edited = format!("{}192.0.2.9 edited\n", fs::read_to_string(&file).unwrap());
    fs::write(&file, edited).unwrap();
    let inode = fs::metadata(&file).unwrap().ino();

    // Whoever reads meanwhile finds whole lines, the first and the edited one among them.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reads = 0;
            while !stop.load(Ordering::Relaxed) {
                let text = fs::read_to_string(&file).unwrap();
                assert!(text.contains("127.0.0.1\tlocalhost\n"), "{text:?}");
                assert!(text.contains("192.0.2.9 edited\n"), "{text:?}");
                for line in text.lines().filter(|line| !line.is_empty()) {
                    let ip = line.split_whitespace().next().unwrap();
                    assert!(ip.parse::<IpAddr>().is_ok(), "{line:?} in {text:?}");
                }
                reads += 1;
            }
            reads
        });
        // Also when something below fails.
        let ending = Stop(&stop);
        for _ in 0..3 {
            let mut both = own_addresses(&pid_c1, &c1);
            host.ok(&format!("network connect --ip 10.0.8.9 green {c1}"));
            both.push("10.0.8.9".to_owned());
            both.sort();
            assert_eq!(own_addresses(&pid_c1, &c1), both);
            host.ok(&format!("network disconnect blue {c1}"));
            assert_eq!(own_addresses(&pid_c1, &c1), ["10.0.8.9"]);
            host.ok(&format!("network connect --ip 10.0.9.9 blue {c1}"));
            host.ok(&format!("network disconnect green {c1}"));
            assert_eq!(own_addresses(&pid_c1, &c1)[0], "10.0.9.9");
        }
        drop(ending);
        println!("{} reads meanwhile", reader.join().unwrap());
    });
    assert_eq!(fs::metadata(&file).unwrap().ino(), inode, "the same file");

    // A new agent goes on with what it finds, and who has put a file of their own there keeps it.
    host.ok(&format!("network connect --ip 10.0.7.9 inner {c1}"));
    host.ok(&format!("network connect inner {theirs}"));
    cluster.hosts[0].kill_agent();
    assert!(own_addresses(&pid_c1, &c1).contains(&"10.0.7.9".to_owned()));
    cluster.hosts[0].start_agent();
    let host = &cluster.hosts[0];
    host.ok(&format!("network disconnect blue {c1}"));
    assert_eq!(own_addresses(&pid_c1, &c1), ["10.0.7.9"]);
    assert_eq!(seen(&pid_theirs, "/etc/hosts"), "given\n");
}
