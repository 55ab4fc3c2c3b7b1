use std::collections::BTreeMap;

use proptest::prelude::*;

use super::fixture::{Cluster, gateway};
use super::*;
use config::gateway::{Algorithm, SourceChecks};

use super::lifetime::Removal;
use crate::addr::{Tuple, protocol};
use crate::control::state::Accepted;
use crate::table::flow_map::{FlowMapConfig, FlowSnapshot, NewFlow};
use crate::tables::{Action, Frontend, FrontendKey, FrontendKind, Origin};

const HEAD: &str = "[gateway]
name = 'gw'
cluster_cidrs = ['10.244.0.0/16']
service_cidrs = ['10.96.0.0/16', 'fd00:96::/112']
return = 'routed'";

const WEB: &str = "
kind: Service
metadata: {name: web, namespace: shop, resourceVersion: '77'}
spec:
  type: LoadBalancer
  clusterIPs: [10.96.0.1, 'fd00:96::1']
  externalTrafficPolicy: Local
  sessionAffinity: ClientIP
  loadBalancerSourceRanges: [198.51.100.0/24]
  ports:
  - {name: http, port: 80, nodePort: 30080}
  - {name: dns, port: 53, protocol: UDP}
status: {loadBalancer: {ingress: [{ip: 203.0.113.10}, {ip: '2001:db8::10'}]}}
---
kind: EndpointSlice
metadata: {name: web-4, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
endpoints:
- {addresses: [10.244.1.1], nodeName: n1, targetRef: {kind: Pod, name: web-a, namespace: shop}}
- {addresses: [10.244.2.1], nodeName: n2}
- {addresses: [10.244.2.2], nodeName: n2, conditions: {ready: false, serving: true, terminating: true}}
- {addresses: [10.244.2.3], nodeName: n2, conditions: {ready: false, serving: false}}
---
kind: Node
metadata: {name: gw}
status: {addresses: [{type: InternalIP, address: 192.168.0.9}]}
";

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn key(text: &str, port: u16, protocol: u8) -> FrontendKey {
    FrontendKey { addr: addr(text), port, protocol }
}

/// `dnat 10.244.1.1:8080,10.244.2.1:8080 masquerade`, `reject no_endpoints`, `drop frontend_off`.
fn show(action: &Action) -> String {
    match action {
        Action::Reject(reason) => format!("reject {}", reason.name()),
        Action::Drop(reason) => format!("drop {}", reason.name()),
        Action::Dnat { backends, masquerade, list } => {
            let endpoints: Vec<_> =
                backends.endpoints.iter().map(|e| format!("{}:{}", e.addr, e.port)).collect();
            let masquerade = if *masquerade { " masquerade" } else { "" };
            format!("{} {}{masquerade}", describe::list_name(*list), endpoints.join(","))
        }
    }
}

fn frontend(compiler: &Compiler, key: FrontendKey) -> &Arc<Frontend> {
    compiler.tables().frontends.get(&key).unwrap_or_else(|| panic!("{key:?}"))
}

/// Everything in the tables, in an order, as text: two tables are the same if this is.
fn dump(tables: &Tables) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for (key, frontend) in tables.frontends.iter() {
        let text = format!(
            "{}/{} {} {:?} {:?}: {} | {} | {} {:?}",
            frontend.service.namespace,
            frontend.service.name,
            frontend.service.port_name,
            frontend.service.affinity_timeout_s,
            frontend.kind,
            show(&frontend.from_outside),
            show(&frontend.from_pod),
            show(&frontend.from_node),
            frontend.source_ranges,
        );
        all.insert(format!("{key:?}"), text);
    }
    for (endpoint, vip) in tables.sole_vips.iter() {
        all.insert(format!("{endpoint:?}"), format!("sole {vip:?}"));
    }
    for (addr, vip) in tables.vips.iter() {
        all.insert(format!("vip {addr}"), format!("{vip:?}"));
    }
    all
}

/// Rules 4.3, 11.1, 14.1.
#[test]
fn a_load_balancer_of_two_families() {
    let cluster = Cluster::new(HEAD, WEB);
    let compiler = cluster.compiler(&[]);
    let (ready, http) = ("10.244.1.1:8080,10.244.2.1:8080", protocol::TCP);
    for (at, kind, outside, pod, node) in [
        (
            key("10.96.0.1", 80, http),
            FrontendKind::ClusterIp,
            format!("cluster {ready} masquerade"),
            format!("cluster {ready}"),
            format!("cluster {ready} masquerade"),
        ),
        (
            key("203.0.113.10", 80, http),
            FrontendKind::LoadBalancer,
            format!("local {ready}"),
            format!("cluster {ready}"),
            format!("cluster {ready} masquerade"),
        ),
        (
            key("192.168.0.9", 30080, http),
            FrontendKind::NodePort,
            format!("local {ready}"),
            format!("cluster {ready}"),
            format!("cluster {ready} masquerade"),
        ),
        (
            // The second family has no endpoints: rejected, from everywhere.
            key("2001:db8::10", 80, http),
            FrontendKind::LoadBalancer,
            "reject no_endpoints".into(),
            "reject no_endpoints".into(),
            "reject no_endpoints".into(),
        ),
    ] {
        let got = frontend(&compiler, at);
        assert_eq!(got.kind, kind);
        assert_eq!(show(got.action(Origin::Outside)), outside, "{at:?}");
        assert_eq!(show(got.action(Origin::Pod)), pod, "{at:?}");
        assert_eq!(show(got.action(Origin::Node)), node, "{at:?}");
        assert_eq!(got.service.affinity_timeout_s, Some(10_800));
        assert_eq!((got.service.port_name.as_str(), got.service.resource_version.as_str()), ("http", "77"));
    }
    // Two ports on four addresses, and one NodePort on the one address of our Node, of one family.
    assert_eq!(compiler.tables().frontends.len(), 9);
    let dns = frontend(&compiler, key("203.0.113.10", 53, protocol::UDP));
    assert_eq!(show(&dns.from_pod), "cluster 10.244.1.1:5353,10.244.2.1:5353");
    // The address of a NodePort is the gateway's: it is no VIP.
    assert_eq!(compiler.tables().vips.len(), 4);
    assert_eq!(compiler.tables().vips.get(&addr("10.96.0.1")), Some(&Vip { frontends: 2, cluster_ip: true }));
    assert_eq!(
        compiler.tables().vips.get(&addr("203.0.113.10")),
        Some(&Vip { frontends: 2, cluster_ip: false })
    );
}

