//! Any frames, merged: what was merged is cut again to the same frames, and nothing else is touched.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vtep::edge::{Offload, TapFeatures};
use vtep::offload::checksum::{L4, inspect};
use vtep::offload::coalesce::{Coalescer, Span};
use vtep::offload::segment::SuperFrame;

fuzz_target!(|frames: Vec<Vec<u8>>| {
    let mut coalescer = Coalescer::new();
    for (buffer, frame) in frames.iter().enumerate() {
        if coalescer.is_full() {
            break;
        }
        let span = Span {
            buffer,
            start: 0,
            len: frame.len(),
        };
        // As the worker does: only a checksum that is right lets a frame be merged.
        if inspect(frame) == L4::Valid {
            coalescer.push(0, span, frame, Offload::default(), TapFeatures::ALL);
        } else {
            coalescer.push_whole(0, span, frame, Offload::default());
        }
    }
    for merged in coalescer.finish() {
        let (offload, headers) = (merged.offload, merged.headers.to_vec());
        let spans: Vec<_> = merged.collect();
        let part = |span: &Span| &frames[span.buffer][span.start..span.start + span.len];
        if headers.is_empty() {
            assert_eq!(
                (spans.len(), part(&spans[0])),
                (1, &frames[spans[0].buffer][..])
            );
            continue;
        }
        let whole: Vec<u8> = spans.iter().fold(headers, |mut whole, span| {
            whole.extend(part(span));
            whole
        });
        let cut =
            SuperFrame::requested(&whole, &offload, u16::MAX).expect("what was merged can be cut");
        assert_eq!(cut.count(), spans.len());
        for (index, span) in spans.iter().enumerate() {
            let mut headers = vec![0; cut.headers_len()];
            let payload = cut.write_headers(index, &mut headers);
            assert_eq!(payload, part(span));
            let original = &frames[span.buffer][..headers.len()];
            // All but the identification, and the checksums with it, is as it was; a UDP checksum of all ones may be one of zero.
            let ip = if headers[12] == 8 { 18..20 } else { 0..0 };
            for at in 0..headers.len() {
                let of_id = ip.contains(&at) || (!ip.is_empty() && (24..26).contains(&at));
                let field = usize::from(offload.csum_start + offload.csum_offset);
                assert!(
                    of_id || (field..field + 2).contains(&at) || headers[at] == original[at],
                    "byte {at}"
                );
            }
        }
    }
});
