use config::fault::Fault;
use config::gateway::OverlayKind;

use super::*;
use crate::control::compile::fixture::objects;

fn read(yaml: &str) -> (Facts, Vec<Fault>, Vec<Fault>) {
    let (mut faults, mut warnings) = (Vec::new(), Vec::new());
    let facts = Facts::read(&objects(yaml)[0], &mut faults, &mut warnings);
    (facts, faults, warnings)
}

fn service(spec: &str) -> ServiceFacts {
    let (facts, faults, _) = read(&format!("kind: Service\nmetadata: {{name: web}}\n{spec}\n"));
    assert_eq!(faults, [], "{spec}");
    match facts {
        Facts::Service(facts) => facts,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refuses(yaml: &str, field: &str, words: &str) {
    let (_, faults, _) = read(yaml);
    assert_eq!(faults.len(), 1, "{yaml}: {faults:?}");
    assert_eq!(faults[0].field.as_deref(), Some(field), "{}", faults[0]);
    assert!(faults[0].to_string().contains(words), "{}", faults[0]);
    assert!(faults[0].remedy.is_some(), "{}", faults[0]);
}

#[track_caller]
fn refuses_service(spec: &str, field: &str, words: &str) {
    refuses(&format!("kind: Service\nmetadata: {{name: web}}\n{spec}\n"), field, words);
}

#[test]
fn bad_names() {
    refuses("kind: Namespace\nmetadata: {}\n", "metadata.name", "missing");
    refuses("kind: Namespace\nmetadata: {name: 'a b'}\n", "metadata.name", "not a name");
    refuses("kind: Namespace\nmetadata: {name: Web}\n", "metadata.name", "lower-case");
    refuses("kind: Pod\nmetadata: {name: a, namespace: ../x}\n", "metadata.namespace", "not a name");
    refuses(&format!("kind: Namespace\nmetadata: {{name: {}}}\n", "a".repeat(254)), "metadata.name", "253");
}

#[test]
fn bad_services() {
    let ip = "clusterIP: 10.96.0.1";
    refuses_service("status: {}", "spec", "missing");
    refuses_service(&format!("spec: {{{ip}}}"), "spec.ports", "needs ports");
    refuses_service(&format!("spec: {{{ip}, ports: []}}"), "spec.ports", "needs ports");
    refuses_service(&format!("spec: {{{ip}, ports: [{{name: x}}]}}"), "spec.ports[0].port", "1 to 65535");
    refuses_service(&format!("spec: {{{ip}, ports: [{{port: 0}}]}}"), "spec.ports[0].port", "1 to 65535");
    refuses_service(&format!("spec: {{{ip}, ports: [{{port: 65536}}]}}"), "spec.ports[0].port", "65536");
    refuses_service(&format!("spec: {{{ip}, ports: [{{port: -1}}]}}"), "spec.ports[0].port", "-1");
    refuses_service(
        &format!("spec: {{{ip}, ports: [{{port: 80, protocol: tcp}}]}}"),
        "spec.ports[0].protocol",
        "capitals",
    );
    refuses_service(
        &format!("spec: {{{ip}, type: NodePort, ports: [{{port: 80, nodePort: 70000}}]}}"),
        "spec.ports[0].nodePort",
        "70000",
    );
    refuses_service(
        &format!("spec: {{{ip}, ports: [{{port: 80}}, {{port: 81, name: b}}]}}"),
        "spec.ports[0].name",
        "several ports",
    );
    refuses_service(
        &format!("spec: {{{ip}, ports: [{{port: 80, name: a}}, {{port: 80, name: b}}]}}"),
        "spec.ports[1].port",
        "twice",
    );
    refuses_service(
        &format!("spec: {{{ip}, ports: [{{port: 80, name: a}}, {{port: 81, name: a}}]}}"),
        "spec.ports[1].name",
        "this name",
    );
    let ports = "ports: [{port: 80}]";
    refuses_service(&format!("spec: {{clusterIP: 10.96.0, {ports}}}"), "spec.clusterIP", "not an IP address");
    refuses_service(&format!("spec: {{clusterIP: 127.0.0.1, {ports}}}"), "spec.clusterIP", "loopback");
    refuses_service(
        &format!("spec: {{clusterIPs: [10.96.0.1, 10.96.0.2], {ports}}}"),
        "spec.clusterIPs",
        "family",
    );
    refuses_service(&format!("spec: {{{ip}, {ports}, type: Balancer}}"), "spec.type", "LoadBalancer");
    refuses_service(
        &format!("spec: {{{ip}, {ports}, externalIPs: [x]}}"),
        "spec.externalIPs[0]",
        "not an IP address",
    );
    refuses_service(
        &format!("spec: {{{ip}, {ports}, internalTrafficPolicy: local}}"),
        "spec.internalTrafficPolicy",
        "Cluster or Local",
    );
    refuses_service(
        &format!("spec: {{{ip}, {ports}, externalTrafficPolicy: Global}}"),
        "spec.externalTrafficPolicy",
        "Cluster or Local",
    );
    refuses_service(
        &format!("spec: {{{ip}, {ports}, sessionAffinity: Cookie}}"),
        "spec.sessionAffinity",
        "ClientIP",
    );
    for seconds in [0, -1, 86_401] {
        refuses_service(
            &format!(
                "spec: {{{ip}, {ports}, sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}}}"
            ),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "1 to 86400",
        );
    }
    refuses_service(
        &format!("spec: {{{ip}, {ports}, loadBalancerSourceRanges: [10.0.0.0]}}"),
        "spec.loadBalancerSourceRanges[0]",
        "not a prefix",
    );
    let balancer = format!("spec: {{{ip}, {ports}, type: LoadBalancer}}");
    refuses_service(
        &format!("{balancer}\nstatus: {{loadBalancer: {{ingress: [{{ip: 203.0.113.300}}]}}}}"),
        "status.loadBalancer.ingress[0].ip",
        "not an IP address",
    );
    refuses_service(
        &format!("{balancer}\nstatus: {{loadBalancer: {{ingress: [{{ip: 203.0.113.3, ipMode: NAT}}]}}}}"),
        "status.loadBalancer.ingress[0].ipMode",
        "VIP or Proxy",
    );
}

#[test]
fn bad_slices() {
    let slice = |rest: &str| {
        format!(
            "kind: EndpointSlice\nmetadata: {{name: s, labels: {{kubernetes.io/service-name: web}}}}\n{rest}\n"
        )
    };
    refuses(&slice("endpoints: []"), "addressType", "IPv4 or IPv6");
    refuses(&slice("addressType: ipv4"), "addressType", "IPv4 or IPv6");
    for (address, words) in [
        ("127.0.0.1", "loopback"),
        ("169.254.1.1", "link-local"),
        ("224.0.0.1", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("255.255.255.255", "reserved"),
        ("web", "not an IP address"),
        ("'fd00::1'", "not an IPv4 address"),
    ] {
        let rest = format!("addressType: IPv4\nendpoints: [{{addresses: [{address}]}}]");
        refuses(&slice(&rest), "endpoints[0].addresses[0]", words);
    }
    for (address, words) in
        [("::1", "loopback"), ("fe80::1", "link-local"), ("ff02::1", "multicast"), ("10.0.0.1", "IPv6")]
    {
        let rest = format!("addressType: IPv6\nendpoints: [{{addresses: ['{address}']}}]");
        refuses(&slice(&rest), "endpoints[0].addresses[0]", words);
    }
    refuses(
        &slice("addressType: IPv4\nendpoints: [{addresses: []}]"),
        "endpoints[0].addresses",
        "no address",
    );
    refuses(&slice("addressType: IPv4\nports: [{port: 65536}]\nendpoints: []"), "ports[0].port", "65535");
    refuses(
        &slice("addressType: IPv4\nports: [{port: 1, protocol: X}]\nendpoints: []"),
        "ports[0].protocol",
        "SCTP",
    );
}

#[test]
fn bad_nodes_and_pods() {
    refuses(
        "kind: Node\nmetadata: {name: n}\nspec: {podCIDRs: [10.0.0.0]}\n",
        "spec.podCIDRs[0]",
        "not a prefix",
    );
    refuses("kind: Node\nmetadata: {name: n}\nspec: {podCIDR: 0.0.0.0/0}\n", "spec.podCIDR", "not a prefix");
    refuses(
        "kind: Node\nmetadata: {name: n}\nstatus: {addresses: [{type: InternalIP, address: node-1}]}\n",
        "status.addresses[0].address",
        "not an IP address",
    );
    refuses(
        "kind: Pod\nmetadata: {name: p}\nstatus: {podIPs: [{ip: '::1'}]}\n",
        "status.podIPs[0].ip",
        "loopback",
    );
}

/// Rules 1.3, 1.4.
#[test]
fn what_is_not_served_is_said() {
    for (spec, labels, expected) in [
        ("clusterIP: None", "", Some(Skip::Headless)),
        ("clusterIP: ''", "", Some(Skip::NoClusterIp)),
        ("type: LoadBalancer", "", Some(Skip::NoClusterIp)),
        ("type: ExternalName, externalName: x.example", "", Some(Skip::ExternalName)),
        ("clusterIP: 10.0.0.1", "service.kubernetes.io/service-proxy-name: other", Some(Skip::OtherProxy)),
        ("clusterIP: 10.0.0.1", "service.kubernetes.io/headless: ''", Some(Skip::HeadlessLabel)),
        ("clusterIP: 10.0.0.1", "", None),
    ] {
        let yaml = format!(
            "kind: Service\nmetadata: {{name: web, labels: {{{labels}}}}}\nspec: {{{spec}, ports: [{{port: 80}}]}}\n"
        );
        let (facts, faults, _) = read(&yaml);
        assert_eq!(faults, [], "{yaml}");
        let Facts::Service(facts) = facts else { panic!("{facts:?}") };
        assert_eq!(facts.skip, expected, "{yaml}");
    }
}

/// Rules 6.1, 11.4.
#[test]
fn addresses_come_from_three_fields() {
    let facts = service(
        "spec: {type: LoadBalancer, clusterIP: 010.96.0.1, clusterIPs: [10.96.0.1, 'fd00:96::1'], externalIPs: ['::ffff:192.0.2.1'],
           ports: [{port: 80, nodePort: 30080}]}
status: {loadBalancer: {ingress: [{ip: 203.0.113.1}, {hostname: lb.example}, {ip: 203.0.113.2, ipMode: Proxy}, {ip: 203.0.113.3, ipMode: VIP}]}}",
    );
    let shown: Vec<_> =
        facts.addresses.iter().map(|a| format!("{:?} {} {}", a.kind, a.addr, a.field)).collect();
    assert_eq!(
        shown,
        [
            "Cluster 10.96.0.1 spec.clusterIPs[0]",
            "Cluster fd00:96::1 spec.clusterIPs[1]",
            "External 192.0.2.1 spec.externalIPs[0]",
            "LoadBalancer 203.0.113.1 status.loadBalancer.ingress[0].ip",
            "LoadBalancer 203.0.113.3 status.loadBalancer.ingress[3].ip",
        ]
    );
    assert_eq!(facts.ports[0].node_port, Some(30080));
}

#[test]
fn what_a_change_of_type_leaves_behind_is_not_served() {
    let yaml = "kind: Service
metadata: {name: web}
spec: {type: ClusterIP, clusterIP: 10.96.0.1, ports: [{port: 80, nodePort: 30080}]}
status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}
";
    let (facts, faults, warnings) = read(yaml);
    assert_eq!(faults, []);
    assert_eq!(warnings[0].field.as_deref(), Some("status.loadBalancer.ingress[0].ip"));
    let Facts::Service(facts) = facts else { panic!("{facts:?}") };
    assert_eq!((facts.addresses.len(), facts.ports[0].node_port), (1, None));
}

/// Rules 3.10, 8.1.
#[test]
fn policies_and_affinity() {
    let facts = service("spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}");
    assert_eq!((facts.internal_local, facts.external_local, facts.affinity_timeout_s), (false, false, None));
    assert!(facts.uses_cluster_endpoints() && !facts.uses_local_endpoints());
    let facts = service(
        "spec: {clusterIP: 10.0.0.1, ports: [{port: 80}], internalTrafficPolicy: Local, externalTrafficPolicy: Local, sessionAffinity: ClientIP}",
    );
    assert_eq!(
        (facts.internal_local, facts.external_local, facts.affinity_timeout_s),
        (true, true, Some(10_800))
    );
    assert!(!facts.uses_cluster_endpoints() && facts.uses_local_endpoints());
    let facts = service(
        "spec: {type: NodePort, clusterIP: 10.0.0.1, ports: [{port: 80, nodePort: 30000}], internalTrafficPolicy: Local,
           sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 7}}}",
    );
    // Reachable from outside: pods and nodes are short-circuited to the Cluster list.
    assert!(facts.uses_cluster_endpoints() && facts.uses_local_endpoints());
    assert_eq!(facts.affinity_timeout_s, Some(7));
    let facts = service(
        "spec: {type: NodePort, clusterIP: 10.0.0.1, ports: [{port: 80, nodePort: 30000}], internalTrafficPolicy: Local,
           externalTrafficPolicy: Local}",
    );
    assert!(facts.uses_cluster_endpoints() && facts.uses_local_endpoints());
}

