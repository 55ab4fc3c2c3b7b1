//! Manifests: a change that cannot be is refused whole, with document, field, value and remedy; what can wait, waits.

use std::fmt::Write as _;

use tests::cluster::{Cluster, pod_v4};

use super::{cluster, undisturbed};

/// Runs `towpathctl apply` on a text: exit code, standard output, standard error.
fn apply(cluster: &Cluster, manifests: &str) -> (Option<i32>, String, String) {
    let file = cluster.folder.path().join("objects.yaml");
    std::fs::write(&file, manifests).unwrap();
    let output = cluster.daemon().ctl_output(&["apply", "-f", &file.to_string_lossy()]).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Everything that a refused change may not touch.
fn state(cluster: &Cluster) -> (u64, String) {
    let objects = cluster.daemon().ctl(&["get", "all", "-o", "yaml"]).unwrap();
    (cluster.daemon().status().unwrap().generation, objects)
}

/// Applies what must be refused for these words, and for nothing else but as many reasons as are said.
#[track_caller]
fn refuses(cluster: &Cluster, manifests: &str, reasons: usize, words: &[&str]) {
    let before = state(cluster);
    let (code, stdout, stderr) = apply(cluster, manifests);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    for word in words.iter().chain(&["objects.yaml:"]) {
        assert!(stderr.contains(word), "{word:?} is missing in\n{stderr}");
    }
    // The last error is the sentence that nothing was done.
    assert_eq!(stderr.matches("error: ").count(), reasons + 1, "{stderr}");
    assert!(
        stderr.trim_end().ends_with("nothing was changed") || stderr.trim_end().ends_with("nothing was done")
    );
    assert_eq!(state(cluster), before, "something of it took effect");
    println!("{}", stderr.lines().next().unwrap_or_default());
}

/// A Service by name, ClusterIP and what else is in `spec`, with a load balancer's address.
fn service(name: &str, cluster_ip: &str, spec: &str, vip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: LoadBalancer\n  \
         allocateLoadBalancerNodePorts: false\n  externalTrafficPolicy: Local\n  clusterIP: {cluster_ip}\n  {spec}\n\
         status: {{loadBalancer: {{ingress: [{{ip: {vip}}}]}}}}\n"
    )
}

fn slice(service: &str, address: &str) -> String {
    let family = if address.contains(':') { "IPv6" } else { "IPv4" };
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}-x, labels: \
         {{kubernetes.io/service-name: {service}}}}}\naddressType: {family}\nports: [{{port: 80}}]\n\
         endpoints:\n- {{addresses: ['{address}'], nodeName: node-1}}\n"
    )
}

fn node(name: &str, cidr: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}, spec: {{podCIDR: {cidr}, podCIDRs: [{cidr}]}}}}\n"
    )
}

fn pod(name: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{nodeName: node-1, containers: [{{name: c}}]}}\n\
         status: {{phase: Running, podIP: {address}, podIPs: [{{ip: {address}}}]}}\n"
    )
}

const PORTS: &str = "ports: [{port: 80}]";

#[test]
fn bad_objects_are_refused_and_what_can_wait_waits() {
    let cluster = cluster("objects");
    undisturbed(&cluster, || {
        refused(&cluster);
        waiting(&cluster);
        skipped(&cluster);
    });
    cluster.finish(&["no_flow"]).unwrap();
}

/// A change with a bad object is refused whole.
fn refused(cluster: &Cluster) {
    for (manifests, words) in texts() {
        refuses(cluster, &manifests, 1, &words);
    }
    for (manifests, words) in conflicts() {
        refuses(cluster, &manifests, 1, &words);
    }
    // Each of the two is told of the other.
    let two = pod("one", "10.244.1.77") + &pod("two", "10.244.1.77");
    let words = [
        "Pod default/one: status.podIPs[0].ip: is the address of Pod default/two too",
        "is the address of Pod default/one too",
        "10.244.1.77",
        "remedy: delete the one that is gone",
    ];
    refuses(cluster, &two, 2, &words);
    // One of a hundred.
    let mut hundred = String::new();
    for index in 0..100 {
        let port = if index == 61 { 70_000 } else { 80 };
        let _ = write!(
            hundred,
            "{}",
            service(
                &format!("s{index}"),
                &format!("10.96.7.{index}"),
                &format!("ports: [{{port: {port}}}]"),
                &format!("203.0.113.{}", 100 + index)
            )
        );
    }
    refuses(
        cluster,
        &hundred,
        1,
        &["Service default/s61: spec.ports[0].port: not a port", "document 62", "value: 70000"],
    );
    assert!(cluster.daemon().ctl(&["get", "svc", "s0"]).is_err(), "nothing of the hundred");
}

/// What the text alone shows: found before the daemon hears of it.
fn texts() -> Vec<(String, Vec<&'static str>)> {
    let head = "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec:\n  clusterIP: 10.96.0.99\n";
    vec![
        (
            format!("{head}  ports:\n  - port: 80\n   name: x\n"),
            vec!["objects.yaml:8", "block mapping", "remedy: indent with spaces"],
        ),
        (head.replace("{name: bad}", "\n\tname: bad"), vec!["objects.yaml:4", "tabs"]),
        (
            format!("{head}  ports:\n  - port: eighty\n"),
            vec![
                "Service default/bad: spec.ports[0].port: invalid type",
                "objects.yaml:7",
                "value: \"eighty\"",
                "kubectl explain service",
            ],
        ),
        (
            head.replace("10.96.0.99", "[10.96.0.99]"),
            vec!["spec.clusterIP: invalid type", "objects.yaml:5", "value: [\"10.96.0.99\"]"],
        ),
        (
            format!("{head}  ports: [{{port: 80}}]\n  ports: [{{port: 81}}]\n"),
            vec!["objects.yaml:7", "ports stands there twice", "remedy: remove one of them"],
        ),
        (format!("{head}  ports: {}\n", "[".repeat(100_000)), vec!["nested too deeply"]),
        (
            head.replace("apiVersion: v1", "apiVersion: v7"),
            vec!["apiVersion: not the apiVersion of a Service", "value: v7", "remedy: use v1"],
        ),
        ("kind: Service\n".to_owned(), vec!["apiVersion"]),
        ("just words\n".to_owned(), vec!["not an object with apiVersion and kind", "\"just words\""]),
    ]
}

