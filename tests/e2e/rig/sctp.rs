//! Just enough SCTP to ask a question: packets (RFC 9260 section 3) over raw sockets, since this kernel need not have SCTP.
//!
//! An association is set up by its four chunks; the question rides with COOKIE ECHO and the answer with COOKIE ACK, as RFC
//! 9260 section 5.1 allows. Nothing is sent again: on these wires nothing may be lost.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use forwarder::wire::sctp;
use rustix::net::{
    AddressFamily, Protocol, RawProtocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recvfrom,
    sendto, socket_with,
};

use super::place::Place;

/// IP protocol number of SCTP.
const SCTP: u32 = 132;

const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;

/// Tag by which the client wants to be spoken to.
const CLIENT_TAG: u32 = 0x0c11_e217;
/// Tag by which servers want to be spoken to.
const SERVER_TAG: u32 = 0x5e12_1e12;
/// Bytes before the user data of a DATA chunk and before the parameters of an INIT: of both, the fixed part behind the
/// chunk header.
const FIXED: [(u8, usize); 3] = [(DATA, 12), (INIT, 16), (INIT_ACK, 16)];

/// A packet: common header and chunks, each with its type and value.
#[derive(Clone, Debug)]
struct Packet {
    from_port: u16,
    to_port: u16,
    tag: u32,
    chunks: Vec<(u8, Vec<u8>)>,
}

impl Packet {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.from_port.to_be_bytes());
        bytes.extend(self.to_port.to_be_bytes());
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        for (kind, value) in &self.chunks {
            // Every DATA chunk of ours is a whole message.
            bytes.extend([*kind, if *kind == DATA { 3 } else { 0 }]);
            bytes.extend((4 + value.len() as u16).to_be_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        sctp::set_checksum(&mut bytes);
        bytes
    }

    /// Reads a packet; a wrong checksum is an error.
    fn decode(bytes: &[u8]) -> Result<Packet> {
        ensure!(bytes.len() >= 12, "{} bytes are no SCTP packet", bytes.len());
        let mut right = bytes.to_vec();
        sctp::set_checksum(&mut right);
        ensure!(right == bytes, "the SCTP checksum is wrong: {:02x?}", &bytes[8..12]);
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let tag = u32::from_be_bytes(bytes[4..8].try_into()?);
        let mut packet = Packet { from_port: u16_at(0), to_port: u16_at(2), tag, chunks: Vec::new() };
        let mut at = 12;
        while at + 4 <= bytes.len() {
            let length = usize::from(u16_at(at + 2));
            ensure!(length >= 4 && at + length <= bytes.len(), "a chunk of {length} bytes at {at}");
            packet.chunks.push((bytes[at], bytes[at + 4..at + length].to_vec()));
            at += length.next_multiple_of(4);
        }
        Ok(packet)
    }

    /// What a chunk of this type carries behind its fixed part.
    fn payload(&self, kind: u8) -> Option<&[u8]> {
        let fixed = FIXED.iter().find(|(other, _)| *other == kind).map_or(0, |(_, bytes)| *bytes);
        self.chunks.iter().find(|(other, _)| *other == kind)?.1.get(fixed..)
    }

    fn init(kind: u8, tag: u32, parameters: &[u8]) -> (u8, Vec<u8>) {
        // Tag, receiver window, one stream in either direction, first TSN (RFC 9260 section 3.3.2).
        let mut value = tag.to_be_bytes().to_vec();
        value.extend(65_535u32.to_be_bytes());
        value.extend([0, 1, 0, 1]);
        value.extend(1u32.to_be_bytes());
        value.extend(parameters);
        (kind, value)
    }

    fn data(text: &[u8]) -> (u8, Vec<u8>) {
        // TSN, stream, number in the stream, payload protocol (RFC 9260 section 3.3.1).
        let mut value = 1u32.to_be_bytes().to_vec();
        value.extend([0; 8]);
        value.extend(text);
        (DATA, value)
    }
}

/// A raw socket for SCTP packets to one address.
#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    is_v4: bool,
}

