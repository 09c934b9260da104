//! The tables that both targets decide by.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use vtep::fdb::{Change, NetworkConfig, Port, PortId, TableWriter, Tables};
use vtep::settings::{Vlan, WireSettings};
use vtep::{MacAddr, Vni};

/// The remote that datagrams come from.
pub fn remote() -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 2], 4789))
}

/// Two networks, one that passes tags and one that does not flood, each with a port (0 and 1) and an endpoint behind
/// [`remote`]. MACs are 02:00:00:00:00:01 (port), :02 (remote) and :fe (gateway), the VNIs 0 and 1, so that short inputs hit them.
pub fn tables() -> Arc<Tables> {
    let mac = |number| MacAddr::new([2, 0, 0, 0, 0, number]);
    let ips = |number: u8| {
        vec![
            IpAddr::from([10, 0, 9, number]),
            IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(number)]),
        ]
    };
    let mut writer = TableWriter::new();
    for (number, flood) in [(0, true), (1, false)] {
        let vni = Vni::new(number).expect("24 bits");
        let mut changes = vec![
            Change::SetNetwork(NetworkConfig {
                vni,
                mtu: 1450,
                gateway_mac: mac(0xfe),
                service_ips: Default::default(),
                gateway_ips: ips(1),
                settings: WireSettings {
                    flood,
                    vlan: if flood { Vlan::Pass } else { Vlan::Drop },
                    ..WireSettings::default()
                },
            }),
            Change::AddPort(Port {
                id: PortId(number),
                vni,
                mac: mac(1),
                ips: ips(2),
                mtu: 1450,
                any_source: false,
            }),
            Change::SetMember {
                vni,
                remote: remote(),
                flood: true,
            },
            Change::SetFdb {
                vni,
                mac: mac(2),
                remote: remote(),
            },
        ];
        changes.extend(ips(3).into_iter().map(|ip| Change::SetNeighbor {
            vni,
            ip,
            mac: mac(2),
        }));
        writer.apply(&changes);
    }
    writer.shared().load_full()
}
