use bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::*;
use crate::limits::{FRAME_MAX, HELLO_MAX};
use crate::message::ToAgent;
use crate::transport::{FrameError, read_frame};

/// Reads on until the manager ends the connection; what it said last, if it was a refusal.
async fn ending(stream: &mut TlsStream<TcpStream>) -> Option<String> {
    let mut refused = None;
    loop {
        let frame = timeout(PATIENCE, read_frame(stream, FRAME_MAX)).await;
        match frame.expect("the connection ends") {
            Ok(frame) => {
                if let Ok(ToAgent::Reject { reason, .. }) = ToAgent::decode(&frame) {
                    refused = Some(reason);
                }
            }
            Err(FrameError::Closed | FrameError::Io(_)) => return refused,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Reads on until a message fits.
async fn await_message(stream: &mut TlsStream<TcpStream>, fits: impl Fn(&ToAgent) -> bool) {
    loop {
        let frame = timeout(PATIENCE, read_frame(stream, FRAME_MAX)).await;
        let frame = frame
            .expect("the message comes")
            .expect("the connection stands");
        if ToAgent::decode(&frame).is_ok_and(|message| fits(&message)) {
            return;
        }
    }
}

#[test]
fn what_makes_no_sense_ends_its_own_connection_and_no_other() {
    let stand = Stand::start(124);
    let one = stand.join(1);
    let vni = create(&one, "10.0.9.0/24");
    one.subscribe(vni);
    let connected = one.status().connected_to;
    runtime().block_on(async {
        // Before the hello.
        let long = vec![0x12; HELLO_MAX + 1];
        for (said, refusal) in [
            (&long[..], None),
            (&[0xff; 64], Some("no hello")),
            (&[], Some("no hello")),
            (&ToManager::Heartbeat.encode(), Some("no hello")),
        ] {
            let mut stream = connect(stand.at, &stand.authority, 2).await.unwrap();
            let _ = write_frame(&mut stream, &Bytes::copy_from_slice(said)).await;
            let _ = stream.flush().await;
            assert_eq!(ending(&mut stream).await.as_deref(), refusal);
        }
        // After it: a length of 4 GiB, a field with an impossible value, a second hello.
        let mut lying = Vec::from([0xff; 4]);
        lying.extend([0; 1000]);
        let framed = |message: &[u8]| {
            let length = u32::try_from(message.len()).unwrap();
            [&length.to_be_bytes(), message].concat()
        };
        let second = framed(&hello(stand.at, 2).encode());
        for said in [lying, framed(&[0xff; 32]), second] {
            let mut stream = connect(stand.at, &stand.authority, 2).await.unwrap();
            say(&mut stream, &hello(stand.at, 2)).await;
            await_message(&mut stream, |message| {
                matches!(message, ToAgent::Welcome { .. })
            })
            .await;
            let _ = stream.write_all(&said).await;
            let _ = stream.flush().await;
            ending(&mut stream).await;
        }
        // Half a message, and then nothing: until the connection counts as idle.
        let mut stream = connect(stand.at, &stand.authority, 2).await.unwrap();
        say(&mut stream, &hello(stand.at, 2)).await;
        stream.write_all(&[0, 0, 0, 100, 1, 2]).await.unwrap();
        stream.flush().await.unwrap();
        // A message of a kind that does not exist yet is passed over.
        let mut newer = connect(stand.at, &stand.authority, 3).await.unwrap();
        say(&mut newer, &hello(stand.at, 3)).await;
        // Field 1000, a varint.
        let unknown = [0xc0, 0x3e, 0x01];
        write_frame(&mut newer, &Bytes::copy_from_slice(&unknown))
            .await
            .unwrap();
        say(&mut newer, &ToManager::Heartbeat).await;
        await_message(&mut newer, |message| matches!(message, ToAgent::Heartbeat)).await;
        // The half message's connection is dropped for its silence.
        let mut rest = Vec::new();
        let ended = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        let _ = ended.expect("an idle connection ends");
    });
    assert_eq!(one.status().connected_to, connected);
    let four = stand.join(4);
    await_news(&four, &one, "c1");
}

#[test]
fn doubled_and_old_edits_change_nothing() {
    let stand = Stand::start(125);
    let one = stand.join(1);
    let vni = create(&one, "10.0.9.0/24");
    let row = |endpoint: &Endpoint| {
        let Response::Details(details) = one.request(Request::Network("net1".to_owned())).unwrap()
        else {
            panic!("no network")
        };
        let views = details.endpoints.into_iter();
        let found = views.filter(|view| view.endpoint.epoch == endpoint.epoch);
        found
            .map(|view| (view.host, view.state))
            .collect::<Vec<_>>()
    };
    // Host 2 takes an address and frees it; then the address is another's.
    let two = stand.join(2);
    let old = allocate(&two, "old".to_owned());
    let request = Request::Free {
        vni,
        epoch: old.epoch,
    };
    two.request(request).unwrap();
    let present = allocate(&two, "present".to_owned());
    two.shutdown();
    runtime().block_on(async {
        let mut stream = connect(stand.at, &stand.authority, 2).await.unwrap();
        say(&mut stream, &hello(stand.at, 2)).await;
        let publish = |endpoint: &Endpoint, owner_seq, state| ToManager::Publish {
            endpoint: endpoint.clone(),
            owner_seq,
            state,
        };
        // Each one twice, and the older after the newer.
        for (endpoint, owner_seq, state) in [
            (&present, 7, EndpointState::Up),
            (&present, 7, EndpointState::Up),
            (&present, 6, EndpointState::Down),
            (&present, 7, EndpointState::Down),
            (&old, 9, EndpointState::Up),
            (&old, 9, EndpointState::Up),
        ] {
            say(&mut stream, &publish(endpoint, owner_seq, state)).await;
        }
        say(&mut stream, &ToManager::Heartbeat).await;
        await_message(&mut stream, |message| matches!(message, ToAgent::Heartbeat)).await;
    });
    assert_eq!(row(&present), [("h2".to_owned(), crate::State::Up)]);
    assert_eq!(row(&old), []);
}
