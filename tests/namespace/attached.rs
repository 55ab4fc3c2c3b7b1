//! Pods at the gateway itself: veth pairs whose host ends are ports, found by a pattern or added while packets flow.
//!
//! ```text
//!   client --c0--g0-- gateway --g1--n0-- node with its pods
//!                      |    |
//!                    pod1  pod2   10.244.9.1, 10.244.9.2, each in a namespace of its own
//! ```
//!
//! What a CNI plugin does on the host is done here as Calico does it: a host route to each pod, and a gateway that is link-local.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use tempfile::TempDir;
use tests::cluster::{Cluster, GATEWAY, VIP, nginx, pod_v4, pod_v6};
use tests::namespace::{Namespace, veth};
use tests::probe::{self, Report};
use tests::process::Process;

const PATIENCE: Duration = Duration::from_secs(20);

/// Room in the rings of five ports for what comes while a data plane starts, and no more memory than that to be mapped again.
const RINGS: &str = "[rings]\nrx = 8192\nfill = 8192\n[umem]\nchunk_size = 2048\nframes = 51712\n";

const CLIENT: &str = "198.51.100.2";
const CLIENT6: &str = "2001:db8:c::2";
/// The gateway's own addresses, which pods behind ports without any are masqueraded to.
const OWN: &str = "198.51.100.1";
const OWN6: &str = "2001:db8:c::1";

/// A pod in a namespace of its own, with nginx, attached to the gateway by the interface `pod{number}`.
struct Pod {
    number: u8,
    namespace: Namespace,
    _server: Process,
    _folder: TempDir,
}

fn v4(pod: u8) -> String {
    format!("10.244.9.{pod}")
}

fn v6(pod: u8) -> String {
    format!("fd00:244:9::{pod}")
}

impl Pod {
    fn attach(cluster: &Cluster, number: u8) -> Pod {
        let gateway = &cluster.gateway;
        let (host, v4, v6) = (format!("pod{number}"), v4(number), v6(number));
        let name = gateway.name().rsplit('-').nth(1).unwrap();
        let namespace = Namespace::new(&format!("{name}-{host}")).unwrap();
        let mac = |end| format!("02:00:00:00:09:{}{number}", end);
        veth((gateway, &host, &mac('a')), (&namespace, "eth0", &mac('b')), 1).unwrap();
        // The pod: addresses of its own alone, everything else by a gateway that is no neighbor of any prefix.
        namespace.ip(&format!("address add {v4}/32 dev eth0")).unwrap();
        namespace.ip(&format!("address add {v6}/128 dev eth0 nodad")).unwrap();
        namespace.ip("route add 169.254.1.1 dev eth0").unwrap();
        namespace.ip("route add default via 169.254.1.1").unwrap();
        namespace.ip("route add default via fe80::1 dev eth0").unwrap();
        // The host. For IPv4 the kernel answers ARP for the gateway's address either as a proxy or as its owner.
        if number == 2 {
            let settings =
                [format!("net.ipv4.conf.{host}.proxy_arp=1"), format!("net.ipv4.neigh.{host}.proxy_delay=0")];
            gateway.sysctl(&settings.each_ref().map(String::as_str)).unwrap();
        } else {
            gateway.ip(&format!("address add 169.254.1.1/32 dev {host}")).unwrap();
        }
        gateway.ip(&format!("address add fe80::1/64 dev {host} nodad")).unwrap();
        gateway.ip(&format!("route add {v4} dev {host}")).unwrap();
        gateway.ip(&format!("route add {v6} dev {host}")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let server = nginx(&namespace, folder.path()).unwrap();
        Pod { number, namespace, _server: server, _folder: folder }
    }

    fn curl(&self, host: &str) -> String {
        let retry = ["-sS", "--max-time", "20", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"];
        self.namespace.run("curl", &[&retry[..], &[&format!("http://{host}/")]].concat()).unwrap()
    }
}

/// A cluster whose gateway file ends with `more`. Proxy ARP asks the routing table for the address of the pods' gateway.
fn cluster(name: &str, more: &str) -> Cluster {
    let config = GATEWAY.replace("capacity = 262144", "capacity = 16384");
    let cluster = Cluster::with(name, 3, 1, &format!("{config}{RINGS}{more}")).unwrap();
    cluster.gateway.ip(&format!("route add default via {CLIENT}")).unwrap();
    cluster
}

/// Both pods, and Services in front of them: `far` keeps the client's address, `near` does not, `self` leads to the first pod alone.
fn objects() -> String {
    let mut text = String::new();
    for number in [1, 2] {
        text += &format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{namespace: default, name: attached-{number}}}, spec: {{nodeName: gw-1, \
             containers: [{{name: c}}]}}, status: {{phase: Running, podIP: {v4}, podIPs: [{{ip: {v4}}}, {{ip: '{v6}'}}]}}}}\n",
            v4 = v4(number),
            v6 = v6(number)
        );
    }
    for (name, policy, number, pods) in
        [("far", "Local", 30, &[1, 2][..]), ("near", "Cluster", 31, &[1, 2]), ("self", "Cluster", 32, &[1])]
    {
        text += &format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{namespace: default, name: {name}}}, spec: {{type: LoadBalancer, \
             externalTrafficPolicy: {policy}, allocateLoadBalancerNodePorts: false, clusterIP: 10.96.0.{number}, \
             clusterIPs: [10.96.0.{number}, 'fd00:96::{number}'], ipFamilies: [IPv4, IPv6], ipFamilyPolicy: RequireDualStack, \
             ports: [{{name: http, port: 80}}]}}, \
             status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.{number}}}, {{ip: '2001:db8::{number}'}}]}}}}}}\n"
        );
        for (family, address) in [("IPv4", v4 as fn(u8) -> String), ("IPv6", v6)] {
            let endpoint = |pod: &u8| {
                format!("{{addresses: ['{}'], nodeName: gw-1, conditions: {{ready: true}}}}", address(*pod))
            };
            let endpoints: Vec<String> = pods.iter().map(endpoint).collect();
            text += &format!(
                "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{namespace: default, name: {name}-{slice}, \
                 labels: {{kubernetes.io/service-name: {name}}}}}, addressType: {family}, ports: [{{name: http, port: 80}}], \
                 endpoints: [{}]}}\n",
                endpoints.join(", "),
                slice = family.to_lowercase(),
            );
        }
    }
    text
}

