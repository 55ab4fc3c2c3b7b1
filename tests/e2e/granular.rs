//! Networking: every kind of client to every kind of address, by every protocol; pods without Services; large requests.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::process::Process;

use crate::rig::ask::PATIENCE;
use crate::rig::cluster::Family;
use crate::rig::cluster::Family::{V4, V6};
use crate::rig::cluster::Protocol::{self, Sctp, Tcp, Udp};
use crate::rig::cluster::listen;
use crate::rig::network::{FABRIC_V4, FABRIC_V6, GATEWAY, GATEWAY_V4, GATEWAY_V6};
use crate::rig::place::Place;
use crate::rig::server::Server;
use crate::rig::service::{Service, Type};
use crate::scenario::{Group, Scenario, not_applicable, run};
use crate::services::sticks;
use crate::test::{Test, at, node_port, pod};

pub const GROUPS: &[Group] = &[
    Group { name: "Networking Granular Checks: Pods", scenarios: PODS },
    Group { name: "Networking Granular Checks: Services", scenarios: SERVICES },
    Group { name: "Networking", scenarios: NETWORKING },
    Group { name: "Networking IPerf2 [Feature:Networking-Performance]", scenarios: IPERF },
    Group { name: "NoSNAT", scenarios: NO_SNAT },
    Group { name: "HostPort", scenarios: HOST_PORT },
    Group { name: "Connectivity Pod Lifecycle", scenarios: POD_LIFECYCLE },
];

const PODS: &[Scenario] = &[
    run!("should function for intra-pod communication: http", pod_to_pod(Tcp)),
    run!("should function for intra-pod communication: udp", pod_to_pod(Udp)),
    run!("should function for intra-pod communication: sctp", pod_to_pod(Sctp)),
    run!("should function for node-pod communication: http", node_to_pod(Tcp)),
    run!("should function for node-pod communication: udp", node_to_pod(Udp)),
    run!("should function for node-pod communication: sctp", node_to_pod(Sctp)),
];

const SERVICES: &[Scenario] = &[
    run!("should function for pod-Service: http", pod_to_service(Tcp, V4)),
    run!("should function for pod-Service: udp", pod_to_service(Udp, V4)),
    run!("should function for pod-Service: sctp", pod_to_service(Sctp, V4)),
    run!("should function for node-Service: http", node_to_service(Tcp, V4)),
    run!("should function for node-Service: udp", node_to_service(Udp, V4)),
    run!("should function for node-Service: sctp", node_to_service(Sctp, V4)),
    run!("should function for endpoint-Service: http", endpoint_to_service(Tcp, V4)),
    run!("should function for endpoint-Service: udp", endpoint_to_service(Udp, V4)),
    run!("should function for endpoint-Service: sctp", endpoint_to_service(Sctp, V4)),
    run!("should function for service endpoints using hostNetwork", host_network_endpoints(V4)),
    run!("should function for multiple endpoint-Services with same selector", same_selector),
    run!("should update endpoints: http", endpoints_change(Tcp, V4)),
    run!("should update endpoints: udp", endpoints_change(Udp, V4)),
    run!("should update nodePort: http", node_port_goes(Tcp)),
    run!("should update nodePort: udp", node_port_goes(Udp)),
    run!("should support basic nodePort: udp functionality", basic_node_port),
    run!("should function for client IP based session affinity: http", affinity(Tcp, V4)),
    run!("should function for client IP based session affinity: udp", affinity(Udp, V4)),
    run!("should be able to handle large requests: http", large_requests(Tcp, V4)),
    run!("should be able to handle large requests: udp", large_requests(Udp, V4)),
];

const NETWORKING: &[Scenario] = &[
    run!("should provide Internet connection for containers [Feature:Networking-IPv4]", internet(V4)),
    run!("should provide Internet connection for containers [Feature:Networking-IPv6]", internet(V6)),
    run!("should provider Internet connection for containers using DNS", internet_by_name),
    not_applicable(
        "should provide unchanging, static URL paths for kubernetes api services",
        "the API server alone",
    ),
    not_applicable(
        "should check kube-proxy urls",
        "kube-proxy's own port with /proxyMode; for /healthz see tests/namespace/health.rs",
    ),
    run!("should allow creating a Pod with an SCTP HostPort", sctp_host_port),
    not_applicable("should recreate its iptables rules if they are deleted", "iptables rules of kube-proxy"),
];

const IPERF: &[Scenario] = &[run!("should run iperf2", iperf)];

const NO_SNAT: &[Scenario] =
    &[run!("Should be able to send traffic between Pods without SNAT", no_source_translation)];

