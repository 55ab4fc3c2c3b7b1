//! Names of Services, as docs/service-discovery.md tells to serve them: a real dnsmasq behind a ClusterIP, asked by a pod of another node.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use tests::cluster::{Cluster, FAR_POD, pod_v4, pod_v6};
use tests::gateway::binary;
use tests::namespace::Namespace;
use tests::process::Process;

const PATIENCE: Duration = Duration::from_secs(20);
/// ClusterIPs of the names' server.
const SERVER: [&str; 2] = ["10.96.0.53", "fd00:96::53"];
/// Endpoints of a headless Service whose answer takes three packets.
const MANY: u8 = 200;
const MANY_NAME: &str = "many.default.svc.cluster.local";
const RECIPE: &str = include_str!("../../docs/service-discovery.md");

/// The commands of the recipe that begin with `first`.
fn recipe(first: &str) -> &'static str {
    let blocks = RECIPE.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.into_iter().find(|block| block.starts_with(first)).expect("a block of the recipe")
}

/// dnsmasq's Service, whose endpoint is pod 1.
fn server() -> String {
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: kube-system, name: kube-dns}}\nspec:\n  clusterIP: {}\n  \
         clusterIPs: [{}, '{}']\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  \
         ports: [{{name: dns, protocol: UDP, port: 53}}, {{name: dns-tcp, protocol: TCP, port: 53}}]\n",
        SERVER[0], SERVER[0], SERVER[1]
    );
    for (family, address) in [("IPv4", pod_v4(1)), ("IPv6", pod_v6(1))] {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: kube-system, name: kube-dns-{}, \
             labels: {{kubernetes.io/service-name: kube-dns}}}}\naddressType: {family}\n\
             ports: [{{name: dns, protocol: UDP, port: 53}}, {{name: dns-tcp, protocol: TCP, port: 53}}]\n\
             endpoints: [{{addresses: ['{address}'], nodeName: node-1}}]\n",
            family.to_lowercase()
        );
    }
    text
}

/// A headless Service with so many ready endpoints and one that is not; the first has a hostname.
fn headless(endpoints: u8) -> String {
    let mut text = String::from(
        "---\napiVersion: v1\nkind: Service\nmetadata: {namespace: default, name: many}\nspec: {clusterIP: None, ports: [{port: 80}]}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {namespace: default, name: many-1, \
         labels: {kubernetes.io/service-name: many}}\naddressType: IPv4\nports: [{port: 80}]\nendpoints:\n\
         - {addresses: [10.244.3.254], nodeName: node-1, conditions: {ready: false}}\n\
         - {addresses: [10.244.3.1], nodeName: node-1, hostname: first}\n",
    );
    for number in 2..=endpoints {
        let _ = writeln!(text, "- {{addresses: [10.244.3.{number}], nodeName: node-1}}");
    }
    text
}

/// What dig prints in the pod of node-2.
fn dig(node: &Namespace, server: &str, args: &[&str]) -> String {
    let own = FAR_POD[usize::from(server.contains(':'))];
    let server = format!("@{server}");
    node.run("dig", &[&["-b", own, &server, "+tries=3", "+time=3"], args].concat()).unwrap()
}

/// The addresses that dig finds, one a line.
fn addresses(node: &Namespace, server: &str, args: &[&str]) -> Vec<String> {
    dig(node, server, &[&["+short"], args].concat()).lines().map(str::to_owned).collect()
}

