//! What a pod is to itself: one address and one set of ports for all of its processes, and no trace of what the gateway does for it.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use tests::cluster::{Cluster, OWN_POD, nginx};
use tests::process::Process;

const PATIENCE: Duration = Duration::from_secs(20);
const HOST_PORT: u16 = 8088;
/// Another process of the pod, beside nginx: says why it cannot have port 80, then what nginx answers it, and echoes on port 7000.
const NEIGHBOR: &str = r#"
import errno, http.client, socket
try:
    socket.create_server(("", 80))
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
for host in ("127.0.0.1", "10.244.9.5"):
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/")
    print(connection.getresponse().read().decode().strip(), flush=True)
server = socket.create_server(("", 7000))
print("listening", flush=True)
while True:
    connection, peer = server.accept()
    connection.sendall(connection.getsockname()[0].encode())
    connection.close()
"#;

fn pod(host_port: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: default, name: own}}\n\
         spec: {{nodeName: gw-1, containers: [{{name: web, ports: [{{containerPort: 80{host_port}}}]}}]}}\n\
         status: {{phase: Running, podIP: {}, podIPs: [{{ip: {}}}, {{ip: '{}'}}]}}\n",
        OWN_POD[0], OWN_POD[0], OWN_POD[1]
    )
}

// Rule 12.1.
#[test]
fn processes_of_a_pod_share_its_address_and_its_ports() {
    let cluster = Cluster::new("identity", 1).unwrap();
    let pod = cluster.add_pod("identity-pod").unwrap();
    let folder = cluster.folder.path().join("pod");
    std::fs::create_dir(&folder).unwrap();
    let mut server = nginx(&pod, &folder).unwrap();
    let up = || pod.sh("ss -Hltn sport = :80").is_ok_and(|text| !text.is_empty());
    server.wait_until(PATIENCE, up).unwrap();
    let log = folder.join("neighbor.log");
    let mut neighbor = Process::start(&pod, "/usr/bin/python3", &["-c", NEIGHBOR], &log).unwrap();
    neighbor
        .wait_until(PATIENCE, || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("listening")))
        .unwrap();
    let own = OWN_POD[0];
    assert_eq!(neighbor.log(), format!("EADDRINUSE\n127.0.0.1 127.0.0.1\n{own} {own}\nlistening\n"));
    // Both are reached by the one address.
    assert_eq!(cluster.curl(&[&format!("http://{own}/")]).unwrap(), format!("{own} 198.51.100.2\n"));
    assert_eq!(cluster.curl(&["--http0.9", &format!("telnet://{own}:7000")]).unwrap(), own);
    cluster.finish(&["no_flow"]).unwrap();
}

// Rule 12.2.
#[test]
fn a_pod_cannot_see_its_host_port() {
    let cluster = Cluster::new("hostport", 1).unwrap();
    let pod_namespace = cluster.add_pod("hostport-pod").unwrap();
    let folder = cluster.folder.path().join("pod");
    std::fs::create_dir(&folder).unwrap();
    let mut server = nginx(&pod_namespace, &folder).unwrap();
    let url = format!("http://198.51.100.1:{HOST_PORT}/");
    // What the pod sees of its sockets, routes, addresses and rules of the kernel.
    let seen = || {
        pod_namespace
            .sh("ss -Hltun; ip address show dev eth0 | grep -v valid_lft; ip route; ip -6 route; nft list ruleset")
            .unwrap()
    };
    let port_is_free = |address: &str| {
        let address = SocketAddr::new(address.parse::<IpAddr>().unwrap(), HOST_PORT);
        pod_namespace.inside(|| Ok(TcpStream::connect(address).is_err())).unwrap()
    };
    cluster.daemon().apply(&pod("")).unwrap();
    let up = || cluster.client.output("curl", &["-s", "--max-time", "1", &format!("http://{}/", OWN_POD[0])]);
    server.wait_until(PATIENCE, || up().is_ok_and(|output| output.status.success())).unwrap();
    let without = seen();
    assert!(!cluster.client.output("curl", &["-s", "--max-time", "1", &url]).unwrap().status.success());

    cluster.daemon().apply(&pod(&format!(", hostPort: {HOST_PORT}"))).unwrap();
    let answer = format!("{} 198.51.100.2\n", OWN_POD[0]);
    assert_eq!(cluster.curl(&[&url]).unwrap(), answer);
    assert_eq!(seen(), without);
    assert!(port_is_free("127.0.0.1") && port_is_free(OWN_POD[0]) && port_is_free(OWN_POD[1]));
    // The number is the pod's own, and means another thing there.
    let listener = pod_namespace.inside(|| Ok(TcpListener::bind(("0.0.0.0", HOST_PORT))?)).unwrap();
    assert!(!port_is_free(OWN_POD[0]));
    assert_eq!(cluster.curl(&[&url]).unwrap(), answer);
    drop(listener);
    cluster.finish(&["no_flow", "unknown_port"]).unwrap();
}
