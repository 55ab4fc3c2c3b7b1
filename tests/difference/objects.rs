//! Clusters out of a seed: Nodes, and Services with slices of every shape that decides something.

use forwarder::pipeline::Rng;
use serde_json::{Value, json};

/// The gateway's own node, and its zone.
pub const NODE: &str = "gw-1";
/// See [`NODE`].
pub const ZONE: &str = "zone-a";

/// Addresses of the gateway that serve NodePorts.
pub const NODE_IPS: [&str; 2] = ["10.1.0.1", "fd00:1::1"];

/// One chance in `of`.
fn chance(rng: &mut Rng, of: u64) -> bool {
    rng.next().is_multiple_of(of)
}

fn pick<'a, T>(rng: &mut Rng, choices: &'a [T]) -> &'a T {
    &choices[(rng.next() % choices.len() as u64) as usize]
}

/// A v1 List with `services` Services.
pub fn cluster(rng: &mut Rng, services: u32) -> Value {
    let mut items = vec![json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": ZONE}},
            "status": {"addresses": [{"type": "InternalIP", "address": NODE_IPS[0]}, {"type": "InternalIP", "address": NODE_IPS[1]}]}})];
    for node in 1..=3 {
        items.push(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{node}")},
            "spec": {"podCIDRs": [format!("10.244.{node}.0/24"), format!("fd00:244:{node}::/64")]},
            "status": {"addresses": [{"type": "InternalIP", "address": format!("10.2.0.1{node}")},
                {"type": "InternalIP", "address": format!("fd00:2::1{node}")}]}}));
    }
    for number in 1..=services {
        items.push(service(rng, number));
        items.extend(slices(rng, number));
    }
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

/// The ports of Services: name, protocol, number, NodePort less the Service's number.
const PORTS: [(&str, &str, u16, u32); 3] =
    [("http", "TCP", 80, 30_000), ("dns", "UDP", 53, 30_300), ("dns-tcp", "TCP", 53, 30_600)];

fn service(rng: &mut Rng, number: u32) -> Value {
    let type_ = *pick(rng, &["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer", "LoadBalancer"]);
    const FAMILIES: [&[u8]; 5] = [&[4, 6], &[4, 6], &[4], &[6], &[6, 4]];
    let families = *pick(rng, &FAMILIES);
    let (mut cluster_ips, mut ingress, mut external, mut names) = (vec![], vec![], vec![], vec![]);
    for family in families {
        let four = *family == 4;
        names.push(if four { "IPv4" } else { "IPv6" });
        cluster_ips.push(if four { format!("10.96.0.{number}") } else { format!("fd00:96::{number:x}") });
        let balancer = if four { format!("203.0.113.{number}") } else { format!("2001:db8::{number:x}") };
        let mode = *pick(rng, &[None, Some("VIP"), None, Some("Proxy")]);
        ingress.push(match mode {
            Some(mode) => json!({"ip": balancer, "ipMode": mode}),
            None => json!({"ip": balancer}),
        });
        if chance(rng, 4) {
            external.push(if four { format!("192.0.2.{number}") } else { format!("2001:db8:e::{number:x}") });
        }
    }
    if chance(rng, 6) {
        ingress.push(json!({"hostname": "lb.example.com"}));
    }
    let mut count = 1 + (rng.next() % 3) as usize;
    let node_ports = type_ == "NodePort" || type_ == "LoadBalancer" && !chance(rng, 3);
    let mut ports = vec![];
    for (name, protocol, port, node_port) in PORTS {
        if count == 0 {
            break;
        }
        count -= 1;
        let mut entry = json!({"name": name, "protocol": protocol, "port": port, "targetPort": name});
        if node_ports {
            entry["nodePort"] = json!(node_port + number);
        }
        ports.push(entry);
    }
    let mut labels = json!({});
    match rng.next() % 40 {
        0 => labels["service.kubernetes.io/service-proxy-name"] = json!("another"),
        1 => labels["service.kubernetes.io/headless"] = json!(""),
        _ => {}
    }
    let mut spec = json!({"type": type_, "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ipFamilies": names,
        "ipFamilyPolicy": if names.len() == 2 { "RequireDualStack" } else { "SingleStack" }, "ports": ports,
        "internalTrafficPolicy": pick(rng, &["Cluster", "Cluster", "Local"])});
    if type_ != "ClusterIP" {
        spec["externalTrafficPolicy"] = json!(pick(rng, &["Cluster", "Local"]));
    }
    if !external.is_empty() {
        spec["externalIPs"] = json!(external);
    }
    if type_ == "LoadBalancer" {
        let ranges = match rng.next() % 6 {
            0 => json!(["10.1.0.0/16", "fd00:1::/64"]),
            1 => json!([" 198.51.100.0/24 ", "10.244.0.0/16"]),
            2 => json!(["2001:db8:51::/64"]),
            _ => Value::Null,
        };
        if !ranges.is_null() {
            spec["loadBalancerSourceRanges"] = ranges;
        }
    }
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": format!("s{number}"), "labels": labels},
        "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}})
}

