//! The forwarder's pipeline as a function, without root: the gateway of [`crate::twin`] made of tables instead of links.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use af_xdp::{FramePool, Umem};
use anyhow::{Context as _, Result, bail};
use config::fault::Code;
use config::gateway::Gateway;
use forwarder::addr::Addr;
use forwarder::control::compile::compile;
use forwarder::control::state::State;
use forwarder::packet::Packet;
use forwarder::pipeline::{self, AnswerBudget, Context, Rng};
use forwarder::stage::flow::timeouts_s;
use forwarder::stats::Counters;
use forwarder::table::flow_map::{FlowMap, FlowMapConfig, FlowWorker};
use forwarder::table::lpm::Lpm;
use forwarder::tables::{Fib, NextHop, PortLink, Route, Tables};
use forwarder::verdict::{Reason, Verdict};
use forwarder::worker::batch::Batch;
use forwarder::worker::reassembly::{Limits, Reassembly};
use ipnet::IpNet;

use crate::case::{Case, Emitted, Side, folder};
use crate::twin::{ADDRESSES, INSIDE_MAC, NEIGHBORS, OUTSIDE_MAC, ROUTES, strictness};

/// What became of one frame, or of the datagram that it completes.
#[derive(Debug)]
pub struct Outcome {
    /// The pipeline's verdict.
    pub verdict: Verdict,
    /// What leaves.
    pub emitted: Vec<Emitted>,
    /// What the verdict is about: the frame, or every fragment of its datagram, in order.
    pub came: Vec<Vec<u8>>,
}

impl Outcome {
    /// Why it went no further, if it did not.
    pub fn reason(&self) -> Option<Reason> {
        match self.verdict {
            Verdict::Drop(reason) | Verdict::Answer { reason, .. } => Some(reason),
            _ => None,
        }
    }
}

/// A gateway that is only tables and the pipeline.
pub struct Pure {
    tables: Tables,
    fib: Fib,
    flows: FlowMap,
    flow_worker: FlowWorker,
    affinity: FlowMap,
    affinity_worker: FlowWorker,
    rng: Rng,
    counters: Counters,
    pool: FramePool,
    reassembly: Reassembly,
    gateway: Arc<Gateway>,
    /// Seconds of the clock that the pipeline is given.
    pub now_s: u32,
}

impl Pure {
    /// The gateway of tests/golden, with its objects. Takes memory that lives until the process ends.
    pub fn golden() -> Result<Pure> {
        let file = folder().join("gateway.toml");
        let gateway = Gateway::load(&file).map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
        let text = std::fs::read_to_string(folder().join("objects.yaml"))?;
        Pure::new(gateway, &text)
    }

    /// A gateway with the links of the twin and `[flows] capacity` of the file, and with `objects`, which must all be accepted.
    pub fn new(gateway: Gateway, objects: &str) -> Result<Pure> {
        let gateway = Arc::new(gateway);
        let tables = compiled(&gateway, objects)?;
        let config = FlowMapConfig {
            capacity: gateway.flows.capacity,
            timeouts_s: timeouts_s(&gateway.flows),
            ..Default::default()
        };
        let (flows, affinity) = (FlowMap::anonymous(config), FlowMap::anonymous(config));
        let (flow_worker, affinity_worker) = (flows.worker(0), affinity.worker(0));
        // Beside those of fragments that wait: a packet, and the pieces that it is cut into.
        let frames = gateway.fragments.frames + 64;
        let pool = Umem::anonymous(frames, 4096).take_frames().context("frames of a new UMEM")?;
        let reassembly = Reassembly::new(Limits::from(&gateway.fragments));
        let rng = Rng::new(1);
        let counters = Counters::default();
        Ok(Pure {
            tables,
            fib: fib()?,
            flows,
            flow_worker,
            affinity,
            affinity_worker,
            rng,
            counters,
            pool,
            reassembly,
            gateway,
            now_s: 100,
        })
    }

    /// Puts the tables of other objects in force; connections and what session affinity remembers stay.
    pub fn apply(&mut self, objects: &str) -> Result<()> {
        self.tables = compiled(&self.gateway, objects)?;
        Ok(())
    }

    /// Lets what is over its idle time go, as workers do little by little.
    pub fn age(&mut self) {
        let capacity = self.flows.capacity();
        self.flows.age(&mut self.flow_worker, self.now_s, capacity);
        self.flows.quiescent(&mut self.flow_worker);
    }

    /// Connections that there are.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// One frame through the pipeline, as a worker does it, the frame rewritten. A fragment waits for the others of its datagram; the
    /// last one has the outcome of the datagram.
    ///
    /// # Panics
    /// Where the pipeline panics, which it must not for any frame of at most 4096 bytes less its headroom.
    pub fn feed(&mut self, side: Side, bytes: &[u8]) -> Outcome {
        let frame = self.pool.frame_from(bytes).expect("a frame of the pool, and bytes that fit it");
        let mut batch = Batch::default();
        batch.push(Packet::new(frame, 0, if side == Side::Outside { 0 } else { 1 }), []);
        self.judge(&mut batch);
        let mut verdict = batch.packets[0].verdict;
        if verdict == Verdict::Gather {
            verdict = self.gather(&mut batch);
        }
        let came = match &batch.packets[..] {
            [] => vec![bytes.to_vec()],
            packets => packets.iter().map(|packet| packet.frame.data().to_vec()).collect(),
        };
        batch.rewrite(&self.fib, &mut self.pool);
        let mut emitted = Vec::new();
        let mut leaves = |port: u8, frame: &[u8]| {
            let to = if port == 0 { Side::Outside } else { Side::Inside };
            let strictness = strictness(side, bytes, to, frame);
            emitted.push(Emitted { side: to, frame: frame.to_vec(), strictness });
        };
        for packet in batch.packets {
            match packet.verdict {
                Verdict::Forward { port } if packet.cut_to != 0 => {
                    for piece in batch.pieces.drain(..) {
                        leaves(port, piece.data());
                        self.pool.push(piece);
                    }
                }
                Verdict::Forward { port } | Verdict::Answer { port, .. } => leaves(port, packet.frame.data()),
                _ => {}
            }
            self.pool.push(packet.frame);
        }
        self.flows.quiescent(&mut self.flow_worker);
        self.affinity.quiescent(&mut self.affinity_worker);
        Outcome { verdict, emitted, came }
    }

