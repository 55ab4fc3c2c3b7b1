//! Pods behind the kernel's own VXLAN device, reached through the gateway by real programs, at default offloads.
//!
//! ```text
//!   client --c0--g0-- gateway --g1--+--n0-- node-1: pods 10.244.1.11 to .20 behind vx0
//!                                   +--n2-- node-2: pod 10.244.2.11, by plain routes (a macvlan beside n0)
//! ```

use std::time::Duration;

use tests::cluster::{Cluster, FAR_POD, GATEWAY, SNAT_VIP, VIP, VIP6, pod_v4, pod_v6};
use tests::namespace::Namespace;

/// Of the node's VXLAN device.
const VTEP: &str = "02:00:00:00:09:09";
/// Of the gateway's inside port, as [`Cluster`] makes it.
const FABRIC: &str = "02:00:00:00:03:01";
/// Node and gateway, as ends of the tunnel.
const ENDS: [(&str, &str); 2] = [("10.2.0.11", "10.2.0.1"), ("fd00:2::11", "fd00:2::1")];

/// The overlay with network 77 at Linux' own port, for Nodes that say so.
fn gateway_file() -> String {
    format!("{GATEWAY}[overlay]\nvni = 77\nport = 8472\n")
}

/// Puts the pods of node-1 behind a VXLAN device, of which `mtu` fits.
fn behind_vxlan(cluster: &Cluster, (node, gateway): (&str, &str), mtu: u32) {
    let ip = |args: &str| cluster.node.ip(args).unwrap();
    ip(&format!("link add vx0 address {VTEP} type vxlan id 77 local {node} remote {gateway} dstport 8472"));
    ip(&format!("link set vx0 mtu {mtu} up"));
    for via in ["169.254.1.1", "fe80::1"] {
        ip(&format!("neigh add {via} lladdr {FABRIC} dev vx0 nud permanent"));
        ip(&format!("route replace default via {via} dev vx0 onlink"));
    }
    // Routes of the link itself stay, so that outer packets find their way.
    let other = if node.contains(':') { "10.2.0.11" } else { "fd00:2::11" };
    let applied = cluster
        .daemon()
        .apply(&format!(
            "---\n{{apiVersion: v1, kind: Node, metadata: {{name: node-1, annotations: {{towpath.dev/overlay: vxlan, \
             towpath.dev/vxlan-mac: '{VTEP}'}}}}, spec: {{podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, 'fd00:244:1::/64']}}, \
             status: {{addresses: [{{type: InternalIP, address: '{node}'}}, {{type: InternalIP, address: '{other}'}}]}}}}\n"
        ))
        .unwrap();
    assert!(!applied.contains("warning"), "{applied}");
}

/// Packets that the VXLAN device has received and sent.
fn through_vxlan(cluster: &Cluster) -> [u64; 2] {
    let count = |direction: &str| {
        let file = format!("/sys/class/net/vx0/statistics/{direction}_packets");
        cluster.node.run("cat", &[&file]).unwrap().trim().parse().unwrap()
    };
    [count("rx"), count("tx")]
}

/// Service to pod, pod to pod, and a download over the death of the data plane, by a tunnel between these ends.
fn reaches_pods(name: &str, ends: (&str, &str)) {
    let cluster = Cluster::with(name, 3, 1, &gateway_file()).unwrap();
    let mtu = if ends.0.contains(':') { 1430 } else { 1450 };
    behind_vxlan(&cluster, ends, mtu);
    let native = cluster.second_node(&format!("{name}-n2")).unwrap();

    let answer = cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    assert!(answer.starts_with("10.244.1.1") && answer.ends_with(" 198.51.100.2\n"), "{answer}");
    let answer = cluster.curl(&[&format!("http://[{VIP6}]/")]).unwrap();
    assert!(answer.starts_with("fd00:244:1::1") && answer.ends_with(" 2001:db8:c::2\n"), "{answer}");
    for host in [VIP, &format!("[{VIP6}]"), SNAT_VIP] {
        cluster.download(host).unwrap();
    }
    let report = cluster.iperf(VIP, 2, &[]).unwrap();
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap();
    println!("TCP by {} to {VIP}: {:.0} Mbit/s", ends.0, rate / 1e6);
    assert!(rate > 10e6, "{rate} bit/s");

    // Pods see each other's own addresses, whichever of them is behind a tunnel.
    for (behind, plain) in [(pod_v4(1), FAR_POD[0]), (pod_v6(1), FAR_POD[1])] {
        native.run("ping", &["-c", "3", "-i", "0.2", "-W", "2", "-I", plain, &behind]).unwrap();
        cluster.node.run("ping", &["-c", "3", "-i", "0.2", "-W", "2", "-I", &behind, plain]).unwrap();
        let url =
            if plain.contains(':') { format!("http://[{behind}]/") } else { format!("http://{behind}/") };
        let answer = native.run("curl", &["-sS", "--max-time", "20", "--interface", plain, &url]).unwrap();
        assert_eq!(answer, format!("{behind} {plain}\n"));
    }
    // All of it was in the tunnel, both ways. What the node sends is counted in segments of up to 64 KiB.
    let [received, sent] = through_vxlan(&cluster);
    assert!(received > 5_000 && sent > 1_000, "{received} received, {sent} sent");
    let routes = cluster.daemon().ctl(&["get", "routes", "-o", "wide"]).unwrap();
    let route = routes.lines().find(|line| line.starts_with("10.244.1.0/24")).unwrap_or_default();
    assert!(route.contains("vxlan") && route.contains(&mtu.to_string()), "{routes}");

    let url = format!("http://{VIP}/slow");
    let args = ["-o", "/dev/null", "-w", "%{size_download}", "--max-time", "60", &url];
    std::thread::scope(|scope| {
        let download = scope.spawn(|| cluster.curl(&args));
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(1000));
            cluster.daemon().kill_data_plane().unwrap();
        }
        assert_eq!(download.join().unwrap().unwrap(), "20000000");
    });
    // Groups that the device joins are nobody's in a tunnel.
    cluster.finish(&["no_flow", "interrupted", "overlay_payload"]).unwrap();
}

