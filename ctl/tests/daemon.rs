//! `towpathctl` against the daemon's own control threads, over a real socket: both ends of the protocol agree.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use assert_cmd::Command;
use config::control::Count;
use config::gateway::Gateway;
use forwarder::control::health::monotonic_ns;
use forwarder::control::publish::Publisher;
use forwarder::control::{Control, ControlParts, PortInfo, Steer};
use forwarder::explain::assumed_fib;
use forwarder::port::xsk::steer::{Contents, SteerChange};
use forwarder::table::flow_map::{FlowMap, FlowMapConfig};
use serde_json::Value;

const CLUSTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/cluster.yaml");

/// Steering maps of no interface.
struct NoMaps;

impl Steer for NoMaps {
    fn contents(&self) -> Result<Contents, String> {
        Ok(Contents::default())
    }

    fn apply(&self, _: SteerChange) -> Result<(), String> {
        Ok(())
    }

    fn counters(&self) -> Vec<Count> {
        Vec::new()
    }
}

/// Control threads and one worker that puts every generation in force, unless it is told to stand still.
struct Daemon {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    control: Option<Control>,
    stand_still: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start() -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let text = format!(
            "[gateway]\nname = 'gw-1'\nservice_cidrs = ['10.96.0.0/16', 'fd00:96::/112']\nreturn = 'routed'\n\
             [control]\nstate_dir = '{}'\n\
             [[port]]\nname = 'uplink'\ninterface = 'g0'\nrole = 'outside'\n\
             [[port]]\nname = 'fabric'\ninterface = 'g1'\nrole = 'inside'\n",
            state.display()
        );
        let gateway = Arc::new(Gateway::parse(&text, "gateway.toml").expect("a good gateway file"));
        let socket = dir.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let publisher = Publisher::new(1).unwrap();
        let pods = ["10.244.0.0/16", "fd00:244::/32"].map(|net| net.parse().unwrap());
        let empty = forwarder::tables::Tables {
            settings: Arc::new(forwarder::control::compile::settings(&gateway)),
            ..Default::default()
        };
        publisher.publish_fib(Arc::new(assumed_fib(&empty, &pods, &[])));
        let map = || {
            Arc::new(FlowMap::anonymous(FlowMapConfig { capacity: 1024, workers: 2, ..Default::default() }))
        };
        let (flows, affinity) = (map(), map());
        let control = Control::start(ControlParts {
            gateway,
            listener,
            group: None,
            publisher: publisher.clone(),
            flow_worker: flows.worker(1),
            affinity_worker: affinity.worker(1),
            flows,
            affinity,
            steer: Arc::new(NoMaps),
            routes: Box::new(|_, _| {}),
            ports: vec![PortInfo { mode: "copy".into(), queues: 1, partial_checksums: true }; 2],
            socket_counters: Box::new(|_| Default::default()),
            change_port: Box::new(|_| unreachable!("no port is changed here")),
            restarts: 0,
        })
        .unwrap();
        let (stand_still, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let mut reader = publisher.reader(0);
        let (still, stopping) = (stand_still.clone(), stop.clone());
        let worker = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                if !still.load(Ordering::Relaxed) {
                    let generation = reader.load().0.generation;
                    reader.link().set_in_force(generation);
                    reader.link().beat(monotonic_ns());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let (worker, control) = (Some(worker), Some(control));
        Daemon { _dir: dir, socket, control, stand_still, stop, worker }
    }

    /// One that has the cluster of the manifests.
    fn with_cluster() -> Daemon {
        let daemon = Daemon::start();
        daemon.run(&["apply", "-f", CLUSTER]).assert().code(0);
        daemon
    }

    fn run(&self, args: &[&str]) -> Command {
        let mut command = Command::cargo_bin("towpathctl").unwrap();
        command
            .env("TOWPATH_SOCKET", &self.socket)
            .env("NO_COLOR", "1")
            .timeout(Duration::from_secs(60))
            .args(args);
        command
    }

    /// Standard output of a command that succeeds.
    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args).assert().code(0).get_output().clone();
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.text(&[args, &["-o", "json"]].concat())).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.control.take());
        self.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

