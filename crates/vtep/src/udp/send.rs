//! Sending: 64 sockets that stand for source ports, shared by all workers.
//!
//! They are not connected: one socket serves every remote. A filter drops whatever is sent to their ports before it
//! takes memory; ICMP errors about what they sent still reach their error queues (`errors.rs`), and never stop a batch.
//!
//! One message may be cut to many datagrams by the kernel (`UDP_SEGMENT`), which saves each but the first the way through its
//! stack. What a message may hold is in `segmentation.rs`; what it refuses goes again as single datagrams.
#![allow(unsafe_code)]

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use rustix::net::sockopt::set_socket_send_buffer_size_force;
use socket2::{SockFilter, Socket};

use super::errors::drain;
use super::message::Envelope;
use super::receive::is_icmp;
use super::segmentation::{Segmentation, is_refusal, pieces, singles};
use super::{BUFFER_BYTES, Batching, bind, forbid_fragments, switch_on};
use crate::edge::{Datagram, OuterFields, Refusal, SendReport};
use crate::flow::{FIRST_SOURCE_PORT, SOURCE_PORTS, source_port_index};
use crate::paths::PathListener;
use crate::settings::DEFAULT_TTL;

/// Messages handed over by one `sendmmsg`.
const BATCH: usize = 64;

/// The send sockets of one VTEP address.
pub struct SendSockets {
    sockets: Vec<Socket>,
    /// As many again, for datagrams without checksums; opened when a network wants such.
    unsummed: OnceLock<Vec<Socket>>,
    segmentation: Segmentation,
    batching: Batching,
    listener: Arc<dyn PathListener>,
}

impl SendSockets {
    /// Opens one socket for each source port, on free ports of the dynamic range. `listener` is told what is said about sizes.
    ///
    /// # Errors
    /// What the kernel says; `AddrInUse` when the whole range is taken.
    pub fn open(
        vtep: IpAddr,
        batching: Batching,
        listener: Arc<dyn PathListener>,
    ) -> io::Result<Self> {
        let sockets = open_all(vtep)?;
        let segmentation = match batching {
            Batching::Full => Segmentation::probe(&sockets[0]),
            Batching::Single => Segmentation::none(),
        };
        Ok(Self {
            batching,
            sockets,
            unsummed: OnceLock::new(),
            segmentation,
            listener,
        })
    }

