//! What is refused: one line that names the thing, the cause and what to do, a non-zero exit code, and a host that is as it was.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use netns::{Netlink, Netns, Vxlan};
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{TestNetns, require_root, towline_bin, unique};

const USAGE: i32 = 2;
const FAILED: i32 = 1;
const NOT_STARTED: i32 = 125;

/// All that a command could have changed on a host, as text.
fn host_state(host: &Host) -> String {
    let netlink = Netlink::open(&host.netns).unwrap();
    let links: Vec<String> = netlink
        .links()
        .unwrap()
        .into_iter()
        .map(|link| link.name)
        .collect();
    let addresses = netlink.addresses().unwrap();
    let routes = netlink.routes().unwrap();
    let rules = host
        .netns
        .run(|| Command::new("nft").args(["list", "ruleset"]).output())
        .unwrap()
        .unwrap();
    let namespaces: Vec<String> = Netns::list()
        .unwrap()
        .into_iter()
        .filter(|name| name.starts_with(&host.name))
        .collect();
    let containers = std::fs::read_dir(host.state_dir().join("containers"))
        .unwrap()
        .count();
    format!("{links:?}\n{addresses:?}\n{routes:?}\n{rules:?}\n{namespaces:?}\n{containers}")
}

/// The whole of what was said, when it is one line and the code is right.
fn refusal(what: &str, output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{what}: {stderr}");
    assert_eq!(
        stderr.trim_end().lines().count(),
        1,
        "{what}: not one line: {stderr}"
    );
    stderr
}

#[test]
fn before_init_every_command_says_what_comes_first() {
    let cluster = Cluster::start(1, &[]);
    let host = &cluster.hosts[0];
    let before = host_state(host);
    for args in ["network ls", "network create x", "host ls", "fdb", "leave"] {
        host.refused(
            args,
            FAILED,
            &["in no cluster", "towline init", "towline join"],
        );
    }
    host.refused(
        "run --name x -- true",
        NOT_STARTED,
        &["in no cluster", "towline init"],
    );
    assert_eq!(host_state(host), before);
}