/// What the daemon knows: values that mean nothing, and claims to what others have.
fn conflicts() -> Vec<(String, Vec<&'static str>)> {
    let own = "203.0.113.99";
    let endpoint = |address: &str| slice("web", address);
    vec![
        (
            service("bad", "10.96.0.99", "ports: []", own),
            vec!["Service default/bad: spec.ports: a Service needs ports", "remedy: list at least one port"],
        ),
        (
            service("thief", "10.96.0.99", PORTS, "203.0.113.10"),
            vec![
                "Service default/thief: status.loadBalancer.ingress[0].ip: is taken by Service default/web",
                "value: 203.0.113.10 port 80/TCP",
                "another address or port",
            ],
        ),
        (
            service("far", "10.96.0.99", PORTS, "192.0.2.77"),
            vec![
                "lies outside load_balancer_cidrs",
                "value: 192.0.2.77",
                "add its range to [gateway] load_balancer_cidrs",
            ],
        ),
        (service("own", "10.96.0.99", PORTS, "198.51.100.1"), vec!["is an address of this gateway"]),
        (
            node("node-2", "10.244.1.128/25"),
            vec![
                "Node node-2: spec.podCIDRs[0]: overlaps the podCIDR 10.244.1.0/24 of Node node-1",
                "value: 10.244.1.128/25",
            ],
        ),
        (node("node-2", "10.96.4.0/24"), vec!["spec.podCIDRs[0]: overlaps service_cidrs"]),
        (
            endpoint("127.0.0.1"),
            vec![
                "EndpointSlice default/web-x: endpoints[0].addresses[0]: is a loopback address",
                "value: 127.0.0.1",
                "unicast",
            ],
        ),
        (endpoint("169.254.1.1"), vec!["is a link-local address (169.254.0.0/16)"]),
        (endpoint("224.0.0.1"), vec!["is a multicast address"]),
        (endpoint("0.0.0.0"), vec!["is unspecified"]),
        (endpoint("::1"), vec!["is the loopback address (::1)"]),
        (endpoint("fe80::1"), vec!["is a link-local address"]),
        (endpoint("ff02::1"), vec!["is a multicast address"]),
        (
            endpoint("203.0.113.10"),
            vec!["is an address of Service default/web: packets would come back forever"],
        ),
        (endpoint("10.96.0.20"), vec!["is an address of Service default/shop"]),
        (endpoint("ten"), vec!["not an IP address", "value: ten"]),
        (
            pod("thief", "203.0.113.10"),
            vec!["Pod default/thief: status.podIPs[0].ip:", "Service default/web"],
        ),
    ]
}

/// A slice may come before its Service.
fn waiting(cluster: &Cluster) {
    let (code, stdout, stderr) = apply(cluster, &slice("late", &pod_v4(1)));
    assert_eq!(
        (code, stdout.as_str()),
        (Some(0), "endpointslice.discovery.k8s.io/late-x created\n"),
        "{stderr}"
    );
    for word in [
        "warning: EndpointSlice default/late-x",
        "the slice is kept and waits",
        "value: late",
        "remedy: apply the Service too",
    ] {
        assert!(stderr.contains(word), "{stderr}");
    }
    assert_eq!(cluster.daemon().status().unwrap().slices_waiting, 1);
    let said = cluster.daemon().ctl(&["status"]).unwrap();
    assert!(said.contains("1 slice waits for its Service"), "{said}");
    let url = "http://203.0.113.30/";
    assert!(cluster.curl(&["--max-time", "1", url]).is_err(), "there is no such Service yet");
    let (code, _, stderr) = apply(cluster, &service("late", "10.96.0.30", PORTS, "203.0.113.30"));
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(cluster.curl(&[url]).unwrap(), format!("{} 198.51.100.2\n", pod_v4(1)));
    assert_eq!(cluster.daemon().status().unwrap().slices_waiting, 0);
}

/// Kinds that a gateway does not use are skipped; fields that the API does not have are told.
fn skipped(cluster: &Cluster) {
    let deployment =
        "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec: {replicas: 3}\n";
    let both = format!("{deployment}{}", service("beside", "10.96.0.31", PORTS, "203.0.113.31"));
    let (code, stdout, stderr) = apply(cluster, &both);
    assert_eq!((code, stdout.as_str()), (Some(0), "service/beside created\n"), "{stderr}");
    assert_eq!(stderr, "skipped 1 object of kind Deployment, which Towpath does not use\n");
    let (code, stdout, stderr) = apply(cluster, deployment);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.ends_with("error: no objects to apply: nothing was done\n"), "{stderr}");
    // A typing error is told, as the API server would drop it without a word.
    let typo = service("beside", "10.96.0.31", "ports: [{port: 80, protocl: UDP}]", "203.0.113.31");
    let (code, _, stderr) = apply(cluster, &typo);
    assert_eq!(code, Some(0));
    assert!(stderr.contains("did you mean spec.ports[0].protocol?"), "{stderr}");
}
