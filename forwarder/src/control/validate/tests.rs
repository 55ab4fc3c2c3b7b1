use super::*;
use crate::control::compile::fixture::Cluster;

const HEAD: &str = "[gateway]
name = 'gw'
cluster_cidrs = ['10.244.0.0/16']
service_cidrs = ['10.96.0.0/16', 'fd00:96::/112']
load_balancer_cidrs = ['203.0.113.0/24']
external_ip_cidrs = ['192.0.2.0/25']
[snat]
addresses = ['192.168.0.254']";

fn service(name: &str, spec: &str) -> String {
    format!("kind: Service\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn balancer(name: &str, ip: &str) -> String {
    let spec = "type: LoadBalancer, clusterIP: 10.96.0.9, ports: [{port: 80}]";
    format!("{}status: {{loadBalancer: {{ingress: [{{ip: '{ip}'}}]}}}}\n", service(name, spec))
}

const NODE: &str = "
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.10.1.0/24]}
status: {addresses: [{type: InternalIP, address: 203.0.113.77}]}
";

const POD: &str = "
kind: Pod
metadata: {name: p1}
status: {podIPs: [{ip: 203.0.113.88}]}
";

/// Applies `first`, then expects `second` to be refused with one fault that says `words`.
#[track_caller]
fn refuses(first: &str, second: &str, field: &str, words: &str) {
    let mut cluster = Cluster::new(HEAD, first);
    let faults = cluster.try_apply(second).expect_err(words);
    assert_eq!(faults.len(), 1, "{faults:?}");
    let shown = faults[0].to_string();
    assert_eq!(faults[0].field.as_deref(), Some(field), "{shown}");
    assert!(shown.contains(words) && faults[0].object.is_some() && faults[0].remedy.is_some(), "{shown}");
}

#[test]
fn two_services_with_one_cluster_ip() {
    let web = service("web", "clusterIP: 10.96.0.1, ports: [{port: 80}]");
    for ports in ["{port: 80}", "{port: 81}", "{port: 80, protocol: UDP}"] {
        let other = service("other", &format!("clusterIP: 10.96.0.1, ports: [{ports}]"));
        refuses(&web, &other, "spec.clusterIP", "is the ClusterIP of Service default/web");
    }
    let second =
        service("other", "clusterIPs: [10.96.0.2, 'fd00:96::1'], clusterIP: 10.96.0.2, ports: [{port: 80}]");
    let dual = service("web", "clusterIPs: ['fd00:96::1'], ports: [{port: 81}]");
    refuses(&dual, &second, "spec.clusterIPs[1]", "is the ClusterIP of Service default/web");
    // Nor is it anybody's external address, whoever comes first.
    let cluster_ip = service("web", "clusterIP: 192.0.2.1, ports: [{port: 80}]");
    let external = service("other", "clusterIP: 10.96.0.2, externalIPs: [192.0.2.1], ports: [{port: 81}]");
    refuses(&cluster_ip, &external, "spec.externalIPs[0]", "is the ClusterIP of Service default/web");
    refuses(&external, &cluster_ip, "spec.clusterIP", "is an address of Service default/other");

    let mut cluster = Cluster::new(HEAD, &web);
    // A Service that is not served takes nothing.
    cluster.apply(
        "kind: Service\nmetadata: {name: d, labels: {service.kubernetes.io/headless: ''}}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n",
    );
    // One change may hand an address on.
    let moved = service("web", "clusterIP: 10.96.0.5, ports: [{port: 80}]");
    let heir = service("heir", "clusterIP: 10.96.0.1, ports: [{port: 81}]");
    cluster.apply(&format!("{heir}---\n{moved}"));
}

#[test]
fn services_may_share_the_address_of_a_load_balancer_port_by_port() {
    let balancer = |name: &str, number: u8, ports: &str| {
        let spec = format!("type: LoadBalancer, clusterIP: 10.96.0.{number}, ports: [{ports}]");
        format!("{}status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.10}}]}}}}\n", service(name, &spec))
    };
    let web = balancer("web", 1, "{port: 80}");
    let mut cluster = Cluster::new(HEAD, &web);
    cluster.apply(&balancer("b", 2, "{port: 81}"));
    cluster.apply(&balancer("c", 3, "{port: 80, protocol: UDP}"));
    refuses(
        &web,
        &balancer("d", 4, "{port: 443, name: s}, {port: 80, name: p}"),
        "status.loadBalancer.ingress[0].ip",
        "is taken by Service default/web",
    );
}

