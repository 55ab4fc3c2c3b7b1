//! What is asked of both gateways: clients of every origin, every frontend of every Service, and what became of the packets.

use std::collections::BTreeSet;
use std::net::IpAddr;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use serde_json::Value;
use tests::case::Side;
use tests::twin::{INSIDE_MAC, OUTSIDE_MAC};

use crate::objects::NODE_IPS;

/// Packets of one probe that Linux sees; more than any Service has endpoints, so that a round of them shows the whole list.
pub const PACKETS: u32 = 12;
/// Numbers of one probe; each packet carries one.
pub const NUMBERS: u32 = 1024;

/// A client.
#[derive(Clone, Debug, PartialEq)]
pub struct Client {
    /// Who it is, for reports.
    pub name: &'static str,
    /// By which port its packets come in.
    pub side: Side,
    /// Its address.
    pub addr: IpAddr,
    mac: [u8; 6],
}

/// One question: a client asks for one frontend.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Who asks.
    pub client: Client,
    /// For what address.
    pub addr: IpAddr,
    /// For what port.
    pub port: u16,
    /// By UDP instead of TCP.
    pub udp: bool,
    /// What it is of which Service.
    pub about: String,
    /// Which rule it is about.
    pub kind: Kind,
}

/// What a probe asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A served frontend.
    Frontend,
    /// A ClusterIP, on a port that the Service does not have.
    UnknownPort,
    /// Another address of a Service, on a port that it does not have.
    UnknownPortOutside,
    /// An address of the Service range that no Service has.
    NoService,
    /// An address that a Service names, but that is not to be served.
    NotServed,
}

/// What became of the packets of a probe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// Where they went, translated: endpoint, and the source that it sees.
    pub endpoints: BTreeSet<(IpAddr, u16, IpAddr)>,
    /// Packets that were answered with a refusal.
    pub refused: u32,
    /// Packets that went on with the destination that they came with, or that were none of the gateway's.
    pub untouched: u32,
    /// Packets of which nothing was seen.
    pub silent: u32,
}

impl Fate {
    /// Notes one frame that left the gateway for packet `number` of `probe`.
    pub fn note(&mut self, probe: &Probe, seen: &Seen) {
        match seen.kind {
            SeenKind::Refusal => self.refused += 1,
            SeenKind::Packet { src, dst, dst_port } if (dst, dst_port) != (probe.addr, probe.port) => {
                self.endpoints.insert((dst, dst_port, src));
            }
            SeenKind::Packet { .. } => self.untouched += 1,
        }
    }

    /// In one line.
    pub fn say(&self) -> String {
        let endpoints: Vec<String> =
            self.endpoints.iter().map(|(addr, port, src)| format!("{addr}:{port} from {src}")).collect();
        let mut words = vec![];
        if !endpoints.is_empty() {
            words.push(format!("to {}", endpoints.join(", ")));
        }
        for (count, word) in
            [(self.refused, "refused"), (self.untouched, "untouched"), (self.silent, "dropped")]
        {
            if count > 0 {
                words.push(format!("{word} ({count})"));
            }
        }
        words.join("; ")
    }

    /// The same but for how often.
    pub fn agrees(&self, other: &Fate) -> bool {
        let some = |fate: &Fate| (fate.refused > 0, fate.untouched > 0, fate.silent > 0);
        self.endpoints == other.endpoints && some(self) == some(other)
    }
}

/// A frame that left a gateway.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The number that the packet carried.
    pub number: u32,
    kind: SeenKind,
}

#[derive(Clone, Debug)]
enum SeenKind {
    Refusal,
    Packet { src: IpAddr, dst: IpAddr, dst_port: u16 },
}

impl Probe {
    /// Packet `number` of the probe, as it comes in. `port`: the client's.
    pub fn frame(&self, number: u32, port: u16) -> Vec<u8> {
        let gateway = if self.client.side == Side::Outside { OUTSIDE_MAC } else { INSIDE_MAC };
        let ethernet = PacketBuilder::ethernet2(self.client.mac, mac(gateway));
        let ip = match (self.client.addr, self.addr) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
            (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
            _ => unreachable!("clients ask for addresses of their family"),
        };
        let mut frame = Vec::new();
        let written = if self.udp {
            ip.udp(port, self.port).write(&mut frame, &number.to_be_bytes())
        } else {
            ip.tcp(port, self.port, number, 8192).syn().write(&mut frame, &[])
        };
        written.expect("a small packet");
        frame
    }
}

/// Reads a frame that left a gateway; `None` if it carries no number.
pub fn read(frame: &[u8]) -> Option<Seen> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (src, dst) = match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()))
        }
        NetSlice::Ipv6(ip) => {
            (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()))
        }
        _ => return None,
    };
    match packet.transport.as_ref()? {
        TransportSlice::Udp(udp) => Some(Seen {
            number: number(udp.payload())?,
            kind: SeenKind::Packet { src, dst, dst_port: udp.destination_port() },
        }),
        TransportSlice::Tcp(tcp) if tcp.rst() => {
            Some(Seen { number: tcp.acknowledgment_number().wrapping_sub(1), kind: SeenKind::Refusal })
        }
        TransportSlice::Tcp(tcp) => Some(Seen {
            number: tcp.sequence_number(),
            kind: SeenKind::Packet { src, dst, dst_port: tcp.destination_port() },
        }),
        TransportSlice::Icmpv4(icmp) => quoted(icmp.payload(), 4),
        TransportSlice::Icmpv6(icmp) => quoted(icmp.payload(), 6),
        TransportSlice::Igmp(_) => None,
    }
}

