//! Docker's rules as tables of cases, each with what it means or the words that refuse it.

use super::*;

fn mount(text: &str) -> anyhow::Result<MountWanted> {
    Ok(parse(&[text.to_owned()], &[])?.remove(0))
}

fn volume(text: &str) -> anyhow::Result<MountWanted> {
    Ok(parse(&[], &[text.to_owned()])?.remove(0))
}

fn named(name: Option<&str>, nocopy: bool) -> Wanted {
    Wanted::Volume {
        name: name.map(str::to_owned),
        nocopy,
        labels: BTreeMap::new(),
    }
}

fn bind(source: &str, create: bool) -> Wanted {
    Wanted::Bind {
        source: source.to_owned(),
        create,
    }
}

#[test]
fn what_is_accepted_and_what_it_means() {
    let memory = Wanted::Tmpfs {
        size: Some(64 << 20),
        mode: Some(0o1770),
    };
    let cases: [(&str, Wanted, &str, bool); 16] = [
        // The type is volume unless said otherwise.
        (
            "source=data,target=/data",
            named(Some("data"), false),
            "/data",
            false,
        ),
        (
            "type=volume,src=data,dst=/data",
            named(Some("data"), false),
            "/data",
            false,
        ),
        ("target=/data", named(None, false), "/data", false),
        (
            "source=data,target=/data,readonly",
            named(Some("data"), false),
            "/data",
            true,
        ),
        (
            "source=data,target=/data,ro=false",
            named(Some("data"), false),
            "/data",
            false,
        ),
        (
            "source=data,target=/data,volume-nocopy",
            named(Some("data"), true),
            "/data",
            false,
        ),
        (
            "source=data,target=/data,volume-nocopy=true",
            named(Some("data"), true),
            "/data",
            false,
        ),
        (
            "source=data,target=/data,volume-nocopy=0",
            named(Some("data"), false),
            "/data",
            false,
        ),
        (
            "source=data,target=/data,volume-driver=local",
            named(Some("data"), false),
            "/data",
            false,
        ),
        (
            "TYPE=Bind,source=/srv,destination=/mnt",
            bind("/srv", false),
            "/mnt",
            false,
        ),
        (
            "type=bind,source=/srv,target=/mnt,bind-create-src",
            bind("/srv", true),
            "/mnt",
            false,
        ),
        (
            "type=bind,source=/srv,target=/mnt,bind-recursive=enabled",
            bind("/srv", false),
            "/mnt",
            false,
        ),
        (
            "type=bind,source=/srv,target=/a//b/../c/",
            bind("/srv", false),
            "/a/c",
            false,
        ),
        (
            r#"type=bind,"source=/a,b""c",target=/mnt"#,
            bind("/a,b\"c", false),
            "/mnt",
            false,
        ),
        (
            "type=tmpfs,target=/m,tmpfs-size=64m,tmpfs-mode=1770",
            memory,
            "/m",
            false,
        ),
        (
            "type=tmpfs,target=/m,ro",
            Wanted::Tmpfs {
                size: None,
                mode: None,
            },
            "/m",
            true,
        ),
    ];
    for (text, source, target, readonly) in cases {
        let target = target.to_owned();
        let wanted = mount(text).unwrap_or_else(|error| panic!("{text}: {error:#}"));
        assert_eq!(
            wanted,
            MountWanted {
                source,
                target,
                readonly
            },
            "{text}"
        );
    }
    let labelled =
        mount("source=data,target=/data,volume-label=a=b,volume-label=c").expect("labels");
    let Wanted::Volume { labels, .. } = labelled.source else {
        panic!("a volume");
    };
    assert_eq!(
        labels,
        BTreeMap::from([("a".into(), "b".into()), ("c".into(), String::new())])
    );
}

#[test]
fn what_the_short_form_means() {
    let here = std::env::current_dir()
        .expect("a folder")
        .canonicalize()
        .expect("it stands");
    let cases = [
        ("data:/data", named(Some("data"), false), "/data", false),
        ("/data", named(None, false), "/data", false),
        ("data:/data:ro", named(Some("data"), false), "/data", true),
        ("data:/data:rw", named(Some("data"), false), "/data", false),
        (
            "data:/data:nocopy",
            named(Some("data"), true),
            "/data",
            false,
        ),
        (
            "data:/data:ro,nocopy",
            named(Some("data"), true),
            "/data",
            true,
        ),
        ("/srv:/mnt", bind("/srv", true), "/mnt", false),
        ("/srv:/mnt:ro", bind("/srv", true), "/mnt", true),
        (
            ".:/mnt",
            bind(here.to_str().expect("UTF-8"), true),
            "/mnt",
            false,
        ),
    ];
    for (text, source, target, readonly) in cases {
        let target = target.to_owned();
        let wanted = volume(text).unwrap_or_else(|error| panic!("{text}: {error:#}"));
        assert_eq!(
            wanted,
            MountWanted {
                source,
                target,
                readonly
            },
            "{text}"
        );
    }
}

