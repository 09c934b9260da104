//! Any frame with any vnet header, and any frame from a peer: cut to segments that fit, that make up the payload again, and that
//! have right checksums.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vtep::edge::Offload;
use vtep::offload::checksum::{L4, inspect};
use vtep::offload::segment::{MAX_HEADERS, SuperFrame};

fuzz_target!(|input: (u8, u8, u16, u16, u16, u16, Vec<u8>)| {
    let (flags, gso_type, gso_size, csum_start, csum_offset, mtu, frame) = input;
    let offload = Offload {
        flags,
        gso_type,
        hdr_len: 0,
        gso_size,
        csum_start,
        csum_offset,
    };
    if let Ok(cut) = SuperFrame::requested(&frame, &offload, mtu) {
        let told = cut.offload();
        assert_eq!((told.gso_size, told.csum_start), (gso_size, csum_start));
        check(&frame, &cut, mtu);
    }
    if let Ok(cut) = SuperFrame::merged_by_peer(&frame, mtu) {
        check(&frame, &cut, mtu);
    }
});

fn check(frame: &[u8], cut: &SuperFrame<'_>, mtu: u16) {
    let mut rest = &frame[cut.headers_len()..];
    for index in 0..cut.count() {
        let mut space = [0; MAX_HEADERS];
        let headers = &mut space[..cut.headers_len()];
        let payload = cut.write_headers(index, headers);
        assert!(rest.starts_with(payload));
        rest = &rest[payload.len()..];
        // Tags don't count towards the MTU.
        assert!(headers.len() + payload.len() <= usize::from(mtu) + 14 + 4 * 4);
        let segment = [headers, payload].concat();
        assert!(!matches!(inspect(&segment), L4::Bad));
    }
}
