//! The texts of `--mount` and `--volume`, as Docker reads them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};

use super::refused::not_built;
use crate::api::mount::{MountWanted, Wanted, check};

/// Options that mean yes when they stand alone.
const OPTIONS_WITHOUT_VALUE: [&str; 4] = ["readonly", "ro", "volume-nocopy", "bind-create-src"];

/// What `--mount` and `--volume` ask for together.
///
/// # Errors
/// Names the option and what is wrong with it; one that Docker has and this program has not is refused by name.
pub(super) fn parse(mounts: &[String], volumes: &[String]) -> anyhow::Result<Vec<MountWanted>> {
    let mut wanted = Vec::new();
    for text in volumes {
        wanted.push(short(text)?);
    }
    for text in mounts {
        wanted.push(
            long(text).with_context(|| format!("invalid argument \"{text}\" for \"--mount\""))?,
        );
    }
    check(&mut wanted)?;
    Ok(wanted)
}

/// `type=bind,source=/data,target=/mnt,readonly`.
fn long(text: &str) -> anyhow::Result<MountWanted> {
    let mut options = Options::default();
    for field in fields(text)? {
        options.set(&field, text)?;
    }
    options.finish()
}

/// The options of one `--mount`.
#[derive(Default)]
struct Options {
    kind: Option<String>,
    source: Option<String>,
    target: Option<String>,
    readonly: bool,
    nocopy: Option<bool>,
    labels: BTreeMap<String, String>,
    create: Option<bool>,
    size: Option<u64>,
    mode: Option<u32>,
    /// Options of each kind, to name one that does not fit.
    of_kind: Vec<&'static str>,
}

impl Options {
    fn set(&mut self, field: &str, text: &str) -> anyhow::Result<()> {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (field, None),
        };
        if key.trim() != key {
            bail!("invalid option '{key}' in '{field}': option should not have whitespace");
        }
        let key = key.to_lowercase();
        let value = match value {
            Some("") => bail!("invalid value for '{key}': value is empty"),
            Some(value) if value.trim() != value => {
                bail!("invalid value for '{key}' in '{field}': value should not have whitespace")
            }
            Some(value) => value,
            None if OPTIONS_WITHOUT_VALUE.contains(&key.as_str()) => "true",
            None => bail!("invalid field '{field}' must be a key=value pair"),
        };
        match key.as_str() {
            "type" => self.kind = Some(value.to_lowercase()),
            "source" | "src" => self.source = Some(absolute(value)?),
            "target" | "dst" | "destination" => self.target = Some(value.to_owned()),
            "readonly" | "ro" => self.readonly = boolean(&key, value)?,
            "volume-nocopy" => {
                self.of_kind.push("volume");
                self.nocopy = Some(boolean(&key, value)?);
            }
            "volume-label" => {
                self.of_kind.push("volume");
                let (name, value) = value.split_once('=').unwrap_or((value, ""));
                self.labels.insert(name.to_owned(), value.to_owned());
            }
            "volume-driver" => {
                self.of_kind.push("volume");
                if value != "local" {
                    return Err(not_built(
                        &format!("--mount volume-driver={value}"),
                        "volumes are folders of this host, driver 'local'; docs/volumes.md has ways to share one",
                    ));
                }
            }
            "bind-create-src" => {
                self.of_kind.push("bind");
                self.create = Some(boolean(&key, value)?);
            }
            "bind-recursive" if value == "enabled" => self.of_kind.push("bind"),
            "tmpfs-size" => {
                self.of_kind.push("tmpfs");
                self.size = Some(bytes(value)?);
            }
            "tmpfs-mode" => {
                self.of_kind.push("tmpfs");
                let mode = u32::from_str_radix(value, 8);
                self.mode = Some(mode.ok().with_context(|| {
                    format!("invalid value for tmpfs-mode: {value}: write it as chmod does, such as 1777")
                })?);
            }
            "consistency" => {}
            "volume-opt" | "volume-subpath" => {
                return Err(not_built(
                    &format!("--mount {key}"),
                    "mount the volume whole, or a folder by type=bind",
                ));
            }
            "bind-propagation" | "bind-nonrecursive" | "bind-recursive" => {
                return Err(not_built(
                    &format!("--mount {key}"),
                    "what is mounted below the source on the host is seen in the container, and nothing the other way",
                ));
            }
            _ => bail!("unexpected key '{key}' in '{text}'"),
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<MountWanted> {
        let kind = self.kind.as_deref().unwrap_or("volume");
        if let Some(of) = self.of_kind.iter().find(|of| **of != kind)
            && ["bind", "volume", "tmpfs"].contains(&kind)
        {
            bail!("cannot mix '{of}-*' options with mount type '{kind}'");
        }
        let source = match kind {
            "bind" => Wanted::Bind {
                source: self.source.unwrap_or_default(),
                create: self.create.unwrap_or(false),
            },
            "volume" => Wanted::Volume {
                name: self.source,
                nocopy: self.nocopy.unwrap_or(false),
                labels: self.labels,
            },
            "tmpfs" => {
                if self.source.is_some() {
                    bail!(
                        "invalid mount config for type \"tmpfs\": field Source must not be specified"
                    );
                }
                Wanted::Tmpfs {
                    size: self.size,
                    mode: self.mode,
                }
            }
            "cluster" | "image" | "npipe" => {
                return Err(not_built(
                    &format!("--mount type={kind}"),
                    "use type=volume, type=bind or type=tmpfs",
                ));
            }
            _ => bail!("invalid mount type '{kind}': use volume, bind or tmpfs"),
        };
        let Some(target) = self.target else {
            bail!("target is required");
        };
        Ok(MountWanted {
            source,
            target,
            readonly: self.readonly,
        })
    }
}

/// `SRC:DST[:ro|nocopy]`, or `DST` alone for a volume without a name.
fn short(text: &str) -> anyhow::Result<MountWanted> {
    let invalid = || format!("invalid volume specification: '{text}'");
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, modes) = match parts.as_slice() {
        [target] if !target.is_empty() => (None, *target, ""),
        // A volume without a name has no mode.
        [source, target] if !source.is_empty() && !is_mode(target) => (Some(*source), *target, ""),
        [source, target, modes] if !source.is_empty() => (Some(*source), *target, *modes),
        _ => bail!(invalid()),
    };
    let (mut readonly, mut nocopy) = (None, false);
    for mode in modes.split(',').filter(|_| parts.len() == 3) {
        match mode {
            "ro" | "rw" if readonly.is_none() => readonly = Some(mode == "ro"),
            "nocopy" if !nocopy => nocopy = true,
            "z" | "Z" | "shared" | "rshared" | "slave" | "rslave" | "private" | "rprivate" => {
                return Err(not_built(
                    &format!("--volume …:{mode}"),
                    "leave it out: mounts below the source on the host are seen in the container, files keep their SELinux labels",
                ));
            }
            "consistent" | "cached" | "delegated" => {}
            _ => bail!("invalid mode: {mode}"),
        }
    }
    let readonly = readonly.unwrap_or(false);
    let source = source.map(absolute).transpose()?;
    let source = match source {
        Some(source) if source.starts_with('/') => {
            if nocopy {
                bail!("invalid mode: nocopy");
            }
            // Docker's rule for this option alone: `--mount` refuses one that is missing.
            Wanted::Bind {
                source,
                create: true,
            }
        }
        name => Wanted::Volume {
            name,
            nocopy,
            labels: BTreeMap::new(),
        },
    };
    Ok(MountWanted {
        source,
        target: target.to_owned(),
        readonly,
    })
}

