//! Any vnet header and any frame from a container: never a panic, and nothing passes with another's MAC.
#![no_main]

mod tables;

use std::sync::LazyLock;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vtep::edge::Offload;
use vtep::engine::{Engine, Settings, Verdict};
use vtep::ethernet::Frame;
use vtep::fdb::PortId;
use vtep::flow;
use vtep::offload::{self, checksum};

static TABLES: LazyLock<std::sync::Arc<vtep::fdb::Tables>> = LazyLock::new(tables::tables);

fuzz_target!(|input: (u8, [u8; 2], [u16; 4], &[u8])| {
    let (port, [flags, gso_type], [hdr_len, gso_size, csum_start, csum_offset], bytes) = input;
    let offload = Offload {
        flags,
        gso_type,
        hdr_len,
        gso_size,
        csum_start,
        csum_offset,
    };
    let mut frame = bytes.to_vec();
    if offload::check(&frame, &offload, 1450).is_err() {
        return;
    }
    if offload.needs_checksum()
        && !offload.is_gso()
        && !checksum::complete(&mut frame, csum_start, csum_offset)
    {
        return;
    }
    let mut engine = Engine::new(Settings::default());
    let verdict = engine.handle_frame(&TABLES, PortId(u32::from(port)), &frame, Instant::now());
    let _ = flow::hash(&frame);
    match verdict {
        Verdict::Drop(_) => return,
        Verdict::Answer { len } => {
            assert_eq!(engine.answer().len(), len);
            Frame::parse(engine.answer()).expect("an answer can be read");
        }
        Verdict::Deliver { .. } | Verdict::Send { .. } | Verdict::Flood { .. } => {}
    }
    let source = Frame::parse(&frame)
        .expect("a frame that passes can be read")
        .source();
    assert_eq!(source.octets(), [2, 0, 0, 0, 0, 1]);
});