#[test]
fn pods_behind_vxlan_over_ipv4() {
    reaches_pods("vx4", ENDS[0]);
}

#[test]
fn pods_behind_vxlan_over_ipv6() {
    reaches_pods("vx6", ENDS[1]);
}

#[test]
fn what_is_too_long_for_the_tunnel_is_told_cut_or_refused() {
    // Without clamping, so that sizes have to be learned.
    let config = gateway_file().replace("return = \"routed\"", "return = \"routed\"\nmss_clamp = \"off\"");
    let cluster = Cluster::with("vxmtu", 1, 1, &config).unwrap();
    behind_vxlan(&cluster, ENDS[0], 1450);
    let ping = |from: &Namespace, args: &[&str]| {
        let output = from.output("ping", &[&["-c", "2", "-i", "0.3", "-W", "2"][..], args].concat()).unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    // One packet that may be fragmented, and a datagram in fragments of the client.
    for size in ["1472", "4000"] {
        let (reached, text) = ping(&cluster.client, &["-M", "dont", "-s", size, &pod_v4(1)]);
        assert!(reached, "{size}: {text}");
    }
    let (reached, text) = ping(&cluster.client, &["-M", "do", "-s", "1422", &pod_v4(1)]);
    assert!(reached, "{text}");
    let (_, text) = ping(&cluster.client, &["-M", "do", "-s", "1423", &pod_v4(1)]);
    assert!(text.contains("mtu = 1450") || text.contains("mtu=1450"), "{text}");
    let (_, text) = ping(&cluster.client, &["-M", "do", "-s", "1403", &pod_v6(1)]);
    assert!(text.contains("mtu = 1450") || text.contains("mtu=1450"), "{text}");
    let (reached, text) = ping(&cluster.client, &["-s", "4000", &pod_v6(1)]);
    assert!(reached, "IPv6 in fragments, once the MTU is known: {text}");

    // A device with too large an MTU makes fragments of outer packets.
    cluster.node.ip("link set vx0 mtu 1600").unwrap();
    let (reached, text) = ping(&cluster.node, &["-M", "do", "-s", "1500", "-I", &pod_v4(1), "198.51.100.2"]);
    assert!(!reached, "{text}");
    let drops = cluster.daemon().drops().unwrap();
    // The first ping, in two fragments; then the node's kernel knows.
    assert_eq!(drops.get("overlay_fragment"), Some(&2), "{drops:?}");
    cluster.finish(&["packet_too_big", "overlay_fragment", "overlay_payload", "no_flow"]).unwrap();
}

#[test]
fn only_nodes_speak_in_the_tunnel_and_only_for_their_pods() {
    let cluster = Cluster::with("vxsrc", 1, 1, &gateway_file()).unwrap();
    behind_vxlan(&cluster, ENDS[0], 1450);
    let ping = |from: &str| {
        cluster.node.output("ping", &["-c", "2", "-i", "0.2", "-W", "1", "-I", from, "198.51.100.2"]).unwrap()
    };
    assert!(ping(&pod_v4(1)).status.success());
    // Somebody else's address inside; then the right one from somebody else's address.
    cluster.node.ip("address add 10.244.9.9/32 dev lo").unwrap();
    assert!(!ping("10.244.9.9").status.success());
    cluster.node.ip("address add 10.2.0.99/24 dev n0").unwrap();
    cluster.node.ip("link del vx0").unwrap();
    let link =
        format!("link add vx0 address {VTEP} type vxlan id 77 local 10.2.0.99 remote 10.2.0.1 dstport 8472");
    cluster.node.ip(&link).unwrap();
    cluster.node.ip("link set vx0 mtu 1450 up").unwrap();
    cluster.node.ip(&format!("neigh add 169.254.1.1 lladdr {FABRIC} dev vx0 nud permanent")).unwrap();
    cluster.node.ip("route replace default via 169.254.1.1 dev vx0 onlink").unwrap();
    assert!(!ping(&pod_v4(1)).status.success());
    let drops = cluster.daemon().drops().unwrap();
    // IPv6 of the new device asks around, too.
    assert_eq!(drops.get("overlay_inner_source"), Some(&2), "{drops:?}");
    assert!(drops.get("overlay_source").is_some_and(|count| *count >= 2), "{drops:?}");
    cluster.finish(&["overlay_inner_source", "overlay_source", "overlay_payload", "no_flow"]).unwrap();
}
