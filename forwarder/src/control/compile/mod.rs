//! State to tables: kube-proxy's rules, written anew, and the decisions that a gateway makes besides.
//!
//! [`Compiler::compile`] is a function of the state, the gateway file and what it compiled before; no clock, no I/O. Only
//! Services that a change touches are compiled again, and tables share everything else with the generation before.
//!
//! Read in this order: [`endpoints`] merges slices, [`topology`] sorts endpoints into lists, [`frontends`] decides what
//! happens to packets, [`service`] puts the three together for one Service; then [`identities`], [`steer`], [`cleanup`]
//! for what goes along with the tables, and [`rows`], [`describe`], [`dns`], [`health`] for what people, name servers and load
//! balancers want to know.

pub mod endpoints;
pub mod frontends;
pub mod topology;

pub mod cleanup;
pub mod describe;
pub mod dns;
pub mod health;
mod host_ports;
pub mod identities;
pub mod lifetime;
mod overflow;
pub mod rows;
pub mod service;
pub mod steer;
mod tallies;

#[cfg(test)]
pub(crate) mod fixture;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use config::control::{Kind, ObjectRef};
use config::gateway::{Gateway, Role};

use super::facts::{Facts, SliceFacts};
use super::state::{Entry, State, Touch};
use super::validate::Rules;
use crate::addr::Addr;
use crate::table::flow_map::FlowMap;
use crate::tables::{EgressRule, EndpointKey, PortSettings, Settings, Tables, Vip};
use cleanup::UdpCleanup;
use health::HealthTables;
use lifetime::Lifetime;
use overflow::{Leads, Unmasqueraded};
use service::Compiled;
use tallies::Tallies;

/// Makes tables. Control thread; keeps what it compiled, so that a change costs what it touches.
pub struct Compiler {
    gateway: Arc<Gateway>,
    /// Addresses of the gateway's ports, those first that NodePorts fall back to.
    own: Vec<Addr>,
    /// Mixed into every Maglev table; the same on every gateway with one `lb_key`.
    key: u64,
    surroundings: Surroundings,
    services: BTreeMap<Arc<ObjectRef>, Compiled>,
    /// Weights of Pods that have one of their own, by `namespace/name`.
    pod_weights: HashMap<String, u16>,
    tallies: Tallies,
    leads: Leads,
    next_id: u32,
    tables: Tables,
    health: Arc<HealthTables>,
}

/// What every Service's tables depend on besides the Service and its slices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// Zone of the gateway, may be empty.
    zone: String,
    /// Own addresses that serve NodePorts.
    node_port_addresses: Vec<Addr>,
    /// Every own address, that of our Node object included.
    own: Vec<Addr>,
    /// Nodes that load balancers do not send to.
    excluded: BTreeSet<String>,
}

/// What a change makes of the tables.
pub struct Compilation {
    /// The new tables, not yet published.
    pub tables: Arc<Tables>,
    /// UDP flows to forget once the tables are in force.
    pub udp_cleanup: UdpCleanup,
    /// Which endpoints keep their connections, by stable id of the service port, for the Services that were touched; `None` for a
    /// port that is gone.
    pub lifetimes: Vec<(u64, Option<Lifetime>)>,
    /// The set of [`Compiler::steer_set`] may differ from the one before.
    pub steering_changed: bool,
    /// The routes of [`identities::pod_routes`] may differ from those before.
    pub routes_changed: bool,
    /// Endpoints outside of pod ranges may have come or gone, whose link-layer addresses are to be kept.
    pub endpoints_changed: bool,
}

impl Compiler {
    /// A compiler that has compiled nothing yet.
    pub fn new(gateway: Arc<Gateway>) -> Compiler {
        let tables = Tables { settings: Arc::new(settings(&gateway)), ..Tables::default() };
        let key = tables.settings.lb_key;
        Compiler {
            gateway,
            own: Vec::new(),
            key,
            surroundings: Surroundings::default(),
            services: BTreeMap::new(),
            pod_weights: HashMap::new(),
            tallies: Tallies::default(),
            leads: Leads::default(),
            next_id: 1,
            tables,
            health: Arc::default(),
        }
    }

