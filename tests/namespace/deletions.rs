//! What is deleted leaves its connections alone, as with kube-proxy: on real sockets, over a restart too.

use std::time::Duration;

use tests::cluster::{Cluster, SNAT_VIP, VIP, VIP6, objects, slices};
use tests::process::Process;

/// A Service whose endpoint is a pod on its node's own address, outside of all pod ranges; by ClusterIP and NodePort.
const AGENT: &str = "---
apiVersion: v1
kind: Service
metadata: {namespace: default, name: agent}
spec: {type: NodePort, clusterIP: 10.96.0.30, ports: [{port: 80, nodePort: 30080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: default, name: agent-1, labels: {kubernetes.io/service-name: agent}}
addressType: IPv4
ports: [{port: 80}]
endpoints: [{addresses: [10.2.0.11], nodeName: node-1, conditions: {ready: true}}]
";

/// The gateway's own address, which is where NodePorts are.
const NODE_PORT: &str = "198.51.100.1:30080";

fn start_downloads(cluster: &Cluster, hosts: &[&str]) -> Vec<Process> {
    let start = |host: &&str| {
        let url = format!("http://{host}/slow");
        let args = ["-sS", "--max-time", "60", "-o", "/dev/null", "-w", "%{size_download}", &url];
        let log = cluster.folder.path().join(format!("download-{}", host.replace([':', '[', ']'], "-")));
        Process::start(&cluster.client, "curl", &args, &log).unwrap()
    };
    let downloads = hosts.iter().map(start).collect();
    std::thread::sleep(Duration::from_secs(1));
    downloads
}

fn wait_for(downloads: &mut [Process], hosts: &[&str]) {
    for (download, host) in downloads.iter_mut().zip(hosts) {
        let status = download.wait(Duration::from_secs(60)).unwrap();
        assert!(status.success() && download.log() == "20000000", "{host}: {status} {}", download.log());
    }
}

/// Nobody serves new connections at `host`.
fn is_gone(cluster: &Cluster, host: &str) {
    let output =
        cluster.client.output("curl", &["-sS", "--max-time", "1", &format!("http://{host}/")]).unwrap();
    assert!(!output.status.success(), "{host} still answers: {output:?}");
}

#[test]
fn connections_go_on_when_their_endpoints_and_services_are_deleted() {
    let cluster = Cluster::new("deleted", 3).unwrap();
    cluster.daemon().apply(AGENT).unwrap();
    let hosts = [VIP, &format!("[{VIP6}]"), SNAT_VIP, NODE_PORT];
    let mut downloads = start_downloads(&cluster, &hosts);
    // Endpoints first: those of the agent are nowhere else in the tables.
    cluster.daemon().ctl(&["delete", "endpointslice", "agent-1", "web-ipv4", "web-ipv6"]).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    is_gone(&cluster, VIP);
    cluster.daemon().ctl(&["delete", "service", "agent", "web", "shop"]).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    hosts.iter().for_each(|host| is_gone(&cluster, host));
    wait_for(&mut downloads, &hosts);
    cluster.finish(&["no_flow", "no_endpoints", "no_route"]).unwrap();
}

#[test]
fn connections_of_deleted_services_outlive_the_death_of_everything() {
    let mut cluster = Cluster::new("deleted-dead", 3).unwrap();
    // Not by way of the node's address: while nothing of the daemon lives, the gateway's kernel forwards what the node sends.
    let hosts = [VIP, &format!("[{VIP6}]"), SNAT_VIP];
    let mut downloads = start_downloads(&cluster, &hosts);
    let rest: String = objects()
        .split("---\n")
        .filter(|text| text.contains("kind: Node"))
        .map(|text| format!("---\n{text}"))
        .collect();
    cluster.daemon().replace(&rest).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    cluster.kill_all_and_restart().unwrap();
    wait_for(&mut downloads, &hosts);
    hosts.iter().for_each(|host| is_gone(&cluster, host));
    cluster.daemon().apply(&format!("{}{}", objects(), slices(1..=3))).unwrap();
    cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    cluster.finish(&["no_flow", "no_endpoints", "no_route"]).unwrap();
}
