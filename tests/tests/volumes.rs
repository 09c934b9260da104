//! Volumes: what outlives containers, how it is filled, who has it, and how other hosts come to it.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::container::{LIMIT, output, prints, script};
use towline_tests::files::{Mounted, folder, is_mounted};
use towline_tests::{sh, wait_until};

/// The volumes that `volume ls -q ARGS` names.
fn volumes(host: &Host, args: &str) -> Vec<String> {
    let listed = host.ok(&format!("volume ls -q {args}"));
    listed.lines().map(str::to_owned).collect()
}

/// The id of the container of this name.
fn id(host: &Host, name: &str) -> String {
    let all = host.json("ps -a --json");
    let all = all.as_array().unwrap();
    let found = all.iter().find(|container| container["name"] == name);
    found.unwrap()["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_volume_outlives_its_containers_and_is_filled_once() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let (place, empty) = (folder(), tempfile::tempdir().unwrap());
    let (dst, other) = (place.path().display(), empty.path().display());
    fs::create_dir(place.path().join("sub")).unwrap();
    std::os::unix::fs::symlink("/etc/shadow", place.path().join("sub/link")).unwrap();
    fs::hard_link(place.path().join("file"), place.path().join("sub/again")).unwrap();
    std::os::unix::fs::chown(place.path().join("file"), Some(1234), Some(4321)).unwrap();
    fs::set_permissions(
        place.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o750),
    )
    .unwrap();

    let look = format!(
        "cat {dst}/file; stat -c '%u:%g %h' {dst}/file; readlink {dst}/sub/link; stat -c %a {dst}"
    );
    let filled = "from the host\n1234:4321 2\n/etc/shadow\n750\n";
    let seen = prints(
        host,
        &format!("run --rm -v data:{dst}"),
        &format!("{look}; echo mine > {dst}/file"),
    );
    assert_eq!(seen, filled);
    assert_eq!(
        fs::read_to_string(place.path().join("file")).unwrap(),
        "from the host\n"
    );
    // Not empty any more: what is in it stays.
    let seen = prints(
        host,
        &format!("run --rm -v data:{dst}"),
        &format!("cat {dst}/file"),
    );
    assert_eq!(seen, "mine\n");
    let mount = format!("--mount source=data,target={other},readonly");
    let output = output(
        host,
        script(
            host,
            &format!("run --rm {mount}"),
            &format!("cat {other}/file && touch {other}/x"),
        ),
    );
    assert_eq!(output.stdout, b"mine\n", "the same volume at another place");
    assert!(!output.status.success());
    // As --mount and -v say it.
    for nocopy in [
        format!("--mount source=bare,target={dst},volume-nocopy"),
        format!("-v bare:{dst}:nocopy"),
    ] {
        assert_eq!(
            prints(host, &format!("run --rm {nocopy}"), &format!("ls -A {dst}")),
            ""
        );
    }
    assert_eq!(volumes(host, ""), ["bare", "data"]);
    let said = host.json("volume inspect data");
    assert_eq!(
        said[0]["mountpoint"],
        host.state_dir()
            .join("volumes/data/_data")
            .display()
            .to_string()
    );
    assert_eq!(
        (&said[0]["driver"], &said[0]["scope"]),
        (&"local".into(), &"local".into())
    );
    host.ok("volume rm data bare");
    assert!(volumes(host, "").is_empty() && !host.state_dir().join("volumes/data").exists());
}

#[test]
fn a_volume_that_a_container_has_stays_and_one_without_a_name_goes_with_it() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let place = tempfile::tempdir().unwrap();
    let dst = place.path().display();
    let name = cluster.container("c");
    host.ok(&format!(
        "run -d --name {name} -v data:{dst}/a -v {dst}/b -- sleep 600"
    ));
    let (id, both) = (id(host, &name), volumes(host, ""));
    assert_eq!(both.len(), 2);
    let anonymous = both.iter().find(|name| name.len() == 64).unwrap();
    assert!(anonymous.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let in_use = format!("remove data: volume is in use - [{id}]");
    host.refused("volume rm data", 1, &[&in_use]);
    host.refused("volume rm -f data", 1, &[&in_use]);
    assert_eq!(
        volumes(host, "--filter dangling=true"),
        Vec::<String>::new()
    );
    host.ok("volume prune --all --force");
    let mounts = &host.json("ps --json")[0]["mounts"];
    assert_eq!(
        (&mounts[0]["type"], &mounts[0]["name"]),
        (&"volume".into(), &"data".into())
    );
    assert_eq!(volumes(host, "").len(), 2);
    host.ok(&format!("rm -f {name}"));
    assert_eq!(volumes(host, "").len(), 2, "rm keeps both");
    assert_eq!(volumes(host, "--filter dangling=1").len(), 2);
    let pruned = host.ok("volume prune --force");
    assert_eq!(pruned, format!("Deleted Volumes:\n{anonymous}\n"));
    assert_eq!(volumes(host, ""), ["data"]);

    host.ok(&format!("run -d --name {name} -v {dst}/b -- sleep 600"));
    host.ok(&format!("rm -f -v {name}"));
    prints(host, &format!("run --rm -v {dst}/b"), "true");
    host.refused(
        &format!("run -v {dst}/b -- no-such-command"),
        127,
        &["no-such-command"],
    );
    assert_eq!(
        volumes(host, ""),
        ["data"],
        "rm -v, run --rm, and a start that failed"
    );

    host.ok(&format!("run --name {name} -v data:{dst} -- true"));
    host.refused("volume rm data", 1, &["volume is in use"]);
    host.ok(&format!("rm {name}"));
    host.ok("volume rm data");
}