/// Rule 3.9.
#[test]
fn traffic_distribution_has_two_names_for_the_zone() {
    for (word, expected) in [
        ("PreferClose", Distribution::PreferSameZone),
        ("PreferSameZone", Distribution::PreferSameZone),
        ("PreferSameNode", Distribution::PreferSameNode),
    ] {
        let spec =
            format!("spec: {{clusterIP: 10.0.0.1, ports: [{{port: 80}}], trafficDistribution: {word}}}");
        assert_eq!(service(&spec).distribution, expected, "{word}");
    }
    assert_eq!(
        service("spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}").distribution,
        Distribution::Everywhere
    );
}

/// Rule 6.2.
#[test]
fn source_ranges_are_trimmed() {
    let facts = service(
        "spec: {clusterIP: 10.0.0.1, ports: [{port: 80}], loadBalancerSourceRanges: [' 198.51.100.0/24 ', '2001:db8::/32']}",
    );
    let shown: Vec<_> = facts.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["198.51.100.0/24", "2001:db8::/32"]);
}

/// Rules 1.6, 1.7.
#[test]
fn a_slice_without_a_service_or_with_names_is_kept_with_a_warning() {
    let (_, faults, warnings) = read(
        "kind: EndpointSlice\nmetadata: {name: s}\naddressType: FQDN\nendpoints: [{addresses: [a.example]}]\n",
    );
    assert_eq!(faults, []);
    let fields: Vec<_> = warnings.iter().map(|warning| warning.field.as_deref().unwrap()).collect();
    assert_eq!(fields, ["metadata.labels.kubernetes.io/service-name", "addressType"]);
}

