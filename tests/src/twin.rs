//! The two-armed gateway that golden packets are played against: one namespace with the ports `g0` and `g1`, and one with
//! the bare other ends of both.
//!
//! ```text
//!   client 10.1.0.2, router 10.1.0.77 --w0--g0-- gateway --g1--w1-- node-1 10.2.0.11, node-2 .12, node-3 .13 (MTU 1000)
//! ```
//!
//! Nobody lives at the far ends: neighbors are permanent entries, so that not one packet is on the wires but those of the
//! case. The kernel's gateway and Towpath's are the same in every address, which is what lets their output be compared byte
//! for byte.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::case::{Case, Emitted, Side};
use crate::decode::Strictness;
use crate::marker::{marker, number};
use crate::namespace::{Namespace, veth};
use crate::wire::Wire;

/// Link-layer address of the outside port.
pub const OUTSIDE_MAC: &str = "02:00:00:00:00:01";
/// Link-layer address of the inside port.
pub const INSIDE_MAC: &str = "02:00:00:00:01:01";

/// Permanent neighbors: interface, address, link-layer address.
pub const NEIGHBORS: &[(&str, &str, &str)] = &[
    ("g0", "10.1.0.2", "02:00:00:00:00:02"),
    ("g0", "10.1.0.77", "02:00:00:00:00:77"),
    ("g0", "fd00:1::2", "02:00:00:00:00:02"),
    ("g0", "fd00:1::77", "02:00:00:00:00:77"),
    ("g1", "10.2.0.11", "02:00:00:00:01:11"),
    ("g1", "10.2.0.12", "02:00:00:00:01:12"),
    ("g1", "10.2.0.13", "02:00:00:00:01:13"),
    ("g1", "fd00:2::11", "02:00:00:00:01:11"),
    ("g1", "fd00:2::12", "02:00:00:00:01:12"),
    ("g1", "fd00:2::13", "02:00:00:00:01:13"),
];

/// Addresses of the gateway: interface, address with prefix length.
pub const ADDRESSES: &[(&str, &str)] =
    &[("g0", "10.1.0.1/16"), ("g0", "fd00:1::1/64"), ("g1", "10.2.0.1/24"), ("g1", "fd00:2::1/64")];

/// Routes of the gateway beyond its links: prefix, next hop, MTU.
pub const ROUTES: &[(&str, &str, Option<u16>)] = &[
    ("198.51.100.0/24", "10.1.0.77", None),
    ("2001:db8:51::/64", "fd00:1::77", None),
    ("10.244.1.0/24", "10.2.0.11", None),
    ("10.244.2.0/24", "10.2.0.12", None),
    ("10.244.3.0/24", "10.2.0.13", Some(1000)),
    ("fd00:244:1::/64", "fd00:2::11", None),
    ("fd00:244:2::/64", "fd00:2::12", None),
    ("fd00:244:3::/64", "fd00:2::13", Some(1280)),
];

/// How long a marker may take on a busy machine. Nothing waits as long unless a gateway is broken.
const PATIENCE: Duration = Duration::from_secs(20);
/// How much longer than the markers a frame may take that was recorded: by the TAP and the kernel, for one.
const LATE: Duration = Duration::from_millis(500);

/// A gateway in a namespace and the wires to it.
#[derive(Debug)]
pub struct Twin {
    /// Where the gateway's interfaces are.
    pub gateway: Namespace,
    /// Where the other ends are.
    pub far: Namespace,
    outside: Wire,
    inside: Wire,
    /// Markers sent so far.
    markers: u64,
}

impl Twin {
    /// Builds both namespaces, links, addresses, routes and neighbors. `name`: unique in the process.
    pub fn new(name: &str) -> Result<Twin> {
        let gateway = Namespace::new(&format!("{name}-gw"))?;
        let far = Namespace::new(&format!("{name}-far"))?;
        gateway.sysctl(&[
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv6.conf.default.accept_dad=0",
            "net.ipv6.conf.default.router_solicitations=0",
            "net.ipv4.conf.all.rp_filter=1",
            "net.ipv4.conf.default.rp_filter=1",
            "net.ipv4.conf.all.send_redirects=0",
            "net.ipv4.conf.default.send_redirects=0",
            "net.ipv4.icmp_ratelimit=0",
            "net.ipv4.icmp_msgs_per_sec=100000",
            "net.ipv6.icmp.ratelimit=0",
        ])?;
        far.sysctl(&["net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"])?;
        veth((&gateway, "g0", OUTSIDE_MAC), (&far, "w0", "02:00:00:00:00:02"), 1)?;
        veth((&gateway, "g1", INSIDE_MAC), (&far, "w1", "02:00:00:00:01:11"), 1)?;
        // Each packet is compared as it is: no checksum left for hardware, no merging, no splitting.
        for (namespace, interface) in [(&gateway, "g0"), (&gateway, "g1"), (&far, "w0"), (&far, "w1")] {
            let off = ["-K", interface, "tx", "off", "rx", "off", "gro", "off", "gso", "off", "tso", "off"];
            namespace.run("ethtool", &off)?;
        }
        for (interface, address) in ADDRESSES {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            gateway.ip(&format!("address add {address} dev {interface} {nodad}"))?;
        }
        for (interface, address, mac) in NEIGHBORS {
            gateway.ip(&format!("neigh replace {address} lladdr {mac} dev {interface} nud permanent"))?;
        }
        for (prefix, via, mtu) in ROUTES {
            let mtu = mtu.map_or(String::new(), |mtu| format!("mtu lock {mtu}"));
            gateway.ip(&format!("route add {prefix} via {via} {mtu}"))?;
        }
        let (outside, inside) = (Wire::open(&far, "w0")?, Wire::open(&far, "w1")?);
        Ok(Twin { gateway, far, outside, inside, markers: 0 })
    }