const HOST_PORT: &[Scenario] = &[run!(
    "validates that there is no conflict between pods with same hostPort but different hostIP and protocol",
    host_ports_without_conflict
)];

const POD_LIFECYCLE: &[Scenario] = &[
    run!("should be able to connect from a Pod to a terminating Pod", to_terminating),
    run!("should be able to connect to other Pod from a terminating Pod", from_terminating),
];

const PROTOCOLS: [Protocol; 3] = [Tcp, Udp, Sctp];
/// Names of the endpoints, one on each node.
const ENDPOINTS: [&str; 3] = ["netserver-1", "netserver-2", "netserver-3"];

/// Upstream's NetworkingTestConfig: an endpoint on each node, a client pod, a NodePort Service in front of the endpoints.
struct Nettest {
    client: Place,
    service: Service,
}

impl Nettest {
    fn new(test: &mut Test) -> Result<Nettest> {
        for (number, name) in ENDPOINTS.iter().enumerate() {
            endpoint(test, name, &format!("node-{}", number + 1), "nettest")?;
        }
        let client = test.start(pod("test-container-pod", "node-1"))?;
        let service = test.create(nettest("node-port-service"))?;
        Ok(Nettest { client, service })
    }

    /// Its ClusterIP of a family.
    fn cluster_ip(&self, family: Family, protocol: Protocol) -> SocketAddr {
        of_family(at(&self.service.cluster_ips, port_of(protocol)), family)
    }

    /// The gateway's address of a family with its NodePort.
    fn node_port(&self, family: Family, protocol: Protocol) -> Result<SocketAddr> {
        let index = PROTOCOLS.iter().position(|known| *known == protocol).context("a protocol")?;
        Ok(of_family(node_port(&self.service, index)?, family))
    }
}

/// Ports of the Service by protocol, as upstream has them.
fn port_of(protocol: Protocol) -> u16 {
    match protocol {
        Tcp => 80,
        Udp => 90,
        Sctp => 95,
    }
}

/// The same of the endpoints.
fn target_of(protocol: Protocol) -> u16 {
    match protocol {
        Tcp => 8083,
        Udp => 8081,
        Sctp => 8082,
    }
}

fn nettest(name: &str) -> Service {
    let service = PROTOCOLS.iter().fold(Service::new(name), |service, protocol| {
        service.port(*protocol, port_of(*protocol), target_of(*protocol))
    });
    service.of_type(Type::NodePort).with(|service| service.app = "nettest".to_owned())
}

fn endpoint(test: &mut Test, name: &str, node: &str, app: &str) -> Result<Place> {
    let spec = pod(name, node).of(app);
    test.start(PROTOCOLS.iter().fold(spec, |spec, protocol| spec.listen(*protocol, target_of(*protocol))))
}

fn of_family(addresses: Vec<SocketAddr>, family: Family) -> SocketAddr {
    let mut addresses = addresses.into_iter();
    addresses.find(|address| family.holds(&address.ip())).expect("dual-stack Services")
}

// --- pods without Services -----------------------------------------------------------------------------------------------

fn pod_to_pod(test: &mut Test, protocol: Protocol) -> Result<()> {
    let net = Nettest::new(test)?;
    directly(test, &net.client, protocol)
}

fn node_to_pod(test: &mut Test, protocol: Protocol) -> Result<()> {
    Nettest::new(test)?;
    directly(test, &test.node("node-1"), protocol)
}

/// Every endpoint by its own addresses, which sees who asks.
fn directly(test: &Test, from: &Place, protocol: Protocol) -> Result<()> {
    for name in ENDPOINTS {
        for to in at(&test.pod(name).addresses(), target_of(protocol)) {
            for answer in test.reaches(from, protocol, to, &[name])? {
                let own = from.address_towards(to.ip());
                ensure!(answer.client.ip() == own, "{own} asked, and the pod saw {}", answer.client);
            }
        }
    }
    Ok(())
}

/// Rule 12.4.
fn no_source_translation(test: &mut Test) -> Result<()> {
    let mut pods = Vec::new();
    for node in ["gw-1", "node-1", "node-2", "node-3"] {
        pods.push(test.start(pod(&format!("no-snat-{node}"), node).listen(Tcp, 8080))?);
    }
    for from in &pods {
        for to in pods.iter().filter(|to| to.name != from.name) {
            for address in at(&to.addresses(), 8080) {
                for answer in test.reaches(from, Tcp, address, &[&to.name])? {
                    let own = from.address_towards(address.ip());
                    ensure!(answer.client.ip() == own, "{} asked {}, {answer:?}", from.name, to.name);
                }
            }
        }
    }
    Ok(())
}