#[test]
fn endpoints_are_named_for_traces() {
    let cluster = Cluster::new(HEAD, WEB);
    let compiler = cluster.compiler(&[]);
    let Action::Dnat { backends, .. } = &frontend(&compiler, key("10.96.0.1", 80, protocol::TCP)).from_pod
    else {
        panic!("no dnat");
    };
    let names: Vec<_> = backends.endpoints.iter().map(|e| (&*e.name, &*e.node)).collect();
    assert_eq!(names, [("shop/web-a", "n1"), ("10.244.2.1", "n2")]);
}

/// Rules 6.2, 6.3, 6.4.
#[test]
fn source_checks_are_those_of_the_gateway_file() {
    assert_eq!(settings(&gateway(HEAD)).source_checks, SourceChecks::default());
    let file = format!("{HEAD}\n[source_checks]\nown_source = false");
    let expected = SourceChecks { own_source: false, ..SourceChecks::default() };
    assert_eq!(settings(&gateway(&file)).source_checks, expected);
}

#[test]
fn source_ranges_are_for_load_balancer_addresses_of_their_family() {
    let cluster = Cluster::new(HEAD, WEB);
    let compiler = cluster.compiler(&[]);
    let ranges = |text| -> Vec<String> {
        frontend(&compiler, key(text, 80, protocol::TCP))
            .source_ranges
            .iter()
            .map(ToString::to_string)
            .collect()
    };
    assert_eq!(ranges("203.0.113.10"), ["198.51.100.0/24"]);
    assert_eq!(ranges("2001:db8::10"), [""; 0]);
    assert_eq!(ranges("10.96.0.1"), [""; 0]);
    assert!(frontend(&compiler, key("192.168.0.9", 30080, protocol::TCP)).source_ranges.is_empty());
    // A range that holds one of our addresses lets the address itself in.
    let compiler = cluster.compiler(&["198.51.100.1"]);
    let got = frontend(&compiler, key("203.0.113.10", 80, protocol::TCP));
    assert_eq!(
        got.source_ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["198.51.100.0/24", "203.0.113.10/32"]
    );
}

/// Rules 6.5, 7.1.
#[test]
fn node_ports_are_on_chosen_addresses() {
    let web = WEB.replace("kind: Node\nmetadata: {name: gw}", "kind: Node\nmetadata: {name: other}");
    let on = |head: &str, yaml: &str, own: &[&str]| -> Vec<String> {
        let compiler = Cluster::new(head, yaml).compiler(own);
        let frontends = compiler.tables().frontends.iter().filter(|(_, f)| f.kind == FrontendKind::NodePort);
        let mut addresses: Vec<_> = frontends.map(|(key, _)| key.addr.to_string()).collect();
        addresses.sort();
        addresses
    };
    // Our Node's InternalIPs; without a Node the addresses of the ports; or what the file chooses among all own ones.
    assert_eq!(on(HEAD, WEB, &["192.0.2.1"]), ["192.168.0.9"]);
    assert_eq!(on(HEAD, &web, &["192.0.2.1", "fd00::1"]), ["192.0.2.1", "fd00::1"]);
    let head = HEAD.replace("name = 'gw'", "name = 'gw'\nnodeport_addresses = ['192.0.2.0/24']");
    assert_eq!(on(&head, WEB, &["192.0.2.1", "10.0.0.1"]), ["192.0.2.1"]);
}

/// Rule 11.1.
#[test]
fn a_family_without_cluster_ip_is_not_served() {
    let compiler =
        Cluster::new(HEAD, &WEB.replace("[10.96.0.1, 'fd00:96::1']", "[10.96.0.1]")).compiler(&["fd00::1"]);
    assert!(compiler.tables().frontends.get(&key("2001:db8::10", 80, protocol::TCP)).is_none());
    assert!(compiler.tables().frontends.get(&key("fd00::1", 30080, protocol::TCP)).is_none());
    assert!(compiler.tables().frontends.get(&key("203.0.113.10", 80, protocol::TCP)).is_some());
}

/// Rule 14.3.
#[test]
fn without_a_return_path_local_frontends_are_off() {
    let compiler = Cluster::new(&HEAD.replace("routed", "snat"), WEB).compiler(&[]);
    let got = frontend(&compiler, key("203.0.113.10", 80, protocol::TCP));
    assert_eq!(show(&got.from_outside), "drop frontend_off");
    assert_eq!(show(&got.from_node), "cluster 10.244.1.1:8080,10.244.2.1:8080 masquerade");
}

/// Rule 6.7.
#[test]
fn external_ips_need_a_range() {
    let yaml = WEB.replace("  externalTrafficPolicy: Local", "  externalIPs: [192.0.2.1]");
    assert!(Cluster::new(HEAD, &yaml).compiler(&[]).tables().vips.get(&addr("192.0.2.1")).is_none());
    let head = HEAD.replace("return", "external_ip_cidrs = ['192.0.2.0/24']\nreturn");
    let compiler = Cluster::new(&head, &yaml).compiler(&[]);
    let got = frontend(&compiler, key("192.0.2.1", 80, protocol::TCP));
    assert_eq!(got.kind, FrontendKind::ExternalIp);
    assert_eq!(show(&got.from_outside), "cluster 10.244.1.1:8080,10.244.2.1:8080 masquerade");
    assert!(got.source_ranges.is_empty());
}