#[test]
fn pods_that_have_ended_have_no_address() {
    for (phase, expected) in [("Running", 1), ("Pending", 1), ("Succeeded", 0), ("Failed", 0)] {
        let (facts, faults, _) = read(&format!(
            "kind: Pod\nmetadata: {{name: p}}\nstatus: {{phase: {phase}, podIP: 10.244.0.1}}\n"
        ));
        assert_eq!(faults, []);
        let Facts::Pod(facts) = facts else { panic!("{facts:?}") };
        assert_eq!(facts.addresses.len(), expected, "{phase}");
    }
}

/// Rule 10.1.
#[test]
fn only_local_load_balancers_have_a_health_check_node_port() {
    for (spec, expected) in [
        ("type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 32000", Some(32_000)),
        ("type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 0", None),
        ("type: LoadBalancer, externalTrafficPolicy: Local", None),
        ("type: LoadBalancer, healthCheckNodePort: 32000", None),
        ("type: NodePort, externalTrafficPolicy: Local, healthCheckNodePort: 32000", None),
    ] {
        let facts = service(&format!("spec: {{clusterIP: 10.0.0.1, ports: [{{port: 80}}], {spec}}}"));
        assert_eq!(facts.health_check_node_port, expected, "{spec}");
    }
    refuses_service(
        "spec: {clusterIP: 10.0.0.1, ports: [{port: 80}], healthCheckNodePort: 70000}",
        "spec.healthCheckNodePort",
        "1 to 65535",
    );
}