/// One or two slices of each family; an endpoint may be in both.
fn slices(rng: &mut Rng, number: u32) -> Vec<Value> {
    let mut slices = vec![];
    // What kind of Service it is decides how many of its endpoints are ready, so that every fallback is met often.
    let mood = rng.next() % 5;
    let hints = rng.next() % 4;
    for family in [4u8, 6] {
        if chance(rng, 12) {
            continue;
        }
        let count = (rng.next() % 5) as usize;
        let mut endpoints = vec![];
        for index in 0..count {
            let node = pick(rng, &[NODE, "node-1", "node-2", "node-3"]);
            let pod_node = match *node {
                "node-2" => 2,
                "node-3" => 3,
                _ => 1,
            };
            let host = 20 + index;
            let address = if family == 4 {
                format!("10.244.{pod_node}.{host}")
            } else {
                format!("fd00:244:{pod_node}::{host:x}")
            };
            let mut endpoint =
                json!({"addresses": [address], "nodeName": node, "conditions": conditions(rng, mood)});
            if hints < 2 && !chance(rng, 8) {
                let zone = pick(rng, &[ZONE, "zone-b"]);
                endpoint["hints"] = json!({"forZones": [{"name": zone}]});
                if hints == 0 {
                    endpoint["hints"]["forNodes"] = json!([{"name": node}]);
                }
            }
            endpoints.push(endpoint);
        }
        let pieces = if endpoints.len() > 1 && chance(rng, 3) { 2 } else { 1 };
        for piece in 0..pieces {
            let (first, last) = match (pieces, piece) {
                (1, _) => (0, endpoints.len()),
                // The one in the middle is in both.
                (_, 0) => (0, endpoints.len() / 2 + 1),
                _ => (endpoints.len() / 2, endpoints.len()),
            };
            // A named targetPort may be another number in each slice.
            let offset = 8000 + 1000 * piece;
            let mut ports: Vec<Value> = PORTS
                .iter()
                .map(|(name, protocol, port, _)| json!({"name": name, "protocol": protocol, "port": offset + port}))
                .collect();
            if chance(rng, 10) {
                ports.pop();
            }
            slices.push(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"namespace": "default", "name": format!("s{number}-{family}-{piece}"),
                    "labels": {"kubernetes.io/service-name": format!("s{number}")}},
                "addressType": format!("IPv{family}"), "ports": ports, "endpoints": endpoints[first..last]}));
        }
    }
    slices
}

fn conditions(rng: &mut Rng, mood: u64) -> Value {
    let ready = json!({"ready": true, "serving": true, "terminating": false});
    let leaving = json!({"ready": false, "serving": true, "terminating": true});
    let gone = json!({"ready": false, "serving": false, "terminating": true});
    let unready = json!({"ready": false, "serving": false, "terminating": false});
    match mood {
        // Absent conditions mean ready, serving, not terminating.
        0 => pick(rng, &[ready, json!({}), json!({"ready": true})]).clone(),
        1 => pick(rng, &[leaving.clone(), leaving, gone, unready]).clone(),
        2 => pick(rng, &[gone, unready]).clone(),
        _ => pick(rng, &[ready.clone(), ready, leaving, gone, unready]).clone(),
    }
}