/// Rules 3.6, 14.7.
#[test]
fn the_zone_is_the_gateways() {
    let hint = |zone: &str| format!("zone: {zone}, hints: {{forZones: [{{name: {zone}}}]}}");
    let yaml = WEB
        .replace("{addresses: [10.244.1.1], ", &format!("{{addresses: [10.244.1.1], {}, ", hint("a")))
        .replace("{addresses: [10.244.2.1], ", &format!("{{addresses: [10.244.2.1], {}, ", hint("b")));
    let pods = |head: &str, yaml: &str| {
        let compiler = Cluster::new(head, yaml).compiler(&[]);
        show(&frontend(&compiler, key("10.96.0.1", 80, protocol::TCP)).from_pod)
    };
    assert_eq!(pods(HEAD, &yaml), "cluster 10.244.1.1:8080,10.244.2.1:8080");
    assert_eq!(
        pods(&HEAD.replace("name = 'gw'", "name = 'gw'\nzone = 'a'"), &yaml),
        "cluster 10.244.1.1:8080"
    );
    let labelled = yaml
        .replace("metadata: {name: gw}", "metadata: {name: gw, labels: {topology.kubernetes.io/zone: b}}");
    assert_eq!(pods(HEAD, &labelled), "cluster 10.244.2.1:8080");
}

#[test]
fn ids_and_lists_stay_while_a_service_changes() {
    let mut cluster = Cluster::new(HEAD, WEB);
    let mut compiler = cluster.compiler(&[]);
    let at = key("10.96.0.1", 80, protocol::TCP);
    let before = frontend(&compiler, at).clone();
    let accepted = cluster.apply(&WEB.replace("resourceVersion: '77'", "resourceVersion: '78'"));
    compiler.compile(&cluster.state, &accepted.touched, 2);
    let after = frontend(&compiler, at).clone();
    assert_eq!((after.service.id, after.service.stable_id), (before.service.id, before.service.stable_id));
    assert_eq!(after.service.resource_version, "78");
    let backends = |frontend: &Frontend| match &frontend.from_pod {
        Action::Dnat { backends, .. } => backends.clone(),
        other => panic!("{other:?}"),
    };
    assert!(Arc::ptr_eq(&backends(&before), &backends(&after)), "an equal list is not built again");
    // The lists of pods and nodes are the same one.
    let Action::Dnat { backends: of_node, .. } = &after.from_node else { panic!("no dnat") };
    assert!(Arc::ptr_eq(&backends(&after), of_node));
}

