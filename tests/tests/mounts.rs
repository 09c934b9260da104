//! What containers find at places of their own: files of the host, and memory.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;

use towline_tests::cluster::Cluster;
use towline_tests::container::{output, prints, script};
use towline_tests::files::{Mounted, folder, is_mounted};

#[test]
fn files_of_the_host_are_where_the_container_wants_them() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let (source, place) = (folder(), tempfile::tempdir().unwrap());
    let (src, dst) = (source.path().display(), place.path().display());
    fs::write(place.path().join("hidden"), "").unwrap();

    let seen = prints(
        host,
        &format!("run --rm -v {src}:{dst}"),
        &format!("ls {dst}; echo new > {dst}/made"),
    );
    assert_eq!(seen, "file\n", "what the host has there is hidden");
    assert_eq!(
        fs::read_to_string(source.path().join("made")).unwrap(),
        "new\n"
    );
    assert!(place.path().join("hidden").exists() && !place.path().join("made").exists());

    for read_only in [
        format!("run --rm --mount type=bind,source={src},target={dst},readonly"),
        format!("run --rm -v {src}:{dst}:ro"),
    ] {
        let output = output(
            host,
            script(
                host,
                &read_only,
                &format!("cat {dst}/file && touch {dst}/other"),
            ),
        );
        assert_eq!(output.stdout, b"from the host\n");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && error.contains("Read-only"),
            "{error}"
        );
    }
    // A single file, on a file.
    let seen = prints(
        host,
        &format!("run --rm -v {src}/file:{dst}/hidden:ro"),
        &format!("cat {dst}/hidden"),
    );
    assert_eq!(seen, "from the host\n");
    host.refused(
        &format!("run --rm -v {src}:{dst}/hidden -- true"),
        125,
        &["not a directory", "onto a file"],
    );
    assert!(
        !is_mounted(place.path()),
        "nothing of it is seen on the host"
    );
}

#[test]
fn what_is_mounted_below_the_source_comes_along_and_is_read_only_too() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let (source, place) = (folder(), tempfile::tempdir().unwrap());
    let (src, dst) = (source.path().display(), place.path().display());
    fs::create_dir(source.path().join("sub")).unwrap();
    let below = Mounted::tmpfs(&source.path().join("sub"));
    fs::write(source.path().join("sub/inner"), "").unwrap();
    let output = output(
        host,
        script(
            host,
            &format!("run --rm -v {src}:{dst}:ro"),
            &format!("ls {dst}/sub; touch {dst}/sub/other"),
        ),
    );
    assert_eq!(output.stdout, b"inner\n");
    assert!(
        !output.status.success(),
        "written through a read-only mount"
    );
    drop(below);
}

#[test]
fn places_that_are_missing_are_made_and_go_with_the_last_container() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let (source, place) = (folder(), tempfile::tempdir().unwrap());
    let (src, dst) = (source.path().display(), place.path().display());
    let (one, other) = (cluster.container("one"), cluster.container("other"));
    host.ok(&format!(
        "run -d --name {one} -v {src}:{dst}/a/b -- sleep 600"
    ));
    host.ok(&format!(
        "run -d --name {other} -v {src}:{dst}/a/b -- sleep 600"
    ));
    host.ok(&format!("rm -f {one}"));
    // The kernel would have taken the other's mount away with the folder.
    let seen = host.ok(&format!("exec {other} -- cat {dst}/a/b/file"));
    assert_eq!(seen, "from the host\n");
    fs::write(place.path().join("a/kept"), "").unwrap();
    host.ok(&format!("rm -f {other}"));
    assert!(!place.path().join("a/b").exists(), "made by us, and empty");
    assert!(
        place.path().join("a/kept").exists(),
        "put there by somebody else"
    );

    // A file's place is a file; one inside another mount is made in there, and stays as in Docker.
    let seen = prints(
        host,
        &format!("run --rm -v {src}:{dst}/c -v {src}/file:{dst}/d/e/f -v {src}/file:{dst}/c/g/h"),
        &format!("cat {dst}/d/e/f {dst}/c/g/h"),
    );
    assert_eq!(seen, "from the host\nfrom the host\n");
    assert!(!place.path().join("c").exists() && !place.path().join("d").exists());
    assert!(source.path().join("g/h").is_file());
}