fn to_terminating(test: &mut Test) -> Result<()> {
    let server = test.start(pod("webserver-pod", "node-1").listen(Tcp, 80))?;
    let client = test.start(pod("pause-pod-0", "node-2"))?;
    test.terminate("webserver-pod")?;
    test.reaches_all(&client, Tcp, &at(&server.addresses(), 80), &["webserver-pod"])?;
    Ok(())
}

fn from_terminating(test: &mut Test) -> Result<()> {
    let server = test.start(pod("webserver-pod", "node-1").of("webserver").listen(Tcp, 80))?;
    let service = test.create(Service::new("webserver").port(Tcp, 80, 80))?;
    let client = test.start(pod("pause-pod-0", "node-2"))?;
    test.terminate("pause-pod-0")?;
    test.reaches_all(&client, Tcp, &at(&server.addresses(), 80), &["webserver-pod"])?;
    test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &["webserver-pod"])?;
    Ok(())
}

// --- Services ------------------------------------------------------------------------------------------------------------

pub fn pod_to_service(test: &mut Test, protocol: Protocol, family: Family) -> Result<()> {
    let net = Nettest::new(test)?;
    from_everywhere(test, &net, std::slice::from_ref(&net.client), protocol, family)
}

pub fn node_to_service(test: &mut Test, protocol: Protocol, family: Family) -> Result<()> {
    let net = Nettest::new(test)?;
    let nodes = [test.node("node-1"), test.node("node-3")];
    from_everywhere(test, &net, &nodes, protocol, family)
}

/// An endpoint, too, finds every endpoint, itself among them.
pub fn endpoint_to_service(test: &mut Test, protocol: Protocol, family: Family) -> Result<()> {
    let net = Nettest::new(test)?;
    let endpoints = [test.pod(ENDPOINTS[0]), test.pod(ENDPOINTS[2])];
    from_everywhere(test, &net, &endpoints, protocol, family)
}

/// Each of the places reaches every endpoint by ClusterIP and by NodePort.
fn from_everywhere(
    test: &Test,
    net: &Nettest,
    places: &[Place],
    protocol: Protocol,
    family: Family,
) -> Result<()> {
    for from in places {
        test.reaches(from, protocol, net.cluster_ip(family, protocol), &ENDPOINTS)?;
        test.reaches(from, protocol, net.node_port(family, protocol)?, &ENDPOINTS)?;
    }
    Ok(())
}

/// Endpoints with the addresses of their nodes; large requests, too, as upstream.
pub fn host_network_endpoints(test: &mut Test, family: Family) -> Result<()> {
    let mut pods = Vec::new();
    for node in 1..=2 {
        let name = format!("host-netserver-{node}");
        let spec = pod(&name, &format!("node-{node}")).of("nettest").host_network();
        test.start(spec.listen(Tcp, target_of(Tcp)).listen(Udp, target_of(Udp)))?;
        pods.push(name);
    }
    let client = test.start(pod("test-container-pod", "node-1"))?;
    let net = Nettest { client, service: test.create(nettest("node-port-service"))? };
    for from in [&net.client, &test.node("node-1"), &test.node("node-3")] {
        for protocol in [Tcp, Udp] {
            test.reaches(from, protocol, net.cluster_ip(family, protocol), &pods)?;
            test.reaches(from, protocol, net.node_port(family, protocol)?, &pods)?;
        }
    }
    for protocol in [Tcp, Udp] {
        large(&net.client, protocol, net.cluster_ip(family, protocol))?;
    }
    Ok(())
}

/// Two Services with the same endpoints; when one goes, the other stays.
fn same_selector(test: &mut Test) -> Result<()> {
    let net = Nettest::new(test)?;
    let second = Nettest { client: net.client.clone(), service: test.create(nettest("second-service"))? };
    let from = test.pod(ENDPOINTS[0]);
    for net in [&net, &second] {
        from_everywhere(test, net, std::slice::from_ref(&from), Tcp, V4)?;
        from_everywhere(test, net, std::slice::from_ref(&from), Tcp, V6)?;
    }
    let mut connection = from.connect(second.cluster_ip(V4, Tcp))?;
    let before = connection.ask()?;
    test.remove("node-port-service")?;
    ensure!(connection.ask()? == before, "a connection through the other Service");
    test.dropped(&from, Tcp, net.cluster_ip(V4, Tcp), "unknown_service")?;
    test.closed(&from, Tcp, net.node_port(V4, Tcp)?)?;
    from_everywhere(test, &second, std::slice::from_ref(&from), Tcp, V4)?;
    from_everywhere(test, &second, std::slice::from_ref(&from), Tcp, V6)
}

