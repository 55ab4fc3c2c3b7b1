//! Which endpoint a new connection goes to: the three algorithms and weights, on the whole pipeline with Services of manifests.

#[allow(dead_code)] // other tests use the rest of it
mod rig;

use std::collections::BTreeMap;

use forwarder::addr::Addr;
use rig::{Gateway, HEAD, INSIDE, OUTSIDE, VIP, addr, tcp};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

/// A Service at [`VIP`] with `pods` pods, that keeps the client's address. `annotations`: of the Service and of its slice.
fn web(pods: u8, annotations: [&str; 2]) -> String {
    let [service, slice] = annotations;
    let endpoints: Vec<_> =
        (1..=pods).map(|pod| format!("{{addresses: [10.244.1.{pod}], nodeName: n1}}")).collect();
    format!(
        "kind: Service\nmetadata: {{name: web, namespace: default, annotations: {{{service}}}}}\n\
         spec: {{type: LoadBalancer, clusterIP: 10.96.0.10, externalTrafficPolicy: Local, ports: [{{port: 80}}]}}\n\
         status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.10}}]}}}}\n---\n\
         kind: EndpointSlice\nmetadata: {{name: web, namespace: default, annotations: {{{slice}}}, \
         labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\n\
         endpoints: [{}]\n",
        endpoints.join(", ")
    )
}

fn client(i: u32) -> (Addr, u16) {
    (Addr::v4(0xc633_6402 + i / 1_000), 10_000 + (i % 1_000) as u16)
}

/// Opens connections and says where they went.
fn open(gateway: &mut Gateway, clients: std::ops::Range<u32>) -> BTreeMap<Addr, u32> {
    let mut went = BTreeMap::new();
    for (src, port) in clients.map(client) {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, SYN, b""));
        *went.entry(rig::destination(&out)).or_default() += 1;
    }
    went
}

#[test]
fn maglev_goes_by_the_tuple_alone() {
    let place = |seed: u32| {
        let mut gateway = Gateway::of_objects(HEAD, 16_384, &web(10, ["", ""]));
        // Other connections before do not matter.
        open(&mut gateway, 2_000..2_000 + seed);
        (0..200).map(|i| open(&mut gateway, i..i + 1)).collect::<Vec<_>>()
    };
    assert_eq!(place(0), place(77));
}

#[test]
fn random_does_not_go_by_the_tuple() {
    let objects = web(10, ["towpath.dev/lb-algorithm: random", ""]);
    let place = |seed: u32| {
        let mut gateway = Gateway::of_objects(HEAD, 16_384, &objects);
        open(&mut gateway, 2_000..2_000 + seed);
        (0..200).map(|i| open(&mut gateway, i..i + 1)).collect::<Vec<_>>()
    };
    let (one, two) = (place(0), place(77));
    let same = one.iter().zip(&two).filter(|(a, b)| a == b).count();
    assert!((5..60).contains(&same), "{same} of 200 went to the same endpoint");
    // An established connection stays where it is.
    let mut gateway = Gateway::of_objects(HEAD, 16_384, &objects);
    let (src, port) = client(0);
    let first = open(&mut gateway, 0..1);
    for _ in 0..50 {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, ACK, b"x"));
        assert_eq!(first.get(&rig::destination(&out)), Some(&1));
    }
}

#[test]
fn least_connections_keeps_endpoints_even_and_fills_up_who_is_behind() {
    let objects = |pods| web(pods, ["towpath.dev/lb-algorithm: least-connections", ""]);
    let mut gateway = Gateway::of_objects(HEAD, 32_768, &objects(4));
    open(&mut gateway, 0..2_000);
    let counts = gateway.connections(VIP, 80);
    assert_eq!(counts.iter().sum::<u32>(), 2_000);
    assert!(counts.iter().all(|count| count.abs_diff(500) <= 10), "{counts:?}");
    // A fifth endpoint comes: it gets more than its share until it has as many. The others keep their counts.
    gateway.apply(&objects(5));
    assert_eq!(gateway.connections(VIP, 80)[..4], counts[..4]);
    let went = open(&mut gateway, 2_000..3_000);
    // Two of five are drawn: 400 of 1,000 draws have it, give or take 16; its share would be 200.
    assert!(went[&addr("10.244.1.5")] > 330, "{went:?}");
    // Connections that end are counted no more, whatever ends them.
    gateway.rest(241);
    assert_eq!((gateway.flows(), gateway.connections(VIP, 80)), (0, vec![0; 5]));
    open(&mut gateway, 0..10);
    let (src, port) = client(3);
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, RST, b""));
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, SYN, b""));
    assert_eq!(gateway.connections(VIP, 80).iter().sum::<u32>(), 10, "the port was used again");
}

#[test]
fn every_algorithm_follows_weights() {
    for algorithm in ["maglev", "random", "least-connections"] {
        let pod = |weight| {
            format!(
                "---\nkind: Pod\nmetadata: {{name: a, namespace: default, annotations: {{towpath.dev/weight: '{weight}'}}}}\n"
            )
        };
        // Endpoint 1 is the Pod; the others have the weight of the slice.
        let annotation = format!("towpath.dev/lb-algorithm: {algorithm}");
        let objects = web(3, [&annotation, "towpath.dev/weight: '2'"])
            .replace("[10.244.1.1], ", "[10.244.1.1], targetRef: {kind: Pod, name: a, namespace: default}, ");
        let mut gateway = Gateway::of_objects(HEAD, 32_768, &format!("{objects}{}", pod(6)));
        let went = open(&mut gateway, 0..4_000);
        println!("{algorithm}: weights 6, 2, 2: {:?}", went.values().collect::<Vec<_>>());
        let near = |got: u32, percent: u32| got.abs_diff(40 * percent) < 160;
        assert!(
            went.values().zip([60, 20, 20]).all(|(got, percent)| near(*got, percent)),
            "{algorithm}: {went:?}"
        );
        // Weight 0: nothing new, and what is there stays.
        let before = gateway.connections(VIP, 80);
        gateway.apply(pod(0).trim_start_matches("---\n"));
        let went = open(&mut gateway, 4_000..5_000);
        assert_eq!(went.get(&addr("10.244.1.1")), None, "{algorithm}");
        assert_eq!(gateway.flows(), 5_000, "{algorithm}");
        let (src, port) = client(0);
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, ACK, b"x"));
        let back =
            gateway.forwarded(INSIDE, OUTSIDE, &tcp(rig::destination(&out), 8080, src, port, ACK, b"y"));
        assert_eq!(rig::source(&back), VIP);
        assert!(before[0] > 2_000);
    }
}