/// What is said of a name that can't be a volume's, behind the name.
const NO_VOLUME_NAME: &str = "includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. \
                              If you intended to pass a host directory, use absolute path";

/// How a message of `--mount`'s own begins.
fn argument(text: &str) -> String {
    format!("invalid argument \"{text}\" for \"--mount\": ")
}

#[test]
fn a_mount_that_cannot_be_read_is_refused_word_for_word() {
    for (text, words) in [
        ("type=volume,source=data", "target is required"),
        (
            "type=tmpfs,source=x,target=/mnt",
            "invalid mount config for type \"tmpfs\": field Source must not be specified",
        ),
        (
            "type=tmpfs,target=/mnt,tmpfs-size=0",
            "invalid value for tmpfs-size: 0: write a number of bytes, such as 64m",
        ),
        (
            "type=tmpfs,target=/mnt,tmpfs-size=lots",
            "invalid value for tmpfs-size: lots: write a number of bytes, such as 64m",
        ),
        (
            "type=tmpfs,target=/mnt,tmpfs-size=99999999999t",
            "invalid value for tmpfs-size: 99999999999t: write a number of bytes, such as 64m",
        ),
        (
            "type=tmpfs,target=/mnt,tmpfs-mode=999",
            "invalid value for tmpfs-mode: 999: write it as chmod does, such as 1777",
        ),
        (
            "type=bind,source=/srv,target=/mnt,volume-nocopy",
            "cannot mix 'volume-*' options with mount type 'bind'",
        ),
        (
            "type=volume,target=/mnt,bind-create-src",
            "cannot mix 'bind-*' options with mount type 'volume'",
        ),
        (
            "type=bind,source=/srv,target=/mnt,tmpfs-size=1m",
            "cannot mix 'tmpfs-*' options with mount type 'bind'",
        ),
        (
            "type=nfs,target=/mnt",
            "invalid mount type 'nfs': use volume, bind or tmpfs",
        ),
        (
            "type=bind,source=/srv,target=/mnt,colour=red",
            "unexpected key 'colour' in 'type=bind,source=/srv,target=/mnt,colour=red'",
        ),
        (
            "type=bind,source=,target=/mnt",
            "invalid value for 'source': value is empty",
        ),
        (
            "type=bind,source= /srv,target=/mnt",
            "invalid value for 'source' in 'source= /srv': value should not have whitespace",
        ),
        (
            "type=bind, source=/srv,target=/mnt",
            "invalid option ' source' in ' source=/srv': option should not have whitespace",
        ),
        (
            "type=bind,source=/srv,target=/mnt,ro=maybe",
            "invalid value for ro: maybe",
        ),
        (
            "type=bind,source,target=/mnt",
            "invalid field 'source' must be a key=value pair",
        ),
        ("", "invalid field '' must be a key=value pair"),
        (
            r#"type=bind,"source=/srv,target=/mnt"#,
            r#"a quote is not closed in 'type=bind,"source=/srv,target=/mnt'"#,
        ),
    ] {
        let error = format!("{:#}", mount(text).expect_err(text));
        assert_eq!(error, argument(text) + words);
    }
}

#[test]
fn a_mount_that_docker_has_and_this_has_not_is_refused_by_its_name() {
    let kinds = "use type=volume, type=bind or type=tmpfs";
    let whole = "mount the volume whole, or a folder by type=bind";
    let below = "what is mounted below the source on the host is seen in the container, and nothing the other way";
    for (text, name, instead) in [
        ("type=cluster,source=x,target=/mnt", "type=cluster", kinds),
        ("type=image,source=x,target=/mnt", "type=image", kinds),
        ("type=npipe,source=x,target=/mnt", "type=npipe", kinds),
        (
            "source=data,target=/mnt,volume-driver=nfs",
            "volume-driver=nfs",
            "volumes are folders of this host, driver 'local'; docs/volumes.md has ways to share one",
        ),
        (
            "source=data,target=/mnt,volume-opt=size=1g",
            "volume-opt",
            whole,
        ),
        (
            "source=data,target=/mnt,volume-subpath=a",
            "volume-subpath",
            whole,
        ),
        (
            "type=bind,source=/srv,target=/mnt,bind-propagation=rshared",
            "bind-propagation",
            below,
        ),
        (
            "type=bind,source=/srv,target=/mnt,bind-nonrecursive",
            "bind-nonrecursive",
            below,
        ),
        (
            "type=bind,source=/srv,target=/mnt,bind-recursive=writable",
            "bind-recursive",
            below,
        ),
    ] {
        let error = format!("{:#}", mount(text).expect_err(text));
        let expected = format!("'--mount {name}' is not built yet: {instead}");
        assert_eq!(error, argument(text) + &expected);
    }
}

