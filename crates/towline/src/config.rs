//! What the agent is told: configuration file, then environment, then flags;
//! the later wins. Checked once, here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use control::AddressPool;
use control::pki::LIFETIME;
use ipnet::{Ipv4Net, Ipv6Net};
use serde::Deserialize;
use vtep::datapath::Backend;

use crate::cli::DEFAULT_SOCKET;
use crate::cli::network::label;
use crate::cli::token::duration;
use crate::shim::dns::RESOLV_CONF;

const DEFAULT_CONFIG: &str = "/etc/towline/towline.toml";
const DEFAULT_STATE_DIR: &str = "/var/lib/towline";
const MAX_WORKERS: usize = 64;
const MIN_CERT_EXPIRY: Duration = Duration::from_secs(10);

/// The agent's options as given on the command line or in the environment.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Flags {
    /// This host's name, unique in the cluster [default: the hostname; configuration key: name]
    #[arg(long, env = "TOWLINE_NAME")]
    name: Option<String>,
    /// Where the agent keeps its state [default: /var/lib/towline; configuration key: state-dir]
    #[arg(long, env = "TOWLINE_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Configuration file (TOML) [default: /etc/towline/towline.toml, if it exists]
    #[arg(long, env = "TOWLINE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// How containers' interfaces are served: 'offload' (many queues, checksums left to the
    /// program) or 'plain' (one queue, works everywhere) [default: offload; configuration key: backend]
    #[arg(long, env = "TOWLINE_BACKEND", value_parser = backend)]
    backend: Option<Backend>,
    /// Threads that carry frames [default: one per core, at most 8; configuration key: workers]
    #[arg(long, env = "TOWLINE_WORKERS")]
    workers: Option<usize>,
    /// Drop datagrams whose reserved VXLAN bits are set, as Linux does
    /// [default: accept them, RFC 7348 §5; configuration key: strict-reserved-bits]
    #[arg(long, env = "TOWLINE_STRICT_RESERVED_BITS")]
    strict_reserved_bits: bool,
    /// Take networks, endpoints and other hosts from this file (TOML) instead of a manager; SIGHUP reads it again
    /// [default: ask a manager; configuration key: static]
    #[arg(long = "static", env = "TOWLINE_STATIC", value_name = "FILE")]
    static_tables: Option<PathBuf>,
    /// How long certificates are good for that this host's manager signs: a number with s, m, h or d, at least 10s;
    /// hosts renew theirs after two thirds of it [default: 90d; configuration key: cert-expiry]
    #[arg(long, env = "TOWLINE_CERT_EXPIRY", value_name = "DURATION")]
    cert_expiry: Option<String>,
    /// The IPv4 subnet of this host's gateway bridge, /8 to /30; it may overlap no route of the host
    /// [default: the first free /16 of 172.16.0.0/12 from the top; configuration key: gwbridge-subnet]
    #[arg(long, env = "TOWLINE_GWBRIDGE_SUBNET", value_name = "CIDR", value_parser = subnet::<Ipv4Net>)]
    gwbridge_subnet: Option<Ipv4Net>,
    /// The IPv6 subnet of this host's gateway bridge
    /// [default: a random unique local /64, RFC 4193; configuration key: gwbridge-subnet-ipv6]
    #[arg(long, env = "TOWLINE_GWBRIDGE_SUBNET_IPV6", value_name = "CIDR", value_parser = subnet::<Ipv6Net>)]
    gwbridge_subnet_ipv6: Option<Ipv6Net>,
    /// The file that names the servers for what is no name of the cluster, as resolv.conf(5)
    /// [default: /etc/resolv.conf; configuration key: resolv-conf]
    #[arg(long, env = "TOWLINE_RESOLV_CONF", value_name = "FILE")]
    resolv_conf: Option<PathBuf>,
    /// A label of this host for 'run --constraint engine.labels.KEY==VALUE', KEY=VALUE; once per label
    /// [default: none; configuration key: labels, an array of such texts]
    #[arg(
        long = "label",
        env = "TOWLINE_LABELS",
        value_name = "KEY=VALUE",
        value_delimiter = ','
    )]
    labels: Vec<String>,
}

/// The same options as keys of the configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    name: Option<String>,
    state_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
    backend: Option<Backend>,
    workers: Option<usize>,
    strict_reserved_bits: Option<bool>,
    #[serde(rename = "static")]
    static_tables: Option<PathBuf>,
    #[serde(default)]
    default_address_pools: Vec<AddressPool>,
    cert_expiry: Option<String>,
    gwbridge_subnet: Option<Ipv4Net>,
    gwbridge_subnet_ipv6: Option<Ipv6Net>,
    resolv_conf: Option<PathBuf>,
    #[serde(default)]
    labels: Vec<String>,
}