/// Asks again until the addresses of `name` are those expected.
fn becomes(node: &Namespace, name: &str, expected: &[&str]) {
    let start = Instant::now();
    loop {
        let mut found = addresses(node, SERVER[0], &[name]);
        found.sort();
        if found == expected {
            println!("{name} is {expected:?} after {:?}", start.elapsed());
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{name}: {found:?}, not {expected:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn gathered(cluster: &Cluster) -> u64 {
    let totals = cluster.daemon().stats().unwrap().totals;
    totals.into_iter().find(|count| count.name == "fragments_gathered").map_or(0, |count| count.value)
}

// Rules 15.1, 15.2, 15.3.
#[test]
fn pods_find_services_by_name() {
    let cluster = Cluster::new("names", 3).unwrap();
    let node = cluster.second_node("names-n2").unwrap();
    cluster.daemon().apply(&format!("{}{}", server(), headless(MANY))).unwrap();

    // The recipe as it stands there.
    let folder = cluster.folder.path();
    let names = folder.join("names");
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(&names).unwrap();
    let ctl = binary("towpathctl").unwrap();
    let folder_is = format!("folder={}", names.display());
    let addresses_are = format!("addresses={},{}", pod_v4(1), pod_v6(1));
    let path = format!("PATH={}:{}", ctl.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let socket = format!("TOWPATH_SOCKET={}", cluster.daemon().socket().display());
    let refresh = [&folder_is, &path, &socket, "sh", "-c", recipe("while")];
    let _refresh = Process::start(&cluster.gateway, "env", &refresh, &folder.join("refresh.log")).unwrap();
    let serve = format!("exec {}", recipe("dnsmasq"));
    let serve = [&folder_is, &addresses_are, "sh", "-c", &serve];
    let mut dnsmasq = Process::start(&cluster.node, "env", &serve, &folder.join("dnsmasq.log")).unwrap();
    dnsmasq
        .wait_until(PATIENCE, || {
            let asked =
                node.output("dig", &["-b", FAR_POD[0], "@10.96.0.53", "+tries=1", "+time=1", MANY_NAME]);
            asked.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("ANSWER: 200"))
        })
        .unwrap();

    // Both families, UDP and TCP; backwards; and what nobody is called.
    let web = "web.default.svc.cluster.local";
    for server in SERVER {
        for transport in ["+notcp", "+tcp"] {
            assert_eq!(addresses(&node, server, &[transport, web, "A"]), ["10.96.0.10"]);
            assert_eq!(addresses(&node, server, &[transport, web, "AAAA"]), ["fd00:96::10"]);
            assert_eq!(addresses(&node, server, &[transport, "-x", "10.96.0.10"]), [format!("{web}.")]);
        }
    }
    assert_eq!(addresses(&node, SERVER[0], &["kube-dns.kube-system.svc.cluster.local"]), [SERVER[0]]);
    assert_eq!(addresses(&node, SERVER[0], &["first.many.default.svc.cluster.local"]), ["10.244.3.1"]);
    assert!(dig(&node, SERVER[0], &["nobody.default.svc.cluster.local"]).contains("status: NXDOMAIN"));

    // A long answer: whole in fragments, else truncated, and then over TCP.
    for server in SERVER {
        let before = gathered(&cluster);
        let whole = dig(&node, server, &["+notcp", "+ignore", "+bufsize=4096", MANY_NAME]);
        assert!(whole.contains("ANSWER: 200") && !whole.contains(" tc"), "{whole}");
        let size = whole.lines().find_map(|line| line.split("rcvd: ").nth(1)).unwrap();
        let fragments = gathered(&cluster) - before;
        println!("{size} bytes from {server} came in {fragments} fragments");
        assert!(size.parse::<u32>().unwrap() > 3_000 && fragments == 3, "{whole}");
        let cut = dig(&node, server, &["+notcp", "+ignore", "+noedns", MANY_NAME]);
        assert!(cut.contains(" tc") && !cut.contains("ANSWER: 200"), "{cut}");
        let again = dig(&node, server, &["+noedns", MANY_NAME]);
        assert!(again.contains("retrying in TCP mode") && again.contains("ANSWER: 200"), "{again}");
    }

    // What is applied resolves, what is deleted does not, and endpoints come and go.
    let fresh = "fresh.default.svc.cluster.local";
    let service = "---\n{apiVersion: v1, kind: Service, metadata: {namespace: default, name: fresh}, spec: {clusterIP: 10.96.0.99, ports: [{port: 80}]}}\n";
    cluster.daemon().apply(&format!("{service}{}", headless(3))).unwrap();
    becomes(&node, fresh, &["10.96.0.99"]);
    becomes(&node, MANY_NAME, &["10.244.3.1", "10.244.3.2", "10.244.3.3"]);
    cluster.daemon().ctl(&["delete", "service", "fresh"]).unwrap();
    becomes(&node, fresh, &[]);
    cluster.finish(&["no_flow"]).unwrap();
}