    /// Opens the sockets for datagrams without checksums, in the calling thread's network namespace; until then such datagrams leave
    /// with them. A second time is harmless.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_unsummed(&self, vtep: IpAddr) -> io::Result<()> {
        if self.unsummed.get().is_some() {
            return Ok(());
        }
        let sockets = open_all(vtep)?;
        for socket in &sockets {
            let (level, option) = if vtep.is_ipv6() {
                (libc::SOL_UDP, UDP_NO_CHECK6_TX)
            } else {
                (libc::SOL_SOCKET, libc::SO_NO_CHECK)
            };
            switch_on(socket, level, option)?;
        }
        // Somebody else may have been faster; then these are closed again.
        let _ = self.unsummed.set(sockets);
        Ok(())
    }

    /// All sockets that there are by now.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Socket> {
        self.sockets
            .iter()
            .chain(self.unsummed.get().into_iter().flatten())
    }

    pub(super) fn listener(&self) -> &dyn PathListener {
        &*self.listener
    }

    /// How many datagrams the kernel cuts one message into, at most; 1 when it doesn't know how to.
    #[must_use]
    pub const fn segments_max(&self) -> usize {
        self.segmentation.segments_max()
    }

    /// How much one system call sends.
    #[must_use]
    pub const fn batching(&self) -> Batching {
        self.batching
    }

    /// The source ports, in the order that [`source_port_index`] counts: of datagrams with checksums, and behind them, once there are
    /// any, of those without.
    ///
    /// # Errors
    /// What the kernel says when it is asked for a socket's address.
    pub fn source_ports(&self) -> io::Result<Vec<u16>> {
        self.iter()
            .map(|socket| {
                let address = socket.local_addr()?;
                Ok(address.as_socket().map_or(0, |address| address.port()))
            })
            .collect()
    }

    /// Sends the datagrams, those of one flow in their order.
    pub fn send(&self, datagrams: &[Datagram<'_>]) -> SendReport {
        let mut report = SendReport::default();
        for (number, chunk) in datagrams.chunks(BATCH).enumerate() {
            self.send_chunk(chunk, number * BATCH, &mut report);
        }
        report
    }

    /// The socket of this number, those without checksums behind those with.
    fn socket(&self, number: usize) -> &Socket {
        match (number.checked_sub(SOURCE_PORTS), self.unsummed.get()) {
            (Some(number), Some(unsummed)) => &unsummed[number],
            _ => &self.sockets[number % SOURCE_PORTS],
        }
    }

    /// Sorts at most [`BATCH`] datagrams by socket, keeping their order, and sends each socket's share in one call. `first` is
    /// the place of the chunk's first in the whole batch.
    fn send_chunk(&self, chunk: &[Datagram<'_>], first: usize, report: &mut SendReport) {
        let mut order = [(0u8, 0u8); BATCH];
        let mut used = 0;
        for (index, datagram) in (0u8..).zip(chunk) {
            let unsummed = !datagram.outer.checksum && self.unsummed.get().is_some();
            let first = if unsummed { SOURCE_PORTS } else { 0 };
            let socket = u8::try_from(first + source_port_index(datagram.flow))
                .expect("invariant: there are 64 source ports, twice");
            order[used] = (socket, index);
            used += 1;
        }
        let order = &mut order[..used];
        // Socket first, then place in the batch: an unstable sort keeps each flow's order all the same.
        order.sort_unstable();
        for share in order.chunk_by(|one, other| one.0 == other.0) {
            let socket = self.socket(usize::from(share[0].0));
            let mut batch = Batch::new(socket, self);
            for &(_, index) in share {
                let index = usize::from(index);
                batch.add(&chunk[index], first + index, report);
            }
            batch.flush(report);
        }
    }
}

/// Opens a socket for each source port, on free ports of the dynamic range.
fn open_all(vtep: IpAddr) -> io::Result<Vec<Socket>> {
    // Any start will do; a random one keeps two VTEPs that follow each other from meeting in TIME_WAIT-like states of
    // middleboxes. Steps of one through the range find all free ports.
    let start = RandomState::new().hash_one(0u8);
    let mut candidates = (0..=(u16::MAX - FIRST_SOURCE_PORT)).map(|step| {
        let span = u64::from(u16::MAX - FIRST_SOURCE_PORT) + 1;
        let offset = (start % span + u64::from(step)) % span;
        FIRST_SOURCE_PORT + u16::try_from(offset).expect("invariant: the span has 16,384 ports")
    });
    let mut sockets = Vec::with_capacity(SOURCE_PORTS);
    while sockets.len() < SOURCE_PORTS {
        let port = candidates.next().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("no {SOURCE_PORTS} free UDP ports above {FIRST_SOURCE_PORT} on {vtep}"),
            )
        })?;
        match open_one(SocketAddr::new(vtep, port)) {
            Ok(socket) => sockets.push(socket),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

fn open_one(address: SocketAddr) -> io::Result<Socket> {
    let socket = bind(address, false)?;
    // Nobody has a reason to send to these ports: `return 0` keeps no byte of any packet.
    socket.attach_filter(&[SockFilter::new(BPF_RETURN_CONSTANT, 0, 0, 0)])?;
    if set_socket_send_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
        socket.set_send_buffer_size(BUFFER_BYTES)?;
    }
    forbid_fragments(&socket, address.ip())?;
    // Whatever this host's default is (V19 of the conformance list).
    let ttl = u32::from(DEFAULT_TTL.get());
    if address.is_ipv6() {
        socket.set_unicast_hops_v6(ttl)?;
    } else {
        socket.set_ttl_v4(ttl)?;
    }
    receive_errors(&socket, address.is_ipv6())?;
    Ok(socket)
}