#[test]
fn a_node_that_is_to_go_is_leaving() {
    for (yaml, expected) in [
        ("metadata: {name: n}", false),
        ("metadata: {name: n}\nspec: {taints: [{key: other, effect: NoSchedule}]}", false),
        (
            "metadata: {name: n}\nspec: {taints: [{key: other, effect: NoSchedule}, \
             {key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}",
            true,
        ),
        ("metadata: {name: n, deletionTimestamp: '2026-11-27T08:00:00Z'}", true),
    ] {
        let (facts, faults, _) = read(&format!("kind: Node\n{yaml}\n"));
        assert_eq!(faults, [], "{yaml}");
        let Facts::Node(facts) = facts else { panic!("{facts:?}") };
        assert_eq!(facts.leaving, expected, "{yaml}");
    }
}

#[test]
fn slices_say_when_what_they_tell_of_happened() {
    let slice = |annotations: &str| {
        let yaml = format!(
            "kind: EndpointSlice\nmetadata: {{name: s, labels: {{kubernetes.io/service-name: web}}, annotations: {{{annotations}}}}}\n\
             addressType: IPv4\nendpoints: []\n"
        );
        let (facts, faults, warnings) = read(&yaml);
        assert_eq!(faults, [], "{yaml}");
        let Facts::Slice(facts) = facts else { panic!("{facts:?}") };
        (facts.triggered.map(|time| time.as_second()), warnings.len())
    };
    assert_eq!(slice(""), (None, 0));
    let annotation = "endpoints.kubernetes.io/last-change-trigger-time";
    assert_eq!(slice(&format!("{annotation}: '1970-01-02T00:00:00.5Z'")), (Some(86_400), 0));
    assert_eq!(slice(&format!("{annotation}: yesterday")), (None, 1));
}

