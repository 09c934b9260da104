//! A query's bytes to an answer's bytes. What comes from a container or from an upstream may be anything.
//!
//! RFC 1035 has the format, RFC 6891 what EDNS adds, RFC 8482 why nobody is told all at once.

use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::net::IpAddr;
use vtep::Vni;

use super::found::{Answer, Found, Kind};
use super::zone::Zones;

/// Bytes of a message's header.
const HEADER: usize = 12;
/// The longest answer over UDP to who asks without EDNS (RFC 1035 §2.3.4).
const PLAIN_MAX: usize = 512;
/// The longest answer over UDP, whatever a query says that it takes. Nothing longer than this is sent to a container that wants to be
/// flooded, and nothing is fragmented: it passes the loopback interface alone.
const UDP_MAX: usize = 4096;
/// The shortest record: a pointer to its name, type, class, TTL, length, an IPv4 address (RFC 1035 §4.1.3).
const RECORD_MIN: usize = 16;
/// The response codes of RFC 1035 §4.1.1 that another server may mend.
const SERVER_FAILURE: u8 = 2;
const REFUSED: u8 = 5;
/// `QR`, in a header's third byte.
const IS_RESPONSE: u8 = 0x80;
/// `TC`, in the same.
const IS_TRUNCATED: u8 = 0x02;

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// By a connection.
    Tcp,
}

/// What is to be done about a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Send this.
    Answer(Vec<u8>),
    /// It is no name of ours: ask somebody else, and send at most this many bytes of what is said.
    Forward {
        /// Bytes.
        limit: usize,
    },
    /// It is no query: say nothing.
    Nothing,
}

/// What to do about a query of who has ports on these networks. `keep_single`: a name without a dot is nobody else's.
#[must_use]
pub fn answer(
    query: &[u8],
    zones: &Zones,
    networks: &[Vni],
    transport: Transport,
    keep_single: bool,
) -> Reply {
    if query.len() < HEADER || query[2] & IS_RESPONSE != 0 {
        return Reply::Nothing;
    }
    let Some((message, question)) = parse(query) else {
        return Reply::Answer(failure(query, ResponseCode::FormErr));
    };
    let refuse = |code| Reply::Answer(bytes(response(&message, code), UDP_MAX));
    if message.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    if message.version() > 0 {
        return refuse(ResponseCode::BADVERS);
    }
    let kind = match question.query_type() {
        RecordType::A => Kind::A,
        RecordType::AAAA => Kind::Aaaa,
        RecordType::PTR => Kind::Ptr,
        RecordType::SRV => Kind::Srv,
        // RFC 8482: whoever may ask for all is an amplifier's friend.
        RecordType::ANY => return refuse(ResponseCode::NotImp),
        RecordType::AXFR | RecordType::IXFR => return refuse(ResponseCode::Refused),
        _ => Kind::Other,
    };
    if question.query_class() != DNSClass::IN {
        return refuse(ResponseCode::Refused);
    }
    let limit = limit(&message, transport);
    let name = question.name().to_ascii();
    let name = name.strip_suffix('.').unwrap_or(&name);
    match zones.lookup(networks, name, kind) {
        Some(found) => Reply::Answer(bytes(
            found_response(&message, &question, &found, limit),
            limit,
        )),
        None if keep_single && !name.is_empty() && !name.contains('.') => {
            Reply::Answer(bytes(response(&message, ResponseCode::NXDomain), limit))
        }
        None => Reply::Forward { limit },
    }
}

/// The answer that there is none, and why.
#[must_use]
pub fn failure(query: &[u8], code: ResponseCode) -> Vec<u8> {
    if let Some((message, _)) = parse(query) {
        return bytes(response(&message, code), UDP_MAX);
    }
    // What is not understood is answered by its header alone.
    let mut header = [0; HEADER];
    let known = query.len().min(4);
    header[..known].copy_from_slice(&query[..known]);
    header[2] = IS_RESPONSE | header[2] & 0x79;
    header[3] = 0x80 | code.low() & 0x0f;
    header.to_vec()
}

