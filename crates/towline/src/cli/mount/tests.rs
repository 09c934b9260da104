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

#[test]
fn what_is_refused_and_in_which_words() {
    let cases = [
        ("type=bind,target=/mnt", "field Source must not be empty"),
        (
            "type=bind,source=srv,target=/mnt",
            "invalid bind mount source, must be an absolute path: srv",
        ),
        (
            "type=volume,source=/srv,target=/mnt",
            "invalid volume mount source, must not be an absolute path: /srv",
        ),
        (
            "type=volume,source=a/b,target=/mnt",
            "includes invalid characters for a local volume name",
        ),
        (
            "type=volume,source=..,target=/mnt",
            "invalid volume mount source, must not be an absolute path",
        ),
        (
            "type=volume,source=x,target=/mnt",
            "volume name is too short",
        ),
        ("type=volume,source=data", "target is required"),
        (
            "type=volume,source=data,target=mnt",
            "invalid mount path: 'mnt' mount path must be absolute",
        ),
        (
            "type=volume,source=data,target=/",
            "destination can't be '/'",
        ),
        (
            "type=volume,source=data,target=/a/..",
            "destination can't be '/'",
        ),
        (
            "target=/mnt,readonly",
            "must not set ReadOnly mode when using anonymous volumes",
        ),
        (
            "type=tmpfs,source=x,target=/mnt",
            "field Source must not be specified",
        ),
        ("type=tmpfs,target=/mnt,tmpfs-size=0", "tmpfs-size"),
        ("type=tmpfs,target=/mnt,tmpfs-size=lots", "tmpfs-size"),
        (
            "type=tmpfs,target=/mnt,tmpfs-size=99999999999t",
            "tmpfs-size",
        ),
        ("type=tmpfs,target=/mnt,tmpfs-mode=999", "tmpfs-mode"),
        ("type=tmpfs,target=/mnt,tmpfs-mode=77777", "at most 7777"),
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
        ("type=nfs,target=/mnt", "invalid mount type 'nfs'"),
        (
            "type=bind,source=/srv,target=/mnt,colour=red",
            "unexpected key 'colour'",
        ),
        (
            "type=bind,source=,target=/mnt",
            "invalid value for 'source': value is empty",
        ),
        (
            "type=bind,source= /srv,target=/mnt",
            "value should not have whitespace",
        ),
        (
            "type=bind, source=/srv,target=/mnt",
            "option should not have whitespace",
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
            "a quote is not closed",
        ),
        // Docker has these; here each is refused by its name.
        (
            "type=cluster,source=x,target=/mnt",
            "'--mount type=cluster' is not built yet",
        ),
        (
            "type=image,source=x,target=/mnt",
            "'--mount type=image' is not built yet",
        ),
        (
            "type=npipe,source=x,target=/mnt",
            "'--mount type=npipe' is not built yet",
        ),
        (
            "source=data,target=/mnt,volume-driver=nfs",
            "'--mount volume-driver=nfs' is not built yet",
        ),
        (
            "source=data,target=/mnt,volume-opt=size=1g",
            "'--mount volume-opt' is not built yet",
        ),
        (
            "source=data,target=/mnt,volume-subpath=a",
            "'--mount volume-subpath' is not built yet",
        ),
        (
            "type=bind,source=/srv,target=/mnt,bind-propagation=rshared",
            "'--mount bind-propagation' is not built yet",
        ),
        (
            "type=bind,source=/srv,target=/mnt,bind-recursive=writable",
            "'--mount bind-recursive' is not built yet",
        ),
    ];
    for (text, words) in cases {
        let error = format!("{:#}", mount(text).expect_err(text));
        // `..` begins with a dot: a folder of the caller's, and so no volume.
        assert!(error.contains(words), "{text}: {error}");
    }
    for (text, words) in [
        ("", "invalid volume specification: ''"),
        (":/data", "invalid volume specification: ':/data'"),
        ("/data:ro", "invalid volume specification: '/data:ro'"),
        ("a:b:c:d", "invalid volume specification: 'a:b:c:d'"),
        ("data:/data:fast", "invalid mode: fast"),
        ("data:/data:", "invalid mode: "),
        ("data:/data:ro,rw", "invalid mode: rw"),
        ("/srv:/mnt:nocopy", "invalid mode: nocopy"),
        ("data:/data:z", "is not built yet"),
        ("data:mnt", "'mnt' mount path must be absolute"),
        ("data:/", "destination can't be '/'"),
        (
            "da/ta:/data",
            "includes invalid characters for a local volume name",
        ),
    ] {
        let error = format!("{:#}", volume(text).expect_err(text));
        assert!(error.contains(words), "{text}: {error}");
    }
    let twice = parse(&["target=/data".into()], &["data:/data/".into()]).expect_err("twice");
    assert_eq!(twice.to_string(), "duplicate mount point: /data");
}