#[test]
fn a_mount_that_cannot_be_is_refused_word_for_word() {
    let parent = std::env::current_dir().expect("a folder").join("..");
    let parent = parent.canonicalize().expect("it stands");
    for (text, kind, words) in [
        (
            "type=bind,target=/mnt",
            "bind",
            "field Source must not be empty".to_owned(),
        ),
        (
            "type=bind,source=srv,target=/mnt",
            "bind",
            "invalid bind mount source, must be an absolute path: srv".to_owned(),
        ),
        (
            "type=volume,source=/srv,target=/mnt",
            "volume",
            "invalid volume mount source, must not be an absolute path: /srv".to_owned(),
        ),
        // `..` begins with a dot: a folder of the caller's, and so no volume.
        (
            "type=volume,source=..,target=/mnt",
            "volume",
            format!(
                "invalid volume mount source, must not be an absolute path: {}",
                parent.display()
            ),
        ),
        (
            "type=volume,source=a/b,target=/mnt",
            "volume",
            format!("\"a/b\" {NO_VOLUME_NAME}"),
        ),
        (
            "type=volume,source=x,target=/mnt",
            "volume",
            "volume name is too short, names should be at least two alphanumeric characters"
                .to_owned(),
        ),
        (
            "type=volume,source=data,target=mnt",
            "volume",
            "invalid mount path: 'mnt' mount path must be absolute".to_owned(),
        ),
        (
            "type=volume,source=data,target=/",
            "volume",
            "invalid specification: destination can't be '/'".to_owned(),
        ),
        (
            "type=volume,source=data,target=/a/..",
            "volume",
            "invalid specification: destination can't be '/'".to_owned(),
        ),
        (
            "target=/mnt,readonly",
            "volume",
            "must not set ReadOnly mode when using anonymous volumes".to_owned(),
        ),
        (
            "type=tmpfs,target=/mnt,tmpfs-mode=77777",
            "tmpfs",
            "invalid tmpfs mode 77777: at most 7777".to_owned(),
        ),
    ] {
        let error = format!("{:#}", mount(text).expect_err(text));
        assert_eq!(
            error,
            format!("invalid mount config for type \"{kind}\": {words}"),
            "{text}"
        );
    }
    let twice = parse(&["target=/data".into()], &["data:/data/".into()]).expect_err("twice");
    assert_eq!(
        twice.to_string(),
        "ContainerSpec: duplicate mount point: /data"
    );
}

#[test]
fn the_short_form_is_refused_word_for_word() {
    for (text, words) in [
        ("", "invalid volume specification: ''"),
        (":/data", "invalid volume specification: ':/data'"),
        ("/data:ro", "invalid volume specification: '/data:ro'"),
        ("a:b:c:d", "invalid volume specification: 'a:b:c:d'"),
        ("data:/data:fast", "invalid mode: fast"),
        ("data:/data:", "invalid mode: "),
        ("data:/data:ro,rw", "invalid mode: rw"),
        ("/srv:/mnt:nocopy", "invalid mode: nocopy"),
        (
            "data:/data:z",
            "'--volume …:z' is not built yet: leave it out: mounts below the source on the host are seen in the container, \
             files keep their SELinux labels",
        ),
        (
            "data:mnt",
            "invalid mount config for type \"volume\": invalid mount path: 'mnt' mount path must be absolute",
        ),
        (
            "data:/",
            "invalid mount config for type \"volume\": invalid specification: destination can't be '/'",
        ),
        (
            "da/ta:/data",
            &format!("invalid mount config for type \"volume\": \"da/ta\" {NO_VOLUME_NAME}"),
        ),
    ] {
        let error = format!("{:#}", volume(text).expect_err(text));
        assert_eq!(error, words, "{text}");
    }
}
