//! What `--publish` says, in Docker's two grammars, with what Docker lacks: a host address or interface for services too.
//!
//! ```text
//! short   [address-or-interface:][published:]target[/tcp|/udp]     ranges as first-last; 127.0.0.1::80 takes an automatic port
//! long    target=80,published=8080,protocol=tcp,mode=ingress,host_ip=127.0.0.1     or interface=eth0
//! ```
//!
//! A range is as many single ports. Messages are Docker's where Docker has one.

use std::net::IpAddr;

use control::service::{Protocol, Publish, PublishMode, PublishOn};

/// Why a `--publish` was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Nothing, or nothing where the container's port belongs.
    #[error("no port specified: {0:?}: say at least the container's port, as in 8080:80")]
    NoPort(String),
    /// The container's port is no number from 1 to 65535, nor a range of them.
    #[error("invalid containerPort: {0}: ports are 1 to 65535")]
    Target(String),
    /// The published port is no number from 1 to 65535, nor a range of them.
    #[error(
        "invalid hostPort: {0}: ports are 1 to 65535; leave it out to have one chosen from 30000 to 32767"
    )]
    Published(String),
    /// Two ranges that do not go together.
    #[error("invalid ranges specified for container and host Ports: {target} and {published}")]
    Ranges {
        /// The container's ports.
        target: String,
        /// The published ports.
        published: String,
    },
    /// Neither tcp nor udp.
    #[error("invalid proto: {0}: publish tcp or udp")]
    Protocol(String),
    /// SCTP, which Docker takes.
    #[error("sctp can't be published: Towline publishes tcp and udp")]
    Sctp,
    /// What stands before the ports is neither an address nor an interface's name.
    #[error("invalid IP address or interface name: {0:?}")]
    On(String),
    /// The long grammar without `target`.
    #[error("missing mandatory field 'target' in {0:?}")]
    NoTarget(String),
    /// A field without a value.
    #[error("invalid field: {0}: fields are key=value")]
    Field(String),
    /// A key that is none.
    #[error(
        "invalid field key: {0}: there are target, published, protocol, mode, host_ip and interface"
    )]
    Key(String),
    /// A key said twice.
    #[error("field {0} is given twice")]
    Twice(&'static str),
    /// Both an address and an interface.
    #[error("host_ip and interface exclude each other")]
    TwoPlaces,
    /// A mode that is none.
    #[error("invalid publish mode value ({0}): must be either 'ingress' or 'host'")]
    Mode(String),
}

/// Reads one `--publish`. A grammar that says no mode has `default_mode`.
///
/// # Errors
/// See [`PublishError`].
pub fn parse(text: &str, default_mode: PublishMode) -> Result<Vec<Publish>, PublishError> {
    if text.contains('=') {
        long(text, default_mode)
    } else {
        short(text, default_mode)
    }
}

fn short(text: &str, mode: PublishMode) -> Result<Vec<Publish>, PublishError> {
    let (rest, protocol) = match text.rsplit_once('/') {
        Some((rest, name)) => (rest, protocol(name)?),
        None => (text, Protocol::Tcp),
    };
    let (rest, target) = rest.rsplit_once(':').unwrap_or(("", rest));
    // An IPv6 address in brackets holds colons of its own.
    let (on, published) = match rest.rsplit_once(':') {
        Some((on, published)) if !published.contains(']') => (on, published),
        Some(_) => return Err(PublishError::On(rest.to_owned())),
        None => ("", rest),
    };
    if target.is_empty() {
        return Err(PublishError::NoPort(text.to_owned()));
    }
    // `127.0.0.1:80` would be a published port that is no number: Docker's message names it so.
    let targets = range(target).ok_or_else(|| PublishError::Target(target.to_owned()))?;
    let publisheds = match published {
        "" => None,
        some => Some(range(some).ok_or_else(|| PublishError::Published(some.to_owned()))?),
    };
    let on = match on {
        "" => None,
        some => Some(place(some)?),
    };
    let publish = |target, published| Publish {
        target,
        published,
        protocol,
        mode,
        on: on.clone(),
    };
    let Some(publisheds) = publisheds else {
        return Ok(targets.map(|target| publish(target, None)).collect());
    };
    if targets.len() == publisheds.len() {
        let pairs = targets.zip(publisheds);
        return Ok(pairs.map(|(to, from)| publish(to, Some(from))).collect());
    }
    // Docker: many published ports may lead to one of the container's.
    if targets.len() == 1 {
        let target = *targets.start();
        return Ok(publisheds.map(|from| publish(target, Some(from))).collect());
    }
    Err(PublishError::Ranges {
        target: target.to_owned(),
        published: published.to_owned(),
    })
}