#[test]
fn init_and_join_check_all_before_they_change_anything() {
    let cluster = Cluster::start(2, &[]);
    let [manager, host] = &cluster.hosts[..] else {
        panic!("two hosts")
    };
    let token = manager.json("init --json")["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let (ours, _) = token.rsplit_once('-').unwrap();
    let wrong = format!("{ours}-{}", "0".repeat(32));
    let elsewhere = format!("tl1-{}-{}", "0".repeat(64), "0".repeat(32));
    let before = host_state(host);

    host.refused(
        "init --advertise 192.0.2.99",
        FAILED,
        &["192.0.2.99", "no address of this host", "192.0.2.2"],
    );
    host.refused(
        "init --advertise 127.0.0.1",
        FAILED,
        &["127.0.0.1", "--advertise"],
    );
    host.refused(
        &format!("join --token {wrong} 192.0.2.1"),
        FAILED,
        &["wrong token", "towline token"],
    );
    host.refused(
        &format!("join --token {elsewhere} 192.0.2.1"),
        FAILED,
        &["192.0.2.1", "another cluster", "token"],
    );
    host.refused("join --token x 192.0.2.1", FAILED, &["token"]);
    for command in ["init", "join --token TOKEN 192.0.2.1"] {
        host.refused(
            &format!("{} --port 49152", command.replace("TOKEN", &token)),
            FAILED,
            &["49152", "from 1 to 49151"],
        );
    }
    host.refused(
        &format!("join --token {token} 192.0.2.1:1"),
        FAILED,
        &["192.0.2.1", "TCP port 1", "towline init"],
    );
    host.refused(
        &format!("join --token {token} 192.0.2.77"),
        FAILED,
        &["192.0.2.77", "TCP port 4789"],
    );
    host.refused(
        &format!("join --token {token} 192.0.2.1:x"),
        FAILED,
        &["192.0.2.1:x", "HOST:PORT"],
    );
    host.refused(
        &format!("join --token {token} --advertise 2001:db8:2::2 192.0.2.1"),
        FAILED,
        &["2001:db8:2::2", "192.0.2.1", "IP versions", "--advertise"],
    );
    assert_eq!(host_state(host), before);

    manager.refused("init", FAILED, &["in a cluster already", "towline leave"]);
    manager.refused(
        &format!("join --token {token} 192.0.2.1"),
        FAILED,
        &["in a cluster already", "towline leave"],
    );
    assert_eq!(
        manager.json("host ls --json").as_array().unwrap().len(),
        1,
        "nobody came in"
    );
}

#[test]
fn a_port_that_is_taken_is_refused_with_the_name_of_its_holder() {
    let cluster = Cluster::start(1, &[]);
    let host = &cluster.hosts[0];
    let before = host_state(host);

    let socket = host
        .netns
        .run(|| UdpSocket::bind("0.0.0.0:4789"))
        .unwrap()
        .unwrap();
    let pid = std::process::id().to_string();
    host.refused("init", FAILED, &["UDP port 4789", "taken by", &pid]);
    drop(socket);

    let netlink = Netlink::open(&host.netns).unwrap();
    let spec = Vxlan {
        vni: 7,
        local: host.address.into(),
        port: 4789,
        learning: false,
        dev: None,
        udp_checksum: true,
    };
    netlink.add_vxlan("vx7", &spec).unwrap();
    netlink.set_up("vx7").unwrap();
    host.refused(
        "init",
        FAILED,
        &["UDP port 4789", "vxlan device vx7", "ip link del"],
    );
    netlink.delete_link("vx7").unwrap();
    assert_eq!(host_state(host), before);

    let tcp = host
        .netns
        .run(|| std::net::TcpListener::bind("0.0.0.0:4789"))
        .unwrap()
        .unwrap();
    host.refused("init", FAILED, &["4789"]);
    drop(tcp);
    assert_eq!(host_state(host), before);
    host.ok("init");
}

#[test]
fn a_blocked_direction_and_a_narrow_path_are_named() {
    let cluster = Cluster::start(2, &[]);
    let [manager, host] = &cluster.hosts[..] else {
        panic!("two hosts")
    };
    let token = manager.json("init --json")["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let join = format!("join --token {token} 192.0.2.1");
    let block = |host: &Host, rule: &str| {
        let rules = format!(
            "add table inet block\nadd chain inet block in {{ type filter hook input priority 0 ; }}\nadd rule inet block in {rule}\n"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), rules).unwrap();
        let nft = host
            .netns
            .run(|| Command::new("nft").arg("-f").arg(file.path()).status())
            .unwrap();
        assert!(nft.unwrap().success());
    };
    let open = |host: &Host| {
        let nft = host.netns.run(|| {
            Command::new("nft")
                .args(["delete", "table", "inet", "block"])
                .status()
        });
        assert!(nft.unwrap().unwrap().success());
    };
    let before = host_state(host);

    block(manager, "udp dport 4789 ip saddr 192.0.2.2 drop");
    host.refused(
        &join,
        FAILED,
        &["UDP port 4789 of the manager 192.0.2.1", "192.0.2.2"],
    );
    open(manager);
    block(host, "udp dport 4789 drop");
    host.refused(
        &join,
        FAILED,
        &["UDP port 4789 of this host (192.0.2.2)", "192.0.2.1"],
    );
    open(host);
    assert_eq!(host_state(host), before);
    assert_eq!(
        manager.json("host ls --json").as_array().unwrap().len(),
        1,
        "nobody came in"
    );

    block(host, "udp dport 4789 udp length > 1380 drop");
    let joined = host.json(&format!("{join} --json"));
    open(host);
    assert_eq!(joined["path_mtu"], 1400);
    assert!(
        joined["warnings"].to_string().contains("--mtu 1350"),
        "{joined}"
    );
}

#[test]
fn networks_and_names_that_cannot_be_are_refused() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    host.ok("network create --subnet 10.0.9.0/24 -d overlay myoverlay");
    let before = (host_state(host), host.ok("network ls"));

    let create = |subnet: &str| format!("network create --subnet {subnet} other");
    host.refused(
        &create("10.0.1.1/24"),
        FAILED,
        &["invalid subnet 10.0.1.1/24: it should be 10.0.1.0/24"],
    );
    host.refused(
        &create("10.0.9.128/25"),
        FAILED,
        &["10.0.9.128/25", "overlaps", "myoverlay"],
    );
    host.refused(
        &create("192.0.2.0/25"),
        FAILED,
        &["192.0.2.0/25", "overlaps", "192.0.2.0/24", "--subnet"],
    );
    host.refused(&create("10.0.0.0/24"), FAILED, &["10.0.0.0/24", "ingress"]);
    host.refused(&create("ten"), FAILED, &["ten", "10.0.9.0/24"]);
    host.refused(
        "network create myoverlay",
        FAILED,
        &["network with name myoverlay already exists"],
    );
    host.refused(
        "network create -d bridge other",
        FAILED,
        &["bridge", "overlay"],
    );
    host.refused(
        "network create --vni 4096 other",
        FAILED,
        &["4096", "myoverlay"],
    );
    host.refused(
        "network create --vni 16777216 other",
        FAILED,
        &["16777216", "16777215"],
    );
    host.refused("network create --mtu 1451 other", FAILED, &["1451", "1450"]);
    host.refused(
        "network create --encrypted other",
        USAGE,
        &["--encrypted", "not built yet"],
    );
    let long = "x".repeat(300);
    for name in ["a/b", "a b", "..", "", "Upper", long.as_str()] {
        for (before, what, code) in [
            (&["network", "create"][..], "network", FAILED),
            (&["run", "--name"], "container", NOT_STARTED),
        ] {
            let mut command = host.command("");
            command.args(before).arg(name).args(
                (what == "container")
                    .then_some(["--", "true"])
                    .into_iter()
                    .flatten(),
            );
            let said = refusal(name, &command.output().unwrap(), code);
            assert!(said.contains("lower-case") && said.len() < 300, "{said}");
        }
    }
    for args in [
        "network inspect",
        "network rm",
        "fdb --network",
        "exec -i",
        "logs",
        "rm",
    ] {
        let args = args.trim_end_matches(" -i");
        let rest = if args == "exec" { " -- true" } else { "" };
        let output = host.towline(&format!("{args} nobody{rest}"));
        let said = refusal(
            args,
            &output,
            if args == "exec" { NOT_STARTED } else { FAILED },
        );
        assert!(
            said.contains("nobody") && said.contains("towline "),
            "{args}: {said}"
        );
    }
    host.refused(
        "run --network nobody -- true",
        NOT_STARTED,
        &["nobody", "towline network ls"],
    );
    host.refused("host rm nobody", FAILED, &["nobody", "towline host ls"]);
    for refused in [
        "service rollback web",
        "service logs web",
        "doctor",
        "bench",
    ] {
        host.refused(refused, USAGE, &["not built yet"]);
    }
    assert_eq!((host_state(host), host.ok("network ls")), before);
}

