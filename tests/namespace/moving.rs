//! A pod moves to another node under load, with its address and its sockets: its connections go on, and nobody else notices.
//!
//! ```text
//!   client --c0--g0-- gateway --g1--+--n0-- node-1 --p0--+
//!                                   +--n2-- node-2 ------+-- eth0 of the pod 10.244.9.5
//! ```

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use tests::cluster::{Cluster, NODE_1, NODE_2, OWN_POD, OWN_POD_RANGE, VIP, nginx, pod_v4};
use tests::namespace::Namespace;
use tests::process::Process;

const PATIENCE: Duration = Duration::from_secs(20);
/// Linux' shortest retransmission timeout, of a connection with so short a way.
const RTO: Duration = Duration::from_millis(200);
/// Addresses of the pod's Service.
const SERVICE: [&str; 2] = ["203.0.113.60", "2001:db8::60"];
/// Bytes of a download at which the pod moves: there, and back.
const MOVES: [u64; 2] = [5_000_000, 11_000_000];

/// The pod, and a Service whose only endpoint it is, on a node.
fn objects(node: &str) -> String {
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: moving}}\nspec:\n  type: LoadBalancer\n  \
         externalTrafficPolicy: Local\n  allocateLoadBalancerNodePorts: false\n  clusterIP: 10.96.0.60\n  \
         clusterIPs: [10.96.0.60, 'fd00:96::60']\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  \
         ports: [{{name: http, port: 80}}, {{name: iperf, port: 5201}}]\n\
         status: {{loadBalancer: {{ingress: [{{ip: {}}}, {{ip: '{}'}}]}}}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: default, name: moving}}\nspec: {{nodeName: {node}}}\n\
         status: {{phase: Running, podIP: {}, podIPs: [{{ip: {}}}, {{ip: '{}'}}]}}\n",
        SERVICE[0], SERVICE[1], OWN_POD[0], OWN_POD[0], OWN_POD[1]
    );
    for (family, address) in ["IPv4", "IPv6"].iter().zip(OWN_POD) {
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: default, name: moving-{}, \
             labels: {{kubernetes.io/service-name: moving}}}}\naddressType: {family}\n\
             ports: [{{name: http, port: 80}}, {{name: iperf, port: 5201}}]\n\
             endpoints: [{{addresses: ['{address}'], nodeName: {node}}}]\n",
            family.to_lowercase()
        );
    }
    text
}

/// A request on a connection of its own to the other pods, again and again. Returns how many; any that fails is an error.
fn requests(stop: &AtomicBool) -> Result<u64> {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let ask = || {
            let mut stream =
                TcpStream::connect_timeout(&SocketAddr::new(VIP.parse()?, 80), Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            anyhow::Ok(())
        };
        ask().with_context(|| format!("request {count}"))?;
        count += 1;
    }
    Ok(count)
}

/// Datagrams to the echo of the other pods, eight at a time. Returns how many; any without an answer is an error.
fn datagrams(stop: &AtomicBool) -> Result<u64> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((VIP, 7))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut count = 0u64;
    while !stop.load(Ordering::Relaxed) {
        for number in count..count + 8 {
            socket.send(&number.to_be_bytes())?;
        }
        for number in count..count + 8 {
            let mut answer = [0; 8];
            socket.recv(&mut answer).with_context(|| format!("the answer to datagram {number}"))?;
            ensure!(u64::from_be_bytes(answer) == number, "datagram {number} came back as another");
        }
        count += 8;
    }
    Ok(count)
}

/// How often retransmission timers ran out, of all TCP connections in a namespace.
fn timeouts(namespace: &Namespace) -> u64 {
    let text = namespace.run("cat", &["/proc/net/netstat"]).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:")).map(str::split_whitespace);
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    names.zip(values).find(|(name, _)| *name == "TCPTimeouts").unwrap().1.parse().unwrap()
}

/// Waits until a download has come so far.
fn wait_for_bytes(download: &mut Process, file: &Path, bytes: u64) {
    let is_there = || std::fs::metadata(file).is_ok_and(|meta| meta.len() >= bytes);
    download.wait_until(PATIENCE, is_there).unwrap();
}