/// An endpoint goes and another one comes in its place.
pub fn endpoints_change(test: &mut Test, protocol: Protocol, family: Family) -> Result<()> {
    let net = Nettest::new(test)?;
    let to = net.cluster_ip(family, protocol);
    test.reaches(&net.client, protocol, to, &ENDPOINTS)?;
    test.delete(ENDPOINTS[0])?;
    test.reaches(&net.client, protocol, to, &ENDPOINTS[1..])?;
    endpoint(test, "netserver-4", "node-1", "nettest")?;
    test.reaches(&net.client, protocol, to, &["netserver-4", ENDPOINTS[1], ENDPOINTS[2]])?;
    Ok(())
}

fn node_port_goes(test: &mut Test, protocol: Protocol) -> Result<()> {
    let net = Nettest::new(test)?;
    let places = [test.node("node-1"), test.client()];
    for family in [V4, V6] {
        for from in &places {
            test.reaches(from, protocol, net.node_port(family, protocol)?, &ENDPOINTS)?;
        }
    }
    test.remove("node-port-service")?;
    for family in [V4, V6] {
        for from in &places {
            test.closed(from, protocol, net.node_port(family, protocol)?)?;
        }
    }
    Ok(())
}

fn basic_node_port(test: &mut Test) -> Result<()> {
    let net = Nettest::new(test)?;
    for from in [test.node("node-1"), test.node("node-2"), net.client.clone(), test.client()] {
        test.reaches(&from, Udp, net.node_port(V4, Udp)?, &ENDPOINTS)?;
        test.reaches(&from, Udp, net.node_port(V6, Udp)?, &ENDPOINTS)?;
    }
    Ok(())
}

pub fn affinity(test: &mut Test, protocol: Protocol, family: Family) -> Result<()> {
    let mut net = Nettest::new(test)?;
    let service = nettest("session-affinity-service").with(|service| service.affinity_s = Some(10_800));
    net.service = test.create(service)?;
    let pod = sticks(test, &net.client, protocol, net.cluster_ip(family, protocol))?;
    // By the NodePort, too: what counts is the client and the port of the Service.
    let by_node_port = sticks(test, &net.client, protocol, net.node_port(family, protocol)?)?;
    ensure!(pod == by_node_port, "{pod} by ClusterIP, {by_node_port} by NodePort");
    Ok(())
}

/// 2000 bytes: more than a packet has room for, so fragments over UDP.
pub fn large_requests(test: &mut Test, protocol: Protocol, family: Family) -> Result<()> {
    let net = Nettest::new(test)?;
    for _ in 0..10 {
        large(&net.client, protocol, net.cluster_ip(family, protocol))?;
    }
    Ok(())
}

fn large(from: &Place, protocol: Protocol, to: SocketAddr) -> Result<()> {
    let message = match protocol {
        Udp => format!("n{}", "o".repeat(1999)),
        _ => "42".repeat(1000),
    };
    let request = format!("echo {message}");
    let answer = match protocol {
        Udp => {
            let answer = from.datagrams(0, to)?.request(request.as_bytes(), PATIENCE)?;
            let answer =
                answer.map_err(|why| anyhow::anyhow!("a datagram of 2005 bytes to {to}: {why:?}"))?;
            String::from_utf8_lossy(&answer).into_owned()
        }
        _ => from.connect(to)?.request(&request)?,
    };
    ensure!(answer == message, "{} bytes came back of {}: {answer:.40}", answer.len(), message.len());
    Ok(())
}

// --- host ports ----------------------------------------------------------------------------------------------------------

/// A pod of the gateway's own node, at the node's address for outside. Rule 7.3.
fn sctp_host_port(test: &mut Test) -> Result<()> {
    let client = test.client();
    for host_ip in gateway_addresses() {
        test.start(pod("hostport", GATEWAY).listen_on_host(Sctp, 5060, host_ip, 5060))?;
        for answer in test.reaches(&client, Sctp, SocketAddr::new(host_ip, 5060), &["hostport"])? {
            ensure!(client.addresses().contains(&answer.client.ip()), "{answer:?}");
        }
        test.delete("hostport")?;
    }
    Ok(())
}

