//! `towpathctl explain`: what would happen to a packet, from Kubernetes objects alone: no daemon, no root, no cluster.
//!
//! The objects are compiled and the packet is judged by the code of the daemon, on a gateway that is not there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use config::control::{FrontendDescription, Kind, ObjectRef, ServiceDescription, Trace};
use config::gateway::Gateway;
use config::object::Manifest;
use config::packet::{PacketSpec, Protocol};
use forwarder::addr::protocol;
use forwarder::assume::{self, Assumed, Compiled};
use forwarder::control::compile::Compiler;
use forwarder::control::state::State;
use forwarder::explain::Scene;
use forwarder::tables::{FrontendKey, ServicePort};

use crate::print::{self, Color, Output, Paint, Table, Tint, notice, out, out_value};
use crate::service::action_cell;
use crate::source::{self, SourceArgs};
use crate::trace;
use crate::{Ending, Global};

/// Shown below the help.
pub const EXAMPLES: &str = "\
Examples:
  # What can be asked for, on your own cluster
  kubectl get svc,endpointslices,nodes -A -o yaml | towpathctl explain -f -

  # Which endpoint a client gets, and why
  kubectl get svc,endpointslices,nodes -A -o yaml | towpathctl explain -f - \\
    'tcp 198.51.100.7:4242 > 203.0.113.10:80'

  # A packet that a pod sends, and one that comes in by a port of the gateway file
  towpathctl explain -f cluster.yaml 'udp 10.244.1.5 > 10.96.0.10:53'
  towpathctl explain -f cluster.yaml --config gateway.toml 'icmp 198.51.100.7 > 203.0.113.10 from uplink'

`kubectl get -o json` is read too, and faster, which tells with thousands of objects.
A packet is PROTOCOL SOURCE[:PORT] > DESTINATION[:PORT] [FLAGS] [from outside|inside|PORT].";

/// Arguments of `explain`.
#[derive(clap::Args)]
pub struct Args {
    /// The packet, such as 'tcp 198.51.100.7:4242 > 203.0.113.10:80'; without one, everything that is served
    #[arg(value_name = "PACKET")]
    packet: Vec<String>,
    #[command(flatten)]
    source: SourceArgs,
    /// The gateway file; without one, a gateway that fits the objects
    #[arg(short, long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// The gateway is this Node
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    node: Option<String>,
    /// How to print
    #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
    output: Output,
}

/// Runs `explain`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    // The packet first: a typing error there should not wait for `kubectl get` to finish.
    let packets = if args.packet.is_empty() { Vec::new() } else { trace::packets(&args.packet)? };
    let manifests = source::read(&args.source, global.color)?;
    if manifests.is_empty() {
        bail!("no objects to explain by; `kubectl get svc,endpointslices,nodes -A -o yaml` prints them");
    }
    if let Some(node) = &args.node {
        check_node(node, &manifests)?;
    }
    let assumed = match &args.config {
        Some(path) => Assumed::with(gateway_file(path, global.color)?),
        None => {
            let by_packet =
                || packets.iter().find_map(|packet| assume::node_of_node_port(&manifests, packet));
            assume::from_objects(&manifests, args.node.clone().or_else(by_packet))
        }
    };
    let mut cluster = Cluster::new(&assumed, manifests, global);
    let paint = global.paint();
    if packets.is_empty() {
        overview(&cluster, args.output, paint)?;
        return Ok(Ending::Done);
    }
    let traces: Result<Vec<Trace>> = packets.iter().map(|packet| cluster.explain(packet)).collect();
    trace::show(&traces?, args.output, paint)?;
    if !matches!(args.output, Output::Json | Output::Yaml) {
        out(&assumptions(&assumed, paint))?;
    }
    Ok(Ending::Done)
}

/// Fails if there is no such Node.
fn check_node(name: &str, manifests: &[Manifest]) -> Result<()> {
    let references = manifests.iter().map(|manifest| manifest.object.reference());
    let nodes: Vec<String> =
        references.filter(|reference| reference.kind == Kind::Node).map(|reference| reference.name).collect();
    if nodes.iter().any(|node| node == name) {
        return Ok(());
    }
    match nodes.as_slice() {
        [] => bail!(
            "--node {name}: there is no Node among the objects; add those of `kubectl get nodes -o yaml`"
        ),
        nodes => bail!("--node {name}: no such Node among the objects; there are {}", nodes.join(", ")),
    }
}

/// Reads a gateway file; every fault is told on standard error.
fn gateway_file(path: &Path, color: Color) -> Result<Gateway> {
    Gateway::load(path).map_err(|faults| {
        let paint = Paint::for_stderr(color);
        for fault in &faults {
            notice(&print::fault(paint, Tint::Bad, "error:", fault));
        }
        anyhow!("{} is no gateway file: nothing was done", path.display())
    })
}

/// The objects, compiled.
struct Cluster {
    state: State,
    compiler: Compiler,
    scene: Scene,
}

