//! What load balancers, Kubernetes and Prometheus are told of a gateway, asked by curl from both sides of it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::cluster::{Cluster, GATEWAY, VIP, pod_v4};
use tests::metrics::Metrics;
use tests::namespace::Namespace;

/// Packets of connections that both ends have closed come too late for their flow.
const LATE: &[&str] = &["no_flow"];

/// Where the gateway is asked: by the client, in both families, and by a node.
const GATEWAY_V4: &str = "198.51.100.1";
const GATEWAY_V6: &str = "[2001:db8:c::1]";
const GATEWAY_INSIDE: &str = "10.2.0.1";

/// An answer as curl got it.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// Lower case.
    headers: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// Asks `url` from a namespace. Errors: curl's exit code 7 is a refused connection.
fn ask(from: &Namespace, url: &str, args: &[&str]) -> Result<Answer, Option<i32>> {
    let mut words = vec!["-s", "-i", "--max-time", "10", url];
    words.extend_from_slice(args);
    let output = from.output("curl", &words).expect("curl runs");
    if !output.status.success() {
        return Err(output.status.code());
    }
    let text = String::from_utf8(output.stdout).expect("text");
    let (headers, body) = text.split_once("\r\n\r\n").expect("headers and a body");
    let status = headers.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    Ok(Answer { status, headers: headers.to_lowercase(), body: body.to_owned() })
}

/// Waits until `url` answers with `status`.
#[track_caller]
fn becomes(from: &Namespace, url: &str, status: u16) -> Answer {
    let start = Instant::now();
    loop {
        match ask(from, url, &[]) {
            Ok(answer) if answer.status == status => return answer,
            other => assert!(
                start.elapsed() < Duration::from_secs(20),
                "{url} does not become {status}: {other:?}"
            ),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until nobody listens there any more.
#[track_caller]
fn closes(from: &Namespace, url: &str) {
    let start = Instant::now();
    loop {
        match ask(from, url, &[]) {
            Err(Some(7)) => return,
            other => assert!(start.elapsed() < Duration::from_secs(20), "{url} does not close: {other:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The gateway's Node with addresses on both sides.
fn gateway_node(rest: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata:\n  name: gw-1\n{rest}\nstatus: {{addresses: [{{type: InternalIP, address: {GATEWAY_V4}}}, \
         {{type: InternalIP, address: '2001:db8:c::1'}}, {{type: InternalIP, address: {GATEWAY_INSIDE}}}]}}\n"
    )
}

/// A Service of pods with a health check; `name` and `number` tell it from others.
fn checked(name: &str, number: u8, port: u16, policy: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}}}\nspec:\n  type: LoadBalancer\n  \
         externalTrafficPolicy: {policy}\n  healthCheckNodePort: {port}\n  allocateLoadBalancerNodePorts: false\n  \
         clusterIP: 10.96.0.{number}\n  clusterIPs: [10.96.0.{number}, 'fd00:96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  \
         ipFamilyPolicy: RequireDualStack\n  ports: [{{name: http, port: 80}}]\n\
         status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.{number}}}]}}}}\n"
    )
}

/// Its IPv4 slice: pods with their conditions.
fn slice(name: &str, pods: &[(u8, &str)]) -> String {
    let mut text = format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: shop, name: {name}-4, \
         labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: 80}}]\nendpoints:\n"
    );
    for (pod, conditions) in pods {
        text +=
            &format!("- {{addresses: [{}], nodeName: node-1, conditions: {{{conditions}}}}}\n", pod_v4(*pod));
    }
    if pods.is_empty() { text.replace("endpoints:", "endpoints: []") } else { text }
}

const READY: &str = "ready: true";
const TERMINATING: &str = "ready: false, serving: true, terminating: true";