/// linux/udp.h; libc does not have it.
const UDP_NO_CHECK6_TX: libc::c_int = 101;
/// `BPF_RET | BPF_K` (linux/filter.h).
const BPF_RETURN_CONSTANT: u16 = 0x06;

/// Has ICMP errors put into the socket's error queue.
fn receive_errors(socket: &Socket, v6: bool) -> io::Result<()> {
    let (level, option) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
    } else {
        (libc::IPPROTO_IP, libc::IP_RECVERR)
    };
    switch_on(socket, level, option)
}

/// Messages for one socket, gathered for one system call.
struct Batch<'a> {
    socket: &'a Socket,
    shared: &'a SendSockets,
    envelopes: [MaybeUninit<Envelope>; BATCH],
    pieces: [Datagram<'a>; BATCH],
    /// Where in what was to be sent each piece's datagram is.
    places: [usize; BATCH],
    used: usize,
}

impl<'a> Batch<'a> {
    fn new(socket: &'a Socket, shared: &'a SendSockets) -> Self {
        let nothing = Datagram {
            to: SocketAddr::from(([0, 0, 0, 0], 0)),
            flow: 0,
            outer: OuterFields::default(),
            segment_size: None,
            slices: &[],
        };
        Self {
            socket,
            shared,
            envelopes: [MaybeUninit::uninit(); BATCH],
            pieces: [nothing; BATCH],
            places: [0; BATCH],
            used: 0,
        }
    }

    /// Adds a datagram, as as many messages as it takes. Sends when there is no more room.
    fn add(&mut self, datagram: &Datagram<'a>, place: usize, report: &mut SendReport) {
        // udp_send_skb refuses to cut for a socket without checksums.
        let segments_max = if datagram.outer.checksum {
            self.shared.segmentation.segments_for(datagram.to.ip())
        } else {
            1
        };
        for piece in pieces(datagram, segments_max) {
            self.push(piece, place, report);
        }
    }

    /// Adds one message.
    fn push(&mut self, piece: Datagram<'a>, place: usize, report: &mut SendReport) {
        if self.used == BATCH {
            self.flush(report);
        }
        self.pieces[self.used] = piece;
        self.places[self.used] = place;
        self.used += 1;
    }

