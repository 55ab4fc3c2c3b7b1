//! `towpathctl explain` on manifests as kubectl prints them. No test here needs root, a daemon or a cluster.

use std::process::Output;
use std::time::Duration;

use assert_cmd::Command;
use serde_json::Value;

const CLUSTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/cluster.yaml");

fn ctl(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("towpathctl").unwrap();
    // A socket that does not exist: nobody may be asked.
    command.env("TOWPATH_SOCKET", "/nonexistent").env("NO_COLOR", "1").timeout(Duration::from_secs(60));
    command.arg("explain").args(args);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What is printed about a packet in the cluster of the manifests.
fn explain(packet: &str) -> String {
    let output = ctl(&["-f", CLUSTER, packet]).assert().code(0).stderr("");
    text(&output.get_output().stdout)
}

/// The same for programs.
fn trace(args: &[&str], packet: &str) -> Value {
    let all: Vec<&str> = args.iter().copied().chain(["-o", "json", packet]).collect();
    let Output { stdout, .. } = ctl(&all).assert().code(0).get_output().clone();
    serde_json::from_slice(&stdout).unwrap()
}

fn in_cluster(packet: &str) -> Value {
    trace(&["-f", CLUSTER], packet)
}

#[test]
fn a_load_balancer_address_from_outside() {
    insta::assert_snapshot!(explain("tcp 198.51.100.7:4242 > 203.0.113.10:8080"), @r#"
    tcp 198.51.100.7:4242 > 203.0.113.10:8080
      is forwarded as tcp 192.0.2.129:64221 > 10.244.1.7:80 by port inside

      Service    default/my-nginx, type LoadBalancer, resourceVersion 4711
      Frontend   203.0.113.10:8080/TCP, a LoadBalancer address, port http
      Client     outside the cluster
      Rule       externalTrafficPolicy Cluster: any endpoint, and replies must come back through us
      Endpoint   10.244.1.7:80, Pod/my-nginx-646554d7fd-gqsfh on node-1
      Source     192.0.2.129:64221, masqueraded

      ENDPOINT        STATE         NODE     TARGET                          WHY
      10.244.1.7:80   ready         node-1   Pod/my-nginx-646554d7fd-gqsfh   chosen
      10.244.2.5:80   ready         node-2   Pod/my-nginx-646554d7fd-7lm2p   in the list: other connections come here
      10.244.2.9:80   not ready     node-2   Pod/my-nginx-646554d7fd-x8kcn   not ready
      10.244.1.4:80   terminating   node-1   Pod/my-nginx-5b56ccd65f-w2dzt   terminating: used only while no endpoint is ready

      Walk
        parse      tcp 198.51.100.7:4242 > 203.0.113.10:8080
        flow       no connection has this tuple
        classify   source is outside the cluster
        service    Service default/my-nginx port http, status.loadBalancer.ingress
                   list cluster: 2 ready endpoints of the cluster
                   endpoint 10.244.1.7:80 (default/my-nginx-646554d7fd-gqsfh on node-1), by consistent hash
        route      10.244.1.7/32 by port inside, next hop 192.0.2.1
        nat        source becomes 192.0.2.129:64221: the rule says masquerade
        verdict    forwarded by port inside

      Assumed
        one port outside, one inside; nodes and pods are inside
        return = "routed": the cluster routes replies to clients through the gateway
        service ranges 10.96.0.0/16, fd00:96::/112, from the ClusterIPs
        the gateway's own addresses are of the documentation ranges 192.0.2.128/25 and 2001:db8:ffff::/48
    "#);
}

/// The README opens with this very output.
#[test]
fn the_readme_is_true() {
    let readme = include_str!("../../README.md");
    let output = explain("tcp 198.51.100.7:4242 > 203.0.113.10:8080");
    assert!(readme.contains(&output), "put this into README.md:\n{output}");
}

#[test]
fn everything_that_is_served() {
    let output = ctl(&["-f", CLUSTER]).assert().code(0);
    insta::assert_snapshot!(text(&output.get_output().stdout), @"
    SERVICE                FRONTEND                   KIND           PORT      FOR CLIENTS OUTSIDE               FOR PODS
    default/kubernetes     10.96.0.1:443/TCP          ClusterIP      https     drop (cluster_internal)           dnat to 1 (cluster)
    default/my-nginx       10.96.142.17:8080/TCP      ClusterIP      http      drop (cluster_internal)           dnat to 2 (cluster)
    default/my-nginx       [fd00:96::8e11]:8080/TCP   ClusterIP      http      drop (cluster_internal)           dnat to 2 (cluster)
    default/my-nginx       203.0.113.10:8080/TCP      LoadBalancer   http      dnat to 2 (cluster), masquerade   dnat to 2 (cluster), masquerade
    default/my-nginx       [2001:db8::10]:8080/TCP    LoadBalancer   http      dnat to 2 (cluster), masquerade   dnat to 2 (cluster), masquerade
    default/my-nginx       <gateway>:31704/TCP        NodePort       http      dnat to 2 (cluster), masquerade   dnat to 2 (cluster), masquerade
    default/my-nginx       10.96.142.17:443/TCP       ClusterIP      https     drop (cluster_internal)           dnat to 2 (cluster)
    default/my-nginx       [fd00:96::8e11]:443/TCP    ClusterIP      https     drop (cluster_internal)           dnat to 2 (cluster)
    default/my-nginx       203.0.113.10:443/TCP       LoadBalancer   https     dnat to 2 (cluster), masquerade   dnat to 2 (cluster), masquerade
    default/my-nginx       [2001:db8::10]:443/TCP     LoadBalancer   https     dnat to 2 (cluster), masquerade   dnat to 2 (cluster), masquerade
    default/my-nginx       <gateway>:32453/TCP        NodePort       https     dnat to 2 (cluster), masquerade   dnat to 2 (cluster), masquerade
    kube-system/kube-dns   10.96.0.10:53/UDP          ClusterIP      dns       drop (cluster_internal)           dnat to 1 (cluster)
    kube-system/kube-dns   10.96.0.10:53/TCP          ClusterIP      dns-tcp   drop (cluster_internal)           dnat to 1 (cluster)
    shop/billing           10.96.77.3:443/TCP         ClusterIP      https     drop (cluster_internal)           dnat to 1 (cluster)
    shop/billing           203.0.113.11:443/TCP       LoadBalancer   https     dnat to 1 (local)                 dnat to 1 (cluster)
    shop/billing           <gateway>:30443/TCP        NodePort       https     dnat to 1 (local)                 dnat to 1 (cluster)
    shop/empty             10.96.77.4:9000/TCP        ClusterIP      <none>    drop (cluster_internal)           reject (no_endpoints)
    shop/empty             <gateway>:30900/TCP        NodePort       <none>    reject (no_endpoints)             reject (no_endpoints)
    ");
    let notice = text(&output.get_output().stderr);
    assert!(notice.contains("'tcp 198.51.100.7:4242 > 203.0.113.10:8080'"), "{notice}");
}

#[test]
fn a_service_without_endpoints_rejects() {
    insta::assert_snapshot!(explain("tcp 10.244.1.7:40000 > 10.96.77.4:9000"), @r#"
    tcp 10.244.1.7:40000 > 10.96.77.4:9000
      is answered by the gateway: the Service has no endpoints at all: rejected (no_endpoints)

      Service    shop/empty, type NodePort, resourceVersion 5133
      Frontend   10.96.77.4:9000/TCP, a ClusterIP
      Client     a pod of this cluster
      Rule       the Service has no usable endpoint anywhere

      The Service has no endpoint for this port and address family.

      Walk
        parse      tcp 10.244.1.7:40000 > 10.96.77.4:9000
        flow       no connection has this tuple
        classify   source is a pod of this cluster
        service    Service shop/empty, spec.clusterIPs
        answer     answered with TCP RST
        verdict    not forwarded: the Service has no endpoints at all: rejected (no_endpoints)

      Assumed
        one port outside, one inside; nodes and pods are inside
        return = "routed": the cluster routes replies to clients through the gateway
        service ranges 10.96.0.0/16, fd00:96::/112, from the ClusterIPs
        the gateway's own addresses are of the documentation ranges 192.0.2.128/25 and 2001:db8:ffff::/48
    "#);
}

#[test]
fn a_cluster_ip_is_not_for_clients_outside() {
    insta::assert_snapshot!(explain("tcp 198.51.100.7:4242 > 10.96.0.10:53"), @r#"
    tcp 198.51.100.7:4242 > 10.96.0.10:53
      is dropped: a ClusterIP is not served to the outside on this port (cluster_internal)

      Service    kube-system/kube-dns, type ClusterIP, resourceVersion 261
      Frontend   10.96.0.10:53/TCP, a ClusterIP, port dns-tcp
      Client     outside the cluster
      Rule       a ClusterIP is for the inside; expose_cluster_ips = true on a port serves it there too

      ENDPOINT        STATE   NODE     TARGET                         WHY
      10.244.1.2:53   ready   node-1   Pod/coredns-7c65d6cfc9-m2k8t   in list cluster, which is not used here

      Walk
        parse      tcp 198.51.100.7:4242 > 10.96.0.10:53
        flow       no connection has this tuple
        classify   source is outside the cluster
        service    Service kube-system/kube-dns port dns-tcp, spec.clusterIPs
        verdict    dropped: a ClusterIP is not served to the outside on this port (cluster_internal)

      Assumed
        one port outside, one inside; nodes and pods are inside
        return = "routed": the cluster routes replies to clients through the gateway
        service ranges 10.96.0.0/16, fd00:96::/112, from the ClusterIPs
        the gateway's own addresses are of the documentation ranges 192.0.2.128/25 and 2001:db8:ffff::/48
    "#);
}

/// The walk alone, without what was assumed.
fn walk(packet: &str) -> String {
    let text = explain(packet);
    let (_, walk) = text.split_once("  Walk\n").unwrap();
    walk.split_once("\n\n").unwrap().0.to_owned()
}

#[test]
fn packets_for_no_port_of_a_service_are_told_in_words_of_their_own() {
    insta::assert_snapshot!(walk("icmp 198.51.100.7 > 203.0.113.10"), @"
    parse      icmp 198.51.100.7:40000 > 203.0.113.10:40000
    flow       no connection has this tuple
    classify   source is outside the cluster
    service    an address of Services: a ping of it is answered by the gateway
               served there: default/my-nginx 443/TCP, 8080/TCP
    answer     answered with an echo reply
    verdict    not forwarded: a ping of an address that we own, answered (echo_answered)
    ");
    insta::assert_snapshot!(walk("tcp 198.51.100.7 > 203.0.113.10:81"), @"
    parse      tcp 198.51.100.7:40000 > 203.0.113.10:81
    flow       no connection has this tuple
    classify   source is outside the cluster
    service    an address of Services, none of them on this port
               served there: default/my-nginx 443/TCP, 8080/TCP
    answer     answered with TCP RST
    verdict    not forwarded: the address belongs to a Service, but not this port: rejected (unknown_port)
    ");
    insta::assert_snapshot!(walk("udp 198.51.100.7 > 203.0.113.10:443"), @"
    parse      udp 198.51.100.7:40000 > 203.0.113.10:443
    flow       no connection has this tuple
    classify   source is outside the cluster
    service    an address of Services, none of them on this port
               served there: default/my-nginx 443/TCP, 8080/TCP
    answer     answered with ICMP port unreachable
    verdict    not forwarded: the address belongs to a Service, but not this port: rejected (unknown_port)
    ");
    let internal = walk("icmp 198.51.100.7 > 10.96.0.10");
    assert!(internal.contains("a ClusterIP, for the inside only"), "{internal}");
    assert!(internal.contains("served there: kube-system/kube-dns 53/TCP, 53/UDP"), "{internal}");
    insta::assert_snapshot!(walk("tcp 10.244.1.7 > 10.96.200.200:80"), @"
    parse      tcp 10.244.1.7:40000 > 10.96.200.200:80
    flow       no connection has this tuple
    classify   source is a pod of this cluster
    service    inside a Service range, but no Service has this address
    verdict    dropped: an address inside a service range without a Service (unknown_service)
    ");
    insta::assert_snapshot!(walk("udp 10.244.1.7 > 10.244.2.5:53"), @"
    parse      udp 10.244.1.7:40000 > 10.244.2.5:53
    flow       no connection has this tuple
    classify   source is a pod of this cluster
    service    a pod of this cluster: routed untranslated
    route      10.244.2.5/32 by port inside, next hop 192.0.2.1
    verdict    forwarded by port inside
    ");
    insta::assert_snapshot!(walk("tcp 198.51.100.7 > 192.168.50.11:22"), @"
    parse      tcp 198.51.100.7:40000 > 192.168.50.11:22
    flow       no connection has this tuple
    classify   source is outside the cluster
    service    a node of this cluster: routed untranslated
    route      192.168.50.11/32 by port inside, next hop 192.0.2.1
    verdict    forwarded by port inside
    ");
}

/// Every frontend, client and family: what comes out, or why not.
#[test]
fn every_kind_of_frontend_and_client() {
    for (packet, verdict, endpoint_or_reason) in [
        ("tcp 198.51.100.7:4242 > 203.0.113.10:443", "forward", "10.244."),
        ("tcp [2001:db8:1::7]:4242 > [2001:db8::10]:8080", "forward", "[fd00:244:"),
        ("udp 10.244.1.7 > 10.96.0.10:53", "forward", "10.244.1.2:53"),
        ("tcp 192.168.50.11 > 10.96.0.1:443", "forward", "192.168.50.10:6443"),
        ("tcp 198.51.100.7 > 203.0.113.11:443", "forward", "10.244.2.21:8443"),
        ("tcp 198.51.100.7 > 192.168.50.12:31704", "forward", "10.244."),
        ("tcp 192.0.2.7 > 203.0.113.11:443", "drop", "source_range"),
        ("tcp 198.51.100.7 > 203.0.113.10:81", "answer", "unknown_port"),
        ("icmp 198.51.100.7 > 203.0.113.10", "answer", "echo_answered"),
        ("tcp 10.244.1.7 > 10.96.200.200:80", "drop", "unknown_service"),
        ("tcp 10.244.1.7 > 10.96.77.4:9000", "answer", "no_endpoints"),
        ("tcp 10.244.1.7 > 10.244.1.7:80", "drop", "land"),
    ] {
        let trace = in_cluster(packet);
        assert_eq!(trace["verdict"], verdict, "{packet}: {trace:#}");
        let field = if verdict == "forward" { "endpoint" } else { "reason" };
        let found = trace[field].as_str().unwrap_or_default();
        assert!(found.starts_with(endpoint_or_reason), "{packet}: {field} is {found:?}");
    }
}

#[test]
fn local_policy_keeps_the_client_and_cluster_policy_masquerades() {
    let local = in_cluster("tcp 198.51.100.7:4242 > 203.0.113.11:443");
    assert_eq!(local["output"], "tcp 198.51.100.7:4242 > 10.244.2.21:8443");
    let cluster = in_cluster("tcp 198.51.100.7:4242 > 203.0.113.10:8080");
    assert!(!cluster["output"].as_str().unwrap().contains("198.51.100.7"), "{cluster:#}");
}

#[test]
fn the_same_packet_gets_the_same_endpoint_and_many_get_all() {
    let endpoint = |port: u16| {
        let trace = in_cluster(&format!("tcp 198.51.100.7:{port} > 203.0.113.10:8080"));
        trace["endpoint"].as_str().unwrap().to_owned()
    };
    assert_eq!(endpoint(4242), endpoint(4242));
    let mut endpoints: Vec<String> = (4242..4258).map(endpoint).collect();
    endpoints.sort();
    endpoints.dedup();
    assert_eq!(endpoints, ["10.244.1.7:80", "10.244.2.5:80"]);
}

#[test]
fn several_packets_and_a_list_from_standard_input() {
    let manifests = std::fs::read_to_string(CLUSTER).unwrap();
    let packets = ["tcp 198.51.100.7:1 > 203.0.113.10:443", "udp 10.244.1.7 > 10.96.0.10:53"];
    let output =
        ctl(&["-f", "-", "-o", "json", packets[0], packets[1]]).write_stdin(manifests).assert().code(0);
    let traces: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(traces.as_array().unwrap().len(), 2);
}

#[test]
fn json_objects_are_explained_too() {
    let yaml = std::fs::read_to_string(CLUSTER).unwrap();
    let value: Value = serde_saphyr::from_str(&yaml).unwrap();
    let packet = "tcp 198.51.100.7:4242 > 203.0.113.10:8080";
    let output = ctl(&["-f", "-", packet]).write_stdin(value.to_string()).assert().code(0);
    assert_eq!(text(&output.get_output().stdout), explain(packet));
}

#[test]
fn a_gateway_file_changes_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("gateway.toml");
    let gateway = |exposes: bool, return_path: &str| {
        let text = format!(
            "[gateway]\nname = \"gw-1\"\nservice_cidrs = [\"10.96.0.0/16\", \"fd00:96::/112\"]\nreturn = \"{return_path}\"\n\
             [[port]]\nname = \"uplink\"\ninterface = \"g0\"\nrole = \"outside\"\nexpose_cluster_ips = {exposes}\n\
             [[port]]\nname = \"fabric\"\ninterface = \"g1\"\nrole = \"inside\"\n"
        );
        std::fs::write(&file, text).unwrap();
        ["-f", CLUSTER, "--config", file.to_str().unwrap()]
    };
    let packet = "tcp 198.51.100.7:4242 > 10.96.0.10:53 from uplink";
    assert_eq!(trace(&gateway(false, "routed"), packet)["reason"], "cluster_internal");
    let exposed = trace(&gateway(true, "routed"), packet);
    assert_eq!((&exposed["verdict"], &exposed["port"]), (&"forward".into(), &"fabric".into()), "{exposed:#}");
    // Without routed replies the client's address cannot be kept.
    let local = trace(&gateway(false, "snat"), "tcp 198.51.100.7:4242 > 203.0.113.11:443");
    assert_eq!(local["reason"], "frontend_off");
}

fn fails(command: &mut Command, code: i32, parts: &[&str]) {
    let output = command.assert().code(code).stdout("");
    let stderr = text(&output.get_output().stderr);
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is missing:\n{stderr}");
    }
}

#[test]
fn a_packet_at_fault_is_told_before_anything_is_read() {
    for (packet, parts) in [
        ("tcp 198.51.100.7:4242 > 203.0.113.10", &["destination", "no port"][..]),
        ("tcp 198.51.100.7:4242 > 203.0.113.10:99999", &["203.0.113.10:99999"]),
        ("tcp 198.51.100.7 > [2001:db8::1]:80", &["2001:db8::1"]),
        ("gre 198.51.100.7 > 203.0.113.10", &["protocol", "gre", "not one of"]),
        ("tcp", &["quote the packet"]),
    ] {
        fails(&mut ctl(&["-f", "/nonexistent", packet]), 2, parts);
    }
    fails(
        &mut ctl(&["-f", CLUSTER, "tcp 192.0.2.1:1 > 203.0.113.10:80 from eth7"]),
        1,
        &["eth7", "outside, inside"],
    );
}

#[test]
fn objects_at_fault_name_file_field_value_and_remedy() {
    let packet = "tcp 198.51.100.7:4242 > 203.0.113.10:8080";
    let wrong = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: eighty\n";
    let parts =
        ["stdin:6 (document 1)", "Service default/a", "spec.ports[0].port", "eighty", "nothing was done"];
    fails(ctl(&["-f", "-", packet]).write_stdin(wrong), 1, &parts);
    fails(ctl(&["-f", "-", packet]).write_stdin("kind: [unclosed\n"), 1, &["stdin", "nothing was done"]);
    fails(ctl(&["-f", "-", packet]).write_stdin(""), 1, &["no objects to explain by", "kubectl get"]);
    fails(&mut ctl(&["-f", "/nonexistent.yaml", packet]), 1, &["/nonexistent.yaml"]);
    fails(&mut ctl(&[packet]), 2, &["-f"]);
    fails(&mut ctl(&["-f", CLUSTER, "--config", CLUSTER, packet]), 1, &["is no gateway file"]);
}

#[test]
fn one_object_at_fault_does_not_hide_the_rest() {
    let good = std::fs::read_to_string(CLUSTER).unwrap();
    // The address of another Service: the API server would have refused it, an etcd restore would not.
    let bad = "---\napiVersion: v1\nkind: Service\nmetadata: {name: thief}\nspec:\n  clusterIP: 10.96.0.10\n  clusterIPs: [10.96.0.10]\n  ports: [{port: 53, protocol: UDP}]\n";
    let packet = "tcp 198.51.100.7:4242 > 203.0.113.10:8080";
    let output = ctl(&["-f", "-", packet]).write_stdin(good + bad).assert().code(0);
    assert_eq!(text(&output.get_output().stdout), explain(packet));
    let stderr = text(&output.get_output().stderr);
    assert!(stderr.starts_with("left out: Service default/thief:"), "{stderr}");
    assert!(stderr.contains("kube-system/kube-dns"), "both are named: {stderr}");
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let script = format!(
        "{} explain -f {CLUSTER} | head -1; echo ${{PIPESTATUS[0]}}",
        assert_cmd::cargo::cargo_bin("towpathctl").display()
    );
    let output = std::process::Command::new("bash").arg("-c").arg(script).output().unwrap();
    assert_eq!(text(&output.stdout).lines().last(), Some("0"));
    assert!(!text(&output.stderr).contains("panicked"));
}

#[test]
fn what_is_for_the_gateway_itself_goes_to_the_kernel() {
    let to_node = trace(&["-f", CLUSTER, "--node", "node-1"], "tcp 198.51.100.7 > 192.168.50.11:22");
    assert_eq!(to_node["verdict"], "punt", "{to_node}");
    let assumed = in_cluster("tcp 198.51.100.7 > 192.0.2.129:22");
    assert_eq!(assumed["verdict"], "punt", "{assumed}");
    // The same address is another node's for a gateway that is none.
    assert_ne!(in_cluster("tcp 198.51.100.7 > 192.168.50.11:22")["verdict"], "punt");
}

#[test]
fn a_node_that_is_not_there_is_told() {
    let packet = "tcp 198.51.100.7 > 203.0.113.10:8080";
    fails(&mut ctl(&["-f", CLUSTER, "--node", "nope", packet]), 1, &["--node nope: no such Node", "node-1"]);
}