fn service(name: &str, cluster_ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
         spec: {{clusterIP: {cluster_ip}, clusterIPs: [{cluster_ip}], ports: [{{port: 80}}]}}\n---\n"
    )
}

#[test]
fn applying_twice_changes_nothing_the_second_time() {
    let daemon = Daemon::start();
    insta::assert_snapshot!(daemon.text(&["apply", "-f", CLUSTER, "--dry-run"]), @"
    service/kubernetes created (dry run)
    service/my-nginx created (dry run)
    service/billing created (dry run)
    service/empty created (dry run)
    service/kube-dns created (dry run)
    endpointslice.discovery.k8s.io/kubernetes created (dry run)
    endpointslice.discovery.k8s.io/my-nginx-4kv7d created (dry run)
    endpointslice.discovery.k8s.io/my-nginx-x9sbm created (dry run)
    endpointslice.discovery.k8s.io/billing-8wq2z created (dry run)
    endpointslice.discovery.k8s.io/kube-dns-qz6jx created (dry run)
    node/node-1 created (dry run)
    node/node-2 created (dry run)
    ");
    assert!(daemon.text(&["get", "svc", "-A"]).is_empty(), "a dry run changes nothing");
    let created = daemon.text(&["apply", "-f", CLUSTER]);
    assert!(created.lines().all(|line| line.ends_with(" created")), "{created}");
    let again = daemon.text(&["apply", "-f", CLUSTER]);
    assert!(again.lines().all(|line| line.ends_with(" unchanged")), "{again}");
    daemon.run(&["diff", "-f", CLUSTER]).assert().code(0).stdout("");
}

#[test]
fn every_noun_has_its_rows() {
    let daemon = Daemon::with_cluster();
    insta::assert_snapshot!(daemon.text(&["get", "endpoints", "-A"]), @"
    NAMESPACE     SERVICE      ENDPOINT                PORT      STATE         NODE     TARGET
    default       kubernetes   192.168.50.10:6443      https     ready         <none>   <none>
    default       my-nginx     10.244.1.7:80           http      ready         node-1   Pod/my-nginx-646554d7fd-gqsfh
    default       my-nginx     10.244.1.7:443          https     ready         node-1   Pod/my-nginx-646554d7fd-gqsfh
    default       my-nginx     10.244.2.5:80           http      ready         node-2   Pod/my-nginx-646554d7fd-7lm2p
    default       my-nginx     10.244.2.5:443          https     ready         node-2   Pod/my-nginx-646554d7fd-7lm2p
    default       my-nginx     10.244.2.9:80           http      not ready     node-2   Pod/my-nginx-646554d7fd-x8kcn
    default       my-nginx     10.244.2.9:443          https     not ready     node-2   Pod/my-nginx-646554d7fd-x8kcn
    default       my-nginx     10.244.1.4:80           http      terminating   node-1   Pod/my-nginx-5b56ccd65f-w2dzt
    default       my-nginx     10.244.1.4:443          https     terminating   node-1   Pod/my-nginx-5b56ccd65f-w2dzt
    default       my-nginx     [fd00:244:0:1::7]:80    http      ready         node-1   Pod/my-nginx-646554d7fd-gqsfh
    default       my-nginx     [fd00:244:0:1::7]:443   https     ready         node-1   Pod/my-nginx-646554d7fd-gqsfh
    default       my-nginx     [fd00:244:0:2::5]:80    http      ready         node-2   Pod/my-nginx-646554d7fd-7lm2p
    default       my-nginx     [fd00:244:0:2::5]:443   https     ready         node-2   Pod/my-nginx-646554d7fd-7lm2p
    kube-system   kube-dns     10.244.1.2:53           dns-tcp   ready         node-1   Pod/coredns-7c65d6cfc9-m2k8t
    kube-system   kube-dns     10.244.1.2:53           dns       ready         node-1   Pod/coredns-7c65d6cfc9-m2k8t
    shop          billing      10.244.2.21:8443        https     ready         node-2   Pod/billing-0
    ");
    insta::assert_snapshot!(daemon.text(&["get", "endpoints", "billing", "-n", "shop", "-o", "wide"]), @"
    SERVICE   ENDPOINT           PORT    STATE   NODE     TARGET          ZONE     PROTOCOL   SLICE
    billing   10.244.2.21:8443   https   ready   node-2   Pod/billing-0   <none>   TCP        billing-8wq2z
    ");
    insta::assert_snapshot!(daemon.text(&["get", "routes"]), @"
    PREFIX          KIND       VIA         PORT
    0.0.0.0/0       next-hop   192.0.2.0   uplink
    10.244.0.0/16   next-hop   192.0.2.1   fabric
    ::/0            next-hop   192.0.2.0   uplink
    fd00:244::/32   next-hop   192.0.2.1   fabric
    ");
    insta::assert_snapshot!(daemon.text(&["get", "neighbors"]), @"
    ADDRESS     PORT     MAC                 STATE
    192.0.2.0   uplink   02:00:00:00:01:00   reachable
    192.0.2.1   fabric   02:00:00:00:01:01   reachable
    ");
    insta::assert_snapshot!(daemon.text(&["get", "ports"]), @"
    NAME     INTERFACE   ROLE      LINK   MODE   QUEUES   ADDRESSES
    uplink   g0          outside   up     copy   1        192.0.2.128,2001:db8:ffff::
    fabric   g1          inside    up     copy   1        192.0.2.129,2001:db8:ffff::1
    ");
    insta::assert_snapshot!(daemon.text(&["get", "dns", "-o", "hosts"]), @"
    10.96.77.3 billing.shop.svc.cluster.local
    10.96.77.4 empty.shop.svc.cluster.local
    10.96.0.10 kube-dns.kube-system.svc.cluster.local
    10.96.0.1 kubernetes.default.svc.cluster.local
    10.96.142.17 my-nginx.default.svc.cluster.local
    fd00:96::8e11 my-nginx.default.svc.cluster.local
    ");
    let services = daemon.text(&["get", "svc", "-A", "--no-headers"]);
    assert_eq!(services.lines().count(), 5, "{services}");
    let worker = daemon.json(&["get", "worker/0"]);
    assert_eq!((&worker["index"], &worker["state"]), (&0.into(), &"running".into()));
    daemon.run(&["get", "worker/7"]).assert().code(1);
    daemon.run(&["get", "pods"]).assert().code(0).stdout("").stderr("No pods found in default namespace.\n");
    daemon.run(&["get", "flows"]).assert().code(0).stdout("").stderr("No flows found.\n");
}

#[test]
fn objects_come_back_as_they_were_applied() {
    let daemon = Daemon::with_cluster();
    let all = daemon.text(&["get", "all", "-o", "yaml"]);
    let restored = Daemon::start();
    restored.run(&["apply", "-f", "-"]).write_stdin(all.clone()).assert().code(0);
    assert_eq!(restored.text(&["get", "all", "-o", "yaml"]), all);
    let service = daemon.json(&["get", "svc/my-nginx"]);
    assert_eq!(service["status"]["loadBalancer"]["ingress"][0]["ip"], "203.0.113.10");
}

#[test]
fn a_service_is_described_with_rules_and_uses() {
    let daemon = Daemon::with_cluster();
    insta::assert_snapshot!(daemon.text(&["describe", "service", "shop/billing"]), @"
    Name:                     billing
    Namespace:                shop
    Selector:                 app=billing
    Type:                     LoadBalancer
    IPs:                      10.96.77.3
    External IPs:             203.0.113.11
    Ports:                    443:30443/TCP
    Session Affinity:         None
    Algorithm:                maglev
    On Endpoint Removed:      leave
    Internal Traffic Policy:  Cluster
    External Traffic Policy:  Local
    Resource Version:         5120
    Endpoints:                1 ready of 1

    Frontends:
      ADDRESS        PORT              KIND           CLIENTS   ACTION                            RULE
      10.96.77.3     443/TCP https     ClusterIP      outside   drop (cluster_internal)           a ClusterIP is for the inside; expose_cluster_ips = true on a port serves it there too
                                                      pods      dnat to 1 (cluster)               a pod's address is kept on its way through a ClusterIP
                                                      nodes     dnat to 1 (cluster), masquerade   the client is a node, not a pod, so replies must come back through us
      203.0.113.11   443/TCP https     LoadBalancer   outside   dnat to 1 (local)                 externalTrafficPolicy Local: straight to a node with an endpoint, the client's address kept
                                                      pods      dnat to 1 (cluster)               externalTrafficPolicy Local, but the client is a pod: any endpoint, its address kept
                                                      nodes     dnat to 1 (cluster), masquerade   externalTrafficPolicy Local, but the client is a node: any endpoint, masqueraded
      192.0.2.128    30443/TCP https   NodePort       outside   dnat to 1 (local)                 externalTrafficPolicy Local: straight to a node with an endpoint, the client's address kept
                                                      pods      dnat to 1 (cluster)               externalTrafficPolicy Local, but the client is a pod: any endpoint, its address kept
                                                      nodes     dnat to 1 (cluster), masquerade   externalTrafficPolicy Local, but the client is a node: any endpoint, masqueraded
      192.0.2.129    30443/TCP https   NodePort       outside   dnat to 1 (local)                 externalTrafficPolicy Local: straight to a node with an endpoint, the client's address kept
                                                      pods      dnat to 1 (cluster)               externalTrafficPolicy Local, but the client is a pod: any endpoint, its address kept
                                                      nodes     dnat to 1 (cluster), masquerade   externalTrafficPolicy Local, but the client is a node: any endpoint, masqueraded
      LoadBalancer addresses only for clients of 198.51.100.0/24

    Endpoints:
      ENDPOINT           PORT    STATE   NODE     ZONE     TARGET          WEIGHT   SHARE     CONNECTIONS   USED
      10.244.2.21:8443   https   ready   node-2   <none>   Pod/billing-0   1        100.0 %   0             cluster,local (every node)
    ");
    daemon
        .run(&["describe", "service", "nobody"])
        .assert()
        .code(1)
        .stderr("error: Service default/nobody: not found\n  remedy: see `towpathctl get services -A`\n");
}

#[test]
fn the_daemon_traces_what_explain_explains() {
    let daemon = Daemon::with_cluster();
    for packet in [
        "tcp 198.51.100.7:4242 > 203.0.113.10:8080",
        "udp 10.244.1.7 > 10.96.0.10:53",
        "tcp 192.0.2.7:1 > 203.0.113.11:443",
        "tcp 10.244.1.7 > 10.96.77.4:9000",
    ] {
        let traced = daemon.json(&["trace", packet]);
        let explained = daemon.json(&["explain", "-f", CLUSTER, packet]);
        // Not `output`: the source port of a masqueraded packet is the gateway's to choose.
        for field in ["verdict", "reason", "frontend", "endpoint", "origin"] {
            assert_eq!(traced[field], explained[field], "{field} of {packet}");
        }
        assert_eq!(traced["service"]["service"]["name"], explained["service"]["service"]["name"]);
    }
}

#[test]
fn a_change_with_one_bad_object_is_refused_whole() {
    let daemon = Daemon::with_cluster();
    let before = daemon.json(&["status"])["generation"].clone();
    let thief = service("thief", "10.96.0.10").replace("port: 80", "port: 53, protocol: UDP");
    let change = service("fine", "10.96.9.1") + &thief;
    let output = daemon.run(&["apply", "-f", "-"]).write_stdin(change).assert().code(1).stdout("");
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    for part in
        ["Service default/thief", "kube-system/kube-dns", "10.96.0.10", "document 2", "nothing was changed"]
    {
        assert!(stderr.contains(part), "{part} is missing:\n{stderr}");
    }
    daemon.run(&["get", "svc", "fine"]).assert().code(1);
    assert_eq!(daemon.json(&["status"])["generation"], before);
}

#[test]
fn pruning_leaves_what_is_applied_and_deleting_takes_the_rest() {
    let daemon = Daemon::with_cluster();
    let keep = service("keep", "10.96.9.1");
    let output = daemon.run(&["apply", "--prune", "-f", "-"]).write_stdin(keep.clone()).assert().code(0);
    let lines = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert!(lines.starts_with("service/keep created\n") && lines.contains("node/node-1 pruned\n"), "{lines}");
    assert_eq!(daemon.text(&["get", "svc", "-A", "-o", "name"]), "service/keep\n");
    daemon.run(&["delete", "svc", "keep"]).assert().code(0).stdout("service/keep deleted\n");
    daemon.run(&["delete", "svc", "keep"]).assert().code(1);
    daemon.run(&["delete", "-f", "-", "--ignore-not-found"]).write_stdin(keep).assert().code(0).stdout("");
}

#[test]
fn routes_to_pods_come_and_go_and_are_not_pruned() {
    let daemon = Daemon::with_cluster();
    let add = ["route", "add", "10.250.7.0/24", "via", "10.2.0.17"];
    daemon.run(&add).assert().code(0).stdout("podroute.towpath.dev/10.250.7.0-24 created\n");
    daemon.run(&add).assert().code(0).stdout("podroute.towpath.dev/10.250.7.0-24 unchanged\n");
    daemon
        .run(&["route", "add", "10.250.7.0/24", "via", "10.2.0.18"])
        .assert()
        .code(0)
        .stdout("podroute.towpath.dev/10.250.7.0-24 configured\n");
    daemon.run(&["apply", "--prune", "-f", "-"]).write_stdin(service("keep", "10.96.9.1")).assert().code(0);
    let kept = daemon.text(&["get", "all", "-o", "yaml"]);
    assert!(kept.contains("kind: PodRoute") && kept.contains("via: \"10.2.0.18\""), "{kept}");
    let refused = daemon.run(&["route", "add", "10.96.7.0/24", "via", "10.2.0.17"]).assert().code(1);
    let stderr = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("spec.prefix: overlaps service_cidrs"), "{stderr}");
    daemon.run(&["route", "remove", "10.250.7.0/24"]).assert().code(0);
    daemon.run(&["route", "remove", "10.250.7.0/24"]).assert().code(1);
    daemon.run(&["route", "add", "10.250.7.0/24", "10.2.0.17"]).assert().code(2);
}

#[test]
fn two_writers_are_told_apart_by_the_generation() {
    let daemon = Daemon::with_cluster();
    let generation = daemon.json(&["status"])["generation"].to_string();
    let apply = |name: &str, ip: &str| {
        daemon
            .run(&["apply", "-f", "-", "--if-generation", &generation])
            .write_stdin(service(name, ip))
            .assert()
    };
    apply("first", "10.96.9.1").code(0);
    let output = apply("second", "10.96.9.2").code(1);
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("generation"), "{stderr}");
}

#[test]
fn a_worker_that_stands_still_is_told_by_the_exit_code() {
    let daemon = Daemon::with_cluster();
    daemon.stand_still.store(true, Ordering::Relaxed);
    let output = daemon.run(&["apply", "-f", "-"]).write_stdin(service("late", "10.96.9.1")).assert().code(3);
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("in force on 0 of 1 workers"), "{stderr}");
    let status = daemon.run(&["status"]).assert().code(3);
    let stdout = String::from_utf8(status.get_output().stdout.clone()).unwrap();
    assert!(stdout.contains("in force on 0 of 1 workers") && stdout.contains("Problem: "), "{stdout}");
    daemon.stand_still.store(false, Ordering::Relaxed);
}

#[test]
fn counters_are_told() {
    let daemon = Daemon::with_cluster();
    let stats = daemon.text(&["stats"]);
    assert!(stats.starts_with("COUNTER") && stats.contains("rx_packets"), "{stats}");
    daemon.run(&["drops"]).assert().code(0).stdout("").stderr("No packet was dropped.\n");
    let all = daemon.text(&["drops", "--all"]);
    assert!(all.contains("unknown_port") && all.contains("cluster_internal"), "{all}");
    daemon.run(&["flows", "count"]).assert().code(0).stdout("0\n");
    daemon.run(&["flows", "flush", "--service", "my-nginx"]).assert().code(0).stdout("0 flows removed\n");
    assert_eq!(daemon.text(&["stats", "--watch", "--count", "2", "--interval", "0.01"]).lines().count(), 3);
}