#[test]
fn taken_names_are_refused_with_their_holder() {
    let cluster = Cluster::joined(2, &[]);
    let [manager, host] = &cluster.hosts[..] else {
        panic!("two hosts")
    };
    manager.ok("network create --subnet 10.0.9.0/24 myoverlay");
    let name = cluster.container("c1");
    manager.ok(&format!(
        "run -d --name {name} --network myoverlay -- sleep infinity"
    ));
    manager.refused(
        &format!("run --name {name} -- true"),
        NOT_STARTED,
        &[&name, "in use", "towline rm -f"],
    );
    manager.refused(
        "network rm myoverlay",
        FAILED,
        &["myoverlay", "active endpoints", &name],
    );
    manager.refused(&format!("rm {name}"), FAILED, &[&name, "running", "rm -f"]);
    manager.refused("leave", FAILED, &[&name, "towline rm -f", "--force"]);
    host.refused(
        "run --network myoverlay --ip 10.0.9.2 -- true",
        NOT_STARTED,
        &["10.0.9.2", "already in use", &name],
    );
    host.refused(
        "run --network myoverlay --ip 10.0.8.2 -- true",
        NOT_STARTED,
        &["10.0.8.2", "10.0.9.0/24"],
    );

    // A namespace that is not ours stays what it is.
    let foreign = TestNetns::new(cluster.container("ns"));
    let id = foreign.id();
    let said = ["namespace", "is no container's", "ip netns del"];
    host.refused(
        &format!("run --name {} -- true", foreign.name()),
        NOT_STARTED,
        &said,
    );
    assert_eq!(Netns::open(foreign.name()).unwrap().id(), id);
}

#[test]
fn with_its_manager_dead_a_host_says_so_and_carries_on() {
    let mut cluster = Cluster::joined(2, &[]);
    cluster.hosts[0].ok("network create myoverlay");
    cluster.hosts[0].kill_agent();
    let host = &cluster.hosts[1];
    let before = host_state(host);
    host.refused(
        "network ls",
        FAILED,
        &["no manager answers", "192.0.2.1:4789"],
    );
    host.refused(
        "run --network myoverlay -- true",
        NOT_STARTED,
        &["no manager answers", "192.0.2.1:4789"],
    );
    assert_eq!(host_state(host), before);
    assert!(String::from_utf8_lossy(&host.towline("status").stderr).contains("no manager answers"));
    host.refused("leave", FAILED, &["no manager answers", "--force"]);
    cluster.hosts[0].start_agent();
}

/// An agent that must refuse to start, with what it said.
fn refused_agent(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    refusal("agent", &output, FAILED)
}