    fn judge(&mut self, batch: &mut Batch) {
        let mut answers = AnswerBudget::new(u32::MAX);
        let mut cx = Context {
            tables: &self.tables,
            fib: &self.fib,
            flows: &self.flows,
            flow_worker: &mut self.flow_worker,
            affinity: &self.affinity,
            affinity_worker: &mut self.affinity_worker,
            now_s: self.now_s,
            rng: &mut self.rng,
            answers: &mut answers,
            counters: &self.counters,
            read_only: false,
        };
        pipeline::run(&mut batch.packets, &mut cx, &mut ());
    }

    /// Takes a fragment out of `batch`, and puts the datagram there that it completes, judged. Returns the verdict.
    fn gather(&mut self, batch: &mut Batch) -> Verdict {
        let packet = batch.packets.remove(0);
        batch.tail_counts.clear();
        let (chunk, now_ns) = (packet.frame.chunk(), u64::from(self.now_s) * 1_000_000_000);
        let mut verdict = Verdict::Gather;
        let mut give_up = |reason, packet: Packet, _| {
            if packet.frame.chunk() == chunk {
                verdict = Verdict::Drop(reason);
            }
            self.pool.push(packet.frame);
        };
        self.reassembly.expire(now_ns, &mut give_up);
        self.reassembly.add(packet, [].into_iter(), now_ns, &mut give_up);
        if self.reassembly.take_complete(batch) == 0 {
            return verdict;
        }
        self.judge(batch);
        batch.follow();
        batch.packets[0].verdict
    }

    /// Every frame of a case.
    pub fn play(&mut self, case: &Case) -> Vec<Outcome> {
        case.steps.iter().map(|step| self.feed(step.side, &step.frame)).collect()
    }
}

/// The tables of `objects`, which must all be accepted, on a gateway with the addresses of the twin.
fn compiled(gateway: &Arc<Gateway>, objects: &str) -> Result<Tables> {
    let manifests = config::object::parse(objects, "objects.yaml");
    if !manifests.faults.is_empty() {
        bail!("{:?}", manifests.faults);
    }
    let own: Vec<Addr> = ADDRESSES
        .iter()
        .map(|(_, address)| net(address).map(|net| net.addr().into()))
        .collect::<Result<_>>()?;
    let rules = forwarder::control::compile::Compiler::new(gateway.clone());
    let (state, mut notes) = State::load(&rules.rules(), manifests.manifests);
    // A field that has no meaning is no reason against an object.
    notes.retain(|note| note.code != Code::Ignored);
    if !notes.is_empty() {
        bail!("objects are not taken as they are: {notes:?}");
    }
    Ok(compile(&state, gateway, &own).tables().clone())
}

/// The forwarding table that the kernel mirror would make of the twin.
fn fib() -> Result<Fib> {
    let port_of = |interface: &str| u8::from(interface == "g1");
    let mut next_hops = Vec::new();
    let mut routes: Vec<(IpNet, Route)> = Vec::new();
    let mut by_address = HashMap::new();
    let mut ports = vec![PortLink::default(); 2];
    for (port, mac) in ports.iter_mut().zip([OUTSIDE_MAC, INSIDE_MAC]) {
        *port = PortLink { mac: mac_bytes(mac)?, mtu: 1500, up: true, ..PortLink::default() };
    }
    for (interface, address) in ADDRESSES {
        let net = net(address)?;
        routes.push((net.trunc(), Route::OnLink { port: port_of(interface) }));
        routes.push((IpNet::from(net.addr()), Route::Local));
        let port = &mut ports[usize::from(port_of(interface))];
        let addr = Some(net.addr().into());
        if net.addr().is_ipv4() { port.v4 = addr } else { port.v6 = addr }
    }
    for (interface, address, mac) in NEIGHBORS {
        let gateway: IpAddr = address.parse()?;
        let hop = NextHop {
            port: port_of(interface),
            gateway: gateway.into(),
            mac: Some(mac_bytes(mac)?),
            mtu: 1500,
            tunnel: None,
        };
        by_address.insert(gateway, hop);
        routes.push((IpNet::from(gateway), Route::NextHop(next_hops.len() as u32)));
        next_hops.push(hop);
    }
    for (prefix, via, mtu) in ROUTES {
        let mut hop = *by_address.get(&via.parse()?).with_context(|| format!("{via} is no neighbor"))?;
        hop.mtu = mtu.unwrap_or(1500);
        routes.push((net(prefix)?, Route::NextHop(next_hops.len() as u32)));
        next_hops.push(hop);
    }
    Ok(Fib { epoch: 1, routes: Arc::new(Lpm::build(routes)), next_hops, ports, overlay: None })
}

fn net(text: &str) -> Result<IpNet> {
    text.parse().with_context(|| format!("prefix {text:?}"))
}

fn mac_bytes(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16).with_context(|| format!("address {text:?}"))?;
    }
    Ok(mac)
}