fn is_mode(text: &str) -> bool {
    text.split(',')
        .all(|word| matches!(word, "ro" | "rw" | "nocopy" | "z" | "Z"))
}

/// A path that begins with a dot is one of the caller's folder.
fn absolute(source: &str) -> anyhow::Result<String> {
    let relative =
        source == "." || source == ".." || source.starts_with("./") || source.starts_with("../");
    if !relative {
        return Ok(source.to_owned());
    }
    let folder = std::env::current_dir().context("can't tell the current folder")?;
    let path = folder.join(Path::new(source));
    // Symbolic links are followed, so that `..` leads where the shell's does.
    let path = path.canonicalize().unwrap_or(path);
    path.to_str()
        .map(str::to_owned)
        .with_context(|| format!("{} is not UTF-8: give another path", path.display()))
}

/// Go's `strconv.ParseBool`.
fn boolean(key: &str, value: &str) -> anyhow::Result<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => bail!("invalid value for {key}: {value}"),
    }
}

/// A number of bytes, with `k`, `m`, `g` or `t` as 1,024-fold steps.
fn bytes(text: &str) -> anyhow::Result<u64> {
    let lower = text.to_ascii_lowercase();
    let number = lower.trim_end_matches("ib").trim_end_matches('b');
    let (digits, shift) = match number.chars().last() {
        Some('k') => (number.trim_end_matches('k'), 10),
        Some('m') => (number.trim_end_matches('m'), 20),
        Some('g') => (number.trim_end_matches('g'), 30),
        Some('t') => (number.trim_end_matches('t'), 40),
        _ => (number, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .with_context(|| {
            format!("invalid value for tmpfs-size: {text}: write a number of bytes, such as 64m")
        })
}

/// Fields between commas; one in double quotes may hold commas, and a doubled quote is one.
fn fields(text: &str) -> anyhow::Result<Vec<String>> {
    let mut fields = vec![String::new()];
    let mut chars = text.chars().peekable();
    let mut quoted = false;
    while let Some(c) = chars.next() {
        let field = fields.last_mut().context("a field stands open always")?;
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' if quoted => quoted = false,
            '"' if field.is_empty() => quoted = true,
            ',' if !quoted => fields.push(String::new()),
            _ => field.push(c),
        }
    }
    if quoted {
        bail!("a quote is not closed in '{text}'");
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
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
}