#[test]
fn volumes_are_made_listed_and_pruned_by_hand() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    assert_eq!(
        host.ok("volume create --label tier=db pgdata").trim(),
        "pgdata"
    );
    assert_eq!(
        host.ok("volume create pgdata").trim(),
        "pgdata",
        "a second time is harmless"
    );
    let random = host.ok("volume create").trim().to_owned();
    assert_eq!(random.len(), 64);
    host.ok("volume create --label tier=web cache");
    assert_eq!(volumes(host, "--filter label=tier=db"), ["pgdata"]);
    assert_eq!(volumes(host, "--filter label=tier"), ["cache", "pgdata"]);
    assert_eq!(volumes(host, "--filter name=gda"), ["pgdata"]);
    assert_eq!(volumes(host, "--filter driver=nfs"), Vec::<String>::new());
    assert_eq!(
        host.ok("volume ls --filter name=pg --format {{.Name}}:{{.Scope}}")
            .trim(),
        "pgdata:local"
    );
    let table = host.ok("volume ls");
    assert!(
        table.starts_with("DRIVER") && table.contains("VOLUME NAME"),
        "{table}"
    );
    assert_eq!(
        host.json("volume inspect pgdata")[0]["labels"]["tier"],
        "db"
    );
    assert_eq!(
        host.ok("volume inspect --format {{.Name}}:{{.Labels.tier}} pgdata"),
        "pgdata:db\n"
    );
    for (wrong, code, words) in [
        (
            "volume inspect --format {{.Colour}} pgdata",
            1,
            "no field 'Colour'",
        ),
        (
            "volume create --type mount data",
            2,
            "'volume create --type' is not built yet",
        ),
        (
            "volume ls --filter colour=red",
            1,
            "invalid filter 'colour'",
        ),
        ("volume ls --filter dangling=maybe", 1, "dangling=maybe"),
        (
            "volume create a/b",
            1,
            "includes invalid characters for a local volume name",
        ),
        ("volume create x", 1, "volume name is too short"),
        (
            "volume create --driver nfs data",
            1,
            "volume driver 'nfs' does not exist",
        ),
        ("volume create --opt size=1g data", 2, "not built yet"),
        ("volume rm nothing", 1, "get nothing: no such volume"),
        ("volume rm ../state", 1, "includes invalid characters"),
    ] {
        host.refused(wrong, code, &[words]);
    }
    host.ok("volume rm -f nothing");
    // Nobody says yes.
    host.ok("volume prune --all");
    assert_eq!(volumes(host, "").len(), 3);
    let pruned = host.json("volume prune --all --force --filter label!=tier --json");
    assert_eq!(pruned, serde_json::json!([random]));
    assert_eq!(
        host.ok("volume prune --force"),
        "",
        "those with a name stay"
    );
    let gone = host.ok("volume prune --all --force");
    assert_eq!(
        gone.lines().collect::<Vec<_>>(),
        ["Deleted Volumes:", "cache", "pgdata"]
    );
}

#[test]
fn a_volume_that_was_half_filled_when_the_agent_was_killed_is_filled_again() {
    let mut cluster = Cluster::joined(1, &[]);
    let place = folder();
    let dst = place.path().display().to_string();
    // Enough that the copying takes a while.
    for number in 0..3000 {
        fs::write(place.path().join(format!("f{number}")), vec![1; 8192]).unwrap();
    }
    let name = cluster.container("c");
    let host = &mut cluster.hosts[0];
    let mut command = host.command(&format!("run --rm --name {name} -v data:{dst} -- true"));
    command.stderr(Stdio::null());
    let mut client = host.netns.run(|| command.spawn()).unwrap().unwrap();
    let copying = host.state_dir().join("volumes/data/copying");
    wait_until("the copying has begun", LIMIT, || {
        fs::read_dir(&copying).is_ok_and(|mut entries| entries.next().is_some())
    });
    host.kill_agent();
    client.wait().unwrap();
    let half = fs::read_dir(host.state_dir().join("volumes/data/_data"))
        .unwrap()
        .count();
    assert_eq!(half, 0, "nothing of a half copy is seen");
    host.start_agent();
    assert!(!copying.exists());
    let seen = prints(
        host,
        &format!("run --rm -v data:{dst}"),
        &format!("ls {dst} | wc -l"),
    );
    assert_eq!(seen.trim(), "3001");
    wait_until("the container that was not started is gone", LIMIT, || {
        host.json("ps -a --json").as_array().unwrap().is_empty()
    });
}

