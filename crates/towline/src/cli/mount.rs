//! The texts of `--mount` and `--volume`, as Docker reads them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};

use super::refused::not_built;
use crate::api::mount::{MountWanted, Wanted, check};

/// Options that mean yes when they stand alone.
const OPTIONS_WITHOUT_VALUE: [&str; 5] = [
    "readonly",
    "ro",
    "volume-nocopy",
    "bind-create-src",
    "bind-nonrecursive",
];

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
mod tests;
