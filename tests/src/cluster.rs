//! A small cluster for traffic tests: a client, a gateway that runs towpathd, and one namespace in which every pod lives.
//!
//! ```text
//!   client 198.51.100.2 --c0--g0-- gateway --g1--n0-- node 10.2.0.11, pods 10.244.1.11 to 10.244.1.20 on its loopback
//! ```
//!
//! All offloads are as the kernel sets them, as on any veth: checksums of what comes in are unfinished.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::gateway::Towpathd;
use crate::namespace::{Namespace, veth};
use crate::process::Process;

/// Pods that there are.
pub const PODS: u8 = 10;
/// The Service's address that keeps the client's.
pub const VIP: &str = "203.0.113.10";
/// The same, IPv6.
pub const VIP6: &str = "2001:db8::10";
/// The Service's address behind which the client is masqueraded.
pub const SNAT_VIP: &str = "203.0.113.20";
/// The same, IPv6.
pub const SNAT_VIP6: &str = "2001:db8::20";
/// Ports of both Services: HTTP, an iperf3 server, and an echo of datagrams.
pub const PORTS: [(&str, &str, u16); 4] =
    [("http", "TCP", 80), ("iperf", "TCP", 5201), ("iperf-udp", "UDP", 5201), ("echo", "UDP", 7)];

/// The pod of the node that [`Cluster::second_node`] adds.
pub const FAR_POD: [&str; 2] = ["10.244.2.11", "fd00:244:2::11"];

/// The pod that [`Cluster::add_pod`] adds.
pub const OWN_POD: [&str; 2] = ["10.244.9.5", "fd00:244:9::5"];
/// InternalIPs of node-1.
pub const NODE_1: [&str; 2] = ["10.2.0.11", "fd00:2::11"];
/// InternalIPs of node-2.
pub const NODE_2: [&str; 2] = ["10.2.0.12", "fd00:2::12"];

const OWN_POD_MAC: &str = "02:00:00:00:05:05";
/// A node without the pod must not send its packets back to the gateway.
pub const OWN_POD_RANGE: &str = "route add blackhole 10.244.9.0/24\nroute add blackhole fd00:244:9::/64\n";

/// The gateway file; `[control]` and the region are added by [`Towpathd::start`].
pub const GATEWAY: &str = r#"
[gateway]
name = "gw-1"
cluster_cidrs = ["10.244.0.0/16", "fd00:244::/48"]
service_cidrs = ["10.96.0.0/16", "fd00:96::/112"]
load_balancer_cidrs = ["203.0.113.0/24", "2001:db8::/64"]
return = "routed"
[workers]
cpus = [1]
[flows]
capacity = 262144
[[port]]
name = "uplink"
interface = "g0"
role = "outside"
[[port]]
name = "fabric"
interface = "g1"
role = "inside"
"#;

/// Namespaces, daemon and servers; gone when dropped, the daemon first.
#[derive(Debug)]
pub struct Cluster {
    /// The gateway's daemon. Taken by [`Cluster::finish`].
    pub daemon: Option<Towpathd>,
    servers: Vec<Process>,
    /// Where clients run.
    pub client: Namespace,
    /// Where the daemon runs.
    pub gateway: Namespace,
    /// Where pods run.
    pub node: Namespace,
    /// For files of the test.
    pub folder: TempDir,
}

impl Cluster {
    /// Builds everything, with `endpoints` pods ready. `name`: unique in the process.
    pub fn new(name: &str, endpoints: u8) -> Result<Cluster> {
        Cluster::with(name, endpoints, 1, GATEWAY)
    }

