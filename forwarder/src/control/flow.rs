//! Flows for people: rows, filters, and walks over the flow table in slices, so that no client waits for another's walk.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use config::control::{FlowFilter, FlowRow, Item, Reply};
use config::fault::{Code, Fault};
use ipnet::IpNet;

use crate::addr::{Addr, Tuple, protocol};
use crate::stage::flow::Phase;
use crate::table::flow_map::{FlowMap, FlowSnapshot};
use crate::tables::Tables;

/// Records looked at in one step of a walk: some 100 microseconds.
const STEP: u32 = 2048;

/// Names of service ports by their stable id.
pub type ServiceNames = Arc<HashMap<u64, ServiceName>>;

/// The name of a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceName {
    /// `namespace/name`.
    pub service: String,
    /// `namespace/name:port`, with the port's name, or `namespace/name` if it has none.
    pub port: String,
}

/// The names of all service ports in `tables`.
pub fn service_names(tables: &Tables) -> ServiceNames {
    let mut names = HashMap::new();
    for (_, frontend) in tables.frontends.iter() {
        let port = &frontend.service;
        names.entry(port.stable_id).or_insert_with(|| {
            let service = format!("{}/{}", port.namespace, port.name);
            let port = match port.port_name.as_str() {
                "" => service.clone(),
                name => format!("{service}:{name}"),
            };
            ServiceName { service, port }
        });
    }
    Arc::new(names)
}

/// Name of a protocol in rows and filters; its number if it has none.
pub fn protocol_name(number: u8) -> String {
    match number {
        protocol::ICMP => "icmp".into(),
        protocol::TCP => "tcp".into(),
        protocol::UDP => "udp".into(),
        protocol::ICMPV6 => "icmpv6".into(),
        protocol::SCTP => "sctp".into(),
        other => other.to_string(),
    }
}

/// The two ends of a flow that its original tuple does not name: the endpoint, and the client as the endpoint sees it.
fn far_side(flow: &FlowSnapshot) -> ((Addr, u16), (Addr, u16)) {
    match flow.reply {
        Some(reply) => ((reply.src, reply.src_port), (reply.dst, reply.dst_port)),
        None => ((flow.endpoint_addr, flow.endpoint_port), (flow.original.src, flow.original.src_port)),
    }
}

/// Name of the state of a flow; entries without a reply direction are those of session affinity.
fn state_name(flow: &FlowSnapshot) -> &'static str {
    if flow.reply.is_none() { "affinity" } else { Phase::name(flow.phase) }
}

/// `address:port`, with brackets around an IPv6 address.
pub fn address_port((addr, port): (Addr, u16)) -> String {
    match IpAddr::from(addr) {
        IpAddr::V4(v4) => format!("{v4}:{port}"),
        IpAddr::V6(v6) => format!("[{v6}]:{port}"),
    }
}

/// A flow as a row. `now_s`: CLOCK_MONOTONIC.
pub fn row(flow: &FlowSnapshot, names: &ServiceNames, now_s: u32) -> FlowRow {
    let original: Tuple = flow.original;
    let client = (original.src, original.src_port);
    let (endpoint, seen_as) = far_side(flow);
    FlowRow {
        protocol: protocol_name(original.protocol),
        client: address_port(client),
        frontend: address_port((original.dst, original.dst_port)),
        endpoint: address_port(endpoint),
        masqueraded_as: (seen_as != client).then(|| address_port(seen_as)),
        state: state_name(flow).to_owned(),
        service: names.get(&flow.service).map(|name| name.port.clone()),
        age_s: now_s.saturating_sub(flow.created_s),
        idle_s: now_s.saturating_sub(flow.last_seen_s),
        timeout_s: flow.timeout_s,
        generation: flow.generation.into(),
    }
}

/// An address, a prefix, or an address with a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Side {
    net: IpNet,
    port: Option<u16>,
}