/// A volume that is filled with one file which takes a while, and the folder where the copy grows.
fn filling(host: &Host, options: &str) -> (std::process::Child, std::path::PathBuf) {
    let mut command = host.command(&format!("run {options} -- true"));
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let client = host.netns.run(|| command.spawn()).unwrap().unwrap();
    let copying = host.state_dir().join("volumes/data/copying");
    wait_until("the copying has begun", LIMIT, || {
        fs::metadata(copying.join("long")).is_ok_and(|file| file.len() > 0)
    });
    (client, copying)
}

/// Filling with one long file ends with the wish for it, holds up nobody else, and is not taken for done.
#[test]
fn a_volume_that_is_being_filled_is_given_up_when_nobody_wants_it() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    // In memory, and all holes: it costs nothing, and no filesystem shares its blocks with the volume's.
    let place = tempfile::tempdir().unwrap();
    let source = Mounted::tmpfs(place.path());
    let long = fs::File::create(place.path().join("long")).unwrap();
    long.set_len(8 << 30).unwrap();
    let dst = place.path().display();
    let (name, other) = (cluster.container("c"), cluster.container("d"));
    let data = host.state_dir().join("volumes/data/_data");
    let nothing_is_left = |copying: &Path| {
        wait_until("the container and the copy are gone", LIMIT, || {
            !copying.exists() && host.json("ps -a --json").as_array().unwrap().is_empty()
        });
        assert_eq!(fs::read_dir(&data).unwrap().count(), 0);
    };

    // Ended by a signal, as by Ctrl-C: by one that who is started in the background does not ignore.
    let (mut client, copying) = filling(host, &format!("--name {name} -v data:{dst}"));
    sh(&host.netns, &format!("kill -TERM {}", client.id()));
    assert_eq!(client.wait().unwrap().signal(), Some(15));
    nothing_is_left(&copying);

    // Killed.
    let (mut client, copying) = filling(host, &format!("-d --name {name} -v data:{dst}"));
    client.kill().unwrap();
    client.wait().unwrap();
    nothing_is_left(&copying);

    // Removed, while another waits for the same volume and others don't.
    let (client, copying) = filling(host, &format!("--name {name} -v data:{dst}"));
    host.refused("volume rm data", 1, &["volume is in use"]);
    host.ok("run --rm -v quick:/run/towline-test-quick -- true");
    let mut waiting = host.command(&format!("run --name {other} -v data:{dst} -- true"));
    waiting.stderr(Stdio::piped());
    let waiting = host.netns.run(|| waiting.spawn()).unwrap().unwrap();
    wait_until("another container waits", LIMIT, || {
        host.json("ps -a --json").as_array().unwrap().len() == 2
    });
    host.ok(&format!("rm -f {other}"));
    host.ok(&format!("rm -f {name}"));
    for client in [client, waiting] {
        let output = client.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{error}");
        assert!(error.contains("was removed before its command"), "{error}");
    }
    nothing_is_left(&copying);

    // Nothing of it counts: now it is filled.
    long.set_len(5).unwrap();
    let seen = prints(
        host,
        &format!("run --rm -v data:{dst}"),
        &format!("stat -c %s {dst}/long"),
    );
    assert_eq!(seen, "5\n");
    host.ok("volume rm data quick");
    drop(source);
}

#[test]
fn a_volume_is_not_filled_from_where_volumes_are() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let state = host.state_dir();
    host.refused(
        &format!("run --rm -v data:{} -- true", state.display()),
        125,
        &["can't fill the volume data", "volume-nocopy"],
    );
    assert_eq!(host.json("ps -a --json").as_array().unwrap().len(), 0);
}

/// Keys of docs/volumes.md in a folder that both hosts have.
fn keys(address: &str) -> TempDir {
    let folder = tempfile::Builder::new()
        .prefix("towline-keys-")
        .tempdir()
        .unwrap();
    for name in ["server-key", "client-key"] {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f", name])
            .current_dir(folder.path())
            .status()
            .unwrap();
        assert!(made.success());
    }
    let server = fs::read_to_string(folder.path().join("server-key.pub")).unwrap();
    fs::write(
        folder.path().join("known-hosts"),
        format!("[{address}]:2022 {server}"),
    )
    .unwrap();
    folder
}

