//! nginx as an ingress controller behind `externalTrafficPolicy: Local` (docs/ingress.md): the client's address, HTTP/1.1, HTTP/2 and
//! WebSockets that live on while pods of the controller come and go.
//!
//! The controller's pods are on node-1, the backend that it proxies to is a pod of node-2 behind a ClusterIP.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use tests::cluster::{Cluster, FAR_POD, pod_v4, pod_v6, slices_of};
use tests::namespace::run;
use tests::process::Process;

const PATIENCE: Duration = Duration::from_secs(20);
const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:c::2"];
const VIP: &str = "203.0.113.80";
const VIP6: &str = "2001:db8::80";
/// Port names of the controller, ports of its Service and of its pods.
const PORTS: [(&str, u16, u16); 3] = [("http", 80, 8080), ("http2", 81, 8081), ("https", 443, 8443)];

/// A WebSocket server (RFC 6455). Its first message is who asked, as the controller says; then each message comes back.
const BACKEND: &str = r#"
import base64, hashlib, socketserver
class Handler(socketserver.StreamRequestHandler):
    def send(self, opcode, data):
        head = bytes([0x80 | opcode])
        head += bytes([len(data)]) if len(data) < 126 else b"\x7e" + len(data).to_bytes(2, "big")
        self.wfile.write(head + data)
    def handle(self):
        headers = {}
        self.rfile.readline()
        while line := self.rfile.readline().strip():
            name, value = line.decode().split(": ", 1)
            headers[name.lower()] = value
        key = headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        self.send(1, f"{headers['x-real-ip']} {self.client_address[0]}".encode())
        while len(head := self.rfile.read(2)) == 2:
            size = head[1] & 0x7f
            if size == 126:
                size = int.from_bytes(self.rfile.read(2), "big")
            mask = self.rfile.read(4)
            data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(self.rfile.read(size)))
            self.send(head[0] & 0x0f, data)
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
Server(("10.244.2.11", 9000), Handler).serve_forever()
"#;

/// The controller: tells who asked whom by which protocol, and proxies `/ws` as the pod that was asked.
fn start_controller(cluster: &Cluster) -> Process {
    let path = cluster.folder.path().display().to_string();
    let (key, certificate) = (format!("{path}/tls.key"), format!("{path}/tls.crt"));
    let new = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        "/CN=ingress",
    ];
    let files = ["-keyout", &key, "-out", &certificate];
    run("openssl", &[&new[..], &files].concat()).unwrap();
    let config = format!(
        "daemon off; master_process off; user root; pid {path}/ingress.pid; error_log {path}/ingress.error;\n\
         events {{ worker_connections 1024; }}\n\
         http {{ access_log {path}/access; server {{ listen 8080; listen [::]:8080; listen 8081 http2; listen [::]:8081 http2;\n\
         listen 8443 ssl http2; listen [::]:8443 ssl http2; ssl_certificate {path}/tls.crt; ssl_certificate_key {path}/tls.key;\n\
         location / {{ default_type text/plain; return 200 \"$server_addr $remote_addr $server_protocol\\n\"; }}\n\
         location /ws {{ proxy_pass http://10.96.0.90; proxy_bind $server_addr; proxy_http_version 1.1;\n\
         proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade; proxy_set_header X-Real-IP $remote_addr; }} }} }}\n"
    );
    let file = cluster.folder.path().join("ingress.conf");
    std::fs::write(&file, config).unwrap();
    let args = ["-e", &format!("{path}/ingress.error"), "-c", &file.to_string_lossy()];
    Process::start(&cluster.node, "nginx", &args, &cluster.folder.path().join("ingress.log")).unwrap()
}

fn services() -> String {
    let ports: Vec<_> = PORTS
        .iter()
        .map(|(name, port, _)| format!("{{name: {name}, protocol: TCP, port: {port}}}"))
        .collect();
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: ingress}}\nspec:\n  type: LoadBalancer\n  \
         externalTrafficPolicy: Local\n  allocateLoadBalancerNodePorts: false\n  clusterIP: 10.96.0.80\n  \
         clusterIPs: [10.96.0.80, 'fd00:96::80']\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  ports: [{}]\n\
         status: {{loadBalancer: {{ingress: [{{ip: {VIP}}}, {{ip: '{VIP6}'}}]}}}}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: backend}}\n\
         spec: {{clusterIP: 10.96.0.90, ports: [{{port: 80}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: default, name: backend-1, \
         labels: {{kubernetes.io/service-name: backend}}}}\naddressType: IPv4\nports: [{{port: 9000}}]\n\
         endpoints: [{{addresses: [{}], nodeName: node-2}}]\n",
        ports.join(", "),
        FAR_POD[0]
    )
}

/// The controller's slices, with these pods.
fn controllers(pods: &[u8]) -> String {
    slices_of("ingress", &PORTS.map(|(name, _, port)| (name, "TCP", port)), pods.iter().copied())
}

/// A client's WebSocket.
struct WebSocket(TcpStream);