impl Cluster {
    /// Compiles what can be compiled; objects at fault are left out and told on standard error.
    fn new(assumed: &Assumed, manifests: Vec<Manifest>, global: &Global) -> Cluster {
        let names: Vec<ObjectRef> = manifests.iter().map(|manifest| manifest.object.reference()).collect();
        let Compiled { state, notes, compiler, inside } = assumed.compile(manifests);
        let paint = Paint::for_stderr(global.color);
        let left_out: BTreeSet<String> =
            names.iter().filter(|name| state.get(name).is_none()).map(ToString::to_string).collect();
        for note in &notes {
            let is_left_out = note.object.as_deref().is_some_and(|name| left_out.contains(name));
            let (tint, label) = if is_left_out { (Tint::Bad, "left out:") } else { (Tint::Warn, "note:") };
            notice(&print::fault(paint, tint, label, note));
        }
        let names = assumed.gateway.ports.iter().map(|port| port.name.clone()).collect();
        let scene = Scene::new(compiler.tables().clone(), names, &inside, compiler.own_addresses());
        Cluster { state, compiler, scene }
    }

    fn explain(&mut self, packet: &PacketSpec) -> Result<Trace> {
        let mut trace = self.scene.explain(packet).map_err(|sentence| anyhow!(sentence))?;
        let key = FrontendKey {
            addr: packet.dst.into(),
            port: packet.dst_port,
            protocol: match packet.protocol {
                Protocol::Tcp => protocol::TCP,
                Protocol::Udp => protocol::UDP,
                Protocol::Sctp => protocol::SCTP,
                Protocol::Icmp => return Ok(trace),
            },
        };
        if let Some(frontend) = self.compiler.tables().frontends.get(&key) {
            let ServicePort { namespace, name, .. } = &*frontend.service;
            trace.service = self.compiler.describe_service(&self.state, namespace, name);
        }
        Ok(trace)
    }

    fn services(&self) -> Vec<ServiceDescription> {
        let names = self.state.services().map(|(entry, _)| &entry.reference);
        names.filter_map(|r| self.compiler.describe_service(&self.state, &r.namespace, &r.name)).collect()
    }
}

/// Everything that is served, and a packet to begin with.
fn overview(cluster: &Cluster, output: Output, paint: Paint) -> Result<()> {
    let services = cluster.services();
    if matches!(output, Output::Json | Output::Yaml) {
        return out_value(output, &services);
    }
    let mut table = Table::new(["SERVICE", "FRONTEND", "KIND", "PORT", "FOR CLIENTS OUTSIDE", "FOR PODS"]);
    for service in &services {
        let row = &service.service;
        let name = format!("{}/{}", row.namespace, row.name);
        let mut node_ports = BTreeSet::new();
        for frontend in &service.frontends {
            // Nobody knows the gateway's addresses here: a NodePort is one row.
            let is_node_port = frontend.kind == "NodePort";
            if is_node_port && !node_ports.insert((&frontend.protocol, frontend.port)) {
                continue;
            }
            let address = match is_node_port {
                true => format!("<gateway>:{}/{}", frontend.port, frontend.protocol),
                false => trace::frontend_name(frontend),
            };
            table.row([
                name.as_str().into(),
                address.into(),
                frontend.kind.as_str().into(),
                frontend.port_name.as_str().into(),
                action_cell(&frontend.from_outside),
                action_cell(&frontend.from_pod),
            ]);
        }
    }
    if table.len() == 0 {
        notice("No Service of these objects is served.");
        return Ok(());
    }
    out(&table.take(paint, 0))?;
    // Of equals the last is the greatest: reversed, the first.
    let frontends = services.iter().flat_map(|service| &service.frontends).rev();
    if let Some(frontend) = frontends.max_by_key(|frontend| interest(frontend)) {
        notice(&format!(
            "\nNow ask about a packet, such as: towpathctl explain -f ... '{}'",
            example(frontend)
        ));
    }
    Ok(())
}

/// What a stranger asks for first: a LoadBalancer address for everybody, with several endpoints, IPv4.
fn interest(frontend: &FrontendDescription) -> (bool, bool, bool, u32) {
    (
        frontend.kind == "LoadBalancer",
        frontend.source_ranges.is_empty(),
        !frontend.address.contains(':'),
        frontend.from_outside.endpoints,
    )
}

/// A packet that asks for a frontend.
fn example(frontend: &FrontendDescription) -> String {
    let protocol = frontend.protocol.to_ascii_lowercase();
    let FrontendDescription { address, port, .. } = frontend;
    if address.contains(':') {
        format!("{protocol} [2001:db8:1::7]:4242 > [{address}]:{port}")
    } else {
        format!("{protocol} 198.51.100.7:4242 > {address}:{port}")
    }
}

fn assumptions(assumed: &Assumed, paint: Paint) -> String {
    let mut text = format!("\n  {}\n", paint.paint(Tint::Bold, "Assumed"));
    for sentence in &assumed.because {
        text += &format!("    {}\n", paint.paint(Tint::Dim, sentence));
    }
    text
}