/// Whether these bytes answer that query: its number, its question, whatever the case of its letters.
#[must_use]
pub fn answers(query: &[u8], reply: &[u8]) -> bool {
    let Some(end) = question_end(query) else {
        return false;
    };
    reply.len() >= end
        && reply[..2] == query[..2]
        && reply[2] & IS_RESPONSE != 0
        && reply[4..6] == query[4..6]
        && reply[HEADER..end].eq_ignore_ascii_case(&query[HEADER..end])
}

/// Whether nobody else is to be asked after this answer: of what a server failed to do or refused, another may know more.
#[must_use]
pub fn is_last_word(reply: &[u8]) -> bool {
    reply
        .get(3)
        .is_some_and(|flags| !matches!(flags & 0x0f, SERVER_FAILURE | REFUSED))
}

/// An upstream's answer to that query, cut to its question where it is longer than may be.
#[must_use]
pub fn truncated(query: &[u8], mut reply: Vec<u8>, limit: usize) -> Vec<u8> {
    if let Some(end) = question_end(query)
        && reply.len() > limit
    {
        reply.truncate(end);
        reply[2] |= IS_TRUNCATED;
        reply[6..HEADER].fill(0);
    }
    reply
}

/// A query that is one: exactly one question, in plain labels.
fn parse(query: &[u8]) -> Option<(Message, Query)> {
    question_end(query)?;
    let message = Message::from_vec(query).ok()?;
    let [question] = message.queries.as_slice() else {
        return None;
    };
    let question = question.clone();
    Some((message, question))
}

/// Where the only question ends. In front of it is nothing that its name could point to.
fn question_end(message: &[u8]) -> Option<usize> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        match message.get(at)? {
            0 => break,
            // RFC 1035 §4.1.4: above is a pointer, or reserved.
            length @ 1..=63 => at += 1 + usize::from(*length),
            _ => return None,
        }
    }
    let end = at + 1 + 4;
    (message.len() >= end && at - HEADER < 255).then_some(end)
}

fn limit(message: &Message, transport: Transport) -> usize {
    match (transport, &message.edns) {
        (Transport::Tcp, _) => usize::from(u16::MAX),
        (Transport::Udp, Some(edns)) => usize::from(edns.max_payload()).clamp(PLAIN_MAX, UDP_MAX),
        (Transport::Udp, None) => PLAIN_MAX,
    }
}

/// An answer without records.
fn response(query: &Message, code: ResponseCode) -> Message {
    let mut response = Message::response(query.metadata.id, query.metadata.op_code);
    response.metadata.recursion_desired = query.metadata.recursion_desired;
    response.metadata.checking_disabled = query.metadata.checking_disabled;
    response.metadata.recursion_available = true;
    response.metadata.response_code = code;
    response.queries.clone_from(&query.queries);
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(u16::try_from(UDP_MAX).unwrap_or(u16::MAX));
        response.edns = Some(edns);
    }
    response
}

fn found_response(query: &Message, question: &Query, found: &Found<'_>, limit: usize) -> Message {
    let code = if found.absent {
        ResponseCode::NXDomain
    } else {
        ResponseCode::NoError
    };
    let mut response = response(query, code);
    let owner = question.name();
    // What cannot fit is not written, nor looked at.
    let mut answers = found.answers();
    for answer in answers.by_ref().take(limit / RECORD_MIN) {
        match answer {
            Answer::Address(ip) => response.answers.push(address(owner.clone(), found.ttl, ip)),
            Answer::Name(name) => {
                let data = labels(&name).map(|name| RData::PTR(PTR(name)));
                let record = data.map(|data| Record::from_rdata(owner.clone(), found.ttl, data));
                response.answers.extend(record);
            }
            Answer::Service {
                weight,
                port,
                target,
                ips,
            } => {
                let Some(target) = labels(&target) else {
                    continue;
                };
                let data = RData::SRV(SRV::new(0, weight, port, target.clone()));
                let record = Record::from_rdata(owner.clone(), found.ttl, data);
                response.answers.push(record);
                let addresses = ips.into_iter();
                let addresses = addresses.map(|ip| address(target.clone(), found.ttl, ip));
                response.additionals.extend(addresses);
            }
        }
    }
    response.metadata.truncation |= answers.next().is_some();
    response
}

fn address(owner: Name, ttl: u32, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(owner, ttl, data)
}

