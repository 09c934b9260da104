//! Edge: switching a link's offloads, as `ethtool -K` does.
//!
//! Only what a lab's wire needs; the kernel's names of the features are asked for, since their numbers differ between
//! kernels (`include/uapi/linux/ethtool.h`, `struct ethtool_sfeatures`).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use netns::Netns;

const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_SFEATURES: u32 = 0x3b;
/// The string set that holds the features' names.
const ETH_SS_FEATURES: u32 = 4;
/// Bytes of each name in a string set.
const ETH_GSTRING_LEN: usize = 32;
/// More features than any kernel has: bounds what we allocate on its word.
const MAX_FEATURES: usize = 4096;

/// Switches those features of link `ifname` in `netns` for which `wanted` gives a state by their kernel names. By
/// names that it asks for, because the kernel gains features of a kind with time (`tx-tcp-accecn-segmentation`).
pub(crate) fn set_features(
    netns: &Netns,
    ifname: &str,
    wanted: impl Fn(&str) -> Option<bool> + Send,
) -> io::Result<()> {
    let set = || -> io::Result<()> {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
        let names = feature_names(&socket, ifname)?;
        let blocks = words_for(&names, wanted);
        // struct ethtool_sfeatures: cmd, size, then (valid, requested) for each 32 features.
        let mut buffer = vec![
            ETHTOOL_SFEATURES,
            u32::try_from(blocks.len()).unwrap_or(u32::MAX),
        ];
        buffer.extend(
            blocks
                .iter()
                .flat_map(|&(valid, requested)| [valid, requested]),
        );
        ethtool(&socket, ifname, &mut buffer)
    };
    netns.run(set).map_err(io::Error::other)?
}

/// The (valid, requested) bits of each block of 32 features.
fn words_for(names: &[String], wanted: impl Fn(&str) -> Option<bool>) -> Vec<(u32, u32)> {
    let mut blocks = vec![(0, 0); names.len().div_ceil(32)];
    for (index, name) in names.iter().enumerate() {
        if let Some(on) = wanted(name) {
            let bit = 1 << (index % 32);
            let (valid, requested) = &mut blocks[index / 32];
            *valid |= bit;
            if on {
                *requested |= bit;
            }
        }
    }
    blocks
}

fn feature_names(socket: &impl AsRawFd, ifname: &str) -> io::Result<Vec<String>> {
    // struct ethtool_sset_info: cmd, reserved, mask (64 bits), then one length for each bit set.
    let mask: u64 = 1 << ETH_SS_FEATURES;
    let mut info = [ETHTOOL_GSSET_INFO, 0, 0, 0, 0];
    let halves = mask.to_ne_bytes();
    info[2] = u32::from_ne_bytes([halves[0], halves[1], halves[2], halves[3]]);
    info[3] = u32::from_ne_bytes([halves[4], halves[5], halves[6], halves[7]]);
    ethtool(socket, ifname, &mut info)?;
    let count = usize::try_from(info[4]).unwrap_or(0).min(MAX_FEATURES);
    // struct ethtool_gstrings: cmd, string set, length, then the names.
    let mut buffer = vec![0_u32; 3 + count * ETH_GSTRING_LEN / 4];
    buffer[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, info[4]]);
    ethtool(socket, ifname, &mut buffer)?;
    let bytes: Vec<u8> = buffer[3..]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let name = |chunk: &[u8]| {
        let end = chunk
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(chunk.len());
        String::from_utf8_lossy(&chunk[..end]).into_owned()
    };
    Ok(bytes.chunks_exact(ETH_GSTRING_LEN).map(name).collect())
}

/// One SIOCETHTOOL request; `buffer` begins with the command and is as long as that command says in itself.
fn ethtool(socket: &impl AsRawFd, ifname: &str, buffer: &mut [u32]) -> io::Result<()> {
    if ifname.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("'{ifname}' is too long for a link's name"),
        ));
    }
    // SAFETY: `ifreq` is plain data for which all zeroes is a value. Safe code has no way to make one: libc's type
    // holds a union without a default.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(ifname.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
    // SAFETY: the name is zero-terminated (checked above), the pointer is to `buffer`, which outlives the call, and
    // each caller sizes it by the lengths it writes into it, which bound what the kernel reads and writes. No safe
    // wrapper of this ioctl exists.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    // Above 0: the request was met in part (ETHTOOL_F_UNSUPPORTED and the like), as for a feature that is fixed.
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_follow_the_names() {
        let names: Vec<String> = (0..40).map(|n| format!("f{n}")).collect();
        let wanted = |name: &str| match name {
            "f0" | "f33" => Some(true),
            "f3" | "absent" => Some(false),
            _ => None,
        };
        assert_eq!(words_for(&names, wanted), [(0b1001, 0b0001), (0b10, 0b10)]);
        assert_eq!(words_for(&[], wanted), []);
    }

    #[test]
    fn the_loopback_link_names_its_features() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let names = feature_names(&socket, "lo").unwrap();
        for name in ["tx-tcp-segmentation", "tx-generic-segmentation", "rx-gro"] {
            assert!(
                names.iter().any(|have| have == name),
                "{name} is missing in {names:?}"
            );
        }
        let error = feature_names(&socket, "no-such-link").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert!(feature_names(&socket, "a-name-longer-than-15").is_err());
    }
}
