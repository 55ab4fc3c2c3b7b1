//! Pods reach the outside by an address of the gateway: real connections and pings from pods to a server outside.

use std::time::Duration;

use tests::cluster::{Cluster, GATEWAY, pod_v4, pod_v6};
use tests::process::Process;

const CLIENT: &str = "198.51.100.2";
const CLIENT6: &str = "2001:db8:c::2";

/// A server outside: tells who asked; `/big` is 20 MB.
const SERVER: &str = "
import http.server, socket, socketserver
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    address_family = socket.AF_INET6
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = bytes(20_000_000) if self.path == '/big' else self.client_address[0].removeprefix('::ffff:').encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
Server(('::', 8000), Handler).serve_forever()
";

/// The second pod has an address of its own to leave by; `CLIENT:9` and what else is outside sees the gateway's.
fn egress() -> String {
    format!(
        "{GATEWAY}[[egress]]\npods = [\"{}/32\"]\naddresses = [\"198.51.100.77\"]\n[[egress]]\n",
        pod_v4(2)
    )
}

#[test]
fn pods_reach_the_outside_by_the_gateway_and_are_reached_by_their_own_address() {
    let cluster = Cluster::with("egress", 1, 1, &egress()).unwrap();
    cluster.gateway.ip("address add 198.51.100.77/32 dev g0").unwrap();
    let log = cluster.folder.path().join("server.log");
    let _server = Process::start(&cluster.client, "/usr/bin/python3", &["-c", SERVER], &log).unwrap();
    let ask = |pod: &str, path: &str, more: &[&str]| {
        let url = if pod.contains(':') {
            format!("http://[{CLIENT6}]:8000/{path}")
        } else {
            format!("http://{CLIENT}:8000/{path}")
        };
        let retry = ["-s", "--max-time", "60", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"];
        let args = [&retry[..], &["--interface", pod], more, &[&url]].concat();
        cluster.node.run("curl", &args).unwrap()
    };
    assert_eq!(ask(&pod_v4(1), "", &[]), "198.51.100.1");
    assert_eq!(ask(&pod_v4(2), "", &[]), "198.51.100.77");
    assert_eq!(ask(&pod_v6(1), "", &[]), "2001:db8:c::1");
    // Two pods, the same destination, at once.
    for (pods, destination) in [([pod_v4(1), pod_v4(3)], CLIENT), ([pod_v6(1), pod_v6(3)], CLIENT6)] {
        std::thread::scope(|scope| {
            for pod in &pods {
                let node = &cluster.node;
                let args = ["-c", "5", "-i", "0.2", "-W", "2", "-I", pod, destination];
                scope.spawn(move || node.run("ping", &args).unwrap());
            }
        });
    }
    // The way in by a pod's own address stays as it was, and pods see each other as they are.
    let answer = cluster.curl(&[&format!("http://{}/", pod_v4(1))]).unwrap();
    assert!(answer.starts_with(&pod_v4(1)) && answer.ends_with(&format!(" {CLIENT}\n")), "{answer}");
    // A download goes on over the death of the data plane.
    std::thread::scope(|scope| {
        let download = scope.spawn(|| {
            ask(&pod_v4(1), "big", &["--limit-rate", "10M", "-o", "/dev/null", "-w", "%{size_download}"])
        });
        std::thread::sleep(Duration::from_millis(700));
        cluster.daemon().kill_data_plane().unwrap();
        assert_eq!(download.join().unwrap(), "20000000");
    });
    let flows = cluster.daemon().ctl(&["flows", "list", "-o", "wide"]).unwrap();
    assert!(flows.contains("198.51.100.77"), "{flows}");
    cluster.finish(&["no_flow"]).unwrap();
}