    /// The gateway file.
    pub fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    /// What objects are judged by.
    pub fn rules(&self) -> Rules<'_> {
        Rules { gateway: &self.gateway, own: &self.own }
    }

    /// Sets the addresses of the gateway's ports. They take effect with the next [`Compiler::compile`].
    pub fn set_own_addresses(&mut self, own: Vec<Addr>) {
        self.own = own;
    }

    /// Every address of the gateway: of its ports, and of its own Node. As of the last [`Compiler::compile`].
    pub fn own_addresses(&self) -> &[Addr] {
        &self.surroundings.own
    }

    /// Sets what is known of the ports only at run time: whose checksums may be unfinished, by index.
    pub fn set_partial_checksums(&mut self, partial: &[bool]) {
        let mut settings = Settings::clone(&self.tables.settings);
        for (port, partial) in settings.ports.iter_mut().zip(partial) {
            port.partial_checksums = *partial;
        }
        self.tables.settings = Arc::new(settings);
    }

    /// The tables that were compiled last.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Compiles what a change touched. `generation` is that of the new tables.
    pub fn compile(&mut self, state: &State, touched: &[Touch], generation: u64) -> Compilation {
        let surroundings = self.look_around(state);
        let all = surroundings != self.surroundings;
        let own_changed = surroundings.own != self.surroundings.own;
        self.surroundings = surroundings;
        let node = state.node(&self.gateway.gateway.name);
        self.set_node_is_leaving(node.is_some_and(|node| node.leaving));
        let nodes_changed = identities::nodes_differ(touched);
        let is_first = self.tables.generation == 0;
        let identities_changed =
            all || nodes_changed || is_first || identities::pods_matter(state, &self.gateway, touched);
        if identities_changed {
            self.tables.identities =
                Arc::new(identities::identities(state, &self.gateway, &self.surroundings.own));
        }
        let weighed = self.follow_pod_weights(touched);
        let mut affected = if all { self.everything(state) } else { self.affected(touched) };
        affected.extend(services_of_pods(state, &weighed));
        let (udp_cleanup, lifetimes, keys_changed) = self.recompile(state, &affected);
        self.tables.generation = generation;
        let sources_changed = steer::sources_differ(state, &self.gateway, touched);
        Compilation {
            tables: Arc::new(self.tables.clone()),
            udp_cleanup,
            lifetimes,
            steering_changed: keys_changed || identities_changed || own_changed || sources_changed,
            routes_changed: nodes_changed || is_first,
            endpoints_changed: sources_changed,
        }
    }

    /// Compiles everything, as after a restart.
    pub fn compile_all(&mut self, state: &State, generation: u64) -> Compilation {
        let touch = |entry: &Arc<Entry>| Touch {
            reference: entry.reference.clone(),
            old: None,
            new: Some(entry.clone()),
        };
        let touched: Vec<Touch> = state.entries().map(touch).collect();
        self.compile(state, &touched, generation)
    }

    /// Takes the old frontends of the affected Services out and puts the new ones in. Returns true in the last place if
    /// the set of addresses and NodePorts changed.
    fn recompile(
        &mut self,
        state: &State,
        affected: &BTreeSet<Arc<ObjectRef>>,
    ) -> (UdpCleanup, Vec<(u64, Option<Lifetime>)>, bool) {
        let mut udp_cleanup = UdpCleanup::default();
        let mut keys_changed = false;
        let mut compiled = Vec::new();
        for reference in affected {
            let new = match reference.kind {
                Kind::Pod => self.compile_host_ports(state, reference),
                _ => self.compile_service(state, reference),
            };
            if let Some(new) = &new {
                udp_cleanup.add(new);
            }
            compiled.push((reference, new));
        }
        let lifetimes = compiled.iter().flat_map(|(reference, new)| {
            let (old, new) = (self.services.get(*reference), new.as_ref());
            let before = old.iter().flat_map(|old| old.lifetimes.iter().map(|(id, _)| (*id, None)));
            let now =
                new.into_iter().flat_map(|new| new.lifetimes.iter().cloned().map(|(id, l)| (id, Some(l))));
            // A port that is there is the last word on its id.
            before.chain(now).collect::<BTreeMap<_, _>>()
        });
        let lifetimes = lifetimes.collect();
        let old = affected.iter().filter_map(|reference| self.services.get(reference));
        let old: Vec<Unmasqueraded> = old.flat_map(|old| old.unmasqueraded.iter().cloned()).collect();
        let new = compiled.iter().filter_map(|(_, new)| new.as_ref());
        let new: Vec<Unmasqueraded> = new.flat_map(|new| new.unmasqueraded.iter().cloned()).collect();
        self.leads.change(&old, &new, &mut self.tables.sole_vips);
        // All old ones go before any new one comes, since an address may move from one Service to another.
        for (reference, new) in &compiled {
            let old = self.services.remove(*reference).unwrap_or_default();
            let untold = Default::default();
            self.replace_health(reference, &old.health, new.as_ref().map_or(&untold, |new| &new.health));
            for (key, frontend) in &old.frontends {
                let stays =
                    new.as_ref().is_some_and(|new| new.frontends.iter().any(|(other, _)| other == key));
                keys_changed |= !stays;
                if !stays {
                    self.tables.frontends.remove(key);
                }
                if service::is_vip(frontend) {
                    self.leave_vip(key.addr);
                }
            }
        }
        for (reference, new) in compiled {
            let Some(new) = new else { continue };
            for (key, frontend) in &new.frontends {
                keys_changed |= self.tables.frontends.insert(*key, frontend.clone()).is_none();
                if service::is_vip(frontend) {
                    self.join_vip(key.addr, frontend.kind == crate::tables::FrontendKind::ClusterIp);
                }
            }
            self.services.insert(reference.clone(), new);
        }
        (udp_cleanup, lifetimes, keys_changed)
    }

    fn join_vip(&mut self, addr: Addr, cluster_ip: bool) {
        let mut vip = self.tables.vips.get(&addr).copied().unwrap_or_default();
        vip = Vip { frontends: vip.frontends + 1, cluster_ip };
        self.tables.vips.insert(addr, vip);
    }

    fn leave_vip(&mut self, addr: Addr) {
        if let Some(mut vip) = self.tables.vips.get(&addr).copied() {
            vip.frontends -= 1;
            if vip.frontends == 0 {
                self.tables.vips.remove(&addr);
            } else {
                self.tables.vips.insert(addr, vip);
            }
        }
    }

    /// Takes the weights of touched Pods over; returns those that changed, by `namespace/name`.
    fn follow_pod_weights(&mut self, touched: &[Touch]) -> BTreeSet<String> {
        let weight = |entry: &Option<Arc<Entry>>| match entry.as_ref().map(|entry| &entry.facts) {
            Some(Facts::Pod(pod)) => pod.weight,
            _ => None,
        };
        let mut changed = BTreeSet::new();
        for touch in touched.iter().filter(|touch| touch.reference.kind == Kind::Pod) {
            if weight(&touch.old) == weight(&touch.new) {
                continue;
            }
            let name = format!("{}/{}", touch.reference.namespace, touch.reference.name);
            match weight(&touch.new) {
                Some(weight) => self.pod_weights.insert(name.clone(), weight),
                None => self.pod_weights.remove(&name),
            };
            changed.insert(name);
        }
        changed
    }

    /// Has every flow count for its endpoint, as far as the endpoint is known. After a restart, while no worker runs.
    pub fn count_flows(&self, flows: &FlowMap) {
        for flow in (0..flows.capacity() as u32).filter_map(|index| flows.snapshot(index)) {
            let (addr, port) = (flow.endpoint_addr, flow.endpoint_port);
            let key = EndpointKey { addr, port, protocol: flow.original.protocol };
            flows.assign_tally(flow.id, self.tallies.get(&key));
        }
    }

    /// Every Service, and every Pod with host ports here.
    fn everything(&self, state: &State) -> BTreeSet<Arc<ObjectRef>> {
        let services = state.of_kind(Kind::Service).map(|entry| entry.reference.clone());
        let pods = state.pods().filter(|(_, pod)| self.serves_host_ports(pod));
        let pods = pods.map(|(entry, _)| entry.reference.clone());
        services.chain(pods).chain(self.services.keys().cloned()).collect()
    }

    /// Services that a change touches, by themselves or by a slice, and Pods with host ports here.
    fn affected(&self, touched: &[Touch]) -> BTreeSet<Arc<ObjectRef>> {
        let mut affected = BTreeSet::new();
        for touch in touched {
            if touch.reference.kind == Kind::Service {
                affected.insert(touch.reference.clone());
            }
            for entry in touch.old.iter().chain(&touch.new) {
                match &entry.facts {
                    Facts::Slice(SliceFacts { service: Some(name), .. }) => {
                        let (namespace, name) = (touch.reference.namespace.clone(), name.clone());
                        affected.insert(Arc::new(ObjectRef { kind: Kind::Service, namespace, name }));
                    }
                    Facts::Pod(pod) if self.serves_host_ports(pod) => {
                        affected.insert(touch.reference.clone());
                    }
                    _ => {}
                }
            }
        }
        affected
    }

    fn look_around(&self, state: &State) -> Surroundings {
        let section = &self.gateway.gateway;
        let node = state.node(&section.name);
        let mut own = self.own.clone();
        own.extend(node.iter().flat_map(|node| node.addresses()).filter(|addr| !self.own.contains(addr)));
        let internal = node.map(|node| node.internal_ips.clone()).unwrap_or_default();
        let node_port_addresses = if !section.nodeport_addresses.is_empty() {
            let selected = |addr: &Addr| {
                let ip = IpAddr::from(*addr);
                section.nodeport_addresses.iter().any(|net| net.contains(&ip))
            };
            own.iter().copied().filter(selected).collect()
        } else if !internal.is_empty() {
            internal
        } else {
            self.own.clone()
        };
        let zone = section.zone.clone().or_else(|| node.map(|node| node.zone.clone())).unwrap_or_default();
        let excluded = state.nodes().filter(|(_, facts)| facts.excluded);
        let excluded = excluded.map(|(entry, _)| entry.reference.name.clone()).collect();
        Surroundings { zone, node_port_addresses, own, excluded }
    }
}