    /// The same with `queues` queues on every link, and another gateway file.
    pub fn with(name: &str, endpoints: u8, queues: u32, config: &str) -> Result<Cluster> {
        let client = Namespace::new(&format!("{name}-cli"))?;
        let gateway = Namespace::new(&format!("{name}-gw"))?;
        let node = Namespace::new(&format!("{name}-node"))?;
        for namespace in [&client, &gateway, &node] {
            namespace.sysctl(&[
                "net.ipv6.conf.all.accept_dad=0",
                "net.ipv6.conf.default.accept_dad=0",
                "net.ipv4.conf.all.rp_filter=0",
                "net.ipv4.conf.default.rp_filter=0",
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
            ])?;
        }
        veth((&client, "c0", "02:00:00:00:02:02"), (&gateway, "g0", "02:00:00:00:02:01"), queues)?;
        veth((&gateway, "g1", "02:00:00:00:03:01"), (&node, "n0", "02:00:00:00:03:11"), queues)?;
        for (namespace, interface, v4, v6) in [
            (&client, "c0", "198.51.100.2/24", "2001:db8:c::2/64"),
            (&gateway, "g0", "198.51.100.1/24", "2001:db8:c::1/64"),
            (&gateway, "g1", "10.2.0.1/24", "fd00:2::1/64"),
            (&node, "n0", "10.2.0.11/24", "fd00:2::11/64"),
        ] {
            namespace.ip(&format!("address add {v4} dev {interface}"))?;
            namespace.ip(&format!("address add {v6} dev {interface} nodad"))?;
        }
        for (namespace, v4, v6) in
            [(&client, "198.51.100.1", "2001:db8:c::1"), (&node, "10.2.0.1", "fd00:2::1")]
        {
            namespace.ip(&format!("route add default via {v4}"))?;
            namespace.ip(&format!("route add default via {v6}"))?;
        }
        for pod in 1..=PODS {
            node.ip(&format!("address add {}/32 dev lo", pod_v4(pod)))?;
            node.ip(&format!("address add {}/128 dev lo nodad", pod_v6(pod)))?;
        }
        let folder = tempfile::tempdir()?;
        let mut servers = vec![nginx(&node, folder.path())?];
        let echo = ["-u", "-c", UDP_ECHO];
        servers.push(Process::start(&node, "/usr/bin/python3", &echo, &folder.path().join("echo.log"))?);
        let daemon = Towpathd::start(&gateway, config)?;
        daemon.apply(&format!("{}{}", objects(), slices(1..=endpoints)))?;
        let mut cluster = Cluster { daemon: Some(daemon), servers, client, gateway, node, folder };
        cluster.wait_for_servers()?;
        Ok(cluster)
    }

    /// Adds node-2 at 10.2.0.12 with the pod [`FAR_POD`], by plain routes; its link is a macvlan beside n0. `name`: of its namespace.
    pub fn second_node(&self, name: &str) -> Result<Namespace> {
        let node = Namespace::new(name)?;
        node.sysctl(&["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"])?;
        let link = format!(
            "link add n2 link n0 netns {} address 02:00:00:00:03:12 type macvlan mode bridge",
            node.name()
        );
        self.node.ip(&link)?;
        for args in [
            "link set n2 up",
            "address add 10.2.0.12/24 dev n2",
            "address add fd00:2::12/64 dev n2 nodad",
            "address add 10.244.2.11/32 dev lo",
            "address add fd00:244:2::11/128 dev lo nodad",
            "route add default via 10.2.0.1",
            "route add default via fd00:2::1",
        ] {
            node.ip(args)?;
        }
        self.daemon().apply(
            "---\n{apiVersion: v1, kind: Node, metadata: {name: node-2}, \
             spec: {podCIDR: 10.244.2.0/24, podCIDRs: [10.244.2.0/24, 'fd00:244:2::/64']}, \
             status: {addresses: [{type: InternalIP, address: 10.2.0.12}, {type: InternalIP, address: 'fd00:2::12'}]}}\n",
        )?;
        Ok(node)
    }

    /// Adds the pod [`OWN_POD`] to node-1: a network namespace of its own, with a veth to the node, as a CNI makes it. The gateway has a
    /// kernel route to it. `name`: of the namespace.
    pub fn add_pod(&self, name: &str) -> Result<Namespace> {
        let pod = Namespace::new(name)?;
        pod.sysctl(&["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"])?;
        veth((&pod, "eth0", OWN_POD_MAC), (&self.node, "p0", "02:00:00:00:05:01"), 1)?;
        let mut lines = String::new();
        for (address, via) in OWN_POD.iter().zip(["169.254.1.1", "fe80::1"]) {
            let _ = writeln!(lines, "address add {address} dev eth0 nodad");
            let _ = writeln!(lines, "neigh replace {via} lladdr 02:00:00:00:05:01 dev eth0 nud permanent");
            let _ = writeln!(lines, "route add default via {via} dev eth0 onlink");
        }
        self.ip_batch(&pod, &lines)?;
        self.ip_batch(&self.node, OWN_POD_RANGE)?;
        self.put_pod(&self.node, NODE_1)?;
        Ok(pod)
    }