/// The number of the packet that an ICMP error quotes.
fn quoted(payload: &[u8], version: u8) -> Option<Seen> {
    let (protocol, rest) = match version {
        4 => (*payload.get(9)?, payload.get(20..)?),
        _ => (*payload.get(6)?, payload.get(40..)?),
    };
    let number = if protocol == 17 { number(rest.get(8..)?)? } else { number(rest.get(4..)?)? };
    Some(Seen { number, kind: SeenKind::Refusal })
}

fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn mac(text: &str) -> [u8; 6] {
    let mut mac = [0; 6];
    for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16).expect("a link-layer address");
    }
    mac
}

/// The clients that ask for an address, of its family; the last one is an endpoint of the Service itself, if it has one.
fn clients(four: bool, endpoint: Option<IpAddr>) -> Vec<Client> {
    let client = |name, side, v4: &str, v6: &str, link: &str| Client {
        name,
        side,
        addr: if four { v4 } else { v6 }.parse().expect("an address"),
        mac: mac(link),
    };
    let mut clients = vec![
        client("client", Side::Outside, "10.1.0.2", "fd00:1::2", "02:00:00:00:00:02"),
        client("far client", Side::Outside, "198.51.100.7", "2001:db8:51::7", "02:00:00:00:00:77"),
        client("pod", Side::Inside, "10.244.1.5", "fd00:244:1::5", "02:00:00:00:01:11"),
        client("node", Side::Inside, "10.2.0.12", "fd00:2::12", "02:00:00:00:01:12"),
    ];
    if let Some(addr) = endpoint {
        clients.push(Client {
            name: "its own endpoint",
            side: Side::Inside,
            addr,
            mac: mac("02:00:00:00:01:11"),
        });
    }
    clients
}

/// Every probe of a List of objects.
pub fn probes(list: &Value) -> Vec<Probe> {
    let items = list["items"].as_array().expect("a List");
    let mut probes = vec![];
    for service in items.iter().filter(|item| item["kind"] == "Service") {
        let name = service["metadata"]["name"].as_str().expect("a name");
        let spec = &service["spec"];
        let labels = service["metadata"]["labels"].as_object().expect("labels");
        let served = labels.is_empty();
        let balanced = spec["type"] == "LoadBalancer";
        let mut addresses: Vec<(IpAddr, String, Kind)> = vec![];
        for ip in spec["clusterIPs"].as_array().expect("clusterIPs") {
            let kind = if served { Kind::Frontend } else { Kind::NoService };
            addresses.push((address(ip), "ClusterIP".into(), kind));
        }
        for ingress in service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten() {
            if let Some(ip) = ingress.get("ip") {
                let kind = if served && balanced && ingress["ipMode"] != "Proxy" {
                    Kind::Frontend
                } else {
                    Kind::NotServed
                };
                addresses.push((address(ip), "LoadBalancer".into(), kind));
            }
        }
        for ip in spec["externalIPs"].as_array().into_iter().flatten() {
            let kind = if served { Kind::Frontend } else { Kind::NotServed };
            addresses.push((address(ip), "externalIP".into(), kind));
        }
        let mut asked: Vec<(IpAddr, u16, bool, String, Kind)> = vec![];
        for port in spec["ports"].as_array().expect("ports") {
            let (number, udp) = (port["port"].as_u64().expect("a port") as u16, port["protocol"] == "UDP");
            for (addr, what, kind) in &addresses {
                asked.push((*addr, number, udp, format!("{what} of {name}"), *kind));
            }
            if let Some(node_port) = port["nodePort"].as_u64().filter(|_| served) {
                for ip in NODE_IPS {
                    let addr: IpAddr = ip.parse().expect("an address");
                    if addresses
                        .iter()
                        .any(|(other, what, _)| what == "ClusterIP" && other.is_ipv4() == addr.is_ipv4())
                    {
                        asked.push((
                            addr,
                            node_port as u16,
                            udp,
                            format!("NodePort of {name}"),
                            Kind::Frontend,
                        ));
                    }
                }
            }
        }
        for (addr, what, kind) in addresses.iter().filter(|(_, _, kind)| *kind == Kind::Frontend) {
            debug_assert_eq!(*kind, Kind::Frontend);
            let kind = if what == "ClusterIP" { Kind::UnknownPort } else { Kind::UnknownPortOutside };
            asked.push((*addr, 4242, false, format!("unknown port of {what} of {name}"), kind));
        }
        for (addr, port, udp, about, kind) in asked {
            for client in clients(addr.is_ipv4(), endpoint(items, name, addr.is_ipv4())) {
                probes.push(Probe { client, addr, port, udp, about: about.clone(), kind });
            }
        }
    }
    for ip in ["10.96.200.1", "fd00:96::f001"] {
        let addr: IpAddr = ip.parse().expect("an address");
        for client in clients(addr.is_ipv4(), None) {
            let about = "an address without a Service".to_owned();
            probes.push(Probe { client, addr, port: 80, udp: false, about, kind: Kind::NoService });
        }
    }
    probes
}

fn address(value: &Value) -> IpAddr {
    value.as_str().and_then(|text| text.parse().ok()).expect("an address")
}

/// The first endpoint in the slices of a Service.
fn endpoint(items: &[Value], service: &str, four: bool) -> Option<IpAddr> {
    let family = if four { "IPv4" } else { "IPv6" };
    let slice = items.iter().find(|item| {
        item["kind"] == "EndpointSlice"
            && item["metadata"]["labels"]["kubernetes.io/service-name"] == service
            && item["addressType"] == family
    })?;
    slice["endpoints"].get(0).map(|endpoint| address(&endpoint["addresses"][0]))
}
