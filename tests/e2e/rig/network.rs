//! The wires: a client, the gateway, nodes on a fabric, and pods behind their nodes.
//!
//! ```text
//!   client 198.51.100.2 to .9 --c0--g0-- gateway --g1-- fabric --+-- node-1 10.2.0.11 -- pods 10.244.1.11 ...
//!                                                                +-- node-2 10.2.0.12 -- pods 10.244.2.11 ...
//!                                                                +-- node-3 10.2.0.13 -- pods 10.244.3.11 ...
//!                                                                +-- 10.2.0.10, pods of the gateway's own node 10.244.0.11 ...
//! ```
//!
//! Each pod is a namespace. Whatever it sends leaves its node towards the gateway, even to a pod beside it: this is how a
//! node without a Service proxy uses a gateway. The gateway's own pods stand behind a router on the fabric that the gateway's
//! kernel has a route to. All offloads are as the kernel sets them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use anyhow::{Context, Result};
use tests::namespace::{Namespace, veth};

use super::cluster::Node;
use super::place::Place;

/// Name of the gateway and its Node.
pub const GATEWAY: &str = "gw-1";
/// The gateway's address on the client's side, where NodePorts are.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The same, IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1);
/// The gateway's address on the nodes' side.
pub const FABRIC_V4: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
/// The same, IPv6.
pub const FABRIC_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1);
/// Addresses of the client, of each family.
pub const CLIENTS: u8 = 8;
/// Nodes besides the gateway.
const NODES: u8 = 3;

/// Every namespace and link.
#[derive(Debug)]
pub struct Network {
    /// Where the daemon runs.
    pub gateway: Arc<Namespace>,
    client: Place,
    /// The router before the gateway's own pods, then the nodes.
    nodes: Vec<Place>,
    slots: Vec<Slot>,
    /// How many pods have gone.
    freed: u64,
    _fabric: Arc<Namespace>,
}

/// Where a pod can be.
#[derive(Debug)]
struct Slot {
    place: Place,
    /// Index of the node.
    node: u8,
    /// How many pods had gone when its last one went; `None` while one is here.
    free_since: Option<u64>,
}

/// Index of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotId(usize);

impl Network {
    /// Builds everything but the pods, which are built as they are needed.
    pub fn new() -> Result<Network> {
        let (client, gateway, fabric) = (namespace("client")?, namespace("gateway")?, namespace("fabric")?);
        veth((&client, "c0", "02:00:00:00:02:02"), (&gateway, "g0", "02:00:00:00:02:01"), 1)?;
        veth((&gateway, "g1", "02:00:00:00:03:01"), (&fabric, "gw", "02:00:00:00:03:02"), 1)?;
        batch(&fabric, "link add br0 type bridge\nlink set br0 up\nlink set gw master br0")?;
        let mut lines =
            String::from("route add default via 198.51.100.1\nroute add default via 2001:db8:c::1");
        for last in 2..2 + CLIENTS {
            lines = format!(
                "address add 198.51.100.{last}/24 dev c0\naddress add 2001:db8:c::{last}/64 dev c0 nodad\n{lines}"
            );
        }
        batch(&client, &lines)?;
        batch(
            &gateway,
            "address add 198.51.100.1/24 dev g0\naddress add 2001:db8:c::1/64 dev g0 nodad\n\
             address add 10.2.0.1/24 dev g1\naddress add fd00:2::1/64 dev g1 nodad\n\
             route add 10.244.0.0/24 via 10.2.0.10\nroute add fd00:244::/64 via fd00:2::10",
        )?;
        let nodes = (0..=NODES).map(|node| new_node(&fabric, node)).collect::<Result<_>>()?;
        let client = Place {
            name: "the client".into(),
            namespace: client,
            v4: Ipv4Addr::new(198, 51, 100, 2),
            v6: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 2),
        };
        Ok(Network { gateway, client, nodes, slots: Vec::new(), freed: 0, _fabric: fabric })
    }

    /// The client outside, by its address `number`, 0 to 7.
    pub fn client(&self, number: u8) -> Place {
        let [a, b, c, d] = self.client.v4.octets();
        let v6 = u128::from(self.client.v6) + u128::from(number);
        self.client.with_addresses(Ipv4Addr::new(a, b, c, d + number), v6.into())
    }

    /// A node's own network.
    pub fn node(&self, name: &str) -> Place {
        self.nodes[usize::from(index_of(name))].clone()
    }

    /// The Node objects, the gateway's first.
    pub fn node_objects(&self) -> Vec<Node> {
        (0..=NODES)
            .map(|node| {
                let place = &self.nodes[usize::from(node)];
                let (v4, v6) = if node == 0 { (GATEWAY_V4, GATEWAY_V6) } else { (place.v4, place.v6) };
                let pod_cidrs = [format!("10.244.{node}.0/24"), format!("fd00:244:{node}::/64")];
                Node { name: name_of(node), v4, v6, pod_cidrs, zone: None }
            })
            .collect()
    }

    /// Gives a place for a pod on a node: an address that nobody has had for the longest time.
    pub fn take_slot(&mut self, node: &str) -> Result<(SlotId, Place)> {
        let node = index_of(node);
        let here = |(_, slot): &(usize, &Slot)| slot.node == node && slot.free_since.is_some();
        let free = self.slots.iter().enumerate().filter(here).min_by_key(|(_, slot)| slot.free_since);
        let index = match free {
            Some((index, _)) => index,
            None => {
                self.slots.push(self.new_slot(node)?);
                self.slots.len() - 1
            }
        };
        let slot = &mut self.slots[index];
        slot.free_since = None;
        let (v4, v6, link) = (slot.place.v4, slot.place.v6, link_of(&slot.place));
        let routes = format!("route replace {v4} dev {link}\nroute replace {v6} dev {link}");
        let place = slot.place.clone();
        batch(&self.nodes[usize::from(node)].namespace, &routes)?;
        Ok((SlotId(index), place))
    }

    /// Takes a pod away: nobody has its address any more, and packets to it vanish.
    pub fn free_slot(&mut self, SlotId(index): SlotId) -> Result<()> {
        self.freed += 1;
        let slot = &mut self.slots[index];
        slot.free_since = Some(self.freed);
        let (v4, v6) = (slot.place.v4, slot.place.v6);
        batch(
            &self.nodes[usize::from(slot.node)].namespace,
            &format!("route del {v4}/32\nroute del {v6}/128"),
        )
    }

    fn new_slot(&self, node: u8) -> Result<Slot> {
        let number = 11 + self.slots.iter().filter(|slot| slot.node == node).count() as u8;
        let place = Place {
            name: String::new(),
            namespace: namespace(&format!("pod-{node}-{number}"))?,
            v4: Ipv4Addr::new(10, 244, node, number),
            v6: Ipv6Addr::new(0xfd00, 0x244, node.into(), 0, 0, 0, 0, number.into()),
        };
        let (link, v4, v6) = (link_of(&place), place.v4, place.v6);
        let router = &self.nodes[usize::from(node)].namespace;
        let mac = |side| format!("02:00:00:{side:02x}:{node:02x}:{number:02x}");
        veth((&place.namespace, "eth0", &mac(5)), (router, &link, &mac(6)), 1)?;
        batch(
            &place.namespace,
            &format!(
                "address add {v4}/32 dev eth0\naddress add {v6}/128 dev eth0 nodad\n\
                 route add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1\n\
                 route add default via fe80::1 dev eth0"
            ),
        )?;
        batch(
            router,
            &format!(
                "address add 169.254.1.1/32 dev {link}\naddress add fe80::1/64 dev {link} nodad\n\
                 rule add iif {link} lookup 100"
            ),
        )?;
        router.ip(&format!("-6 rule add iif {link} lookup 100"))?;
        Ok(Slot { place, node, free_since: Some(0) })
    }
}