    /// Moves the pod [`OWN_POD`], with its sockets, to another node that has these InternalIPs.
    pub fn move_pod(&self, from: &Namespace, to: &Namespace, addresses: [&str; 2]) -> Result<()> {
        from.ip(&format!("link set p0 netns {}", to.name()))?;
        self.put_pod(to, addresses)
    }

    /// Routes to the pod: from its node by p0, from the gateway by the node.
    fn put_pod(&self, node: &Namespace, addresses: [&str; 2]) -> Result<()> {
        let (mut of_node, mut of_gateway) = ("link set p0 up\n".to_owned(), String::new());
        for (pod, via) in OWN_POD.iter().zip(addresses) {
            let _ = writeln!(of_node, "neigh replace {pod} lladdr {OWN_POD_MAC} dev p0 nud permanent");
            let _ = writeln!(of_node, "route replace {pod} dev p0");
            let _ = writeln!(of_gateway, "route replace {pod} via {via}");
        }
        self.ip_batch(node, &of_node)?;
        self.ip_batch(&self.gateway, &of_gateway)
    }

    /// Runs `ip` once, for each of these lines.
    pub fn ip_batch(&self, namespace: &Namespace, lines: &str) -> Result<()> {
        let file = self.folder.path().join("ip.batch");
        std::fs::write(&file, lines)?;
        namespace.ip(&format!("-batch {}", file.display())).map(drop)
    }

    /// The running daemon.
    pub fn daemon(&self) -> &Towpathd {
        self.daemon.as_ref().expect("taken only by finish")
    }

    /// Kills both processes of the daemon as `kill -9` does, and starts it again on what they left.
    pub fn kill_all_and_restart(&mut self) -> Result<()> {
        self.daemon.as_mut().expect("taken only by finish").kill_all_and_restart(&self.gateway)
    }

    /// The checks that every test ends with; see [`Towpathd::finish`].
    pub fn finish(mut self, allowed: &[&str]) -> Result<()> {
        self.daemon.take().expect("only here").finish(allowed)
    }

    /// What `curl -sS ARGS` prints in the client's namespace.
    pub fn curl(&self, args: &[&str]) -> Result<String> {
        let mut words = vec!["-sS", "--max-time", "20"];
        words.extend_from_slice(args);
        self.client.run("curl", &words)
    }

    /// Downloads 20 MB from `host`, in segments of 64 KiB with unfinished checksums, and compares them byte for byte.
    pub fn download(&self, host: &str) -> Result<()> {
        let file = self.folder.path().join("big");
        let url = format!("http://{host}/big");
        let script = format!("curl -sS --max-time 60 '{url}' | cmp - {}", file.display());
        self.client.sh(&script).map(drop).with_context(|| url)
    }

    /// Runs iperf3 from the client to `to`, with a server of its own on the node, for `seconds`; `args` more of iperf3. Returns
    /// its report.
    pub fn iperf(&self, to: &str, seconds: u32, args: &[&str]) -> Result<serde_json::Value> {
        let log = self.folder.path().join("iperf.log");
        // As pod 1: over UDP an unbound server would answer from the node's own address.
        let pod = if to.contains(':') { pod_v6(1) } else { pod_v4(1) };
        let mut listen = vec!["-s", "-1", "--forceflush"];
        if args.contains(&"-u") {
            listen.extend(["-B", &pod]);
        }
        let mut server = Process::start(&self.node, "iperf3", &listen, &log)?;
        let listening = || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("listening"));
        server.wait_until(Duration::from_secs(10), listening)?;
        let seconds = seconds.to_string();
        let mut words = vec!["-J", "-c", to, "-t", &seconds, "--connect-timeout", "5000"];
        words.extend_from_slice(args);
        let output = self.client.output("iperf3", &words)?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("iperf3 -J")?;
        anyhow::ensure!(report.get("error").is_none(), "iperf3: {}", report["error"]);
        Ok(report)
    }

    fn wait_for_servers(&mut self) -> Result<()> {
        let (client, server) = (&self.client, &mut self.servers[0]);
        let url = format!("http://{}/", pod_v4(1));
        let up =
            || client.output("curl", &["-s", "--max-time", "1", &url]).is_ok_and(|out| out.status.success());
        server
            .wait_until(Duration::from_secs(20), up)
            .context("nginx, through the gateway by a pod's address")
    }
}

/// Address of a pod.
pub fn pod_v4(pod: u8) -> String {
    format!("10.244.1.{}", 10 + pod)
}

