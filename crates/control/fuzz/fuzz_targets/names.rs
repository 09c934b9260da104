//! Any bytes as a question for a name, to a zone that is made of the first of them: what is said is short, has the question's number,
//! and is no answer to what is none.
#![no_main]

use control::service::{EndpointMode, ServiceSpec};
use control::{Backend, Network, Service, TableChange};
use control_fuzz::Input;
use discovery::names::{
    Reply, ResponseCode, Transport, Zones, answer, answers, failure, truncated,
};
use libfuzzer_sys::fuzz_target;
use vtep::Vni;

fn zones(input: &mut Input<'_>) -> (Zones, Vec<Vni>) {
    let (mut zones, vni) = (Zones::default(), Vni::new(4096).expect("24 bits"));
    let network: Network = serde_json::from_value(serde_json::json!({
        "id": "n", "name": "n.a", "vni": 4096, "subnets": [{"net": "10.1.0.0/28", "gateway": "10.1.0.1"}],
        "gateway_mac": "06:74:6c:00:10:00", "mtu": 1450, "flood": true, "labels": {}, "options": {}, "created": 0,
        "epoch": control::Epoch::new(1, 2),
    }))
    .expect("a network");
    zones.network(&network);
    let spec = ServiceSpec {
        mode: [EndpointMode::Vip, EndpointMode::Dnsrr][usize::from(input.below(2))],
        ..ServiceSpec::named("web", "n.a")
    };
    let epoch = control::Epoch::new(1, 3);
    zones.services(
        vni,
        vec![Service {
            id: "s".to_owned(),
            epoch,
            version: epoch,
            vni,
            spec,
            vips: vec![[10, 1, 0, 9].into()],
            created: 0,
        }],
    );
    for _ in 0..input.below(64) {
        let (ip, names) = (input.ip(), input.names());
        let backend = (input.below(2) == 0).then(|| Backend {
            service: epoch,
            host: control::HostId::from_bytes([1; 16]),
            weight: 1,
            serving: input.below(2) == 0,
        });
        let changes = [
            TableChange::Names { ip, names },
            TableChange::Backend { ip, backend },
        ];
        zones.table(vni, &changes);
    }
    (zones, vec![vni])
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let keep_single = input.below(2) == 0;
    let (zones, networks) = zones(&mut input);
    let query = input.0;
    for transport in [Transport::Udp, Transport::Tcp] {
        let reply = match answer(query, &zones, &networks, transport, keep_single) {
            Reply::Answer(reply) => reply,
            Reply::Forward { limit } => {
                let mut long = failure(query, ResponseCode::NoError);
                assert!(answers(query, &long), "what is passed on has one question");
                long.resize(70_000, 0);
                assert!(truncated(query, long, limit).len() <= 512);
                continue;
            }
            Reply::Nothing => continue,
        };
        assert_eq!(reply[..2], query[..2]);
        assert!(query[2] & 0x80 == 0 && reply[2] & 0x80 != 0);
        let limit = if transport == Transport::Udp {
            4096
        } else {
            65_535
        };
        assert!(reply.len() <= limit, "{} bytes", reply.len());
    }
    // What an upstream says is as foreign.
    let _ = answers(bytes, query);
    let _ = truncated(bytes, query.to_vec(), 512);
});