/// What the agent runs with.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// This host's name.
    pub(crate) name: String,
    /// Where state lives.
    pub(crate) state_dir: PathBuf,
    /// Where the agent listens.
    pub(crate) socket: PathBuf,
    /// How new ports are served.
    pub(crate) backend: Backend,
    /// Threads that carry frames; none: chosen by the datapath.
    pub(crate) workers: Option<usize>,
    /// Whether reserved VXLAN bits are refused.
    pub(crate) strict_reserved_bits: bool,
    /// The file that is in a manager's place.
    pub(crate) static_tables: Option<PathBuf>,
    /// Where a manager here draws subnets from, unless `init` was told; none: 10.0.0.0/8 in pieces of /24.
    pub(crate) pools: Vec<AddressPool>,
    /// How long certificates are good for that this host's manager signs.
    pub(crate) cert_expiry: Duration,
    /// Subnets of the gateway bridge; none: chosen by it.
    pub(crate) gwbridge: (Option<Ipv4Net>, Option<Ipv6Net>),
    /// The file that names the servers for what is no name of the cluster.
    pub(crate) resolv_conf: PathBuf,
    /// Labels of this host that constraints may ask for.
    pub(crate) labels: BTreeMap<String, String>,
}

impl Config {
    /// Joins file, environment and flags.
    ///
    /// # Errors
    /// A file that was named but cannot be read, an unknown key, a value out of range.
    pub(crate) fn load(flags: Flags, socket: Option<&Path>) -> anyhow::Result<Self> {
        let file = match &flags.config {
            Some(path) => read_toml("configuration", path)?,
            None if Path::new(DEFAULT_CONFIG).exists() => {
                read_toml("configuration", Path::new(DEFAULT_CONFIG))?
            }
            None => File::default(),
        };
        Self::join(file, flags, socket)
    }

    fn join(file: File, flags: Flags, socket: Option<&Path>) -> anyhow::Result<Self> {
        let name = match flags.name.or(file.name) {
            Some(name) => name,
            None => hostname()?,
        };
        check_name("host name", &name)
            .context("cannot use it for this host; give another with --name")?;
        let workers = flags.workers.or(file.workers);
        if workers.is_some_and(|workers| !(1..=MAX_WORKERS).contains(&workers)) {
            anyhow::bail!("workers must be 1 to {MAX_WORKERS}: leave it out for one per core");
        }
        control::check_pools(&file.default_address_pools)
            .context("cannot use default-address-pools of the configuration file")?;
        let cert_expiry = match flags.cert_expiry.or(file.cert_expiry) {
            Some(text) => duration(&text)
                .ok()
                .filter(|&expiry| expiry >= MIN_CERT_EXPIRY)
                .with_context(|| {
                    format!("cert-expiry '{text}' is wrong: write a number and s, m, h or d, at least 10s")
                })?,
            None => LIFETIME,
        };
        Ok(Self {
            name,
            cert_expiry,
            gwbridge: (
                flags.gwbridge_subnet.or(file.gwbridge_subnet),
                flags.gwbridge_subnet_ipv6.or(file.gwbridge_subnet_ipv6),
            ),
            resolv_conf: absolute(flags.resolv_conf.or(file.resolv_conf), RESOLV_CONF)?,
            state_dir: absolute(flags.state_dir.or(file.state_dir), DEFAULT_STATE_DIR)?,
            socket: absolute(socket.map(Path::to_owned).or(file.socket), DEFAULT_SOCKET)?,
            backend: flags.backend.or(file.backend).unwrap_or(Backend::Offload),
            workers,
            strict_reserved_bits: flags.strict_reserved_bits
                || file.strict_reserved_bits.unwrap_or(false),
            static_tables: flags
                .static_tables
                .or(file.static_tables)
                .map(|path| absolute(Some(path), ""))
                .transpose()?,
            pools: file.default_address_pools,
            labels: labels(if flags.labels.is_empty() {
                &file.labels
            } else {
                &flags.labels
            })?,
        })
    }
}

/// Reads a TOML file that holds `what`.
///
/// # Errors
/// One line, with that of the file.
pub(crate) fn read_toml<T: serde::de::DeserializeOwned>(
    what: &str,
    path: &Path,
) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the {what} file {}", path.display()))?;
    // The parser's message has several lines; an error here is one.
    toml::from_str(&text).map_err(|error| {
        let line = error
            .span()
            .map_or(1, |span| text[..span.start].lines().count().max(1));
        anyhow::anyhow!(
            "{}, line {line}: {}",
            path.display(),
            error.message().replace('\n', " ")
        )
    })
}

/// Labels of this host, KEY=VALUE each.
fn labels(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let labels = texts
        .iter()
        .map(|text| label(text))
        .collect::<anyhow::Result<_>>()?;
    control::check_labels(&labels).map_err(anyhow::Error::msg)?;
    Ok(labels)
}

fn backend(text: &str) -> Result<Backend, String> {
    match text {
        "offload" => Ok(Backend::Offload),
        "plain" => Ok(Backend::Plain),
        _ => Err("it is 'offload' or 'plain'".to_owned()),
    }
}