// Rule 14.9.
#[test]
fn a_pod_moves_with_its_connections() {
    let cluster = Cluster::new("moving", 3).unwrap();
    let other = cluster.second_node("moving-n2").unwrap();
    other.sysctl(&["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]).unwrap();
    cluster.ip_batch(&other, OWN_POD_RANGE).unwrap();
    let pod = cluster.add_pod("moving-pod").unwrap();
    let folder = cluster.folder.path();
    let own = folder.join("pod");
    std::fs::create_dir(&own).unwrap();
    let mut server = nginx(&pod, &own).unwrap();
    let mut iperf =
        Process::start(&pod, "iperf3", &["-s", "-1", "--forceflush"], &own.join("iperf")).unwrap();
    iperf
        .wait_until(PATIENCE, || {
            std::fs::read_to_string(own.join("iperf")).is_ok_and(|text| text.contains("listening"))
        })
        .unwrap();
    cluster.daemon().apply(&objects("node-1")).unwrap();
    let urls = [format!("http://{}", SERVICE[0]), format!("http://[{}]", SERVICE[1])];
    for url in &urls {
        let up = || cluster.client.output("curl", &["-s", "--max-time", "1", url]);
        server.wait_until(PATIENCE, || up().is_ok_and(|output| output.status.success())).unwrap();
    }

    let stop = AtomicBool::new(false);
    let mut moved = Vec::new();
    let before = [&cluster.client, &pod].map(timeouts);
    std::thread::scope(|scope| {
        let requests = scope.spawn(|| cluster.client.inside(|| requests(&stop)));
        let datagrams = scope.spawn(|| cluster.client.inside(|| datagrams(&stop)));
        let upload = ["-J", "-c", SERVICE[0], "-t", "4", "-b", "20M", "--connect-timeout", "5000"];
        let mut upload =
            Process::start(&cluster.client, "iperf3", &upload, &folder.join("upload.json")).unwrap();
        let files = ["v4", "v6"].map(|family| folder.join(format!("download-{family}")));
        let mut downloads: Vec<_> = urls
            .iter()
            .zip(&files)
            .map(|(url, file)| {
                let args = [
                    "-sS",
                    "--no-buffer",
                    "--max-time",
                    "60",
                    "-o",
                    &file.to_string_lossy(),
                    &format!("{url}/slow"),
                ];
                Process::start(&cluster.client, "curl", &args, &file.with_extension("log")).unwrap()
            })
            .collect();
        let moves = [(&cluster.node, &other, NODE_2, "node-2"), (&other, &cluster.node, NODE_1, "node-1")];
        for (bytes, (from, to, addresses, name)) in MOVES.into_iter().zip(moves) {
            wait_for_bytes(&mut downloads[0], &files[0], bytes);
            let start = Instant::now();
            cluster.move_pod(from, to, addresses).unwrap();
            cluster.daemon().apply(&objects(name)).unwrap();
            moved.push(start.elapsed());
            println!("moved to {name} in {:?}", moved[moved.len() - 1]);
        }
        for (download, file) in downloads.iter_mut().zip(&files) {
            let status = download.wait(Duration::from_secs(60)).unwrap();
            assert!(status.success(), "{status}: {}", download.log());
            assert!(
                std::fs::read(file).unwrap() == std::fs::read(own.join("big")).unwrap(),
                "{}",
                file.display()
            );
        }
        assert!(upload.wait(PATIENCE).unwrap().success(), "{}", upload.log());
        stop.store(true, Ordering::Relaxed);
        println!("{} requests of others", requests.join().unwrap().unwrap());
        println!("{} datagrams of others", datagrams.join().unwrap().unwrap());
        let report: serde_json::Value = serde_json::from_str(&upload.log()).unwrap();
        let sum = &report["end"]["sum_received"]["bytes"];
        println!("{sum} bytes were uploaded");
        assert!(sum.as_u64().unwrap() > 5_000_000, "{report}");
    });
    let rounds = [timeouts(&cluster.client) - before[0], timeouts(&pod) - before[1]];
    println!(
        "retransmission timers ran out {} times at the client, {} times in the pod",
        rounds[0], rounds[1]
    );
    // Both downloads are sent again once a move, as long as the move took less than the next time (RFC 6298 section 5).
    let doublings = |moved: &Duration| moved.as_millis().div_ceil(RTO.as_millis()).ilog2() + 1;
    let allowed: u32 = moved.iter().map(doublings).sum::<u32>() * 2;
    assert!(rounds[1] <= u64::from(allowed), "{rounds:?}, {moved:?}");
    cluster.finish(&["no_flow"]).unwrap();
}

/// Rule 12.5.
#[test]
fn a_route_leads_to_pods_that_no_node_tells_of() {
    let cluster = Cluster::new("routes", 3).unwrap();
    let other = cluster.second_node("routes-n2").unwrap();
    let pods = ["10.250.7.5", "fd00:250:7::5"];
    for pod in pods {
        other.ip(&format!("address add {pod} dev lo")).unwrap();
    }
    let folder = cluster.folder.path().join("far");
    std::fs::create_dir(&folder).unwrap();
    let mut server = nginx(&other, &folder).unwrap();
    let urls = [format!("http://{}/", pods[0]), format!("http://[{}]/", pods[1])];
    let asks = |url: &str| cluster.client.output("curl", &["-s", "--max-time", "2", url]).unwrap();
    urls.iter().for_each(|url| assert!(!asks(url).status.success(), "{url}: there is no route yet"));
    for (range, via) in [("10.250.7.0/24", NODE_2[0]), ("fd00:250:7::/64", NODE_2[1])] {
        cluster.daemon().ctl(&["route", "add", range, "via", via]).unwrap();
    }
    for (url, client) in urls.iter().zip(["198.51.100.2", "2001:db8:c::2"]) {
        server.wait_until(PATIENCE, || asks(url).status.success()).unwrap();
        let answer = cluster.curl(&[url]).unwrap();
        assert!(answer.ends_with(&format!(" {client}\n")), "{answer}");
    }
    // They are pods: those of the other node see their own addresses, and are seen by theirs.
    let answer =
        cluster.node.run("curl", &["-sS", "--max-time", "20", "--interface", &pod_v4(1), &urls[0]]).unwrap();
    assert_eq!(answer, format!("{} {}\n", pods[0], pod_v4(1)));
    for range in ["10.250.7.0/24", "fd00:250:7::/64"] {
        cluster.daemon().ctl(&["route", "remove", range]).unwrap();
    }
    urls.iter().for_each(|url| assert!(!asks(url).status.success(), "{url}: the route is gone"));
    cluster.finish(&["no_flow", "no_route"]).unwrap();
}