#[test]
fn an_agent_that_cannot_work_says_why_at_its_start() {
    let cluster = Cluster::start(1, &[]);
    let host = &cluster.hosts[0];
    let folder = tempfile::tempdir().unwrap();
    let agent = |state: &std::path::Path, socket: &std::path::Path| {
        let mut command = Command::new(towline_bin());
        command
            .args(["agent", "--name", "x", "--state-dir"])
            .arg(state)
            .arg("--socket")
            .arg(socket);
        command
    };
    let (state, socket) = (folder.path().join("state"), folder.path().join("sock"));

    let second = host
        .netns
        .run(|| refused_agent(&mut agent(&state, &socket)))
        .unwrap();
    assert!(
        second.contains("in this network namespace already as process"),
        "{second}"
    );
    let elsewhere = TestNetns::new(unique("tt-x"));
    let shared = elsewhere
        .run(|| refused_agent(&mut agent(&host.state_dir(), &socket)))
        .unwrap();
    assert!(
        shared.contains("state folder") && shared.contains("--state-dir"),
        "{shared}"
    );
    let taken = elsewhere
        .run(|| refused_agent(&mut agent(&state, &host.socket())))
        .unwrap();
    assert!(
        taken.contains("another agent listens at") && taken.contains("--socket"),
        "{taken}"
    );
    host.ok("status");

    let file = folder.path().join("towline.toml");
    std::fs::write(&file, "nmae = 'h1'\n").unwrap();
    let unknown = refused_agent(agent(&state, &socket).arg("--config").arg(&file));
    assert!(
        unknown.contains("towline.toml, line 1") && unknown.contains("nmae"),
        "{unknown}"
    );
    let absent = refused_agent(agent(&state, &socket).args(["--config", "/nonexistent"]));
    assert!(absent.contains("/nonexistent"), "{absent}");
}

#[test]
fn without_root_agent_and_commands_say_what_is_missing() {
    let cluster = Cluster::start(1, &[]);
    let host = &cluster.hosts[0];
    // The program must be readable to nobody: a build folder may not be.
    let folder = tempfile::tempdir().unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).unwrap();
    let program = folder.path().join("towline");
    std::fs::copy(towline_bin(), &program).unwrap();
    let nobody = |args: &[&str]| {
        let mut command = Command::new(&program);
        command
            .args(args)
            .uid(65534)
            .gid(65534)
            .env("TOWLINE_SOCKET", host.socket());
        refusal(&args.join(" "), &command.output().unwrap(), FAILED)
    };
    let agent = nobody(&["agent"]);
    assert!(
        agent.contains("needs root") && agent.contains("sudo"),
        "{agent}"
    );
    let ps = nobody(&["ps"]);
    assert!(ps.contains("run this command as root"), "{ps}");
}

#[test]
fn without_an_agent_commands_say_how_to_start_one() {
    require_root();
    for args in [&["ps"][..], &["status"], &["network", "ls"], &["init"]] {
        let output = Command::new(towline_bin())
            .args(args)
            .env("TOWLINE_SOCKET", "/nonexistent/sock")
            .output()
            .unwrap();
        let said = refusal(&args.join(" "), &output, FAILED);
        assert!(
            said.contains("/nonexistent/sock") && said.contains("towline agent"),
            "{said}"
        );
    }
}

/// Runs a shell script in a mount namespace of its own, where devices and programs can be hidden.
fn hidden(netns: &Netns, script: &str) -> Output {
    netns
        .run(|| {
            Command::new("unshare")
                .args(["--mount", "sh", "-ec", script])
                .output()
        })
        .unwrap()
        .unwrap()
}

#[test]
fn without_tun_the_agent_does_not_start_and_without_nft_a_host_is_made() {
    require_root();
    let host = TestNetns::new(unique("tt-x"));
    let netlink = Netlink::open(&host).unwrap();
    netlink.add_bridge("eth0").unwrap();
    netlink
        .add_address("eth0", "192.0.2.1/24".parse().unwrap())
        .unwrap();
    netlink.set_up("eth0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (dir, towline) = (folder.path().display(), towline_bin());
    let agent = format!(
        "{} agent --name x --state-dir {dir}/state --socket {dir}/sock",
        towline.display()
    );

    let output = hidden(
        &host,
        &format!("mount -t tmpfs none /dev/net; exec {agent}"),
    );
    let said = refusal("agent", &output, FAILED);
    assert!(
        said.contains("/dev/net/tun") && said.contains("modprobe tun"),
        "{said}"
    );

    // Nobody else filters here: what others wrote need not be read.
    let ask = format!("{} --socket {dir}/sock", towline.display());
    let script = format!(
        "mkdir {dir}/empty; mount --bind {dir}/empty /usr/sbin; \
         {agent} 2>/dev/null & agent=$!; \
         for try in $(seq 200); do test -S {dir}/sock && break; sleep 0.02; done; \
         code=0; {ask} init && {ask} status --json || code=$?; kill $agent; wait $agent; exit $code"
    );
    let output = hidden(&host, &script);
    assert!(output.status.success(), "{output:?}");
    let links: Vec<String> = netlink
        .links()
        .unwrap()
        .into_iter()
        .map(|link| link.name)
        .collect();
    assert!(links.contains(&"towline_gwbr".to_owned()), "{links:?}");
}