fn subnet<N: FromStr>(text: &str) -> Result<N, String> {
    let subnet = text.parse();
    subnet.map_err(|_| {
        "write an address and a prefix length, such as 10.55.0.0/16 or fd55::/64".to_owned()
    })
}

fn absolute(path: Option<PathBuf>, default: &str) -> anyhow::Result<PathBuf> {
    let path = path.unwrap_or_else(|| default.into());
    std::path::absolute(&path).with_context(|| format!("cannot use the path '{}'", path.display()))
}

fn hostname() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .context("cannot read the hostname; give a name with --name")?;
    Ok(name.trim().to_ascii_lowercase())
}

/// Checks a name that people give to hosts, networks and containers.
///
/// # Errors
/// Names `what`, the text (cut when it is long), and what would do.
pub(crate) fn check_name(what: &str, name: &str) -> anyhow::Result<()> {
    if control::is_valid_name(name) {
        return Ok(());
    }
    anyhow::bail!(
        "invalid {what} {}: use lower-case letters, digits, '_', '.' and '-', \
         a letter or digit first, at most 63 characters",
        control::quote(name)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags {
            name: Some("h1".into()),
            ..Flags::default()
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file: File =
            toml::from_str("name = 'file'\nstate-dir = '/s'\nworkers = 3").expect("toml");
        let config = Config::join(file, flags(), None).expect("config");
        assert_eq!(config.name, "h1");
        assert_eq!(config.state_dir, Path::new("/s"));
        assert_eq!(config.workers, Some(3));
        assert_eq!(config.socket, Path::new(DEFAULT_SOCKET));
        assert_eq!(config.backend, Backend::Offload);
        assert_eq!(config.gwbridge, (None, None));
        assert_eq!(config.resolv_conf, Path::new("/etc/resolv.conf"));
        let file: File =
            toml::from_str("gwbridge-subnet = '10.55.0.0/16'\ngwbridge-subnet-ipv6 = 'fd55::/64'")
                .expect("toml");
        let flags = Flags {
            gwbridge_subnet: Some("10.56.0.0/16".parse().expect("a subnet")),
            ..flags()
        };
        let (ipv4, ipv6) = Config::join(file, flags, None).expect("config").gwbridge;
        assert_eq!(
            ipv4.map(|net| net.to_string()).as_deref(),
            Some("10.56.0.0/16")
        );
        assert_eq!(
            ipv6.map(|net| net.to_string()).as_deref(),
            Some("fd55::/64")
        );
    }

    #[test]
    fn an_unknown_key_and_a_bad_value_are_refused_in_one_line() {
        let dir = tempfile::tempdir().expect("tempdir");
        for text in ["nmae = 'h1'", "workers = 'many'", "= 3"] {
            let path = dir.path().join("towline.toml");
            std::fs::write(&path, text).expect("write");
            let read = read_toml::<File>("configuration", &path);
            let error = format!("{:#}", read.expect_err("refused"));
            assert!(error.contains("towline.toml, line 1"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let wrong: Result<File, _> = toml::from_str("gwbridge-subnet = '10.55.0.0'");
        assert!(wrong.is_err(), "no prefix length");
        let zero = Flags {
            workers: Some(0),
            ..flags()
        };
        assert!(Config::join(File::default(), zero, None).is_err());
    }

    #[test]
    fn address_pools_of_the_file() {
        let join = |text| {
            let file: File = toml::from_str(text).expect("toml");
            Config::join(file, flags(), None)
        };
        let text = "default-address-pools = [{ base = '10.20.0.0/16', size = 24 }]";
        let pools = join(text).expect("config").pools;
        assert_eq!(
            pools,
            ["base=10.20.0.0/16,size=24".parse().expect("a pool")]
        );
        assert!(join("").expect("config").pools.is_empty());
        let refused = join("default-address-pools = [{ base = '10.20.0.0/16', size = 31 }]");
        let error = format!("{:#}", refused.expect_err("too narrow"));
        assert!(error.contains("out of range: 31"), "{error}");
    }

    #[test]
    fn labels_of_the_host_are_checked() {
        let join = |texts: &[&str]| {
            let labels = texts.iter().map(|&text| text.to_owned()).collect();
            let file = File {
                labels,
                ..File::default()
            };
            Config::join(file, flags(), None)
        };
        assert_eq!(join(&["gpu=yes"]).expect("a label").labels["gpu"], "yes");
        assert!(join(&["a b=c"]).is_err() && join(&["=c"]).is_err());
    }

    #[test]
    fn names() {
        for good in ["a", "0", "c1", "a_b.c-d", &"x".repeat(63)] {
            check_name("name", good).expect(good);
        }
        for bad in [
            "",
            "-a",
            ".a",
            "A",
            "a/b",
            "a b",
            "..",
            "ä",
            "a\n",
            &"x".repeat(64),
            &"x".repeat(300),
        ] {
            let error = check_name("name", bad).expect_err(bad).to_string();
            assert!(error.len() < 250 && !error.contains('\n'), "{error}");
        }
    }
}