/// Rules 10.1, 10.2.
#[test]
fn health_checks_of_services_come_change_and_go() {
    let cluster = Cluster::new("check", 1).unwrap();
    let daemon = cluster.daemon();
    let (client, node) = (&cluster.client, &cluster.node);
    let received = || daemon.stats().unwrap().totals.iter().find(|c| c.name == "rx_packets").unwrap().value;
    let at = |host: &str, port: u16| format!("http://{host}:{port}/");
    closes(client, &at(GATEWAY_V4, 32_000));

    daemon
        .apply(
            &[gateway_node(""), checked("web", 30, 32_000, "Local"), slice("web", &[(1, READY), (2, READY)])]
                .concat(),
        )
        .unwrap();
    let before = received();
    let answer = becomes(client, &at(GATEWAY_V4, 32_000), 200);
    assert_eq!(
        answer.json(),
        json!({"service": {"namespace": "shop", "name": "web"}, "localEndpoints": 2, "serviceProxyHealthy": true})
    );
    for header in [
        "content-type: application/json",
        "x-content-type-options: nosniff",
        "x-load-balancing-endpoint-weight: 2",
    ] {
        assert!(answer.headers.lines().any(|line| line == header), "{header}: {}", answer.headers);
    }
    becomes(node, &at(GATEWAY_INSIDE, 32_000), 200);
    // The Service has no IPv6 endpoint, and each family answers for itself.
    let v6 = becomes(client, &at(GATEWAY_V6, 32_000), 503);
    assert_eq!(v6.json()["localEndpoints"], 0);
    assert_eq!(received(), before, "the steering program leaves these packets to the kernel");

    // kubernetes e2e "should fail health check node port if there are only terminating endpoints"; its connections go on.
    daemon.apply(&slice("web", &[(1, TERMINATING), (2, TERMINATING)])).unwrap();
    assert_eq!(becomes(client, &at(GATEWAY_V4, 32_000), 503).json()["localEndpoints"], 0);
    cluster.curl(&["http://203.0.113.30/"]).unwrap();
    daemon.apply(&slice("web", &[(1, READY), (2, TERMINATING)])).unwrap();
    assert_eq!(becomes(client, &at(GATEWAY_V4, 32_000), 200).json()["localEndpoints"], 1);

    // Another Service beside it; another port; the data plane dies; another policy; gone.
    daemon.apply(&[checked("api", 31, 32_005, "Local"), slice("api", &[])].concat()).unwrap();
    assert_eq!(becomes(client, &at(GATEWAY_V4, 32_005), 503).json()["service"]["name"], "api");
    daemon.apply(&checked("web", 30, 32_001, "Local")).unwrap();
    becomes(client, &at(GATEWAY_V4, 32_001), 200);
    closes(client, &at(GATEWAY_V4, 32_000));
    daemon.kill_data_plane().unwrap();
    becomes(client, &at(GATEWAY_V4, 32_001), 200);
    becomes(client, &at(GATEWAY_V4, 32_005), 503);
    becomes(client, &at(GATEWAY_V4, 10_256).replace("256/", "256/healthz"), 200);
    daemon.apply(&checked("web", 30, 32_001, "Cluster")).unwrap();
    closes(client, &at(GATEWAY_V4, 32_001));
    daemon.ctl(&["delete", "service", "api", "-n", "shop"]).unwrap();
    closes(client, &at(GATEWAY_V4, 32_005));
    cluster.finish(LATE).unwrap();
}

#[test]
fn a_port_that_is_taken_is_a_problem_until_it_is_free() {
    let cluster = Cluster::new("taken", 1).unwrap();
    let daemon = cluster.daemon();
    let squatter = cluster.gateway.inside(|| Ok(TcpListener::bind(("198.51.100.1", 32_000))?)).unwrap();
    daemon.apply(&[checked("web", 30, 32_000, "Local"), slice("web", &[(1, READY)])].concat()).unwrap();
    let problem = || daemon.status().unwrap().problems.iter().map(ToString::to_string).collect::<String>();
    eventually("the problem is told", || {
        problem().contains("198.51.100.1:32000: another program listens there")
    });
    // Packets do not care, and nor does the health of the gateway.
    cluster.curl(&["http://203.0.113.30/"]).unwrap();
    becomes(&cluster.client, &format!("http://{GATEWAY_V4}:10256/healthz"), 200);
    drop(squatter);
    becomes(&cluster.client, &format!("http://{GATEWAY_V4}:32000/"), 200);
    eventually("the problem is gone", || problem().is_empty());
    cluster.finish(LATE).unwrap();
}