#[test]
fn two_services_on_one_node_port() {
    let spec = |ip: &str, extra: &str| {
        format!("type: NodePort, clusterIP: {ip}, ports: [{{port: 80, nodePort: 30080{extra}}}]")
    };
    let web = service("web", &spec("10.96.0.1", ""));
    refuses(
        &web,
        &service("b", &spec("10.96.0.2", "")),
        "spec.ports[0].nodePort",
        "is taken by Service default/web",
    );
    Cluster::new(HEAD, &web).apply(&service("b", &spec("10.96.0.2", ", protocol: UDP")));
    let high = service("b", "type: NodePort, clusterIP: 10.96.0.2, ports: [{port: 80, nodePort: 61000}]");
    refuses("", &high, "spec.ports[0].nodePort", "61000-65535");
}

/// Rule 14.5.
#[test]
fn a_health_check_node_port_is_its_services_alone() {
    let spec = |ip: &str, check: u16, node_port: u16| {
        format!(
            "type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: {check}, clusterIP: {ip}, \
             ports: [{{port: 80, nodePort: {node_port}}}]"
        )
    };
    let (field, web) = ("spec.healthCheckNodePort", service("web", &spec("10.96.0.1", 32_000, 30_080)));
    let other = |check, node_port| service("b", &spec("10.96.0.2", check, node_port));
    refuses(&web, &other(32_000, 30_081), field, "is taken by Service default/web");
    refuses(&web, &other(30_080, 30_081), field, "is taken by Service default/web");
    refuses(&web, &other(32_001, 32_000), "spec.ports[0].nodePort", "is taken by Service default/web");
    refuses("", &other(30_081, 30_081), field, "is a nodePort of the Service");
    refuses("", &other(61_000, 30_081), field, "61000-65535");
    refuses("", &other(10_256, 30_081), field, "[health] listen");
    refuses("", &other(32_000, 10_256), "spec.ports[0].nodePort", "[health] listen");
    // Of a Service that has no use for it, it takes nothing.
    let idle = other(32_000, 30_081).replace("externalTrafficPolicy: Local, ", "");
    Cluster::new(HEAD, &web).apply(&idle);
}

/// Rule 14.5.
#[test]
fn addresses_that_a_service_may_not_have() {
    let lb = "status.loadBalancer.ingress[0].ip";
    refuses("", &balancer("web", "198.51.100.1"), lb, "load_balancer_cidrs");
    refuses(NODE, &balancer("web", "203.0.113.77"), lb, "is an address of Node n1");
    refuses(POD, &balancer("web", "203.0.113.88"), lb, "is the address of Pod default/p1");
    refuses(NODE, &balancer("web", "10.10.1.3"), lb, "podCIDR 10.10.1.0/24 of Node n1");
    refuses("", &balancer("web", "10.244.3.3"), lb, "cluster_cidrs");
    refuses("", &balancer("web", "10.96.3.3"), lb, "service_cidrs");
    refuses("", &balancer("web", "192.168.0.254"), lb, "this gateway");
    refuses(
        "",
        &service("web", "clusterIP: 10.244.0.1, ports: [{port: 80}]"),
        "spec.clusterIP",
        "cluster_cidrs",
    );
    Cluster::new(HEAD, &balancer("web", "203.0.113.10"));
}

#[test]
fn own_addresses_come_from_the_ports_too() {
    let mut cluster = Cluster::new(HEAD, "");
    let own = ["203.0.113.1".parse::<IpAddr>().unwrap().into()];
    let gateway = cluster.gateway.clone();
    let objects = crate::control::compile::fixture::objects(&balancer("web", "203.0.113.1"));
    let apply = |object| crate::control::state::Operation::Apply { object, source: Default::default() };
    let rules = Rules { gateway: &gateway, own: &own };
    let refusal = cluster.state.stage(&rules, objects.into_iter().map(apply).collect(), false).unwrap_err();
    assert!(refusal.faults[0].message.contains("this gateway"), "{}", refusal.faults[0]);
}