/// The same host port for three pods: by TCP at one address of the node, by TCP at another, by UDP there. Upstream the first is at
/// 127.0.0.1, which no packet reaches from elsewhere. Rule 7.3.
fn host_ports_without_conflict(test: &mut Test) -> Result<()> {
    let host_port = 54323;
    for (outer, inner) in gateway_addresses().into_iter().zip(fabric_addresses()) {
        test.start(pod("pod1", GATEWAY).listen_on_host(Tcp, 8080, inner, host_port))?;
        test.start(pod("pod2", GATEWAY).listen_on_host(Tcp, 8080, outer, host_port))?;
        test.start(pod("pod3", GATEWAY).listen_on_host(Udp, 8080, outer, host_port))?;
        let client = test.client();
        for from in [client, test.node("node-1"), test.pod("pod1")] {
            test.reaches(&from, Tcp, SocketAddr::new(inner, host_port), &["pod1"])?;
            test.reaches(&from, Tcp, SocketAddr::new(outer, host_port), &["pod2"])?;
            test.reaches(&from, Udp, SocketAddr::new(outer, host_port), &["pod3"])?;
        }
        for name in ["pod1", "pod2", "pod3"] {
            test.delete(name)?;
        }
    }
    Ok(())
}

fn gateway_addresses() -> [IpAddr; 2] {
    [GATEWAY_V4.into(), GATEWAY_V6.into()]
}

fn fabric_addresses() -> [IpAddr; 2] {
    [FABRIC_V4.into(), FABRIC_V6.into()]
}

// --- beyond the cluster --------------------------------------------------------------------------------------------------

/// The Internet is where the client is: pods reach a server there, which sees them as they are.
fn internet(test: &mut Test, family: Family) -> Result<()> {
    let outside = test.client();
    let _server = Server::start(&outside, "8.8.8.8", &[listen(Tcp, 53), listen(Udp, 53)])?;
    let to = of_family(at(&outside.addresses(), 53), family);
    for node in ["node-1", "gw-1"] {
        let from = test.start(pod(&format!("connectivity-test-{node}"), node))?;
        for protocol in [Tcp, Udp] {
            for answer in test.reaches(&from, protocol, to, &["8.8.8.8"])? {
                ensure!(from.addresses().contains(&answer.client.ip()), "{answer:?}");
            }
        }
    }
    Ok(())
}

/// A name is asked for in the cluster's DNS, a Service of UDP and TCP port 53; its server and the name's are outside.
fn internet_by_name(test: &mut Test) -> Result<()> {
    let outside = test.client();
    let _server = Server::start(&outside, "google.com", &[listen(Tcp, 80)])?;
    let dns = test.create(Service::new("kube-dns").port(Udp, 53, 53).port(Tcp, 53, 53))?;
    test.start(pod("coredns", "node-2").of("kube-dns").listen(Udp, 53).listen(Tcp, 53))?;
    let from = test.start(pod("connectivity-test", "node-1"))?;
    test.reaches_all(&from, Udp, &at(&dns.cluster_ips, 53), &["coredns"])?;
    test.reaches_all(&from, Tcp, &at(&dns.cluster_ips, 53), &["coredns"])?;
    test.reaches_all(&from, Tcp, &at(&outside.addresses(), 80), &["google.com"])?;
    Ok(())
}

/// From a pod on each node through a Service, one after the other. iperf3 takes the place of iperf2.
fn iperf(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("iperf2-server").port(Tcp, 6789, 6789))?;
    let server = test.start(pod("iperf2-server", "node-1").of("iperf2-server"))?;
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("iperf.log");
    let listen = ["-s", "-p", "6789", "--forceflush"];
    let mut running = Process::start(&server.namespace, "iperf3", &listen, &log)?;
    running.wait_until(PATIENCE, || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("listening"))
    })?;
    for node in ["node-1", "node-2", "node-3"] {
        let client = test.start(pod(&format!("iperf2-client-{node}"), node))?;
        let address = service.cluster_ips[0].to_string();
        let args = ["-J", "-p", "6789", "-t", "1", "--connect-timeout", "5000", "-c", &address];
        let output = client.namespace.output("iperf3", &args)?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("iperf3 -J")?;
        ensure!(report.get("error").is_none(), "iperf3 from {node}: {}", report["error"]);
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64().context("a rate")?;
        println!("    {node}: {:.0} Mbit/s", rate / 1e6);
        ensure!(rate > 1e6, "{rate} bit/s from {node}");
    }
    drop(running);
    // Connections of the server that was killed may be told so after their flows have gone.
    std::thread::sleep(Duration::from_millis(50));
    Ok(())
}