impl WebSocket {
    /// Opens one, in the namespace of the calling thread. Returns its first message, too.
    fn open() -> Result<(WebSocket, String)> {
        let mut stream = TcpStream::connect((VIP, 80))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // Key and answer are those of the example in RFC 6455 section 1.3.
        write!(
            stream,
            "GET /ws HTTP/1.1\r\nHost: {VIP}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).context("the answer to the handshake")?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        ensure!(head.starts_with("HTTP/1.1 101 "), "{head}");
        ensure!(head.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        let mut socket = WebSocket(stream);
        let first = String::from_utf8(socket.receive()?)?;
        Ok((socket, first))
    }

    /// Sends a binary message of 126 to 65,535 bytes in one frame, masked as clients must (RFC 6455 section 5.2).
    fn send(&mut self, data: &[u8]) -> Result<()> {
        const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
        let mut frame = vec![0x82, 0x80 | 126];
        frame.extend(u16::try_from(data.len())?.to_be_bytes());
        frame.extend(MASK);
        frame.extend(data.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        Ok(self.0.write_all(&frame)?)
    }

    fn receive(&mut self) -> Result<Vec<u8>> {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).context("a frame")?;
        let mut len = usize::from(head[1]);
        if len == 126 {
            let mut long = [0; 2];
            self.0.read_exact(&mut long)?;
            len = usize::from(u16::from_be_bytes(long));
        }
        let mut data = vec![0; len];
        self.0.read_exact(&mut data)?;
        Ok(data)
    }

    /// Messages there and back, all of them under way at once.
    fn exchange(&mut self, round: u8) -> Result<()> {
        let message = |i: usize| vec![round ^ i as u8; 200 + 300 * i];
        (0..8).try_for_each(|i| self.send(&message(i)))?;
        (0..8).try_for_each(|i| {
            ensure!(self.receive()? == message(i), "another message came back");
            Ok(())
        })
    }
}

// Rules 5.2, 9.1.
#[test]
fn an_ingress_controller_sees_its_clients() {
    let cluster = Cluster::new("ingress", 1).unwrap();
    let node = cluster.second_node("ingress-n2").unwrap();
    let log = cluster.folder.path().join("backend.log");
    let mut backend = Process::start(&node, "/usr/bin/python3", &["-c", BACKEND], &log).unwrap();
    let mut controller = start_controller(&cluster);
    cluster.daemon().apply(&format!("{}{}", services(), controllers(&[1]))).unwrap();
    let answers = |process: &mut Process, url: &str| {
        let asked = || cluster.client.output("curl", &["-s", "--max-time", "1", url]);
        process.wait_until(PATIENCE, || asked().is_ok_and(|output| output.status.success())).unwrap();
    };
    answers(&mut controller, &format!("http://{VIP}/"));
    let listening = || node.sh("ss -Hltn src 10.244.2.11:9000").is_ok_and(|text| !text.is_empty());
    backend.wait_until(PATIENCE, listening).unwrap();

    // HTTP/1.1, HTTP/2 in clear, and over TLS, many requests on one connection.
    for (host, pod, client) in
        [(VIP.to_owned(), pod_v4(1), CLIENT[0]), (format!("[{VIP6}]"), pod_v6(1), CLIENT[1])]
    {
        let answer = cluster.curl(&[&format!("http://{host}/")]).unwrap();
        assert_eq!(answer, format!("{pod} {client} HTTP/1.1\n"));
        let answer = cluster.curl(&["--http2-prior-knowledge", &format!("http://{host}:81/")]).unwrap();
        assert_eq!(answer, format!("{pod} {client} HTTP/2.0\n"));
        let urls = format!("https://{host}/?[1-50]");
        let answer = cluster.curl(&["--insecure", "--http2", "-w", "%{num_connects} new\n", &urls]).unwrap();
        let line = format!("{pod} {client} HTTP/2.0\n");
        assert_eq!(answer, format!("{line}1 new\n{}", format!("{line}0 new\n").repeat(49)));
    }

    // WebSockets on pod 1. All others of the controller come and go; at last pod 1 leaves the slice, too.
    let open = || (0..8).map(|_| WebSocket::open()).collect::<Result<Vec<_>>>();
    let mut sockets: Vec<_> = cluster
        .client
        .inside(open)
        .unwrap()
        .into_iter()
        .map(|(socket, first)| {
            assert_eq!(first, format!("{} {}", CLIENT[0], pod_v4(1)));
            socket
        })
        .collect();
    for (round, pods) in [&[1, 2][..], &[1, 2, 3], &[3, 1], &[1], &[2, 1], &[2, 3]].into_iter().enumerate() {
        cluster.daemon().apply(&controllers(pods)).unwrap();
        for socket in &mut sockets {
            socket.exchange(round as u8).unwrap();
        }
        for _ in 0..4 {
            let answer = cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
            let known =
                pods.iter().any(|pod| answer.starts_with(&format!("{} {} ", pod_v4(*pod), CLIENT[0])));
            assert!(known, "{pods:?}: {answer}");
        }
    }
    drop(sockets);
    let access = std::fs::read_to_string(cluster.folder.path().join("access")).unwrap();
    assert!(access.lines().count() > 100, "{access}");
    assert!(access.lines().all(|line| CLIENT.iter().any(|client| line.starts_with(client))), "{access}");
    cluster.finish(&["no_flow"]).unwrap();
}