    /// Waits until the gateway forwards, and forgets what it has sent so far.
    pub fn wait_until_it_forwards(&mut self) -> Result<()> {
        let start = Instant::now();
        while !self.passes(Side::Outside, Duration::from_millis(200), &mut Vec::new())?
            || !self.passes(Side::Inside, Duration::from_millis(200), &mut Vec::new())?
        {
            ensure!(start.elapsed() < PATIENCE, "the gateway forwards nothing");
        }
        Ok(())
    }

    /// Plays the frames of a case, each to its end, and returns what left the gateway for each.
    ///
    /// Listens until markers behind the frame have come out on both sides, then `linger`, and a moment for what was recorded and
    /// is still missing. A frame that comes even later counts for the next one.
    pub fn play(&mut self, case: &Case, linger: Duration) -> Result<Vec<Vec<Emitted>>> {
        let mut all = Vec::new();
        for step in &case.steps {
            self.wire(step.side).send(&step.frame)?;
            let mut frames = Vec::new();
            // One way first: its marker tells that the frame was judged. Only then is a marker the other way behind its outcome.
            for side in [step.side, step.side.other()] {
                let passes = self.passes(side, PATIENCE, &mut frames)?;
                ensure!(passes, "{}: the gateway does not forward any more", case.name);
            }
            self.listen(Instant::now() + linger, usize::MAX, &mut frames)?;
            self.listen(Instant::now() + LATE, step.expected.len(), &mut frames)?;
            all.push(
                frames
                    .into_iter()
                    .map(|(side, frame)| {
                        let strictness = strictness(step.side, &step.frame, side, &frame);
                        Emitted { side, frame, strictness }
                    })
                    .collect(),
            );
        }
        Ok(all)
    }

    /// What still comes, though no frame is under way.
    pub fn leftovers(&self) -> Result<Vec<(Side, Vec<u8>)>> {
        let mut frames = Vec::new();
        self.listen(Instant::now() + LATE, usize::MAX, &mut frames)?;
        Ok(frames)
    }

    /// Sends a marker in by `side` and collects what leaves until it has come out; false if it does not within `patience`.
    fn passes(&mut self, side: Side, patience: Duration, frames: &mut Vec<(Side, Vec<u8>)>) -> Result<bool> {
        self.markers += 1;
        self.wire(side).send(&marker(side, self.markers)?)?;
        let deadline = Instant::now() + patience;
        while let Some((side, frame)) = self.next(deadline)? {
            match number(&frame) {
                Some(number) if number == self.markers => return Ok(true),
                Some(_) => {}
                None => frames.push((side, frame)),
            }
        }
        Ok(false)
    }

    /// Collects what leaves until `deadline`, or until there are `enough` frames.
    fn listen(&self, deadline: Instant, enough: usize, frames: &mut Vec<(Side, Vec<u8>)>) -> Result<()> {
        while frames.len() < enough {
            let Some(frame) = self.next(deadline)? else { break };
            frames.push(frame);
        }
        Ok(())
    }

    fn wire(&self, side: Side) -> &Wire {
        match side {
            Side::Outside => &self.outside,
            Side::Inside => &self.inside,
        }
    }

    /// The next frame on either wire.
    fn next(&self, deadline: Instant) -> Result<Option<(Side, Vec<u8>)>> {
        loop {
            for side in [Side::Outside, Side::Inside] {
                if let Some(frame) = self.wire(side).receive(Duration::ZERO)? {
                    return Ok(Some((side, frame)));
                }
            }
            if !Wire::wait(&[&self.outside, &self.inside], deadline)? {
                return Ok(None);
            }
        }
    }
}

/// A frame that goes back to where the packet came from is an answer of the gateway itself: an ICMP error, a reset, an echo
/// reply. (A hairpin goes back by the same port too, but is none of these.)
pub fn strictness(from: Side, frame: &[u8], to: Side, emitted: &[u8]) -> Strictness {
    let back = from == to && frame.len() >= 12 && emitted.len() >= 14 && emitted[0..6] == frame[6..12];
    // Behind VLAN tags, if there are any.
    let mut packet = emitted.get(12..).unwrap_or_default();
    while let [0x81, 0x00, _, _, rest @ ..] | [0x88, 0xa8, _, _, rest @ ..] = packet {
        packet = rest;
    }
    let made_here = match packet.get(..2) {
        Some([0x08, 0x00]) => match (packet.get(11), packet.get(22), packet.get(35)) {
            (Some(1), Some(kind), _) => matches!(kind, 0 | 3 | 11 | 12),
            (Some(6), _, Some(flags)) => flags & 4 != 0,
            _ => false,
        },
        Some([0x86, 0xdd]) => match (packet.get(8), packet.get(42), packet.get(55)) {
            (Some(58), Some(kind), _) => matches!(kind, 1..=4 | 129),
            (Some(6), _, Some(flags)) => flags & 4 != 0,
            _ => false,
        },
        _ => false,
    };
    if back && made_here { Strictness::Answer } else { Strictness::Exact }
}
