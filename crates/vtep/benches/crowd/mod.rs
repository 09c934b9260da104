//! A crowd of MACs behind many hosts on one network: what `tables.rs` times, and `tests/table_memory.rs` weighs.

use std::net::SocketAddr;

use vtep::fdb::{Change, NetworkConfig, TableWriter};
use vtep::settings::WireSettings;
use vtep::{MacAddr, Vni};

/// The network.
pub(crate) fn vni() -> Vni {
    Vni::new(4096).expect("24 bits")
}

/// An endpoint's MAC.
pub(crate) fn mac(endpoint: u32) -> MacAddr {
    let [a, b, c, d] = endpoint.to_be_bytes();
    MacAddr::new([2, 0x42, a, b, c, d])
}

/// A host's VTEP, of the first 65,536.
pub(crate) fn remote(host: u32) -> SocketAddr {
    let [.., a, b] = host.to_be_bytes();
    SocketAddr::from(([198, 18, a, b], 4789))
}

/// An endpoint is behind a host.
pub(crate) fn set(endpoint: u32, host: u32) -> Change {
    Change::SetFdb {
        vni: vni(),
        mac: mac(endpoint),
        remote: remote(host),
    }
}

/// The network without endpoints.
pub(crate) fn writer() -> TableWriter {
    let mut writer = TableWriter::new();
    writer.apply(&[Change::SetNetwork(NetworkConfig {
        vni: vni(),
        mtu: 1450,
        gateway_mac: MacAddr::new([2; 6]),
        service_ips: Default::default(),
        gateway_ips: Vec::new(),
        settings: WireSettings::default(),
    })]);
    writer
}