fn name_of(node: u8) -> String {
    if node == 0 { GATEWAY.to_owned() } else { format!("node-{node}") }
}

/// # Panics
/// If there is no such node: the scenario is wrong.
fn index_of(name: &str) -> u8 {
    (0..=NODES).find(|node| name_of(*node) == name).expect("gw-1, node-1, node-2 or node-3")
}

fn link_of(place: &Place) -> String {
    let [_, _, node, number] = place.v4.octets();
    format!("pod-{node}-{number}")
}

fn new_node(fabric: &Namespace, node: u8) -> Result<Place> {
    let place = Place {
        name: name_of(node),
        namespace: namespace(&format!("node-{node}"))?,
        v4: Ipv4Addr::new(10, 2, 0, 10 + node),
        v6: Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 0x10 + u16::from(node)),
    };
    let (link, v4, v6) = (format!("node{node}"), place.v4, place.v6);
    let mac = |side| format!("02:00:00:00:{side:02x}:{node:02x}");
    veth((&place.namespace, "eth0", &mac(0x11)), (fabric, &link, &mac(0x12)), 1)?;
    batch(fabric, &format!("link set {link} master br0"))?;
    // Table 100 is for what goes by the gateway whatever its destination: what pods send, and what the node itself sends
    // to pods. A pod that is gone is a black hole.
    batch(
        &place.namespace,
        &format!(
            "address add {v4}/24 dev eth0\naddress add {v6}/64 dev eth0 nodad\n\
             route add default via 10.2.0.1\nroute add default via fd00:2::1\n\
             route add default via 10.2.0.1 table 100\nroute add default via fd00:2::1 table 100\n\
             route add blackhole 10.244.{node}.0/24\nroute add blackhole fd00:244:{node}::/64\n\
             rule add iif lo to 10.244.0.0/16 lookup 100"
        ),
    )?;
    place.namespace.ip("-6 rule add iif lo to fd00:244::/32 lookup 100")?;
    Ok(place)
}

fn namespace(name: &str) -> Result<Arc<Namespace>> {
    let namespace = Namespace::new(name)?;
    namespace.run(
        "sysctl",
        &[
            "-qw",
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv6.conf.all.accept_dad=0",
            "net.ipv6.conf.default.accept_dad=0",
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.default.rp_filter=0",
            // A node's own packets to its pods come back to it by way of the gateway.
            "net.ipv4.conf.all.accept_local=1",
            "net.ipv4.conf.all.send_redirects=0",
            "net.ipv4.conf.default.send_redirects=0",
        ],
    )?;
    Ok(Arc::new(namespace))
}

/// Runs lines of `ip` inside, in one process.
fn batch(namespace: &Namespace, lines: &str) -> Result<()> {
    namespace
        .sh(&format!("ip -batch - <<'LINES'\n{lines}\nLINES"))
        .map(drop)
        .with_context(|| format!("in {}", namespace.name()))
}