/// What the gateway's ports are called, as `get ports` says.
fn ports(cluster: &Cluster) -> Vec<String> {
    let status = cluster.daemon().status().unwrap();
    status.ports.into_iter().map(|port| port.name).collect()
}

#[track_caller]
fn wait_for_ports(cluster: &Cluster, names: &[&str]) {
    let start = Instant::now();
    // While the data plane starts anew nobody may answer.
    let are_there = || {
        let output = cluster.daemon().ctl_output(&["get", "ports", "-o", "name"]).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| line.rsplit('/').next().unwrap()).eq(names.iter().copied())
    };
    while !are_there() {
        assert!(start.elapsed() < PATIENCE, "ports are {:?}\n{}", ports(cluster), cluster.daemon().log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
fn refuses(cluster: &Cluster, args: &[&str], words: &[&str]) {
    let before = (ports(cluster), cluster.daemon().data_plane());
    let output = cluster.daemon().ctl_output(args).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{word:?} is missing in\n{said}"));
    assert_eq!((ports(cluster), cluster.daemon().data_plane()), before, "nothing was changed");
}

/// Rules 5.6, 14.10.
#[test]
fn pods_at_the_gateway_are_pods_like_others() {
    let cluster = cluster("attached", "[[attach]]\npattern = \"pod*\"\n");
    let [one, two] = [1, 2].map(|number| Pod::attach(&cluster, number));
    wait_for_ports(&cluster, &["uplink", "fabric", "pod1", "pod2"]);
    cluster.daemon().apply(&objects()).unwrap();

    // From outside, by a Service, with and without the client's address.
    for (vip, client, pods) in
        [("203.0.113.30", CLIENT, [v4(1), v4(2)]), ("[2001:db8::30]", CLIENT6, [v6(1), v6(2)])]
    {
        let answers: BTreeSet<String> =
            (0..40).map(|_| cluster.curl(&[&format!("http://{vip}/")]).unwrap()).collect();
        assert_eq!(answers, pods.map(|pod| format!("{pod} {client}\n")).into());
    }
    for (vip, own) in [("203.0.113.31", OWN), ("[2001:db8::31]", OWN6)] {
        let answer = cluster.curl(&[&format!("http://{vip}/")]).unwrap();
        assert!(answer.ends_with(&format!(" {own}\n")), "{answer}");
    }
    // To a pod far away and from it, as they are.
    assert_eq!(one.curl(&pod_v4(1)), format!("{} {}\n", pod_v4(1), v4(1)));
    assert_eq!(two.curl(&format!("[{}]", pod_v6(2))), format!("{} {}\n", pod_v6(2), v6(2)));
    for (from, to, host) in [(pod_v4(3), v4(1), v4(1)), (pod_v6(3), v6(2), format!("[{}]", v6(2)))] {
        let answer = cluster
            .node
            .run("curl", &["-sS", "--max-time", "20", "--interface", &from, &format!("http://{host}/")]);
        assert_eq!(answer.unwrap(), format!("{to} {from}\n"));
    }
    // From one to the other, and to both by Services.
    assert_eq!(one.curl(&v4(2)), format!("{} {}\n", v4(2), v4(1)));
    assert_eq!(two.curl(&format!("[{}]", v6(1))), format!("{} {}\n", v6(1), v6(2)));
    assert_eq!(two.curl("10.96.0.32"), format!("{} {}\n", v4(1), v4(2)));
    assert_eq!(two.curl("[fd00:96::32]"), format!("{} {}\n", v6(1), v6(2)));
    let far = one.curl("10.96.0.10");
    assert!(far.starts_with("10.244.1.") && far.ends_with(&format!(" {}\n", v4(1))), "{far}");
    // To itself by a Service.
    assert_eq!(one.curl("10.96.0.32"), format!("{} {OWN}\n", v4(1)));
    assert_eq!(one.curl("[fd00:96::32]"), format!("{} {OWN6}\n", v6(1)));

    // Only by its own address.
    one.namespace.ip(&format!("address add {}/32 dev eth0", v4(7))).unwrap();
    let args = ["-s", "--max-time", "1", "--interface", &v4(7), &format!("http://{}/", pod_v4(1))];
    assert!(!one.namespace.output("curl", &args).unwrap().status.success());
    assert!(cluster.daemon().drops().unwrap()["foreign_source"] > 0);

    let listed = cluster.daemon().ctl(&["get", "ports"]).unwrap();
    assert!(
        listed.lines().any(|line| line.split_whitespace().take(3).eq(["pod1", "pod1", "pod"])),
        "{listed}"
    );
    // A pod that is gone takes its port with it.
    let number = one.number;
    drop(one);
    wait_for_ports(&cluster, &["uplink", "fabric", "pod2"]);
    assert_eq!(two.curl(&pod_v4(1)), format!("{} {}\n", pod_v4(1), v4(2)));
    // And comes back with another interface of the same name.
    let again = Pod::attach(&cluster, number);
    wait_for_ports(&cluster, &["uplink", "fabric", "pod2", "pod1"]);
    assert_eq!(again.curl(&v4(2)), format!("{} {}\n", v4(2), v4(1)));
    assert_eq!(two.curl("10.96.0.32"), format!("{} {}\n", v4(1), v4(2)));
    refuses(&cluster, &["port", "remove", "pod2"], &["pod2", "pattern of [[attach]]", "delete or rename"]);
    cluster.finish(&["no_flow", "foreign_source"]).unwrap();
}

/// A datagram from the client to the Service that keeps its address, to a port where nobody answers.
fn datagram() -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 2, 2], [2, 0, 0, 0, 2, 1])
        .ipv4([198, 51, 100, 2], [203, 0, 113, 10], 64)
        .udp(20_000, 5201)
        .write(&mut frame, &[0; 18])
        .expect("a vector takes every byte");
    frame[40..42].copy_from_slice(&[0, 0]);
    frame
}