/// A name by its labels, whatever is in them; `None`: one is empty or too long.
fn labels(name: &str) -> Option<Name> {
    let mut name = Name::from_labels(name.split('.').map(str::as_bytes)).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// The bytes of a message, with as many of its records as fit: who is told that some are missing may ask by TCP (RFC 2181 §9).
fn bytes(mut message: Message, limit: usize) -> Vec<u8> {
    loop {
        let Ok(bytes) = message.to_vec() else {
            // A name that can be asked for and not be written does not exist; the header alone can always be.
            let mut bare = Message::response(message.metadata.id, message.metadata.op_code);
            bare.metadata.response_code = ResponseCode::ServFail;
            return bare.to_vec().unwrap_or_default();
        };
        if bytes.len() <= limit || (message.answers.is_empty() && message.additionals.is_empty()) {
            return bytes;
        }
        // What is added freely goes first, and its lack is no truncation.
        if !message.additionals.is_empty() {
            message.additionals.clear();
            continue;
        }
        let keep = message.answers.len() * limit / bytes.len();
        message
            .answers
            .truncate(keep.min(message.answers.len() - 1));
        message.metadata.truncation = true;
    }
}

#[cfg(test)]
mod tests {
    use control::{Names, Network, TableChange};
    use hickory_proto::rr::Name;
    use proptest::prelude::*;
    use std::sync::Arc;

    use super::*;

    fn vni() -> Vni {
        Vni::new(4096).unwrap()
    }

    /// A network `blue` with as many containers of the alias `all`.
    fn zones(containers: u8) -> Zones {
        let network: Network = serde_json::from_value(serde_json::json!({
            "id": "n", "name": "blue", "vni": 4096, "subnets": [{"net": "10.0.9.0/24", "gateway": "10.0.9.1"}],
            "gateway_mac": "06:74:6c:00:10:00", "mtu": 1450, "flood": true, "labels": {}, "options": {}, "created": 0,
            "epoch": control::Epoch::new(1, 2), "dns_ttl": 5,
        }))
        .unwrap();
        let mut zones = Zones::default();
        zones.network(&network);
        for n in 0..containers {
            let names = Names {
                container: format!("c{n}"),
                id: "0123456789ab".to_owned(),
                aliases: vec!["all".to_owned()],
            };
            let names = Some(Arc::new(names));
            let ip = [10, 0, 9, n].into();
            zones.table(vni(), &[TableChange::Names { ip, names }]);
        }
        zones
    }

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(7, hickory_proto::op::MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn ask(zones: &Zones, query: &Message, transport: Transport) -> Option<Message> {
        let bytes = query.to_vec().unwrap();
        match answer(&bytes, zones, &[vni()], transport, false) {
            Reply::Answer(reply) => {
                assert!(answers(&bytes, &reply));
                Some(Message::from_vec(&reply).unwrap())
            }
            _ => None,
        }
    }

    #[test]
    fn an_answer_says_what_was_asked_and_what_there_is() {
        let reply = ask(&zones(2), &query("C1.blue.", RecordType::A), Transport::Udp).unwrap();
        assert_eq!((reply.metadata.id, reply.answers.len()), (7, 1));
        assert!(reply.metadata.recursion_available && reply.metadata.recursion_desired);
        assert_eq!(
            reply.answers[0].name.to_ascii(),
            "C1.blue.",
            "in the asker's letters"
        );
        assert_eq!((reply.answers[0].ttl, reply.edns.is_none()), (5, true));
        assert!(
            ask(
                &zones(2),
                &query("elsewhere.", RecordType::A),
                Transport::Udp
            )
            .is_none()
        );
    }

    #[test]
    fn what_does_not_fit_is_cut_and_said_to_be() {
        let zones = zones(200);
        let mut query = query("all.", RecordType::A);
        let size = |query: &Message, transport| {
            let reply = ask(&zones, query, transport).unwrap();
            (reply.answers.len(), reply.metadata.truncation)
        };
        // 16 bytes a record.
        let (count, truncated) = size(&query, Transport::Udp);
        assert!((28..=30).contains(&count) && truncated, "{count}");
        assert_eq!(size(&query, Transport::Tcp), (200, false));
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        query.set_edns(edns.clone());
        let (count, truncated) = size(&query, Transport::Udp);
        assert!((70..=75).contains(&count) && truncated, "{count}");
        edns.set_max_payload(u16::MAX);
        query.set_edns(edns.clone());
        assert_eq!(size(&query, Transport::Udp), (200, false));
        edns.set_max_payload(0);
        query.set_edns(edns);
        assert!(
            size(&query, Transport::Udp).0 >= 28,
            "nobody takes less than 512 bytes"
        );
    }

    #[test]
    fn what_is_refused_and_how() {
        let zones = zones(1);
        let code = |query: &Message| {
            ask(&zones, query, Transport::Udp)
                .unwrap()
                .metadata
                .response_code
        };
        assert_eq!(code(&query("c0.", RecordType::ANY)), ResponseCode::NotImp);
        assert_eq!(
            code(&query("elsewhere.", RecordType::ANY)),
            ResponseCode::NotImp
        );
        assert_eq!(code(&query("c0.", RecordType::AXFR)), ResponseCode::Refused);
        let mut chaos = query("c0.", RecordType::A);
        chaos.queries[0].set_query_class(DNSClass::CH);
        assert_eq!(code(&chaos), ResponseCode::Refused);
        let mut update = query("c0.", RecordType::A);
        update.metadata.op_code = OpCode::Status;
        assert_eq!(code(&update), ResponseCode::NotImp);
        let mut newer = query("c0.", RecordType::A);
        newer.set_edns({
            let mut edns = Edns::new();
            edns.set_version(1);
            edns
        });
        // TSIG has another name for the same number.
        assert_eq!(u16::from(code(&newer)), 16);
    }

    #[test]
    fn a_single_label_stays_where_ndots_says_so() {
        let zones = zones(1);
        let kept = |name: &str| {
            let bytes = query(name, RecordType::A).to_vec().unwrap();
            match answer(&bytes, &zones, &[vni()], Transport::Udp, true) {
                Reply::Answer(reply) => {
                    Some(Message::from_vec(&reply).unwrap().metadata.response_code)
                }
                _ => None,
            }
        };
        assert_eq!(kept("lonely."), Some(ResponseCode::NXDomain));
        assert_eq!(kept("c0."), Some(ResponseCode::NoError));
        assert_eq!(kept("a.b."), None);
    }

    #[test]
    fn only_an_answer_to_the_question_is_one() {
        let question = query("a.example.", RecordType::A).to_vec().unwrap();
        let mut reply = failure(&question, ResponseCode::NXDomain);
        assert!(answers(&question, &reply) && is_last_word(&reply));
        reply.make_ascii_uppercase();
        assert!(answers(&question, &reply), "letters' case is nothing");
        let wrong: [fn(&mut Vec<u8>); 5] = [
            |reply| reply[0] ^= 1,
            |reply| reply[2] &= 0x7f,
            |reply| reply[13] = b'x',
            |reply| reply[5] = 2,
            |reply| reply.truncate(20),
        ];
        for spoil in wrong {
            let mut reply = failure(&question, ResponseCode::NXDomain);
            spoil(&mut reply);
            assert!(!answers(&question, &reply), "{reply:?}");
        }
        assert!(!is_last_word(&failure(&question, ResponseCode::ServFail)));
        assert!(!is_last_word(&failure(&question, ResponseCode::Refused)));
        let mut long = failure(&question, ResponseCode::NoError);
        long.resize(600, 0);
        assert_eq!(truncated(&question, long.clone(), 600), long);
        let cut = truncated(&question, long, 512);
        assert_eq!(cut.len(), question.len());
        assert!(Message::from_vec(&cut).unwrap().metadata.truncation);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_within_bounds_or_not_at_all(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300),
            one in any::<bool>(),
        ) {
            if one && bytes.len() >= 12 {
                bytes[2] &= 0x07;
                bytes[4..12].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
            }
            if let Reply::Answer(reply) = answer(&bytes, &zones(9), &[vni()], Transport::Udp, false) {
                prop_assert!(reply.len() <= 4096 && reply[..2] == bytes[..2] && reply[2] & 0x80 != 0);
            }
        }
    }
}
