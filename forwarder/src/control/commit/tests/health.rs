//! What the health server and Prometheus are told of changes and workers.

use super::*;
use crate::control::health::server::{Backend as _, Target};

/// Rule 10.1.
#[test]
fn the_health_server_is_told_of_changes_and_of_workers_that_stand_still() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let probes = rig.control.as_ref().unwrap().probes(Box::new(|_| Err("not in this test".to_owned())));
    let own: std::net::SocketAddr = "192.168.0.9:32000".parse().unwrap();
    let ask = |target: &Target, path: &str| probes.respond(target, own, path);
    let gateway_is = |status: u16| {
        [ask(&Target::Gateway, "/healthz").status.0, ask(&Target::Gateway, "/livez").status.0] == [status; 2]
    };
    assert!(rig.eventually(|| gateway_is(200)));

    let mut talk = rig.connect();
    let node = |rest: &str| {
        apply(&format!(
            "{{\"apiVersion\":\"v1\",\"kind\":\"Node\",\"metadata\":{{\"name\":\"gw\"}},{rest}\
             \"status\":{{\"addresses\":[{{\"type\":\"InternalIP\",\"address\":\"192.168.0.9\"}}]}}}}"
        ))
    };
    let checked = service("web", "10.96.0.7").replace(
        "\"clusterIP\":",
        "\"type\":\"LoadBalancer\",\"externalTrafficPolicy\":\"Local\",\"healthCheckNodePort\":32000,\"clusterIP\":",
    );
    let at_node = |slice: String| slice.replace("\"conditions\"", "\"nodeName\":\"n1\",\"conditions\"");
    talk.apply(&[node(""), checked, at_node(slice("web", "10.244.1.1"))]);
    let targets = probes.targets();
    assert_eq!(targets.keys().map(|addr| addr.port()).collect::<Vec<_>>(), [10_256, 32_000]);
    // Without an address of a load balancer or a NodePort no client outside can come.
    assert_eq!(ask(&targets[&own], "/anything").status.0, 503);
    let balanced = service("web", "10.96.0.7")
        .replace(
            "\"clusterIP\":",
            "\"type\":\"LoadBalancer\",\"externalTrafficPolicy\":\"Local\",\"healthCheckNodePort\":32000,\"clusterIP\":",
        )
        .replace("\"port\":80,", "\"port\":80,\"nodePort\":30080,");
    talk.apply(&[balanced]);
    assert_eq!(ask(&targets[&own], "/anything").status.0, 200);

    let taint =
        "\"spec\":{\"taints\":[{\"key\":\"ToBeDeletedByClusterAutoscaler\",\"effect\":\"NoSchedule\"}]},";
    talk.apply(&[node(taint)]);
    assert_eq!(ask(&Target::Gateway, "/healthz").status.0, 503);
    assert_eq!(ask(&Target::Gateway, "/livez").status.0, 200);
    assert_eq!(ask(&targets[&own], "/").status.0, 200, "the node does not matter here");
    talk.apply(&[node("")]);

    rig.stand_still.store(true, Ordering::Relaxed);
    assert!(rig.eventually(|| gateway_is(503)));
    let answer = ask(&Target::Gateway, "/healthz");
    assert!(answer.body.contains("worker 0 has made no progress"), "{}", answer.body);
    assert_eq!(ask(&targets[&own], "/").status.0, 503);
    rig.stand_still.store(false, Ordering::Relaxed);
    assert!(rig.eventually(|| gateway_is(200)));

    talk.apply(&[delete("Service", "web"), delete("EndpointSlice", "web-1")]);
    assert_eq!(probes.targets().len(), 1);
    assert_eq!(ask(&targets[&own], "/").status.0, 404);
    assert_eq!(ask(&Target::Gateway, "/").status.0, 404);
}

#[test]
fn what_is_measured_is_printed_and_served_alike() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let probes = rig.control.as_ref().unwrap().probes(Box::new(|_| Err("not in this test".to_owned())));
    let to = "127.0.0.1:10256".parse().unwrap();
    let mut talk = rig.connect();
    let trigger = |time: &str| {
        let annotation = format!(
            "\"annotations\":{{\"endpoints.kubernetes.io/last-change-trigger-time\":\"{time}\"}},\"labels\""
        );
        slice("web", "10.244.1.1").replace("\"labels\"", &annotation)
    };
    // From before this process: what nobody can have followed is not measured.
    talk.apply(&[service("web", "10.96.0.7"), trigger("2020-01-01T00:00:00Z")]);
    talk.apply(&[trigger("2020-01-01T00:00:00Z").replace("10.244.1.1", "10.244.1.2")]);
    talk.apply(&[trigger("2999-01-01T00:00:00Z").replace("10.244.1.1", "10.244.1.3")]);
    for path in ["/healthz", "/healthz", "/livez"] {
        probes.respond(&Target::Gateway, to, path);
    }
    let has = |text: &str, line: &str| text.lines().any(|other| other == line);
    // The generation that it began with, and three changes that were answered.
    let text = match talk.ask("\"metrics\"") {
        Reply::Metrics { text } => text,
        other => panic!("{other:?}"),
    };
    for line in [
        "# TYPE kubeproxy_network_programming_duration_seconds histogram",
        "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1",
        "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"} 0",
        "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 4",
        "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1",
        "kubeproxy_proxy_healthz_total{code=\"200\"} 2",
        "kubeproxy_proxy_healthz_total{code=\"503\"} 0",
        "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0.0",
        "towpath_healthy 1.0",
        "towpath_workers 1.0",
        "towpath_worker_up{worker=\"0\"} 1.0",
        "towpath_generation 4.0",
        "towpath_packets_total{worker=\"0\",direction=\"received\"} 0",
        "towpath_drops_total{reason=\"no_route\"} 0",
        "towpath_flows 0.0",
        "towpath_rings_total{port=\"uplink\",counter=\"rx_ring_full\"} 0",
    ] {
        assert!(has(&text, line), "{line}\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    let served = probes.respond(&Target::Gateway, to, "/metrics");
    let names = |text: &str| {
        let types = text.lines().filter(|line| line.starts_with("# TYPE "));
        types.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!((served.status.0, names(&served.body)), (200, names(&text)));
}