/// Address of a pod.
pub fn pod_v6(pod: u8) -> String {
    format!("fd00:244:1::{}", 10 + pod)
}

/// Nodes and both Services.
pub fn objects() -> String {
    let mut text = String::from(
        "---\n{apiVersion: v1, kind: Node, metadata: {name: gw-1}, status: {addresses: [{type: InternalIP, address: 198.51.100.1}]}}\n\
         ---\n{apiVersion: v1, kind: Node, metadata: {name: node-1}, spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, 'fd00:244:1::/64']}, \
         status: {addresses: [{type: InternalIP, address: 10.2.0.11}, {type: InternalIP, address: 'fd00:2::11'}]}}\n",
    );
    for (name, policy, number) in [("web", "Local", 10), ("shop", "Cluster", 20)] {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: {name}}}\nspec:\n  type: LoadBalancer\n  \
             externalTrafficPolicy: {policy}\n  allocateLoadBalancerNodePorts: false\n  clusterIP: 10.96.0.{number}\n  \
             clusterIPs: [10.96.0.{number}, 'fd00:96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  ports:\n",
        );
        for (port, protocol, port_number) in PORTS {
            let _ = writeln!(text, "  - {{name: {port}, protocol: {protocol}, port: {port_number}}}");
        }
        let _ = writeln!(
            text,
            "status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.{number}}}, {{ip: '2001:db8::{number}'}}]}}}}"
        );
    }
    text
}

/// EndpointSlices of both Services with these pods ready.
pub fn slices(pods: impl Iterator<Item = u8> + Clone) -> String {
    ["web", "shop"].map(|name| slices_of(name, &PORTS, pods.clone())).concat()
}

/// EndpointSlices of a Service, one of each family, with these pods ready. `ports`: name, protocol, number.
pub fn slices_of(name: &str, ports: &[(&str, &str, u16)], pods: impl Iterator<Item = u8> + Clone) -> String {
    let mut text = String::new();
    for (family, address) in [("IPv4", pod_v4 as fn(u8) -> String), ("IPv6", pod_v6)] {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: default, name: {name}-{}, \
             labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: {family}\nports:\n",
            family.to_lowercase()
        );
        for (port, protocol, number) in ports {
            let _ = writeln!(text, "- {{name: {port}, protocol: {protocol}, port: {number}}}");
        }
        text += if pods.clone().next().is_some() { "endpoints:\n" } else { "endpoints: []\n" };
        for pod in pods.clone() {
            let _ = writeln!(
                text,
                "- {{addresses: ['{}'], nodeName: node-1, conditions: {{ready: true}}, \
                 targetRef: {{kind: Pod, namespace: default, name: pod-{pod}}}}}",
                address(pod)
            );
        }
    }
    text
}

/// An nginx that answers with the address that it was asked by, which is the pod's, and that of the client; on a node it is all pods.
/// `folder`: for its files; `big` of 20 MB is among them.
pub fn nginx(node: &Namespace, folder: &Path) -> Result<Process> {
    let path = folder.display();
    let big: Vec<u8> = (0..20_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(folder.join("big"), big)?;
    let config = format!(
        "daemon off; master_process off; user root; pid {path}/nginx.pid; error_log {path}/nginx.error;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000; server {{ listen 80 backlog=4096; listen [::]:80 backlog=4096;\n\
         location / {{ default_type text/plain; return 200 \"$server_addr $remote_addr\\n\"; }}\n\
         location = /big {{ alias {path}/big; default_type application/octet-stream; }}\n\
         location = /slow {{ alias {path}/big; default_type application/octet-stream; limit_rate 4m; }} }} }}\n"
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, config)?;
    let error = folder.join("nginx.error");
    let args = ["-e", &error.to_string_lossy(), "-c", &file.to_string_lossy()];
    Process::start(node, "nginx", &args, &folder.join("nginx.log"))
}

/// Answers each datagram with itself, from the address that it was sent to.
const UDP_ECHO: &str = r#"
import selectors, socket
select = selectors.DefaultSelector()
for i in range(11, 21):
    for family, address in ((socket.AF_INET, f"10.244.1.{i}"), (socket.AF_INET6, f"fd00:244:1::{i}")):
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        s.bind((address, 7))
        select.register(s, selectors.EVENT_READ)
while True:
    for key, _ in select.select():
        data, peer = key.fileobj.recvfrom(65536)
        key.fileobj.sendto(data, peer)
"#;