/// The walk through docs/volumes.md: one container keeps the files, another mounts them from the other host.
#[test]
fn storage_is_shared_over_the_overlay() {
    let cluster = Cluster::joined(2, &[]);
    let [a, b] = &cluster.hosts[..] else {
        panic!("two hosts")
    };
    let keys = keys("10.0.20.10");
    let etc = keys.path().display();
    let (srv, mnt) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (srv, mnt) = (srv.path().join("srv"), mnt.path().join("mnt"));
    let (srv, mnt) = (srv.display(), mnt.display());
    let (store, web) = (cluster.container("store"), cluster.container("web"));
    a.ok("network create --subnet 10.0.20.0/24 shared");
    let serve = |host: &Host| {
        host.ok(&format!(
            "run -d --name {store} --network shared --ip 10.0.20.10 -v shared:{srv} -v {etc}:{etc}:ro -- \
             rclone serve sftp {srv} --addr 10.0.20.10:2022 --user shared --dir-cache-time 1s \
             --authorized-keys {etc}/client-key.pub --key {etc}/server-key"
        ))
    };
    serve(a);
    let options = format!(
        "-p 2022 -o IdentityFile={etc}/client-key -o UserKnownHostsFile={etc}/known-hosts,StrictHostKeyChecking=yes \
         -o reconnect,ServerAliveInterval=5,dcache_timeout=1"
    );
    let mount = format!(
        "until sshfs {options} shared@10.0.20.10:/ {mnt}; do sleep 0.2; done && exec sleep infinity"
    );
    let started = output(
        b,
        script(
            b,
            &format!("run -d --name {web} --network shared --mount type=tmpfs,target={mnt}"),
            &mount,
        ),
    );
    assert!(
        started.status.success(),
        "{}",
        String::from_utf8_lossy(&started.stderr)
    );
    wait_until("the other host's container has the files", LIMIT, || {
        let write = format!("exec {web} -- sh -c");
        let mut command = b.command(&write);
        command.arg(format!("grep -q ' {mnt} fuse.sshfs ' /proc/self/mounts && echo hello > {mnt}/from-b && mkdir -p {mnt}/d && mv {mnt}/from-b {mnt}/d/file"));
        b.netns
            .run(|| command.output())
            .unwrap()
            .unwrap()
            .status
            .success()
    });
    assert_eq!(
        a.ok(&format!("exec {store} -- cat {srv}/d/file")),
        "hello\n"
    );
    assert!(
        !is_mounted(Path::new(&mnt.to_string())),
        "the mount is the container's alone"
    );
    a.ok(&format!("exec {store} -- touch {srv}/from-a"));
    // Lists of folders are kept for a second.
    wait_until("a file of the one is seen by the other", LIMIT, || {
        b.ok(&format!("exec {web} -- ls {mnt}")).contains("from-a")
    });

    // Started again, it is taken up again.
    a.ok(&format!("rm -f {store}"));
    serve(a);
    wait_until("the mount has come back", LIMIT, || {
        b.towline(&format!("exec {web} -- timeout 10 cat {mnt}/d/file"))
            .stdout
            == b"hello\n"
    });
    b.ok(&format!("rm -f {web}"));
    a.ok(&format!("rm -f {store}"));
    a.ok("volume rm shared");
}

/// The other way round of docs/volumes.md: a container goes where its volume is.
#[test]
fn a_container_is_pinned_to_its_volume_by_a_label() {
    let cluster = Cluster::joined(2, &[]);
    let [a, b] = &cluster.hosts[..] else {
        panic!("two hosts")
    };
    let place = tempfile::tempdir().unwrap();
    let dst = place.path().display();
    a.ok(&format!("host update --label-add pgdata=here {}", a.name));
    let db = format!(
        "run --rm --constraint node.labels.pgdata==here --mount source=pgdata,target={dst}"
    );
    prints(a, &db, &format!("echo kept > {dst}/row"));
    let there = format!("run it on {}", a.name);
    b.refused(
        &format!("{db} -- true"),
        125,
        &["node.labels.pgdata==here", "it has none", &there],
    );
    assert!(
        volumes(b, "").is_empty(),
        "nothing was made where it may not run"
    );
    assert_eq!(prints(a, &db, &format!("cat {dst}/row")), "kept\n");
    // Without the label, another and empty volume of the same name.
    let other = format!("run --rm --mount source=pgdata,target={dst}");
    assert_eq!(prints(b, &other, &format!("ls {dst}")), "");
}
