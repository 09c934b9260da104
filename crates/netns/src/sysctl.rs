//! Kernel settings of one namespace, by their path below `/proc/sys`, as in `net/ipv4/ip_forward`.
//!
//! `/proc/sys/net` shows the settings of the *thread* that opens it, hence a thread inside the namespace.

use std::path::PathBuf;
use std::{fs, io};

use crate::{Netns, NetnsError};

/// The value, without its newline.
///
/// # Errors
/// When the key is unknown to this kernel, or the namespace cannot be entered.
pub fn get(netns: &Netns, key: &str) -> Result<String, NetnsError> {
    let path = path_of(key)?;
    let read = netns.run(|| fs::read_to_string(&path))?;
    let value = read.map_err(|cause| NetnsError::Refused {
        operation: format!("read sysctl {key}"),
        cause,
    })?;
    Ok(value.trim_end().to_owned())
}

/// Sets the value.
///
/// # Errors
/// As [`get`], and when the kernel refuses the value.
pub fn set(netns: &Netns, key: &str, value: &str) -> Result<(), NetnsError> {
    let path = path_of(key)?;
    // No O_CREAT: a key that this kernel lacks is "not found", not "permission denied".
    let written = netns.run(|| {
        let mut file = fs::OpenOptions::new().write(true).open(&path)?;
        io::Write::write_all(&mut file, value.as_bytes())
    })?;
    written.map_err(|cause| NetnsError::Refused {
        operation: format!("set sysctl {key} to {value}"),
        cause,
    })
}

fn path_of(key: &str) -> Result<PathBuf, NetnsError> {
    let plain = !key.is_empty() && key.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if plain {
        return Ok(PathBuf::from("/proc/sys").join(key));
    }
    let cause = io::Error::from(io::ErrorKind::InvalidInput);
    Err(NetnsError::Refused {
        operation: format!("use `{key}` as a sysctl"),
        cause,
    })
}

#[cfg(test)]
mod tests {
    use super::path_of;

    #[test]
    fn keys_stay_below_proc_sys() {
        for key in ["", "/etc/passwd", "net/../../etc", "net//ipv4", "net/ipv4/"] {
            assert!(path_of(key).is_err(), "{key}");
        }
        let path =
            path_of("net/ipv4/conf/eth0.5/forwarding").expect("a name with a dot is one part");
        assert_eq!(
            path.to_str(),
            Some("/proc/sys/net/ipv4/conf/eth0.5/forwarding")
        );
    }
}