#[track_caller]
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Rules 10.4, 10.5.
#[test]
fn healthz_and_livez_are_those_of_kube_proxy() {
    let cluster = Cluster::new("healthz", 1).unwrap();
    let daemon = cluster.daemon();
    let (client, node) = (&cluster.client, &cluster.node);
    let healthz = format!("http://{GATEWAY_V4}:10256/healthz");
    let livez = format!("http://{GATEWAY_V4}:10256/livez");
    let answer = becomes(client, &healthz, 200).json();
    assert_eq!((&answer["nodeEligible"], &answer["healthy"]), (&json!(true), &json!(true)));
    assert_eq!(answer["lastUpdated"], answer["currentTime"], "a healthy proxy is up to date");
    assert_eq!(answer["status"]["IPv4"]["healthy"], json!(true));
    assert_eq!(becomes(client, &livez, 200).json().get("nodeEligible"), None);
    for (from, host) in
        [(client, GATEWAY_V6), (node, GATEWAY_INSIDE), (node, "[fd00:2::1]"), (&cluster.gateway, "127.0.0.1")]
    {
        becomes(from, &format!("http://{host}:10256/healthz"), 200);
    }
    let head = ask(client, &healthz, &["--head"]).unwrap();
    assert!(head.status == 200 && head.body.is_empty(), "{head:?}");
    assert_eq!(ask(client, &healthz, &["-d", "x"]).unwrap().status, 405);
    assert_eq!(ask(client, &format!("http://{GATEWAY_V4}:10256/"), &[]).unwrap().status, 404);

    // Our Node is about to go; then it is fine again; then it is being deleted. Somebody else's does not matter.
    let taint = "spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}";
    let deleted = "  deletionTimestamp: '2026-11-27T08:00:00Z'";
    let other = "spec: {taints: [{key: node.kubernetes.io/unschedulable, effect: NoSchedule}]}";
    for (rest, status) in [(taint, 503), (other, 200), (deleted, 503), ("", 200)] {
        daemon.apply(&gateway_node(rest)).unwrap();
        let answer = becomes(client, &healthz, status).json();
        assert_eq!(
            (&answer["nodeEligible"], &answer["healthy"]),
            (&json!(status == 200), &json!(true)),
            "{rest}"
        );
        assert_eq!(ask(client, &livez, &[]).unwrap().status, 200, "{rest}");
    }
    daemon.kill_data_plane().unwrap();
    becomes(client, &healthz, 200);

    // Clients that say nothing, or a letter now and then, keep nobody waiting and are cut off.
    let slow: Vec<TcpStream> =
        client.inside(|| (0..200).map(|_| Ok(TcpStream::connect((GATEWAY_V4, 10_256))?)).collect()).unwrap();
    let start = Instant::now();
    let mut last = slow.last().unwrap();
    last.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    loop {
        assert_eq!(ask(client, &healthz, &[]).unwrap().status, 200);
        let _ = last.write(b"G");
        match last.read(&mut [0; 16]) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            _ => break,
        }
        assert!(start.elapsed() < Duration::from_secs(50), "a slow client is never cut off");
    }
    println!("a slow client was cut off after {:?}", start.elapsed());
    cluster.finish(LATE).unwrap();
}