/// Has datagrams and downloads pass between uplink and fabric while `work` is done.
fn under_traffic(cluster: &Cluster, rate: u64, work: impl FnOnce()) -> Report {
    let stop = AtomicBool::new(false);
    let urls = [format!("http://{VIP}/slow"), format!("http://{}/slow", pod_v4(1))];
    let mut downloads: Vec<Process> = urls
        .iter()
        .enumerate()
        .map(|(number, url)| {
            let args = ["-sS", "--max-time", "60", "-o", "/dev/null", "-w", "%{size_download}", url];
            let log = cluster.folder.path().join(format!("download-{number}"));
            Process::start(&cluster.client, "curl", &args, &log).unwrap()
        })
        .collect();
    let report = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            probe::run((&cluster.client, "c0"), (&cluster.node, "n0"), &datagram(), rate, &stop).unwrap()
        });
        work();
        stop.store(true, Ordering::Relaxed);
        traffic.join().unwrap()
    });
    for download in &mut downloads {
        assert!(download.wait(Duration::from_secs(60)).unwrap().success(), "{}", download.log());
        assert_eq!(download.log(), "20000000");
    }
    report
}

#[test]
fn ports_come_and_go_without_a_loss_on_the_others() {
    let mut cluster = cluster("ports", "");
    let [one, two] = [1, 2].map(|number| Pod::attach(&cluster, number));
    cluster.daemon().apply(&objects()).unwrap();
    let rate = 5_000;
    let report = under_traffic(&cluster, rate, || {
        let ctl = |args: &[&str]| cluster.daemon().ctl(args).unwrap();
        assert_eq!(ctl(&["port", "add", "pod1", "--role", "pod"]), "port/pod1 added\n");
        assert_eq!(
            ctl(&["port", "add", "second", "--interface", "pod2", "--role", "pod"]),
            "port/second added\n"
        );
        // What the command says holds when it returns.
        assert_eq!(one.curl(&v4(2)), format!("{} {}\n", v4(2), v4(1)));
        assert_eq!(ctl(&["port", "remove", "pod1"]), "port/pod1 removed\n");
        assert_eq!(ports(&cluster), ["uplink", "fabric", "second"]);
        assert_eq!(ctl(&["port", "add", "pod1", "--kind", "pod"]), "port/pod1 added\n");
        assert_eq!(two.curl(&v4(1)), format!("{} {}\n", v4(1), v4(2)));
        assert_eq!(ctl(&["port", "remove", "second"]), "port/second removed\n");
        assert_eq!(
            ctl(&["port", "add", "second", "--interface", "pod2", "--role", "pod"]),
            "port/second added\n"
        );
    });
    println!("{report:?} at {rate}/s");
    assert_eq!((report.arrived, report.doubled), (report.sent, 0), "{report:?}");

    refuses(
        &cluster,
        &["port", "add", "nosuch0", "--role", "pod"],
        &["interface", "nosuch0", "ip link show"],
    );
    refuses(
        &cluster,
        &["port", "add", "x", "--interface", "g0", "--role", "pod"],
        &["interface", "g0", "port uplink takes"],
    );
    refuses(
        &cluster,
        &["port", "add", "uplink", "--interface", "pod1", "--role", "pod"],
        &["name", "uplink", "two ports", "rename"],
    );
    refuses(
        &cluster,
        &["port", "add", "lo", "--role", "pod"],
        &["interface", "lo", "no Ethernet frames", "link/ether"],
    );
    refuses(&cluster, &["port", "remove", "uplink"], &["name", "uplink", "only outside port", "add another"]);
    refuses(&cluster, &["port", "remove", "nosuch"], &["name", "nosuch", "get ports"]);

    // Kept over the death of the data plane and of all.
    let names = ["uplink", "fabric", "pod1", "second"];
    assert_eq!(ports(&cluster), names);
    cluster.daemon().kill_data_plane().unwrap();
    wait_for_ports(&cluster, &names);
    assert_eq!(one.curl(&v4(2)), format!("{} {}\n", v4(2), v4(1)));
    // One of the gateway file, gone and back as one that was added.
    cluster.daemon().ctl(&["port", "remove", "fabric"]).unwrap();
    cluster.kill_all_and_restart().unwrap();
    assert_eq!(ports(&cluster), ["uplink", "pod1", "second"]);
    assert_eq!(one.curl(&v4(2)), format!("{} {}\n", v4(2), v4(1)));
    cluster.daemon().ctl(&["port", "add", "fabric", "--interface", "g1", "--role", "inside"]).unwrap();
    cluster.kill_all_and_restart().unwrap();
    assert_eq!(ports(&cluster), ["uplink", "pod1", "second", "fabric"]);
    assert_eq!(one.curl(&pod_v4(1)), format!("{} {}\n", pod_v4(1), v4(1)));
    assert_eq!(one.curl("10.96.0.32"), format!("{} {OWN}\n", v4(1)));
    // What was added goes with its interface; once it is removed, it does not come back.
    drop(one);
    wait_for_ports(&cluster, &["uplink", "second", "fabric"]);
    assert_eq!(cluster.daemon().ctl(&["port", "remove", "pod1"]).unwrap(), "port/pod1 removed\n");
    refuses(&cluster, &["port", "remove", "pod1"], &["no such port"]);
    cluster.finish(&["no_flow"]).unwrap();
}

#[test]
fn a_port_needs_a_queue_for_each_worker_and_room_for_its_rings() {
    let config = GATEWAY.replace("cpus = [1]", "cpus = [0, 1]");
    let cluster = Cluster::with(
        "queues",
        1,
        2,
        &format!("{config}[umem]\nframes = 12800\n[[attach]]\npattern = \"narrow*\"\n"),
    );
    let cluster = cluster.unwrap();
    let beside = Namespace::new("queues-beside").unwrap();
    for (name, mac, queues) in [("narrow0", "02:00:00:00:09:01", 1), ("wide0", "02:00:00:00:09:02", 2)] {
        veth((&cluster.gateway, name, mac), (&beside, name, "02:00:00:00:09:03"), queues).unwrap();
    }
    refuses(
        &cluster,
        &["port", "add", "wide0", "--role", "pod"],
        &["umem.frames", "12800", "set it to 18944 or more"],
    );
    let start = Instant::now();
    while !cluster.daemon().log().contains("has 1 receive queue(s) for 2 worker(s)") {
        assert!(start.elapsed() < PATIENCE, "{}", cluster.daemon().log());
        std::thread::sleep(Duration::from_millis(20));
    }
    cluster.finish(&["no_flow"]).unwrap();
}