/// Rules 6.7, 14.5.
#[test]
fn external_ips_are_served_only_where_the_gateway_file_says_so() {
    let spec = |ip: &str| format!("clusterIP: 10.96.0.1, externalIPs: [{ip}], ports: [{{port: 80}}]");
    let mut cluster = Cluster::new(HEAD, "");
    let accepted = cluster.apply(&service("web", &spec("192.0.2.200")));
    assert_eq!(accepted.warnings[0].field.as_deref(), Some("spec.externalIPs[0]"));
    assert!(accepted.warnings[0].to_string().contains("external_ip_cidrs"), "{}", accepted.warnings[0]);
    assert_eq!(cluster.apply(&service("web", &spec("192.0.2.1"))).warnings, []);
    refuses("", &service("web", &spec("10.96.0.77")), "spec.externalIPs[0]", "service_cidrs");
    // By default nowhere.
    let mut cluster = Cluster::new("[gateway]\nname='gw'", "");
    assert_eq!(cluster.apply(&service("web", &spec("192.0.2.1"))).warnings.len(), 1);
}

#[test]
fn a_cluster_ip_outside_of_the_ranges_is_served_with_a_warning() {
    let mut cluster = Cluster::new(HEAD, "");
    let accepted =
        cluster.apply(&service("web", "clusterIPs: [10.97.0.1, 'fd00:97::1'], ports: [{port: 80}]"));
    assert_eq!(accepted.warnings.len(), 2, "{:?}", accepted.warnings);
    assert!(accepted.warnings[0].to_string().contains("service_cidrs"));
}

#[test]
fn a_service_without_an_address_is_kept_with_a_warning() {
    let mut cluster = Cluster::new(HEAD, "");
    let accepted = cluster.apply(&service("web", "ports: [{port: 80}]"));
    assert!(accepted.warnings[0].to_string().contains("spec.clusterIP: empty"), "{}", accepted.warnings[0]);
}

#[test]
fn an_endpoint_that_is_a_service() {
    let slice = |ip: &str| {
        format!(
            "kind: EndpointSlice\nmetadata: {{name: s, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nendpoints: [{{addresses: [{ip}]}}]\n"
        )
    };
    let web = service("web", "clusterIP: 10.96.0.1, ports: [{port: 80}]");
    refuses(
        &web,
        &slice("10.96.0.1"),
        "endpoints[0].addresses[0]",
        "Service default/web: packets would come back",
    );
    // The Service that comes second is at fault.
    refuses(&slice("10.96.0.1"), &web, "spec.clusterIP", "endpoint in EndpointSlice default/s");
}

/// Rule 14.8.
#[test]
fn overlapping_pod_cidrs() {
    let node = |name: &str, cidrs: &str| {
        format!("kind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{cidrs}]}}\n")
    };
    for (first, second) in
        [("10.10.0.0/16", "10.10.3.0/24"), ("10.10.3.0/24", "10.10.0.0/16"), ("10.10.0.0/24", "10.10.0.0/24")]
    {
        refuses(
            &node("a", first),
            &node("b", second),
            "spec.podCIDRs[0]",
            &format!("overlaps the podCIDR {first} of Node a"),
        );
    }
    refuses("", &node("a", "10.10.0.0/16, 10.10.1.0/24"), "spec.podCIDRs[1]", "of the same Node");
    refuses("", &node("a", "10.96.1.0/24"), "spec.podCIDRs[0]", "service_cidrs");
    let far = service("web", "clusterIP: 10.97.3.3, ports: [{port: 80}]");
    refuses(
        &far,
        &node("a", "10.97.0.0/16"),
        "spec.podCIDRs[0]",
        "holds 10.97.3.3, an address of Service default/web",
    );
    refuses("", &node("a", "203.0.112.0/20"), "spec.podCIDRs[0]", "load_balancer_cidrs");
    Cluster::new(HEAD, &node("a", "10.10.0.0/24, 'fd00:1::/64'"))
        .apply(&node("b", "10.10.1.0/24, 'fd00:2::/64'"));
}