#[test]
fn nothing_is_served_that_is_switched_off() {
    let off = format!("{GATEWAY}\n[health]\nlisten = \"off\"\nnode_ports = false\n");
    let cluster = Cluster::with("off", 1, 1, &off).unwrap();
    let daemon = cluster.daemon();
    daemon.apply(&[checked("web", 30, 32_000, "Local"), slice("web", &[(1, READY)])].concat()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    for url in [format!("http://{GATEWAY_V4}:10256/healthz"), format!("http://{GATEWAY_V4}:32000/")] {
        assert_eq!(ask(&cluster.client, &url, &[]).unwrap_err(), Some(7), "{url}");
    }
    let metrics = Metrics::parse(&daemon.ctl(&["metrics"]).unwrap()).unwrap();
    assert_eq!(metrics.get("towpath_healthy").unwrap(), 1.0);
    cluster.finish(LATE).unwrap();
}

/// What `/metrics` serves, read strictly.
fn scrape(cluster: &Cluster) -> Result<Metrics> {
    let answer = ask(&cluster.client, &format!("http://{GATEWAY_V4}:10256/metrics"), &[])
        .map_err(|code| anyhow::anyhow!("curl ended with {code:?}"))?;
    ensure!(answer.status == 200 && answer.headers.contains("content-type: application/openmetrics-text"));
    Metrics::parse(&answer.body).context("the metrics")
}

/// Rule 10.6.
#[test]
fn metrics_tell_what_happened() {
    let cluster = Cluster::new("metrics", 1).unwrap();
    let daemon = cluster.daemon();
    let before = scrape(&cluster).unwrap_or_else(|error| panic!("{error:#}"));
    for _ in 0..3 {
        cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    }
    let refused =
        cluster.client.output("curl", &["-s", "--max-time", "10", &format!("http://{VIP}:81/")]).unwrap();
    assert_eq!(refused.status.code(), Some(7));
    ask(&cluster.client, &format!("http://{GATEWAY_V4}:10256/healthz"), &[]).unwrap();
    ask(&cluster.client, &format!("http://{GATEWAY_V4}:10256/livez"), &[]).unwrap();
    // RFC 3339 with nanoseconds, as Kubernetes writes it.
    let time = cluster.gateway.sh("date -u +%Y-%m-%dT%H:%M:%S.%NZ").unwrap();
    let annotated = slice("web", &[(1, READY)]).replace(
        "labels:",
        &format!(
            "annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '{}'}}, labels:",
            time.trim()
        ),
    );
    daemon.apply(&[checked("web", 30, 32_000, "Local"), annotated].concat()).unwrap();

    let after = scrape(&cluster).unwrap_or_else(|error| panic!("{error:#}"));
    let grown = |sample: &str| after.get(sample).unwrap() - before.get(sample).unwrap();
    assert!(grown("towpath_packets_total{worker=\"0\",direction=\"received\"}") >= 3.0 * 8.0);
    assert!(grown("towpath_bytes_total{worker=\"0\",direction=\"sent\"}") > 1000.0);
    assert!(grown("towpath_flows_created_total{worker=\"0\"}") >= 3.0);
    assert_eq!(grown("towpath_drops_total{reason=\"unknown_port\"}"), 1.0);
    assert_eq!(grown("kubeproxy_proxy_healthz_total{code=\"200\"}"), 1.0);
    assert_eq!(grown("kubeproxy_proxy_livez_total{code=\"200\"}"), 1.0);
    assert_eq!(grown("towpath_generation"), 1.0);
    assert_eq!(grown("kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}"), 1.0);
    assert_eq!(grown("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}"), 1.0);
    assert_eq!(grown("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"}"), 0.0);
    for (sample, value) in [
        ("towpath_healthy", 1.0),
        ("towpath_workers", 1.0),
        ("towpath_worker_up{worker=\"0\"}", 1.0),
        ("towpath_port_up{port=\"uplink\"}", 1.0),
        ("towpath_restarts_total", 0.0),
        ("towpath_flows_capacity", 262_144.0),
        (
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"}",
            0.0,
        ),
    ] {
        assert_eq!(after.get(sample).unwrap(), value, "{sample}");
    }
    // The keeper is asked for these twice a second.
    eventually("steered packets are counted", || {
        scrape(&cluster).unwrap().sum("towpath_steered_total") > 0.0
    });
    assert_eq!(after.get("towpath_rings_total{port=\"uplink\",counter=\"rx_invalid_descs\"}").unwrap(), 0.0);
    // Received packets are those forwarded, punted, and those with a reason.
    let verdict = |word: &str| {
        after.get(&format!("towpath_verdicts_total{{worker=\"0\",verdict=\"{word}\"}}")).unwrap()
    };
    let ended = verdict("forwarded") + verdict("punted") + after.sum("towpath_drops_total");
    assert_eq!(after.get("towpath_packets_total{worker=\"0\",direction=\"received\"}").unwrap(), ended);

    // The command prints the same families.
    let printed =
        Metrics::parse(&daemon.ctl(&["metrics"]).unwrap()).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(printed.types(), after.types());
    cluster.finish(&["no_flow", "unknown_port"]).unwrap();
}