fn long(text: &str, default_mode: PublishMode) -> Result<Vec<Publish>, PublishError> {
    let (mut target, mut published, mut protocol_, mut mode, mut address, mut interface) =
        (None, None, None, None, None, None);
    for field in text.split(',') {
        let Some((key, value)) = field.split_once('=') else {
            return Err(PublishError::Field(field.to_owned()));
        };
        match key.trim().to_ascii_lowercase().as_str() {
            "target" => {
                let port = port(value).ok_or_else(|| PublishError::Target(value.to_owned()))?;
                once(&mut target, "target", port)?;
            }
            "published" => {
                let port = port(value).ok_or_else(|| PublishError::Published(value.to_owned()))?;
                once(&mut published, "published", port)?;
            }
            "protocol" => once(&mut protocol_, "protocol", protocol(value)?)?,
            "mode" => {
                let value = match value {
                    "ingress" => PublishMode::Ingress,
                    "host" => PublishMode::Host,
                    _ => return Err(PublishError::Mode(value.to_owned())),
                };
                once(&mut mode, "mode", value)?;
            }
            "host_ip" => {
                let ip = address_of(value).ok_or_else(|| PublishError::On(value.to_owned()))?;
                once(&mut address, "host_ip", PublishOn::Address(ip))?;
            }
            "interface" => {
                if !is_interface(value) {
                    return Err(PublishError::On(value.to_owned()));
                }
                let place = PublishOn::Interface(value.to_owned());
                once(&mut interface, "interface", place)?;
            }
            _ => return Err(PublishError::Key(key.to_owned())),
        }
    }
    if address.is_some() && interface.is_some() {
        return Err(PublishError::TwoPlaces);
    }
    Ok(vec![Publish {
        target: target.ok_or_else(|| PublishError::NoTarget(text.to_owned()))?,
        published,
        protocol: protocol_.unwrap_or(Protocol::Tcp),
        mode: mode.unwrap_or(default_mode),
        on: address.or(interface),
    }])
}

fn once<T>(field: &mut Option<T>, name: &'static str, value: T) -> Result<(), PublishError> {
    match field.replace(value) {
        None => Ok(()),
        Some(_) => Err(PublishError::Twice(name)),
    }
}

fn protocol(name: &str) -> Result<Protocol, PublishError> {
    match name.to_ascii_lowercase().as_str() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "sctp" => Err(PublishError::Sctp),
        _ => Err(PublishError::Protocol(name.to_owned())),
    }
}

fn range(text: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some(first..=last)
}

/// Digits only: `parse` alone would take a sign.
fn port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

fn place(text: &str) -> Result<PublishOn, PublishError> {
    if let Some(ip) = address_of(text) {
        return Ok(PublishOn::Address(ip));
    }
    // Digits and dots are a mistyped address sooner than an interface.
    let numeric = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    if numeric || !is_interface(text) {
        return Err(PublishError::On(text.to_owned()));
    }
    Ok(PublishOn::Interface(text.to_owned()))
}

fn address_of(text: &str) -> Option<IpAddr> {
    let inner = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    match inner {
        Some(inner) => inner.parse().ok().filter(IpAddr::is_ipv6),
        None => text.parse().ok(),
    }
}