    /// Sends what has been added.
    fn flush(&mut self, report: &mut SendReport) {
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; BATCH];
        for (slot, piece) in self.pieces[..self.used].iter().enumerate() {
            let envelope = Envelope::new(piece.to, piece.outer, piece.segment_size);
            messages[slot].write(self.envelopes[slot].write(envelope).message(piece.slices));
        }
        let mut next = 0;
        let mut drained = false;
        let most = match self.shared.batching {
            Batching::Full => BATCH,
            Batching::Single => 1,
        };
        while next < self.used {
            let rest = u32::try_from(most.min(self.used - next))
                .expect("invariant: a batch has at most 64 messages");
            // SAFETY: the messages from `next` up to `used` were written above, and what they point to (envelopes in
            // `self`, the datagrams' slices and payloads) lives and stays until this function ends; the kernel reads all
            // of it and writes only `msg_len`. std, socket2 and rustix have no call for many datagrams at once.
            let result = unsafe {
                libc::sendmmsg(
                    self.socket.as_raw_fd(),
                    messages[next..].as_mut_ptr().cast(),
                    rest,
                    libc::MSG_DONTWAIT as _,
                )
            };
            if let Ok(count) = usize::try_from(result) {
                let taken = &self.pieces[next..next + count];
                report.sent += taken.iter().map(Datagram::count).sum::<usize>();
                next += count;
                drained = false;
                continue;
            }
            let error = io::Error::last_os_error();
            let (piece, place) = (self.pieces[next], self.places[next]);
            let mut refuse = |why| report.refuse(place, piece.count(), why);
            match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                // A pending ICMP error is reported in place of this send, which has not been tried: once more, with an
                // empty error queue. A genuine "unreachable" of this datagram then comes again. EMSGSIZE may be either, too.
                _ if !drained
                    && (is_icmp(&error) || error.raw_os_error() == Some(libc::EMSGSIZE)) =>
                {
                    drain(self.socket, self.shared.listener());
                    drained = true;
                    continue;
                }
                Some(errno) if piece.segment_size.is_some() && is_refusal(errno) => {
                    self.send_singles(&piece, place, &error, report);
                }
                Some(libc::EMSGSIZE) => refuse(Refusal::TooBig),
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => refuse(Refusal::Full),
                _ => refuse(Refusal::Failed),
            }
            next += 1;
            drained = false;
        }
        self.used = 0;
    }

    /// Sends each datagram of a message that the kernel did not want to cut. When it finds the first too large as well, so are
    /// all of its length, and nothing was wrong with cutting; the last may be shorter.
    fn send_singles(
        &self,
        piece: &Datagram<'_>,
        place: usize,
        error: &io::Error,
        report: &mut SendReport,
    ) {
        let mut singles = singles(piece);
        let mut batch = Batch::new(self.socket, self.shared);
        let refused = report.too_big;
        let Some(first) = singles.next() else {
            return;
        };
        batch.push(first, place, report);
        batch.flush(report);
        let too_big = report.too_big > refused;
        if !too_big {
            self.shared.segmentation.give_up(piece.to.ip(), error);
        }
        for single in singles {
            if too_big && single.len() >= first.len() {
                report.refuse(place, 1, Refusal::TooBig);
            } else {
                batch.push(single, place, report);
            }
        }
        batch.flush(report);
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::net::UdpSocket;

    use super::super::receive::ReceiveSocket;
    use super::*;
    use crate::paths::PathMonitor;

    fn unheard() -> Arc<dyn PathListener> {
        let tables = crate::fdb::TableWriter::new().shared();
        Arc::new(PathMonitor::new(tables, Arc::default()))
    }

    fn datagram<'a>(to: SocketAddr, flow: u32, slices: &'a [IoSlice<'a>]) -> Datagram<'a> {
        Datagram {
            to,
            flow,
            outer: OuterFields::default(),
            segment_size: None,
            slices,
        }
    }

    #[test]
    fn one_flow_keeps_its_port_and_its_order() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let receiver = UdpSocket::bind(local).unwrap();
            let to = receiver.local_addr().unwrap();
            let sockets = SendSockets::open(to.ip(), Batching::Full, unheard()).unwrap();
            let bytes: Vec<[u8; 1]> = (0..100).map(|byte| [byte]).collect();
            let slices: Vec<_> = bytes
                .iter()
                .map(|byte| [IoSlice::new(b"no "), IoSlice::new(byte)])
                .collect();
            // Three flows in turn, more datagrams than one batch.
            let flows = [3u32, 0x4000_0000, 0xffff_ffff];
            let datagrams: Vec<_> = slices
                .iter()
                .enumerate()
                .map(|(index, slices)| datagram(to, flows[index % 3], slices))
                .collect();
            assert_eq!(
                sockets.send(&datagrams),
                SendReport {
                    sent: 100,
                    ..SendReport::default()
                }
            );
            let mut ports = std::collections::HashMap::new();
            let mut last = [None; 3];
            for _ in 0..100 {
                let mut payload = [0; 16];
                let (length, from) = receiver.recv_from(&mut payload).unwrap();
                assert_eq!((length, &payload[..3]), (4, &b"no "[..]));
                let flow = usize::from(payload[3]) % 3;
                assert!(from.port() >= FIRST_SOURCE_PORT);
                assert_eq!(*ports.entry(flow).or_insert(from.port()), from.port());
                assert!(last[flow] < Some(payload[3]));
                last[flow] = Some(payload[3]);
            }
        }
    }

    #[test]
    fn a_refused_datagram_does_not_stop_the_batch() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = receiver.local_addr().unwrap();
        let sockets = SendSockets::open(to.ip(), Batching::Full, unheard()).unwrap();
        let closed = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let huge = vec![0; 65_000];
        let (good, oversized) = (
            [IoSlice::new(b"good")],
            [IoSlice::new(&huge), IoSlice::new(&huge)],
        );
        // ICMP "port unreachable" comes back at once over loopback, so a later send finds it pending.
        let batch = [
            datagram(closed, 1, &good),
            datagram(closed, 1, &good),
            datagram(to, 1, &oversized),
            datagram("[::1]:9".parse().unwrap(), 1, &good),
            datagram(to, 1, &good),
        ];
        let report = sockets.send(&batch);
        assert_eq!(
            report,
            SendReport {
                sent: 3,
                too_big: 1,
                full: 0,
                failed: 1,
                // The third is too big, the fourth is for another family.
                refused: [1 << 2, 0, 1 << 3],
            }
        );
        let mut payload = [0; 16];
        assert_eq!(receiver.recv(&mut payload).unwrap(), 4);
    }

    #[test]
    fn the_traffic_class_is_set_on_the_outer_header() {
        let receiver = ReceiveSocket::open("[::1]:0".parse().unwrap(), Batching::Full).unwrap();
        let to = socket2::SockRef::from(&rustix::fd::AsFd::as_fd(&receiver))
            .local_addr()
            .unwrap()
            .as_socket()
            .unwrap();
        let sockets = SendSockets::open(to.ip(), Batching::Full, unheard()).unwrap();
        let slices = [IoSlice::new(b"x")];
        let report = sockets.send(&[Datagram {
            outer: OuterFields {
                class: 0b1011_1010,
                ttl: 9,
                checksum: true,
            },
            ..datagram(to, 0, &slices)
        }]);
        assert_eq!(report.sent, 1);
        let mut bufs = [crate::frame::DatagramBuf::new()];
        let mut poll = [rustix::event::PollFd::new(
            &receiver,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut poll, None).unwrap();
        assert_eq!(receiver.recv(&mut bufs).unwrap(), 1);
        assert_eq!(bufs[0].class, 0b1011_1010);
    }

    #[test]
    fn single_batching_sends_and_takes_one_datagram_a_call() {
        use crate::frame::DatagramBuf;
        let receiver =
            ReceiveSocket::open("127.0.0.1:0".parse().unwrap(), Batching::Single).unwrap();
        assert!(!receiver.merges());
        let to = socket2::SockRef::from(&rustix::fd::AsFd::as_fd(&receiver))
            .local_addr()
            .unwrap()
            .as_socket()
            .unwrap();
        let sockets = SendSockets::open(to.ip(), Batching::Single, unheard()).unwrap();
        assert_eq!(sockets.segments_max(), 1);
        let slices = [IoSlice::new(b"one"), IoSlice::new(b"two")];
        let to_be_cut = Datagram {
            segment_size: Some(3),
            ..datagram(to, 0, &slices)
        };
        assert_eq!(sockets.send(&[to_be_cut, to_be_cut]).sent, 4);
        let mut bufs: Vec<_> = (0..8).map(|_| DatagramBuf::new()).collect();
        assert_eq!(receiver.recv(&mut bufs).unwrap(), 4);
        let seen: Vec<_> = bufs[..4]
            .iter()
            .map(|buf| (buf.payload(), buf.segment_size))
            .collect();
        let expected = [b"one", b"two", b"one", b"two"].map(|word| (&word[..], None));
        assert_eq!(seen, expected);
        assert_eq!(receiver.recv(&mut bufs).unwrap(), 0);
    }

    #[test]
    fn what_is_sent_to_a_source_port_is_filtered() {
        let sockets =
            SendSockets::open(IpAddr::from([127, 0, 0, 1]), Batching::Full, unheard()).unwrap();
        let to = sockets.sockets[0]
            .local_addr()
            .unwrap()
            .as_socket()
            .unwrap();
        UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .send_to(b"unwanted", to)
            .unwrap();
        let mut nothing = [MaybeUninit::uninit(); 8];
        // Loopback delivers before `send_to` returns, so there is nothing to wait for.
        let error = sockets.sockets[0].recv(&mut nothing).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