/// Tables of a whole state at once, as `explain` and tests want them.
pub fn compile(state: &State, gateway: &Arc<Gateway>, own: &[Addr]) -> Compiler {
    let mut compiler = Compiler::new(gateway.clone());
    compiler.set_own_addresses(own.to_vec());
    compiler.compile_all(state, 1);
    compiler
}

/// Services with an endpoint that is one of these Pods, by `namespace/name`.
fn services_of_pods(state: &State, pods: &BTreeSet<String>) -> BTreeSet<Arc<ObjectRef>> {
    if pods.is_empty() {
        return BTreeSet::new();
    }
    let is_one = |slice: &SliceFacts| {
        slice.endpoints.iter().filter_map(|endpoint| endpoint.pod()).any(|pod| pods.contains(pod))
    };
    let slices = state.slices().filter(|(_, slice)| is_one(slice));
    let services = slices.filter_map(|(entry, slice)| {
        let (namespace, name) = (entry.reference.namespace.clone(), slice.service.clone()?);
        Some(Arc::new(ObjectRef { kind: Kind::Service, namespace, name }))
    });
    services.collect()
}

/// What packets need to know of the gateway file.
pub fn settings(gateway: &Gateway) -> Settings {
    let ports = gateway.ports.iter().map(|port| PortSettings {
        outside: port.role.is_outside(),
        inside: port.role.is_inside(),
        pod: port.role == Role::Pod,
        expose_cluster_ips: port.expose_cluster_ips,
        partial_checksums: false,
    });
    let sources = |given: &[IpAddr]| {
        let mut addresses: Vec<Addr> = given.iter().map(|ip| Addr::from(*ip)).collect();
        addresses.sort_by_key(|addr| !addr.is_v4());
        addresses
    };
    let egress = gateway.egress.iter().map(|section| EgressRule {
        pods: section.pods.clone(),
        destinations: section.destinations.clone(),
        except: section.except.clone(),
        addresses: sources(&section.addresses),
    });
    Settings {
        ports: ports.collect(),
        snat_addresses: sources(&gateway.snat.addresses),
        egress: egress.collect(),
        snat_port_first: gateway.snat.ports.first,
        snat_port_last: gateway.snat.ports.last,
        lb_key: service::stable_hash(&[gateway.gateway.lb_key.as_bytes()]),
        mss_clamp: gateway.gateway.mss_clamp,
        source_checks: gateway.source_checks,
    }
}

#[cfg(test)]
mod tests;