fn backends(compiler: &Compiler, at: FrontendKey) -> Arc<crate::tables::Backends> {
    match &frontend(compiler, at).from_pod {
        Action::Dnat { backends, .. } => backends.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_algorithm_is_the_gateways_unless_the_service_says_otherwise() {
    let at = key("10.96.0.1", 80, protocol::TCP);
    let algorithm = |head: &str, annotation: &str| {
        let name = "metadata: {name: web, namespace: shop, resourceVersion: '77'";
        let yaml = WEB.replace(name, &format!("{name}, annotations: {{{annotation}}}"));
        let compiler = Cluster::new(head, &yaml).compiler(&[]);
        backends(&compiler, at).spread.algorithm()
    };
    let random = HEAD.replace("return", "lb_algorithm = 'random'\nreturn");
    assert_eq!(algorithm(HEAD, ""), Algorithm::Maglev);
    assert_eq!(algorithm(&random, ""), Algorithm::Random);
    assert_eq!(algorithm(&random, "towpath.dev/lb-algorithm: maglev"), Algorithm::Maglev);
    assert_eq!(algorithm(HEAD, "towpath.dev/lb-algorithm: least-connections"), Algorithm::LeastConnections);
    // A mistake does not make the Service unusable.
    assert_eq!(algorithm(&random, "towpath.dev/lb-algorithm: round-robin"), Algorithm::Random);
}

#[test]
fn a_new_algorithm_takes_the_same_endpoints() {
    let mut cluster = Cluster::new(HEAD, WEB);
    let mut compiler = cluster.compiler(&[]);
    let at = key("10.96.0.1", 80, protocol::TCP);
    let before = backends(&compiler, at);
    let name = "resourceVersion: '77'";
    let yaml = WEB.replace(name, &format!("{name}, annotations: {{towpath.dev/lb-algorithm: random}}"));
    let accepted = cluster.apply(&yaml);
    compiler.compile(&cluster.state, &accepted.touched, 2);
    let after = backends(&compiler, at);
    assert_eq!((after.spread.algorithm(), &after.endpoints), (Algorithm::Random, &before.endpoints));
    assert!(after.endpoints.iter().all(|endpoint| endpoint.tally > 0));
}

/// `10.244.1.1*1 10.244.2.1*3` of http on the ClusterIP.
fn weights(compiler: &Compiler) -> String {
    let backends = backends(compiler, key("10.96.0.1", 80, protocol::TCP));
    let shown: Vec<_> = backends.endpoints.iter().map(|e| format!("{}*{}", e.addr, e.weight)).collect();
    shown.join(" ")
}

const POD: &str = "kind: Pod\nmetadata: {name: web-a, namespace: shop}\nstatus: {podIP: 10.244.1.1}\n";

#[test]
fn weights_come_from_slices_and_pods_and_follow_them() {
    let mut cluster = Cluster::new(HEAD, &format!("{WEB}---\n{POD}"));
    let mut compiler = cluster.compiler(&[]);
    let mut step = |cluster: &mut Cluster, accepted: Accepted| {
        compiler.compile(&cluster.state, &accepted.touched, 2);
        assert_eq!(dump(compiler.tables()), dump(cluster.compiler(&[]).tables()));
        weights(&compiler)
    };
    let slice = WEB.split("---\n").nth(1).unwrap();
    let annotated = |yaml: &str, weight: &str| {
        yaml.replacen(
            "namespace: shop",
            &format!("namespace: shop, annotations: {{towpath.dev/weight: '{weight}'}}"),
            1,
        )
    };
    let accepted = cluster.apply(&annotated(slice, "3"));
    assert_eq!(step(&mut cluster, accepted), "10.244.1.1*3 10.244.2.1*3");
    let accepted = cluster.apply(&annotated(POD, "1000"));
    assert_eq!(step(&mut cluster, accepted), "10.244.1.1*1000 10.244.2.1*3");
    // 0: no new connections; the Maglev table does not even have it.
    let accepted = cluster.apply(&annotated(POD, "0"));
    assert_eq!(step(&mut cluster, accepted), "10.244.2.1*3");
    let accepted = cluster.apply(&annotated(POD, "1001"));
    assert!(accepted.warnings.iter().any(|fault| fault.to_string().contains("from 0 to 1000")));
    assert_eq!(step(&mut cluster, accepted), "10.244.1.1*3 10.244.2.1*3");
    let accepted = cluster.apply(&annotated(POD, "9"));
    assert_eq!(step(&mut cluster, accepted), "10.244.1.1*9 10.244.2.1*3");
    let accepted = cluster.delete(Kind::Pod, "shop", "web-a");
    assert_eq!(step(&mut cluster, accepted), "10.244.1.1*3 10.244.2.1*3");
    let accepted = cluster.apply(slice);
    assert_eq!(step(&mut cluster, accepted), "10.244.1.1*1 10.244.2.1*1");
}

#[test]
fn a_service_of_weight_0_is_rejected_and_says_so() {
    let slice = "name: web-4, namespace: shop";
    let yaml = WEB.replace(slice, &format!("{slice}, annotations: {{towpath.dev/weight: '0'}}"));
    let cluster = Cluster::new(HEAD, &yaml);
    let compiler = cluster.compiler(&[]);
    let got = frontend(&compiler, key("203.0.113.10", 80, protocol::TCP));
    for origin in [Origin::Outside, Origin::Pod, Origin::Node] {
        assert_eq!(show(got.action(origin)), "reject zero_weight");
    }
    // The endpoint still serves: its UDP flows stay.
    let described = compiler.describe_service(&cluster.state, "shop", "web").unwrap();
    let why = described.endpoints[0].unused.as_deref();
    assert_eq!(why, Some("weight 0: it keeps its connections and gets no new ones"));
    assert_eq!(described.frontends[0].from_pod.reason.as_deref(), Some("zero_weight"));
}

#[test]
fn a_description_gives_weights_shares_and_connections() {
    let yaml = format!(
        "{WEB}---\n{}",
        POD.replace("namespace: shop", "namespace: shop, annotations: {towpath.dev/weight: '3'}")
    );
    let cluster = Cluster::new(HEAD, &yaml);
    let compiler = cluster.compiler(&[]);
    let mut described = compiler.describe_service(&cluster.state, "shop", "web").unwrap();
    assert_eq!(described.lb_algorithm, "maglev");
    let flows = FlowMap::anonymous(FlowMapConfig { capacity: 8, tallies: 64, ..Default::default() });
    let tally = backends(&compiler, key("10.96.0.1", 80, protocol::TCP)).endpoints[0].tally;
    flows.insert(&mut flows.worker(0), &NewFlow { tally, ..NewFlow::default() }, 1).unwrap();
    compiler.count_connections(&mut described, &flows);
    let http: Vec<_> = described.endpoints.iter().filter(|e| e.endpoint.port_name == "http").collect();
    let shown: Vec<_> = http.iter().map(|e| (e.weight, &*e.shares_bp, e.connections)).collect();
    let none: &[u32] = &[];
    assert_eq!(
        shown,
        [
            (3, &[7_500, 7_500][..], Some(1)),
            (1, &[2_500, 2_500], Some(0)),
            (1, none, Some(0)),
            (1, none, Some(0))
        ]
    );
}

/// After a restart flows are counted for their endpoints again, those of an endpoint without new connections included.
#[test]
fn flows_that_were_found_again_are_counted() {
    let flows = FlowMap::anonymous(FlowMapConfig { capacity: 64, tallies: 64, ..Default::default() });
    let mut worker = flows.worker(0);
    for (client, endpoint) in [(1, "10.244.1.1"), (2, "10.244.1.1"), (3, "10.244.2.3"), (4, "10.244.9.9")] {
        let original =
            Tuple { src: Addr::v4(client), dst: addr("10.96.0.1"), src_port: 9, dst_port: 80, protocol: 6 };
        let reply = Tuple { src: addr(endpoint), src_port: 8080, ..original.reversed() };
        let new = NewFlow { original, reply: Some(reply), ..NewFlow::default() };
        flows.insert(&mut worker, &new, 1).unwrap();
    }
    let cluster = Cluster::new(HEAD, WEB);
    let compiler = cluster.compiler(&[]);
    compiler.count_flows(&flows);
    let mut described = compiler.describe_service(&cluster.state, "shop", "web").unwrap();
    compiler.count_connections(&mut described, &flows);
    let http = described.endpoints.iter().filter(|e| e.endpoint.port_name == "http");
    let counts: Vec<_> = http.map(|e| e.connections.unwrap()).collect();
    assert_eq!(counts, [2, 0, 0, 1]);
}

#[test]
fn what_a_change_touches_is_told() {
    let mut cluster = Cluster::new(HEAD, WEB);
    let mut compiler = cluster.compiler(&[]);
    let mut step = |cluster: &mut Cluster, yaml: &str| {
        let accepted = cluster.apply(yaml);
        let done = compiler.compile(&cluster.state, &accepted.touched, 2);
        (done.steering_changed, done.routes_changed)
    };
    let slice = WEB.split("---\n").nth(1).unwrap();
    assert_eq!(step(&mut cluster, &slice.replace("10.244.2.1", "10.244.2.9")), (false, false));
    assert_eq!(step(&mut cluster, &slice.replace("10.244.2.1", "172.16.0.1")), (true, false));
    let service = WEB.split("---\n").next().unwrap();
    assert_eq!(step(&mut cluster, &service.replace("'77'", "'79'")), (false, false));
    assert_eq!(step(&mut cluster, &service.replace("port: 53", "port: 54")), (true, false));
    let node = "kind: Node\nmetadata: {name: n1}\nspec: {podCIDRs: [10.50.0.0/24]}\n";
    assert_eq!(step(&mut cluster, node), (true, true));
    assert_eq!(
        step(&mut cluster, &node.replace("name: n1", "name: n1, annotations: {a: b}")),
        (false, false)
    );
}

/// A flow as the table has it.
fn flow(dst: &str, dst_port: u16, protocol: u8, endpoint: (&str, u16), service: u64) -> FlowSnapshot {
    let src = addr(if dst.contains(':') { "2001:db8:1::7" } else { "198.51.100.1" });
    let original = Tuple { src, dst: addr(dst), src_port: 4242, dst_port, protocol };
    let reply = Tuple { src: addr(endpoint.0), src_port: endpoint.1, ..original.reversed() };
    let map = FlowMap::anonymous(FlowMapConfig { capacity: 1, ..Default::default() });
    let new = NewFlow { original, reply: Some(reply), service, ..NewFlow::default() };
    map.insert(&mut map.worker(0), &new, 1).unwrap();
    map.snapshot(0).unwrap()
}

/// Rules 9.2, 9.3, 9.4. The cases of kubernetes pkg/proxy/conntrack/cleanup_test.go, and some more: every frontend of a Service, and
/// ports that are none; endpoints that serve, that do not, that are gone, that have another port now; each protocol.
#[test]
fn udp_flows_to_endpoints_that_do_not_serve_are_forgotten() {
    let yaml = "
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  externalIPs: [192.0.2.1]
  ports:
  - {name: tcp, port: 8000}
  - {name: udp, port: 8000, protocol: UDP, nodePort: 32000}
  - {name: sctp, port: 8000, protocol: SCTP, nodePort: 32000}
status: {loadBalancer: {ingress: [{ip: 203.0.113.10}]}}
---
kind: EndpointSlice
metadata: {name: web, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports:
- {name: tcp, port: 9090}
- {name: udp, port: 9090, protocol: UDP}
- {name: sctp, port: 9090, protocol: SCTP}
endpoints:
- {addresses: [10.244.0.4], conditions: {serving: true, ready: false, terminating: true}}
- {addresses: [10.244.1.5], conditions: {serving: false, ready: false}}
";
    let head = HEAD.replace("return", "external_ip_cidrs = ['192.0.2.0/24']\nreturn");
    let cluster = Cluster::new(&head, yaml);
    let mut compiler = Compiler::new(cluster.gateway.clone());
    compiler.set_own_addresses(vec![addr("198.51.100.9")]);
    let cleanup = compiler.compile_all(&cluster.state, 1).udp_cleanup;
    let port = |name: &str, protocol| crate::control::facts::PortFacts {
        name: name.into(),
        protocol,
        port: 8000,
        node_port: None,
    };
    let reference = ObjectRef { kind: Kind::Service, namespace: "shop".into(), name: "web".into() };
    let vips = ["10.96.0.1", "203.0.113.10", "192.0.2.1"];
    let mut cases = 0;
    for (name, protocol) in [("tcp", protocol::TCP), ("udp", protocol::UDP), ("sctp", protocol::SCTP)] {
        let service = service::stable_id(&reference, &port(name, protocol));
        for (endpoint, serves) in [
            (("10.244.0.4", 9090), true),
            (("10.244.0.4", 8080), false),
            (("10.244.1.5", 9090), false),
            (("10.244.2.6", 9090), false),
        ] {
            let is_stale =
                |dst, dst_port| cleanup.is_stale(&flow(dst, dst_port, protocol, endpoint, service));
            let expected = protocol == protocol::UDP && !serves;
            for vip in vips {
                assert_eq!(is_stale(vip, 8000), expected, "{name} {vip} {endpoint:?}");
                assert!(!is_stale(vip, 3000), "no port of the Service: {name} {vip} {endpoint:?}");
                cases += 2;
            }
            // A NodePort on the address that it has, and on one that it had.
            for own in ["198.51.100.9", "198.51.100.77"] {
                assert_eq!(is_stale(own, 32000), expected, "{name} {own} {endpoint:?}");
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 96);
    // Another Service that has the number of the NodePort as its port.
    assert!(!cleanup.is_stale(&flow("203.0.113.99", 32000, protocol::UDP, ("10.244.2.6", 9090), 5)));
}

/// Rule 9.3.
#[test]
fn what_a_change_does_not_touch_is_not_forgotten() {
    let mut cluster = Cluster::new(HEAD, WEB);
    let mut compiler = cluster.compiler(&[]);
    let slice = WEB.split("---\n").nth(1).unwrap();
    let mut step = |cluster: &mut Cluster, yaml: &str| {
        let accepted = cluster.apply(yaml);
        compiler.compile(&cluster.state, &accepted.touched, 2).udp_cleanup
    };
    let stale = flow("10.96.0.1", 53, protocol::UDP, ("10.244.1.1", 5353), 1);
    let cleanup = step(&mut cluster, &slice.replace("10.244.1.1", "10.244.1.7"));
    assert!(cleanup.is_stale(&stale), "gone");
    assert!(!cleanup.is_stale(&flow("10.96.0.1", 53, protocol::UDP, ("10.244.1.7", 5353), 1)), "new");
    // No serving endpoint: flows are left alone, since there is nothing better.
    let none: String =
        slice.lines().take_while(|line| !line.starts_with("endpoints")).map(|l| format!("{l}\n")).collect();
    let cleanup = step(&mut cluster, &format!("{none}endpoints: []\n"));
    assert!(!cleanup.is_stale(&stale) && cleanup.is_empty());
    // A change that touches another Service forgets nothing of this one.
    let cleanup = step(
        &mut cluster,
        "kind: Service\nmetadata: {name: x}\nspec: {clusterIP: 10.96.0.2, ports: [{port: 53, protocol: UDP}]}\n",
    );
    assert!(!cleanup.is_stale(&stale));
}

/// Rule 9.7.
#[test]
fn who_keeps_connections_is_told_by_annotations_and_gateway_file() {
    let removal = |head: &str, annotations: &str| {
        let name = "metadata: {name: web, namespace: shop, resourceVersion: '77'";
        let yaml = WEB.replace(name, &format!("{name}, annotations: {{{annotations}}}"));
        let cluster = Cluster::new(head, &yaml);
        let mut compiler = Compiler::new(cluster.gateway.clone());
        let lifetimes = compiler.compile_all(&cluster.state, 1).lifetimes;
        assert_eq!(lifetimes.len(), 2, "one for each port");
        let lifetime = lifetimes.iter().find_map(|(_, lifetime)| {
            lifetime.clone().filter(|lifetime| lifetime.staying.iter().any(|(_, port)| *port == 8080))
        });
        let lifetime = lifetime.unwrap();
        (lifetime.removal, lifetime.staying.iter().map(|(addr, _)| addr.to_string()).collect::<Vec<_>>())
    };
    let reset = HEAD.replace("return", "on_endpoint_removed = 'reset'\nreturn");
    let (on, drain) = ("towpath.dev/on-endpoint-removed", "towpath.dev/drain-seconds");
    for (head, annotations, expected) in [
        (HEAD, String::new(), Removal::Leave),
        (HEAD, format!("{on}: reset"), Removal::WhenGone),
        (HEAD, format!("{on}: reset, {drain}: '60'"), Removal::After(60)),
        (HEAD, format!("{drain}: '0'"), Removal::After(0)),
        (HEAD, format!("{on}: leave, {drain}: '60'"), Removal::Leave),
        (HEAD, format!("{on}: kill"), Removal::Leave),
        (&reset, String::new(), Removal::WhenGone),
        (&reset, format!("{on}: leave"), Removal::Leave),
        (&reset, format!("{drain}: soon"), Removal::WhenGone),
    ] {
        assert_eq!(removal(head, &annotations).0, expected, "{annotations}");
    }
    // Without a deadline whoever is in a slice stays; with one, whoever does not terminate. Readiness does not matter.
    let (_, staying) = removal(&reset, "");
    assert_eq!(staying, ["10.244.1.1", "10.244.2.1", "10.244.2.2", "10.244.2.3"]);
    let (_, staying) = removal(HEAD, &format!("{drain}: '60'"));
    assert_eq!(staying, ["10.244.1.1", "10.244.2.1", "10.244.2.3"]);
}

/// Rule 9.7.
#[test]
fn a_port_that_is_renamed_leaves_the_connections_to_its_endpoints_alone() {
    let web = WEB.replacen(
        "metadata: {name: web,",
        "metadata: {name: web, annotations: {towpath.dev/on-endpoint-removed: reset},",
        1,
    );
    let mut cluster = Cluster::new(HEAD, &web);
    let mut compiler = cluster.compiler(&[]);
    let ids =
        |compilation: &Compilation| compilation.lifetimes.iter().map(|(id, _)| *id).collect::<BTreeSet<_>>();
    let accepted = cluster.apply(&web.replace("nodePort: 30080", "nodePort: 30081"));
    let before = ids(&compiler.compile(&cluster.state, &accepted.touched, 2));
    let accepted = cluster.apply(&web.replace("name: http, port", "name: web, port"));
    let compilation = compiler.compile(&cluster.state, &accepted.touched, 3);
    assert_eq!(compilation.lifetimes.len(), 3);
    for (id, lifetime) in &compilation.lifetimes {
        let lifetime = lifetime.as_ref().expect("nothing is gone");
        assert!(
            lifetime.staying.contains(&(addr("10.244.1.1"), 8080)) || before.contains(id),
            "{lifetime:?}"
        );
    }
    // The Service goes: so do all of them, the one of the name before too.
    let accepted = cluster.delete(Kind::Service, "shop", "web");
    let compilation = compiler.compile(&cluster.state, &accepted.touched, 4);
    assert_eq!(compilation.lifetimes.iter().filter(|(_, lifetime)| lifetime.is_none()).count(), 3);
    assert!(ids(&compilation).is_superset(&before));
}

#[test]
fn a_port_that_is_gone_is_told() {
    let mut cluster = Cluster::new(HEAD, WEB);
    let mut compiler = cluster.compiler(&[]);
    let accepted = cluster.apply(&WEB.replace("name: dns, port: 53", "name: names, port: 53"));
    let lifetimes = compiler.compile(&cluster.state, &accepted.touched, 2).lifetimes;
    assert_eq!(lifetimes.iter().filter(|(_, lifetime)| lifetime.is_none()).count(), 1);
    assert_eq!(lifetimes.len(), 3);
    let accepted = cluster.delete(Kind::Service, "shop", "web");
    let lifetimes = compiler.compile(&cluster.state, &accepted.touched, 3).lifetimes;
    assert_eq!(lifetimes.iter().filter(|(_, lifetime)| lifetime.is_none()).count(), 2);
}

/// As of a DaemonSet with hostNetwork: the rest of the Service is served.
#[test]
fn an_endpoint_on_the_gateway_itself_is_left_out_and_told() {
    let mut cluster = Cluster::new(HEAD, WEB);
    let accepted = cluster.apply(&WEB.replace("[10.244.1.1]", "[192.168.0.9]"));
    assert_eq!(accepted.warnings.len(), 0, "the tests' ports have no addresses: {:?}", accepted.warnings);
    let compiler = cluster.compiler(&[]);
    let frontend = compiler.tables().frontends.get(&key("10.96.0.1", 80, protocol::TCP)).unwrap();
    assert_eq!(show(&frontend.from_pod), "cluster 10.244.2.1:8080");
    let description = compiler.describe_service(&cluster.state, "shop", "web").unwrap();
    let own = description.endpoints.iter().find(|it| it.endpoint.address == "192.168.0.9").unwrap();
    assert_eq!(own.unused.as_deref(), Some("an address of this gateway: never used"));
}

#[test]
fn packets_are_masqueraded_to_ports_in_the_families_that_have_no_address_given() {
    let head = HEAD.to_owned()
        + "\n[snat]\naddresses = ['203.0.114.1']\n[[egress]]\naddresses = ['203.0.114.2', '2001:db8:9::9']\n";
    let cluster = Cluster::new(&head, WEB);
    let set = cluster.compiler(&["192.0.2.1", "2001:db8:9::1"]).steer_set(&cluster.state, &[]);
    let masqueraded: Vec<_> =
        set.local.iter().filter(|(_, local)| local.masquerade_ports.is_some()).collect();
    let shown: Vec<_> = masqueraded.iter().map(|(ip, _)| ip.to_string()).collect();
    assert_eq!(shown, ["203.0.114.1", "203.0.114.2", "2001:db8:9::1", "2001:db8:9::9"]);
}

#[test]
fn what_the_steering_program_must_catch() {
    let yaml = format!(
        "{WEB}---
kind: Node
metadata: {{name: n1}}
spec: {{podCIDRs: [10.50.0.0/24]}}
status: {{addresses: [{{type: InternalIP, address: 192.168.0.1}}]}}
---
kind: EndpointSlice
metadata: {{name: far, labels: {{kubernetes.io/service-name: other}}}}
addressType: IPv4
endpoints: [{{addresses: [172.16.0.1]}}, {{addresses: [10.50.0.1]}}]
---
kind: Pod
metadata: {{name: far}}
status: {{podIP: 172.16.0.2}}
"
    );
    let cluster = Cluster::new(HEAD, &yaml);
    let set = cluster.compiler(&["192.0.2.1"]).steer_set(&cluster.state, &[addr("10.9.9.9")]);
    let vips: Vec<_> = set.vips.iter().map(ToString::to_string).collect();
    assert_eq!(vips, ["10.96.0.1", "203.0.113.10", "2001:db8::10", "fd00:96::1"]);
    let local: Vec<_> =
        set.local.iter().map(|(ip, local)| (ip.to_string(), local.masquerade_ports)).collect();
    let masquerade = Some((61000, 65535));
    assert_eq!(
        local,
        [("10.9.9.9".into(), None), ("192.0.2.1".into(), masquerade), ("192.168.0.9".into(), None)]
    );
    let ports: Vec<_> =
        set.local_ports.iter().map(|p| format!("{} {} {}", p.addr, p.protocol, p.port)).collect();
    assert_eq!(ports, ["192.168.0.9 6 30080"]);
    let prefixes: Vec<_> = set
        .prefixes
        .iter()
        .map(|(net, usage)| {
            let mark = |is: bool, mark| if is { mark } else { "" };
            format!(
                "{net} {}{}{}",
                mark(usage.destination, "d"),
                mark(usage.source, "s"),
                mark(usage.service, "S")
            )
        })
        .collect();
    assert_eq!(
        prefixes,
        [
            "10.50.0.0/24 ds",
            "10.96.0.0/16 S",
            "10.244.0.0/16 ds",
            "172.16.0.1/32 s",
            "172.16.0.2/32 ds",
            "fd00:96::/112 S"
        ]
    );
}

#[test]
fn the_overlay_is_caught_at_own_addresses_once_a_node_has_one() {
    let node = |overlay: &str| {
        format!(
            "kind: Node\nmetadata: {{name: n1, annotations: {{towpath.dev/overlay: {overlay}, towpath.dev/vxlan-mac: '02:00:00:00:00:01'}}}}\n\
             spec: {{podCIDRs: [10.50.0.0/24]}}\nstatus: {{addresses: [{{type: InternalIP, address: 192.168.0.1}}]}}\n"
        )
    };
    for (overlay, addresses, expected) in [
        ("native", "", &[][..]),
        ("vxlan", "", &["192.0.2.1 17 4789", "fd00:2::1 17 4789"]),
        ("vxlan", "addresses = ['192.0.2.9']", &["192.0.2.9 17 4789"]),
    ] {
        let cluster = Cluster::new(&format!("{HEAD}\n[overlay]\n{addresses}"), &node(overlay));
        let set = cluster.compiler(&["192.0.2.1", "fd00:2::1"]).steer_set(&cluster.state, &[]);
        let ports: Vec<_> =
            set.local_ports.iter().map(|p| format!("{} {} {}", p.addr, p.protocol, p.port)).collect();
        assert_eq!(ports, expected);
        assert!(set.local_ports.iter().all(|port| set.local.contains_key(&port.addr)));
    }
}

#[test]
fn a_description_says_why() {
    let cluster = Cluster::new(HEAD, WEB);
    let described = cluster.compiler(&[]).describe_service(&cluster.state, "shop", "web").unwrap();
    assert_eq!(described.service.ports, ["80:30080/TCP", "53/UDP"]);
    assert_eq!((described.service.endpoints, described.service.endpoints_ready), (4, 2));
    assert_eq!(described.external_traffic_policy, "Local");
    assert_eq!(described.session_affinity, "ClientIP (10800 s)");
    assert_eq!(described.frontends.len(), 9);
    let vip = described.frontends.iter().find(|f| f.address == "203.0.113.10" && f.port == 80).unwrap();
    assert_eq!((vip.kind.as_str(), vip.from_outside.list.as_deref()), ("LoadBalancer", Some("local")));
    assert!(vip.from_outside.rule.contains("straight to a node"), "{}", vip.from_outside.rule);
    let http: Vec<_> = described.endpoints.iter().filter(|e| e.endpoint.port_name == "http").collect();
    assert_eq!(http[0].lists, ["cluster", "local (every node)"]);
    assert_eq!(http[0].endpoint.target, "Pod/web-a");
    assert_eq!(http[2].unused.as_deref(), Some("terminating: used only while no endpoint is ready"));
    assert_eq!(http[3].unused.as_deref(), Some("not ready"));
    assert_eq!(described.warnings, []);
    assert!(cluster.compiler(&[]).describe_service(&cluster.state, "shop", "nothing").is_none());
}

#[test]
fn a_description_of_what_is_off_or_unused() {
    let describe = |head: &str, yaml: &str| {
        let cluster = Cluster::new(head, yaml);
        cluster.compiler(&[]).describe_service(&cluster.state, "shop", "web").unwrap()
    };
    let off = describe(&HEAD.replace("routed", "snat"), WEB);
    assert!(
        off.warnings.iter().any(|fault| fault.message.contains("return = \"routed\"")),
        "{:?}",
        off.warnings
    );
    assert_eq!((off.service.frontends, off.service.frontends_off), (6, 3));
    let internal = WEB
        .replace("type: LoadBalancer", "type: ClusterIP\n  internalTrafficPolicy: Local")
        .replace("status: {loadBalancer: {ingress: [{ip: 203.0.113.10}, {ip: '2001:db8::10'}]}}", "");
    let internal = describe(HEAD, &internal);
    assert_eq!(
        internal.endpoints[0].unused.as_deref(),
        Some("ready, but on node n1, not on the gateway's own node gw")
    );
    assert_eq!(internal.frontends[0].from_pod.reason.as_deref(), Some("no_local_endpoints"));
    let renamed = describe(HEAD, &WEB.replace("{name: http, port: 8080}", "{name: web, port: 8080}"));
    assert_eq!(renamed.endpoints[0].unused.as_deref(), Some("the Service has no TCP port named \"web\""));
    let headless = describe(HEAD, &WEB.replace("clusterIPs: [10.96.0.1, 'fd00:96::1']", "clusterIP: None"));
    assert!(headless.skipped.unwrap().contains("headless"));
}

#[test]
fn objects_become_rows() {
    let cluster = Cluster::new(HEAD, &format!("{WEB}---\nkind: Pod\nmetadata: {{name: a}}\n"));
    let compiler = cluster.compiler(&[]);
    let count = |kind| {
        let entries = cluster.state.of_kind(kind);
        entries.map(|entry| compiler.rows(&cluster.state, entry).len()).sum::<usize>()
    };
    use config::control::Kind;
    assert_eq!(count(Kind::Service), 1);
    assert_eq!(count(Kind::EndpointSlice), 8, "one for each endpoint and port");
    assert_eq!(count(Kind::Pod), 1);
    assert_eq!(count(Kind::Node), cluster.state.nodes().count());
}

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    Service { name: u8, ip: u8, local: bool, port: u8 },
    Slice { name: u8, service: u8, endpoints: Vec<(u8, u8)> },
    Node { name: u8, excluded: bool, zone: u8 },
    DeleteService(u8),
    DeleteSlice(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4_u8, 0..5_u8, any::<bool>(), 0..2_u8).prop_map(|(name, ip, local, port)| Step::Service {
            name,
            ip,
            local,
            port
        }),
        (0..5_u8, 0..4_u8, prop::collection::vec((0..6_u8, 0..4_u8), 0..4))
            .prop_map(|(name, service, endpoints)| Step::Slice { name, service, endpoints }),
        (0..3_u8, any::<bool>(), 0..2_u8).prop_map(|(name, excluded, zone)| Step::Node {
            name,
            excluded,
            zone
        }),
        (0..4_u8).prop_map(Step::DeleteService),
        (0..5_u8).prop_map(Step::DeleteSlice),
    ]
}

impl Step {
    fn yaml(&self) -> Option<String> {
        Some(match self {
            Step::Service { name, ip, local, port } => format!(
                "kind: Service\nmetadata: {{name: s{name}}}\nspec: {{type: LoadBalancer, clusterIP: 10.96.0.{}, externalTrafficPolicy: {}, \
                 ports: [{{port: {}, nodePort: {}}}]}}\nstatus: {{loadBalancer: {{ingress: [{{ip: 203.0.113.{ip}}}]}}}}\n",
                10 + ip,
                if *local { "Local" } else { "Cluster" },
                80 + port,
                30000 + u32::from(*ip),
            ),
            Step::Slice { name, service, endpoints } => {
                let endpoints: Vec<_> = endpoints
                    .iter()
                    .map(|(host, state)| {
                        let (ready, terminating) = (*state < 2, *state == 3);
                        format!(
                            "{{addresses: [10.244.0.{}], nodeName: n{}, hints: {{forZones: [{{name: z{}}}]}}, conditions: {{ready: {ready}, terminating: {terminating}}}}}",
                            1 + host,
                            host % 3,
                            host % 2
                        )
                    })
                    .collect();
                format!(
                    "kind: EndpointSlice\nmetadata: {{name: e{name}, labels: {{kubernetes.io/service-name: s{service}}}}}\naddressType: IPv4\n\
                     ports: [{{port: 8080}}]\nendpoints: [{}]\n",
                    endpoints.join(", ")
                )
            }
            Step::Node { name, excluded, zone } => {
                let (node, exclude) = (
                    if *name == 0 { "gw".to_owned() } else { format!("n{name}") },
                    if *excluded {
                        ", node.kubernetes.io/exclude-from-external-load-balancers: ''"
                    } else {
                        ""
                    },
                );
                format!(
                    "kind: Node\nmetadata: {{name: {node}, labels: {{topology.kubernetes.io/zone: z{zone}{exclude}}}}}\n\
                     status: {{addresses: [{{type: InternalIP, address: 192.168.{zone}.{}}}]}}\n",
                    1 + name
                )
            }
            Step::DeleteService(_) | Step::DeleteSlice(_) => return None,
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Tables that grew change by change are those of the whole state at once, and a refused change leaves no trace.
    #[test]
    fn incremental_and_whole_agree(steps in prop::collection::vec(step(), 1..24)) {
        let mut cluster = Cluster::new(HEAD, "");
        let mut compiler = Compiler::new(gateway(HEAD));
        compiler.compile_all(&cluster.state, 1);
        for (index, step) in steps.iter().enumerate() {
            let delete = |cluster: &mut Cluster, kind, name: String| {
                let reference = ObjectRef { kind, namespace: "default".into(), name: name.clone() };
                cluster.state.get(&reference).is_some().then(|| cluster.delete(kind, "default", &name))
            };
            let accepted = match step {
                Step::DeleteService(name) => delete(&mut cluster, Kind::Service, format!("s{name}")),
                Step::DeleteSlice(name) => delete(&mut cluster, Kind::EndpointSlice, format!("e{name}")),
                other => cluster.try_apply(&other.yaml().unwrap()).ok(),
            };
            if let Some(accepted) = accepted {
                compiler.compile(&cluster.state, &accepted.touched, index as u64 + 2);
            }
            let whole = cluster.compiler(&[]);
            prop_assert_eq!(dump(compiler.tables()), dump(whole.tables()), "after {:?}", step);
            prop_assert_eq!(compiler.steer_set(&cluster.state, &[]), whole.steer_set(&cluster.state, &[]));
        }
    }
}