#[test]
fn a_place_outlives_an_agent_that_is_killed_and_goes_all_the_same() {
    let mut cluster = Cluster::joined(1, &[]);
    let (source, place) = (folder(), tempfile::tempdir().unwrap());
    let (src, dst) = (
        source.path().display().to_string(),
        place.path().display().to_string(),
    );
    let name = cluster.container("c");
    let host = &mut cluster.hosts[0];
    host.ok(&format!(
        "run -d --name {name} -v {src}:{dst}/a -- sleep 600"
    ));
    host.kill_agent();
    host.start_agent();
    assert_eq!(
        host.ok(&format!("exec {name} -- cat {dst}/a/file")),
        "from the host\n"
    );
    host.ok(&format!("rm -f {name}"));
    assert!(!place.path().join("a").exists());
}

#[test]
fn links_lead_where_they_lead_in_the_container_and_never_out_of_it() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let (source, place) = (folder(), tempfile::tempdir().unwrap());
    let (src, dst) = (source.path().display(), place.path().display());
    fs::create_dir(place.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", place.path().join("link")).unwrap();
    let seen = prints(
        host,
        &format!("run --rm -v {src}:{dst}/link"),
        &format!("cat {dst}/real/file"),
    );
    assert_eq!(seen, "from the host\n");
    // The root of another process is the host's.
    let outside = format!("/proc/{}/root{dst}/real", std::process::id());
    host.refused(
        &format!("run --rm -v {src}:{outside} -- true"),
        125,
        &["another namespace"],
    );
    std::os::unix::fs::symlink("nowhere", place.path().join("broken")).unwrap();
    host.refused(
        &format!("run --rm -v {src}:{dst}/broken -- true"),
        125,
        &["leads nowhere"],
    );
    assert!(!is_mounted(place.path()));
}

#[test]
fn memory_is_the_containers_own() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let place = tempfile::tempdir().unwrap();
    let dst = place.path().display();
    let seen = prints(
        host,
        &format!("run --rm --mount type=tmpfs,target={dst},tmpfs-size=1m,tmpfs-mode=0700"),
        &format!(
            "stat -f -c %T {dst}; stat -c %a {dst}; head -c 2000000 /dev/zero > {dst}/x 2>/dev/null || echo full"
        ),
    );
    assert_eq!(seen, "tmpfs\n700\nfull\n");
    assert!(fs::read_dir(place.path()).unwrap().next().is_none());
}

#[test]
fn a_source_that_is_missing_is_refused_or_made_as_docker_does() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let (source, place) = (folder(), tempfile::tempdir().unwrap());
    let (src, dst) = (source.path().display(), place.path().display());
    host.refused(
        &format!("run --rm --mount type=bind,source={src}/none,target={dst} -- true"),
        125,
        &[&format!(
            "invalid mount config for type \"bind\": bind source path does not exist: {src}/none"
        )],
    );
    prints(
        host,
        &format!("run --rm -v {src}/new:{dst}"),
        &format!("touch {dst}/x"),
    );
    assert!(source.path().join("new/x").exists(), "made by -v, and kept");
    let mount = format!("type=bind,source={src}/newer,target={dst},bind-create-src");
    prints(
        host,
        &format!("run --rm --mount {mount}"),
        &format!("touch {dst}/x"),
    );
    assert!(source.path().join("newer/x").exists());
    assert_eq!(
        host.json("ps -a --json").as_array().unwrap().len(),
        0,
        "nothing is left of what was refused"
    );
}