#[test]
fn nodes_say_how_their_pods_are_reached() {
    let node = |annotations: &str| {
        let (facts, faults, warnings) =
            read(&format!("kind: Node\nmetadata: {{name: n, annotations: {{{annotations}}}}}\n"));
        assert_eq!(faults, []);
        let Facts::Node(node) = facts else { panic!("{facts:?}") };
        let warnings: Vec<_> = warnings.iter().map(ToString::to_string).collect();
        (node.overlay.map(OverlayKind::name), node.vxlan_mac.map(|mac| mac.to_string()), warnings.join(" "))
    };
    let own = "towpath.dev/overlay: vxlan, towpath.dev/vxlan-mac: '02:00:00:00:00:01'";
    let flannel = r#"flannel.alpha.coreos.com/backend-data: '{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}'"#;
    let calico = "projectcalico.org/VXLANTunnelMACAddr: '02:00:00:00:00:03'";
    for (annotations, overlay, mac) in [
        ("", None, None),
        ("towpath.dev/overlay: native", Some("native"), None),
        (own, Some("vxlan"), Some("01")),
        (flannel, None, Some("02")),
        (calico, None, Some("03")),
        (&format!("{own}, {flannel}, {calico}"), Some("vxlan"), Some("01")),
        (&format!("{calico}, {flannel}"), None, Some("02")),
        ("flannel.alpha.coreos.com/backend-data: 'null'", None, None),
        ("flannel.alpha.coreos.com/backend-data: '{'", None, None),
    ] {
        let mac = mac.map(|last| format!("02:00:00:00:00:{last}"));
        assert_eq!(node(annotations), (overlay, mac, String::new()), "{annotations}");
    }
    let (_, _, warning) = node("towpath.dev/overlay: geneve");
    assert!(
        warning.contains("towpath.dev/overlay: geneve") && warning.contains("use native or vxlan"),
        "{warning}"
    );
    let (_, mac, warning) = node("towpath.dev/vxlan-mac: vtep");
    assert!(
        mac.is_none() && warning.contains("vxlan-mac: vtep") && warning.contains("such as 02:"),
        "{warning}"
    );
    let (_, _, warning) = node("towpath.dev/vxlan: 'on'");
    assert!(warning.contains("use towpath.dev/overlay, towpath.dev/vxlan-mac"), "{warning}");
}