impl Side {
    fn parse(text: &str) -> Option<Side> {
        if let Ok(net) = text.parse::<IpNet>() {
            return Some(Side { net: net.trunc(), port: None });
        }
        if let Ok(addr) = text.parse::<IpAddr>() {
            return Some(Side { net: addr.into(), port: None });
        }
        let with_port: std::net::SocketAddr = text.parse().ok()?;
        Some(Side { net: with_port.ip().into(), port: Some(with_port.port()) })
    }

    fn matches(&self, (addr, port): (Addr, u16)) -> bool {
        self.net.contains(&IpAddr::from(addr)) && self.port.is_none_or(|wanted| wanted == port)
    }
}

/// A [`FlowFilter`] that has been read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    protocol: Option<String>,
    client: Option<Side>,
    frontend: Option<Side>,
    endpoint: Option<Side>,
    service: Option<String>,
    state: Option<String>,
}

impl Filter {
    /// Reads the fields.
    ///
    /// # Errors
    /// Names the field that is neither an address nor a prefix nor `address:port`, or a service without a namespace.
    pub fn parse(filter: &FlowFilter) -> Result<Filter, Fault> {
        let side = |field: &str, text: &Option<String>| match text {
            None => Ok(None),
            Some(text) => Side::parse(text).map(Some).ok_or_else(|| {
                Fault::new(Code::Invalid, "neither an address, nor a prefix, nor address:port")
                    .field(field)
                    .value(text)
                    .remedy("write 10.244.1.7, 10.244.0.0/16, 10.244.1.7:80 or [fd00::1]:80")
            }),
        };
        if let Some(service) = filter.service.as_ref().filter(|service| !service.contains('/')) {
            let fault = Fault::new(Code::Invalid, "a Service is named with its namespace").field("service");
            return Err(fault.value(service).remedy(format!("write default/{service}")));
        }
        Ok(Filter {
            protocol: filter.protocol.as_ref().map(|name| name.to_lowercase()),
            client: side("client", &filter.client)?,
            frontend: side("frontend", &filter.frontend)?,
            endpoint: side("endpoint", &filter.endpoint)?,
            service: filter.service.clone(),
            state: filter.state.clone(),
        })
    }

    /// True if everything that the filter names holds.
    pub fn matches(&self, flow: &FlowSnapshot, names: &ServiceNames) -> bool {
        let original = &flow.original;
        let (endpoint, _) = far_side(flow);
        self.protocol.as_ref().is_none_or(|name| *name == protocol_name(original.protocol))
            && self.client.is_none_or(|side| side.matches((original.src, original.src_port)))
            && self.frontend.is_none_or(|side| side.matches((original.dst, original.dst_port)))
            && self.endpoint.is_none_or(|side| side.matches(endpoint))
            && self.state.as_ref().is_none_or(|state| state == state_name(flow))
            && self.service.as_ref().is_none_or(|wanted| {
                names.get(&flow.service).is_some_and(|name| name.service == *wanted || name.port == *wanted)
            })
    }
}

/// A walk over the whole flow table with a filter.
pub struct Walk {
    flows: Arc<FlowMap>,
    names: ServiceNames,
    filter: Filter,
    cursor: u32,
}

impl Walk {
    /// From the first record.
    pub fn new(flows: Arc<FlowMap>, names: ServiceNames, filter: Filter) -> Walk {
        Walk { flows, names, filter, cursor: 0 }
    }

    /// Calls `found` with the matching flows among the next records. Returns false when there are no more.
    fn step(&mut self, mut found: impl FnMut(&FlowSnapshot)) -> bool {
        let capacity = self.flows.capacity() as u32;
        let end = self.cursor.saturating_add(STEP).min(capacity);
        for index in self.cursor..end {
            if let Some(flow) = self.flows.snapshot(index)
                && self.filter.matches(&flow, &self.names)
            {
                found(&flow);
            }
        }
        self.cursor = end;
        end < capacity
    }