/// What the kernel takes as an interface's name (`dev_valid_name`), less what would need quoting.
fn is_interface(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-@".contains(&byte);
    (1..=15).contains(&text.len()) && text != "." && text != ".." && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ingress(text: &str) -> Result<Vec<Publish>, PublishError> {
        parse(text, PublishMode::Ingress)
    }

    fn one(target: u16, published: Option<u16>) -> Publish {
        Publish {
            target,
            published,
            protocol: Protocol::Tcp,
            mode: PublishMode::Ingress,
            on: None,
        }
    }

    fn on(text: &str) -> Option<PublishOn> {
        Some(PublishOn::Address(text.parse().unwrap()))
    }

    #[test]
    fn the_short_grammar() {
        assert_eq!(ingress("8080:80"), Ok(vec![one(80, Some(8080))]));
        assert_eq!(ingress("80"), Ok(vec![one(80, None)]));
        let udp = Publish {
            protocol: Protocol::Udp,
            ..one(53, Some(5353))
        };
        assert_eq!(ingress("5353:53/UDP"), Ok(vec![udp]));
        let local = |published| Publish {
            on: on("127.0.0.1"),
            ..one(80, published)
        };
        assert_eq!(ingress("127.0.0.1:8080:80"), Ok(vec![local(Some(8080))]));
        assert_eq!(ingress("127.0.0.1::80"), Ok(vec![local(None)]));
        let six = Publish {
            on: on("2001:db8::1"),
            ..one(80, Some(8080))
        };
        assert_eq!(ingress("[2001:db8::1]:8080:80"), Ok(vec![six.clone()]));
        assert_eq!(
            ingress("2001:db8::1:8080:80"),
            Ok(vec![six]),
            "as Docker takes it"
        );
        let device = Publish {
            on: Some(PublishOn::Interface("eth0".to_owned())),
            ..one(80, Some(8080))
        };
        assert_eq!(ingress("eth0:8080:80"), Ok(vec![device]));
        let host = Publish {
            mode: PublishMode::Host,
            ..one(80, Some(8080))
        };
        assert_eq!(parse("8080:80", PublishMode::Host), Ok(vec![host]));
    }

    #[test]
    fn ranges_are_single_ports() {
        let pairs = [(80, 8080), (81, 8081)].map(|(to, from)| one(to, Some(from)));
        assert_eq!(ingress("8080-8081:80-81"), Ok(pairs.into()));
        let many = [8080, 8081].map(|from| one(80, Some(from)));
        assert_eq!(ingress("8080-8081:80"), Ok(many.into()));
        let automatic = [80, 81].map(|to| one(to, None));
        assert_eq!(ingress("80-81"), Ok(automatic.into()));
        assert_eq!(ingress("1-65535:1-65535").map(|all| all.len()), Ok(65_535));
    }

    #[test]
    fn the_long_grammar() {
        assert_eq!(ingress("target=80"), Ok(vec![one(80, None)]));
        let all = Publish {
            target: 53,
            published: Some(5353),
            protocol: Protocol::Udp,
            mode: PublishMode::Host,
            on: on("::1"),
        };
        assert_eq!(
            ingress("published=5353,target=53,protocol=udp,mode=host,host_ip=::1"),
            Ok(vec![all])
        );
        let device = Publish {
            on: Some(PublishOn::Interface("eth0".to_owned())),
            ..one(80, None)
        };
        assert_eq!(ingress("interface=eth0,target=80"), Ok(vec![device]));
    }

    #[test]
    fn what_is_wrong_is_named_in_dockers_words() {
        // Conformance H19: port 0.
        for (text, says) in [
            ("", "no port specified"),
            ("8080:", "no port specified"),
            ("/tcp", "no port specified"),
            ("0", "invalid containerPort: 0"),
            ("0:80", "invalid hostPort: 0"),
            ("8080:0", "invalid containerPort: 0"),
            ("65536:80", "invalid hostPort: 65536"),
            ("+80", "invalid containerPort: +80"),
            ("81-80", "invalid containerPort: 81-80"),
            ("127.0.0.1:80", "invalid hostPort: 127.0.0.1"),
            ("127.0.0:8080:80", "invalid IP address"),
            ("[::1]:80", "invalid IP address"),
            ("[127.0.0.1]:8080:80", "invalid IP address"),
            ("a/b:8080:80", "invalid"),
            ("averylongname.eth0:8080:80", "invalid IP address"),
            (
                "8080-8082:80-81",
                "invalid ranges specified for container and host Ports: 80-81 and 8080-8082",
            ),
            ("80/sctp", "sctp"),
            ("80/icmp", "invalid proto: icmp"),
            ("published=80", "missing mandatory field 'target'"),
            ("target=80,ip=1", "invalid field key: ip"),
            ("target=80,mode", "invalid field: mode"),
            (
                "target=80,mode=vip",
                "invalid publish mode value (vip): must be either 'ingress' or 'host'",
            ),
            ("target=80,target=81", "field target is given twice"),
            ("target=80,published=0", "invalid hostPort: 0"),
            ("target=80,protocol=sctp", "sctp"),
            ("target=80,host_ip=eth0", "invalid IP address"),
            ("target=80,interface=a/b", "invalid IP address or interface"),
            ("target=80,interface=eth0,host_ip=::1", "exclude each other"),
        ] {
            let error = ingress(text).expect_err(text).to_string();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn anything_is_taken_or_refused(text in "[0-9a-z:=,./\\[\\]-]{0,40}") {
            if let Ok(ports) = ingress(&text) {
                prop_assert!(!ports.is_empty());
                prop_assert!(ports.iter().all(|port| port.target > 0 && port.published != Some(0)));
            }
        }
    }
}
