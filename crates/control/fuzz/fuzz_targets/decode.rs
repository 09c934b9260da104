//! Any bytes, as each thing that bytes from outside are taken for: an error or a value, never a panic; and a value survives its
//! own bytes.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use control::message::{ToAgent, ToManager};
use control::testing::{cache_file, cached_messages};
use control::{Authority, HostId, Role, Token};
use libfuzzer_sys::fuzz_target;

static AUTHORITY: LazyLock<Authority> =
    LazyLock::new(|| Authority::create(Duration::ZERO).expect("a new authority"));

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = ToManager::decode(bytes) {
        let again = ToManager::decode(&message.encode());
        assert_eq!(again.expect("our own bytes"), message);
        if let ToManager::Join { request, .. } = message {
            let (host, day) = (HostId::from_bytes([1; 16]), Duration::from_secs(86_400));
            let _ = AUTHORITY.sign(&request, host, Role::Worker, day, day);
        }
    }
    let message = ToAgent::decode(bytes).ok();
    if let Some(message) = &message {
        let again = ToAgent::decode(&message.encode());
        assert_eq!(again.expect("our own bytes"), *message);
    }
    // In a file of cached tables, with a right checksum; then as such a file.
    let file = cache_file(vec![Bytes::copy_from_slice(bytes)]);
    let (cached, end) = cached_messages(&file);
    assert_eq!(end == file.len(), message.is_some());
    assert_eq!(cached, Vec::from_iter(message));
    let (_, end) = cached_messages(bytes);
    assert!(end <= bytes.len());
    if let Some(token) = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.parse::<Token>().ok())
    {
        let again = token.to_string().parse();
        assert!(again == Ok(token), "a token's own words");
    }
});