    /// Every matching flow as a row, at most `limit` of them, and how many there were.
    pub fn rows(mut self, limit: u64, now_s: u32) -> impl Iterator<Item = Option<Reply>> + Send {
        let mut ready = std::collections::VecDeque::new();
        let (mut more, mut count, mut ended) = (true, 0, false);
        std::iter::from_fn(move || {
            if let Some(row) = ready.pop_front().filter(|_| count < limit) {
                count += 1;
                return Some(Some(Reply::Item(Item::Flow(row))));
            }
            if more && count < limit {
                let names = self.names.clone();
                more = self.step(|flow| ready.push_back(row(flow, &names, now_s)));
                return Some(None);
            }
            (!std::mem::replace(&mut ended, true)).then_some(Some(Reply::End { count }))
        })
    }

    /// How many flows match.
    pub fn count(self) -> impl Iterator<Item = Option<Reply>> + Send {
        self.tally(|_, _| true)
    }

    /// Takes every matching flow out of use, and says how many.
    pub fn flush(self) -> impl Iterator<Item = Option<Reply>> + Send {
        self.tally(|flows, flow| flows.remove_from_control(flow.id))
    }

    fn tally(
        mut self,
        counts: impl Fn(&FlowMap, &FlowSnapshot) -> bool + Send,
    ) -> impl Iterator<Item = Option<Reply>> + Send {
        let (mut more, mut count, mut ended) = (true, 0, false);
        std::iter::from_fn(move || {
            if more {
                let flows = self.flows.clone();
                more = self.step(|flow| count += u64::from(counts(&flows, flow)));
                return Some(None);
            }
            (!std::mem::replace(&mut ended, true)).then_some(Some(Reply::FlowCount { count }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::flow_map::{FlowMapConfig, NewFlow};

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    /// 3,000 TCP flows of clients 198.51.100.1:1000.. and one UDP flow of IPv6 that is masqueraded.
    fn filled() -> (Arc<FlowMap>, ServiceNames) {
        let map = FlowMap::anonymous(FlowMapConfig { capacity: 8192, ..FlowMapConfig::default() });
        let mut worker = map.worker(0);
        for i in 0..3000u16 {
            let original = Tuple {
                src: addr("198.51.100.1"),
                dst: addr("203.0.113.10"),
                src_port: 1000 + i,
                dst_port: 80,
                protocol: protocol::TCP,
            };
            let mut reply = original.reversed();
            (reply.src, reply.src_port) = (addr(if i % 3 == 0 { "10.244.1.7" } else { "10.244.2.7" }), 8080);
            map.insert(&mut worker, &flow(original, reply, 7, 1), 100).unwrap();
        }
        let original = Tuple {
            src: addr("2001:db8::1"),
            dst: addr("fd00:96::a"),
            src_port: 53,
            dst_port: 53,
            protocol: protocol::UDP,
        };
        let reply = Tuple {
            src: addr("fd00:244::5"),
            dst: addr("fd00::1"),
            src_port: 5353,
            dst_port: 61000,
            protocol: protocol::UDP,
        };
        map.insert(&mut worker, &flow(original, reply, 8, 1), 100).unwrap();
        let name = |service: &str, port: &str| ServiceName { service: service.into(), port: port.into() };
        let names = HashMap::from([
            (7, name("default/web", "default/web:http")),
            (8, name("kube-system/dns", "kube-system/dns")),
        ]);
        (Arc::new(map), Arc::new(names))
    }

    fn flow(original: Tuple, reply: Tuple, service: u64, phase: u8) -> NewFlow {
        NewFlow {
            original,
            reply: Some(reply),
            phase,
            timeout_s: 0,
            service,
            endpoint_addr: reply.src,
            endpoint_port: reply.src_port,
            generation: 4,
            flags: 0,
            tally: 0,
        }
    }

    fn walk(filter: FlowFilter) -> Walk {
        let (map, names) = filled();
        Walk::new(map, names, Filter::parse(&filter).unwrap())
    }

    fn count(filter: FlowFilter) -> u64 {
        match walk(filter).count().flatten().last() {
            Some(Reply::FlowCount { count }) => count,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn filters_by_every_field() {
        let some = |text: &str| Some(text.to_owned());
        let none = FlowFilter::default();
        let cases = [
            (none.clone(), 3001),
            (FlowFilter { protocol: some("udp"), ..none.clone() }, 1),
            (FlowFilter { protocol: some("TCP"), ..none.clone() }, 3000),
            (FlowFilter { client: some("198.51.100.0/24"), ..none.clone() }, 3000),
            (FlowFilter { client: some("198.51.100.1:1005"), ..none.clone() }, 1),
            (FlowFilter { frontend: some("203.0.113.10:81"), ..none.clone() }, 0),
            (FlowFilter { frontend: some("[fd00:96::a]:53"), ..none.clone() }, 1),
            (FlowFilter { endpoint: some("10.244.1.7"), ..none.clone() }, 1000),
            (FlowFilter { endpoint: some("10.244.1.7:8081"), ..none.clone() }, 0),
            (FlowFilter { service: some("default/web"), ..none.clone() }, 3000),
            (FlowFilter { service: some("default/web:http"), ..none.clone() }, 3000),
            (FlowFilter { service: some("default/we"), ..none.clone() }, 0),
            (FlowFilter { state: some("established"), ..none.clone() }, 3001),
            (FlowFilter { state: some("opening"), ..none.clone() }, 0),
            (FlowFilter { endpoint: some("10.244.1.7"), client: some("10.0.0.0/8"), ..none }, 0),
        ];
        for (filter, expected) in cases {
            assert_eq!(count(filter.clone()), expected, "{filter:?}");
        }
    }

    #[test]
    fn a_wrong_filter_names_the_field() {
        let some = |text: &str| Some(text.to_owned());
        for (field, filter) in [
            ("client", FlowFilter { client: some("10.0.0.300"), ..Default::default() }),
            ("endpoint", FlowFilter { endpoint: some(""), ..Default::default() }),
            ("service", FlowFilter { service: some("web"), ..Default::default() }),
        ] {
            let fault = Filter::parse(&filter).unwrap_err();
            assert_eq!(fault.field.as_deref(), Some(field));
            assert!(fault.remedy.is_some());
        }
    }

    #[test]
    fn rows_say_who_speaks_to_whom() {
        let filter = FlowFilter { protocol: Some("udp".into()), ..Default::default() };
        let replies: Vec<_> = walk(filter).rows(u64::MAX, 130).flatten().collect();
        let [Reply::Item(Item::Flow(row)), Reply::End { count: 1 }] = &replies[..] else {
            panic!("{replies:?}")
        };
        assert_eq!(row.client, "[2001:db8::1]:53");
        assert_eq!(row.frontend, "[fd00:96::a]:53");
        assert_eq!(row.endpoint, "[fd00:244::5]:5353");
        assert_eq!(row.masqueraded_as.as_deref(), Some("[fd00::1]:61000"));
        assert_eq!(row.service.as_deref(), Some("kube-system/dns"));
        assert_eq!((row.age_s, row.idle_s, row.timeout_s, row.generation), (30, 30, 240, 4));
    }

    #[test]
    fn a_limit_ends_the_walk() {
        let replies: Vec<_> = walk(FlowFilter::default()).rows(10, 100).flatten().collect();
        assert_eq!(replies.len(), 11);
        assert_eq!(replies.last(), Some(&Reply::End { count: 10 }));
    }

    #[test]
    fn flushing_removes_what_matches_and_nothing_else() {
        let (map, names) = filled();
        let filter = FlowFilter { endpoint: Some("10.244.1.7".into()), ..Default::default() };
        let filter = Filter::parse(&filter).unwrap();
        let flushed = Walk::new(map.clone(), names, filter).flush().flatten().last();
        assert_eq!(flushed, Some(Reply::FlowCount { count: 1000 }));
        assert_eq!(map.len(), 2001);
    }
}