/// Rule 12.5.
#[test]
fn routes_to_pods() {
    let route = |name: &str, prefix: &str, via: &str| {
        format!("kind: PodRoute\nmetadata: {{name: {name}}}\nspec: {{prefix: '{prefix}', via: '{via}'}}\n")
    };
    let good = route("a", "10.10.0.0/24", "192.168.0.7");
    refuses(
        &good,
        &route("b", "10.10.0.0/24", "192.168.0.8"),
        "spec.prefix",
        "is the prefix of PodRoute a too",
    );
    refuses("", &route("a", "10.96.1.0/24", "192.168.0.7"), "spec.prefix", "service_cidrs");
    refuses("", &route("a", "10.10.0.0/24", "10.10.0.7"), "spec.via", "lies in 10.10.0.0/24 itself");
    refuses("", &route("a", "0.0.0.0/0", "192.168.0.7"), "spec.prefix", "not a prefix");
    refuses("", &route("a", "10.10.0.0/24", "router"), "spec.via", "not an IP address");
    let far = service("web", "clusterIP: 10.97.3.3, ports: [{port: 80}]");
    refuses(
        &far,
        &route("a", "10.97.0.0/16", "192.168.0.7"),
        "spec.prefix",
        "an address of Service default/web",
    );
    // It may say otherwise of a Node's pods, or of some of them; and Nodes and routes may come in any order.
    let node = "kind: Node\nmetadata: {name: n}\nspec: {podCIDRs: [10.10.0.0/24]}\n";
    Cluster::new(HEAD, node).apply(&good);
    Cluster::new(HEAD, &good).apply(node);
    Cluster::new(HEAD, &good).apply(&route("b", "10.10.0.128/25", "192.168.0.8"));
}

/// Rule 14.8.
#[test]
fn two_pods_on_one_address() {
    let pod = |name: &str, rest: &str| format!("kind: Pod\nmetadata: {{name: {name}}}\n{rest}\n");
    let status = "status: {podIPs: [{ip: 10.244.0.5}]}";
    refuses(
        &pod("a", status),
        &pod("b", status),
        "status.podIPs[0].ip",
        "is the address of Pod default/a too",
    );
    // Pods on the network of their host share its address; pods that have ended have none.
    let mut cluster = Cluster::new(HEAD, &pod("a", status));
    cluster.apply(&pod("b", &format!("spec: {{hostNetwork: true}}\n{status}")));
    cluster.apply(&pod("c", "status: {phase: Succeeded, podIPs: [{ip: 10.244.0.5}]}"));
}

#[test]
fn nodes_and_pods_that_have_an_address_of_a_service() {
    let web = balancer("web", "203.0.113.10");
    refuses(
        &web,
        &NODE.replace("203.0.113.77", "203.0.113.10"),
        "status.addresses",
        "is an address of Service default/web",
    );
    refuses(
        &web,
        &POD.replace("203.0.113.88", "10.96.0.9"),
        "status.podIPs[0].ip",
        "is an address of Service default/web",
    );
    refuses(
        NODE,
        &NODE.replace("n1", "n2").replace("10.10.1", "10.10.2"),
        "status.addresses",
        "is an address of Node n1 too",
    );
}

#[test]
fn a_node_behind_vxlan_needs_an_address_of_its_device() {
    let node = |name: &str, more: &str| {
        format!(
            "kind: Node\nmetadata: {{name: {name}, annotations: {{towpath.dev/overlay: vxlan{more}}}}}\nspec: {{podCIDRs: [10.10.0.0/24]}}\n"
        )
    };
    let warnings = |head: &str, yaml: &str| {
        let cluster = Cluster::new(head, yaml);
        let rules = Rules { gateway: &cluster.gateway, own: &[] };
        let entry = cluster.state.entries().next().unwrap();
        let warnings = judge(&cluster.state, &rules, entry).warnings;
        warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    let warning = warnings(HEAD, &node("n1", ""));
    assert!(warning.starts_with("metadata.annotations.towpath.dev/vxlan-mac: missing"), "{warning}");
    assert!(warning.contains("overlay.mac"), "{warning}");
    assert_eq!(warnings(HEAD, &node("n1", ", towpath.dev/vxlan-mac: '02:00:00:00:00:01'")), "");
    assert_eq!(warnings(HEAD, &node("gw", "")), "", "the gateway itself");
    let given = format!("{HEAD}\n[overlay]\nmac = '02:00:00:00:00:01'");
    assert_eq!(warnings(&given, &node("n1", "")), "");
}