impl Socket {
    /// Opens it; runs inside the namespace of `address`.
    pub fn open(address: IpAddr) -> Result<Socket> {
        let (is_v4, family) = match address {
            IpAddr::V4(_) => (true, AddressFamily::INET),
            IpAddr::V6(_) => (false, AddressFamily::INET6),
        };
        let protocol = RawProtocol::new(SCTP).map(Protocol::from_raw);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::RAW, flags, protocol).context("raw socket")?;
        bind(&socket, &SocketAddr::new(address, 0)).with_context(|| format!("raw socket of {address}"))?;
        Ok(Socket { socket, is_v4 })
    }

    fn send(&self, to: IpAddr, packet: &Packet) -> Result<()> {
        sendto(&self.socket, &packet.encode(), SendFlags::empty(), &SocketAddr::new(to, 0))?;
        Ok(())
    }

    /// The next packet that waits, with its source.
    fn receive(&self) -> Result<Option<(IpAddr, Packet)>> {
        let mut buffer = [0; 2048];
        let (length, _, from) = match recvfrom(&self.socket, &mut buffer, RecvFlags::empty()) {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error).context("raw socket"),
        };
        let from = SocketAddr::try_from(from.context("a packet without a source")?)?.ip();
        // IPv4 comes with its header, IPv6 without.
        let header = if self.is_v4 { usize::from(buffer[0] & 0xf) * 4 } else { 0 };
        Ok(Some((from, Packet::decode(&buffer[header..length])?)))
    }

    /// Answers what waits, as the server of `port`: `answer` is given the source that it saw.
    pub fn serve(&self, port: u16, answer: impl Fn(SocketAddr) -> String) -> Result<()> {
        while let Some((from, packet)) = self.receive()? {
            if packet.to_port != port {
                continue;
            }
            let (mut tag, mut chunks) = (0, Vec::new());
            if let Some((_, value)) = packet.chunks.iter().find(|(kind, _)| *kind == INIT) {
                // The cookie (parameter 7) holds the client's tag, so that nothing need be remembered.
                tag = u32::from_be_bytes(value[..4].try_into()?);
                let mut cookie = vec![0, 7, 0, 8];
                cookie.extend(tag.to_be_bytes());
                chunks.push(Packet::init(INIT_ACK, SERVER_TAG, &cookie));
            } else if let Some(cookie) = packet.payload(COOKIE_ECHO).filter(|_| packet.tag == SERVER_TAG) {
                tag = u32::from_be_bytes(cookie.try_into().context("the cookie")?);
                chunks.push((COOKIE_ACK, Vec::new()));
                chunks.push(Packet::data(answer(SocketAddr::new(from, packet.from_port)).as_bytes()));
            }
            if !chunks.is_empty() {
                let reply = Packet { from_port: port, to_port: packet.from_port, tag, chunks };
                self.send(from, &reply)?;
            }
        }
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sets an association up from `place`, asks for the server's name and returns the answer; none within `patience`.
pub fn ask(place: &Place, to: SocketAddr, from_port: u16, patience: Duration) -> Result<Option<String>> {
    let socket = place.namespace.inside(|| Socket::open(place.address_towards(to.ip())))?;
    let mut packet =
        Packet { from_port, to_port: to.port(), tag: 0, chunks: vec![Packet::init(INIT, CLIENT_TAG, &[])] };
    let deadline = Instant::now() + patience;
    socket.send(to.ip(), &packet)?;
    while Instant::now() < deadline {
        let Some((from, reply)) = socket.receive()? else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        if reply.to_port != from_port {
            continue;
        }
        ensure!(
            from == to.ip() && reply.from_port == to.port() && reply.tag == CLIENT_TAG,
            "asked {to}, and {from} port {} answered with tag {:x}",
            reply.from_port,
            reply.tag
        );
        if let Some((_, value)) = reply.chunks.iter().find(|(kind, _)| *kind == INIT_ACK) {
            let cookie =
                reply.payload(INIT_ACK).and_then(|parameters| parameters.get(4..8)).context("cookie")?;
            packet.tag = u32::from_be_bytes(value[..4].try_into()?);
            packet.chunks = vec![(COOKIE_ECHO, cookie.to_vec()), Packet::data(b"hostname")];
            socket.send(to.ip(), &packet)?;
        } else if reply.payload(COOKIE_ACK).is_some() {
            let text = reply.payload(DATA).context("COOKIE ACK without an answer")?;
            return Ok(Some(String::from_utf8_lossy(text).into_owned()));
        }
    }
    Ok(None)
}
