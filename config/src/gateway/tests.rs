use super::*;

const GOOD: &str = r#"[gateway]
name = "gw-1"
cluster_cidrs = ["10.244.0.0/16", "fd00:244::/48"]
service_cidrs = ["10.96.0.0/16", "fd00:96::/112"]
return = "routed"
[[port]]
name = "uplink"
interface = "g0"
role = "outside"
[[port]]
name = "fabric"
interface = "g1"
role = "inside"
"#;

#[test]
fn the_examples_are_good() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        Gateway::load(&path).unwrap_or_else(|faults| panic!("{}: {faults:?}", path.display()));
        count += 1;
    }
    assert!(count >= 2);
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let gateway = Gateway::parse(GOOD, "gateway.toml").unwrap();
    assert_eq!(gateway.snat.ports, PortRange { first: 61000, last: 65535 });
    assert_eq!(gateway.control.socket, Path::new("/run/towpath/control.sock"));
    assert_eq!(gateway.flows.capacity, 262_144);
    assert_eq!((gateway.flows.tcp_established_s, gateway.flows.udp_one_way_s), (7440, 30));
    assert_eq!(gateway.gateway.external_traffic_policy, LocalPolicy::Frontend);
    assert_eq!(gateway.health.listen.to_string(), "0.0.0.0:10256");
    assert_eq!(gateway.gateway.lb_algorithm, Algorithm::Maglev);
    assert!(gateway.source_checks.land && gateway.source_checks.pod_from_outside);
    assert_eq!(
        (gateway.overlay.default, gateway.overlay.vni, gateway.overlay.port),
        (OverlayKind::Native, 1, 4789)
    );
    assert_eq!(gateway.frames_per_worker(), 32768);
    assert_eq!(gateway.outside_ports().collect::<Vec<_>>(), [0]);
    assert_eq!(gateway.inside_ports().collect::<Vec<_>>(), [1]);
}

#[test]
fn algorithms_have_one_word_in_the_file_and_in_annotations() {
    for (word, algorithm) in Algorithm::WORDS {
        let text = GOOD.replacen("return", &format!("lb_algorithm = \"{word}\"\nreturn"), 1);
        assert_eq!(Gateway::parse(&text, "gateway.toml").unwrap().gateway.lb_algorithm, algorithm);
        assert_eq!(algorithm.name(), word);
    }
    let unknown = "lb_algorithm = \"round-robin\"\nreturn";
    refuses("return", unknown, 5, "gateway.lb_algorithm", "least-connections");
    let unknown = "on_endpoint_removed = \"ignore\"\nreturn";
    refuses("return", unknown, 5, "gateway.on_endpoint_removed", "leave");
}

#[test]
fn every_file_survives_the_round_trip() {
    let gateway = Gateway::parse(GOOD, "gateway.toml").unwrap();
    let text = toml::to_string(&gateway).unwrap();
    assert_eq!(Gateway::parse(&text, "again.toml").unwrap(), gateway);
}

#[test]
fn the_health_server_can_be_elsewhere_or_nowhere() {
    for listen in ["127.0.0.1:10256", "[2001:db8::1]:80", "off"] {
        let text = format!("[health]\nlisten = \"{listen}\"\n{GOOD}");
        let gateway = Gateway::parse(&text, "g.toml").unwrap();
        assert_eq!(gateway.health.listen.to_string(), listen);
        assert_eq!(Gateway::parse(&toml::to_string(&gateway).unwrap(), "again.toml").unwrap(), gateway);
    }
}

#[test]
fn segments_are_clamped_by_a_word_or_a_number() {
    assert_eq!(Gateway::parse(GOOD, "g.toml").unwrap().gateway.mss_clamp, MssClamp::Auto);
    for (text, clamp) in
        [("\"auto\"", MssClamp::Auto), ("\"off\"", MssClamp::Off), ("1360", MssClamp::AtMost(1360))]
    {
        let text = GOOD.replace("\"routed\"", &format!("\"routed\"\nmss_clamp = {text}"));
        let gateway = Gateway::parse(&text, "g.toml").unwrap();
        assert_eq!(gateway.gateway.mss_clamp, clamp);
        assert_eq!(Gateway::parse(&toml::to_string(&gateway).unwrap(), "again.toml").unwrap(), gateway);
        let json = serde_json::to_string(&gateway).unwrap();
        assert_eq!(serde_json::from_str::<Gateway>(&json).unwrap(), gateway, "as the keeper hands it on");
    }
}

/// Replaces `from` by `to` in the good file and expects one complaint.
#[track_caller]
fn refuses(from: &str, to: &str, line: u32, field: &str, words: &str) {
    assert!(GOOD.contains(from));
    let faults = Gateway::parse(&GOOD.replacen(from, to, 1), "gateway.toml").expect_err(to);
    assert_eq!(faults.len(), 1, "{faults:?}");
    let shown = faults[0].to_string();
    assert!(shown.starts_with(&format!("gateway.toml:{line}: ")), "{shown}");
    assert_eq!(faults[0].field.as_deref(), Some(field), "{shown}");
    assert!(shown.contains(words), "{shown}");
}

#[test]
fn bad_files_are_refused_by_line_and_field() {
    refuses("name = \"gw-1\"", "nmae = \"gw-1\"", 2, "gateway.nmae", "unknown field");
    refuses("\"gw-1\"", "\"\"", 2, "gateway.name", "not a name");
    refuses("\"gw-1\"", "7", 2, "gateway.name", "invalid type");
    refuses("10.244.0.0/16", "10.244.0.0/33", 3, "gateway.cluster_cidrs[0]", "10.244.0.0/33");
    refuses("10.244.0.0/16", "10.244.0.1/16", 3, "gateway.cluster_cidrs[0]", "write 10.244.0.0/16");
    refuses(
        "10.96.0.0/16",
        "10.244.9.0/24",
        4,
        "gateway.service_cidrs[0]",
        "overlaps gateway.cluster_cidrs[0]",
    );
    refuses("\"routed\"", "\"dsr\"", 5, "gateway.return", "unknown variant");
    for bad in ["\"on\"", "535", "65496", "-1", "true"] {
        let line = format!("\"routed\"\nmss_clamp = {bad}");
        refuses("\"routed\"", &line, 6, "gateway.mss_clamp", "\"auto\", \"off\" or a number");
    }
    refuses("\"outside\"", "\"sideways\"", 9, "port[0].role", "unknown variant");
    refuses("\"outside\"", "\"inside\"", 6, "port", "no port is outside");
    refuses("\"g1\"", "\"g0\"", 12, "port[1].interface", "takes this interface already");
    refuses("\"fabric\"", "\"uplink\"", 11, "port[1].name", "two ports have this name");
    refuses("\"g0\"", "\"a-name-that-is-too-long\"", 8, "port[0].interface", "ip link");
    refuses("\"g0\"", "\"g0\"\nmode = \"fast\"", 9, "port[0].mode", "zero-copy");
    refuses(
        "\"inside\"",
        "\"inside\"\nexpose_cluster_ips = true",
        14,
        "port[1].expose_cluster_ips",
        "no meaning",
    );
}

/// Adds a section to the good file and expects one complaint.
#[track_caller]
fn refuses_section(section: &str, field: &str, words: &str) {
    let text = format!("{section}\n{GOOD}");
    let faults = Gateway::parse(&text, "gateway.toml").expect_err(section);
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert_eq!(faults[0].field.as_deref(), Some(field), "{}", faults[0]);
    assert_eq!(faults[0].source.as_ref().unwrap().line, Some(2), "{}", faults[0]);
    assert!(faults[0].to_string().contains(words), "{}", faults[0]);
}

#[test]
fn bad_sections_are_refused_by_field() {
    refuses_section("[rings]\nrx = 1000", "rings.rx", "use 1024");
    refuses_section("[rings]\ntx = 0", "rings.tx", "use 64");
    refuses_section("[rings]\nfill = 131072", "rings.fill", "use 65536");
    refuses_section("[umem]\nchunk_size = 2049", "umem.chunk_size", "use 4096");
    refuses_section("[umem]\nframes = 100", "umem.frames", "use 12800");
    refuses_section("[source_checks]\nland = 1", "source_checks.land", "boolean");
    refuses_section("[source_checks]\nvip = false", "source_checks.vip", "own_source");
    refuses_section("[fragments]\ndatagrams = 0", "fragments.datagrams", "1 to 65536");
    refuses_section("[fragments]\nframes = 44", "fragments.frames", "64 to 65536");
    refuses_section("[fragments]\nipv6_s = 601", "fragments.ipv6_s", "1 to 600");
    refuses_section("[umem]\nframes = 4194305", "umem.frames", "12800 to 4194304");
    refuses_section("[workers]\ncpus = []", "workers.cpus", "no worker");
    refuses_section("[workers]\ncpus = [1, 1]", "workers.cpus[1]", "twice");
    refuses_section("[workers]\ncpus = [-1]", "workers.cpus[0]", "-1");
    refuses_section("[workers]\npoll = \"lazy\"", "workers.poll", "adaptive");
    refuses_section("[snat]\nports = \"65535-61000\"", "snat.ports", "61000-65535");
    refuses_section("[snat]\nports = \"61000-65536\"", "snat.ports", "not a range");
    refuses_section("[snat]\nports = \"20000-30000\"", "snat.ports", "NodePorts, 30000-32767");
    refuses_section("[snat]\nports = \"80-90\"", "snat.ports", "1024");
    refuses_section("[snat]\naddresses = [\"127.0.0.1\"]", "snat.addresses[0]", "unicast");
    refuses_section("[snat]\naddresses = [\"10.96.1.1\"]", "snat.addresses[0]", "service_cidrs");
    refuses_section("[[egress]]\naddresses = [\"203.0.113.256\"]", "egress[0].addresses[0]", "203.0.113.256");
    refuses_section("[[egress]]\naddresses = [\"10.244.0.9\"]", "egress[0].addresses[0]", "cluster_cidrs");
    refuses_section("[[egress]]\npods = [\"10.244.0.9/16\"]", "egress[0].pods[0]", "write 10.244.0.0/16");
    refuses_section("[[egress]]\nexcept = [\"::1/64\"]", "egress[0].except[0]", "write ::/64");
    refuses_section("[overlay]\ndefault = \"geneve\"", "overlay.default", "vxlan");
    refuses_section("[overlay]\nvni = 0", "overlay.vni", "use 1 to 16777215");
    refuses_section("[overlay]\nvni = 16777216", "overlay.vni", "use 1 to 16777215");
    refuses_section("[overlay]\nport = 0", "overlay.port", "use 4789");
    refuses_section("[overlay]\nport = 61000", "overlay.port", "masquerade ports, 61000-65535");
    refuses_section("[overlay]\nport = 30000", "overlay.port", "NodePorts");
    refuses_section("[overlay]\nmtu = 1349", "overlay.mtu", "use 1350 to 65535 bytes");
    refuses_section("[overlay]\naddresses = [\"10.244.0.9\"]", "overlay.addresses[0]", "cluster_cidrs");
    refuses_section("[overlay]\nmac = \"ff:ff:ff:ff:ff:ff\"", "overlay.mac", "02:00:00:00:00:01");
    refuses_section("[[egress]]\nallow = []", "egress[0].allow", "unknown field");
    refuses_section("[flows]\ncapacity = 5", "flows.capacity", "1024");
    refuses_section("[flows]\nudp_s = 0", "flows.udp_s", "1 to 604800");
    refuses_section("[flows]\naffinity_capacity = 300000", "flows.affinity_capacity", "262144");
    refuses_section("[health]\nlisten = \"10256\"", "health.listen", "0.0.0.0:10256");
    refuses_section("[health]\nlisten = \"0.0.0.0:0\"", "health.listen", "port 0");
    refuses_section("[health]\nlisten = \"0.0.0.0:61000\"", "health.listen", "masquerade ports");
    refuses_section("[health]\nlisten = \"224.0.0.1:10256\"", "health.listen", "0.0.0.0 for all");
    refuses_section("[health]\nmetrics = \"no\"", "health.metrics", "boolean");
    refuses_section("[control]\nsocket = \"control.sock\"", "control.socket", "absolute");
    refuses_section("[control]\nstate_dir = \"state\"", "control.state_dir", "absolute");
    refuses_section("[control]\ngroup = \"\"", "control.group", "empty");
    refuses_section("[control]\nmax_clients = 0", "control.max_clients", "1 to 1024");
}

#[test]
fn patterns_stand_for_interfaces() {
    let gateway =
        |attach: &str| Gateway::parse(&format!("{GOOD}[[attach]]\n{attach}\n"), "gateway.toml").unwrap();
    for (pattern, matched, others) in [
        ("pod*", &["pod1", "pod"][..], &["apod1", "po"][..]),
        ("cali*eth*0", &["caliXeth0", "calieth0eth10"], &["cali0", "caliXeth1"]),
        ("veth0", &["veth0"], &["veth01", "veth"]),
        ("a*a", &["aa", "aba"], &["a"]),
    ] {
        let gateway = gateway(&format!("pattern = \"{pattern}\""));
        let section = &gateway.attach[0];
        assert_eq!((section.role, section.mode), (Role::Pod, Mode::Auto));
        matched.iter().for_each(|name| assert!(section.matches(name), "{pattern} {name}"));
        others.iter().for_each(|name| assert!(!section.matches(name), "{pattern} {name}"));
    }
    // A port that comes later counts where one of its role must be.
    let without_inside = GOOD.replace("\"inside\"", "\"outside\"");
    assert!(Gateway::parse(&without_inside, "gateway.toml").is_err());
    Gateway::parse(&format!("{without_inside}[[attach]]\npattern = \"pod*\"\n"), "gateway.toml").unwrap();
    refuses_section("[[attach]]\npattern = \"\"", "attach[0].pattern", "pod*");
    refuses_section("[[attach]]\npattern = \"*\"", "attach[0].pattern", "more narrowly");
    refuses_section("[[attach]]\npattern = \"t*\"", "attach[0].pattern", "TAPs");
    refuses_section("[[attach]]\nrole = \"node\"\npattern = \"pod*\"", "attach[0].role", "unknown variant");
}

#[test]
fn all_complaints_come_at_once_in_file_order() {
    let text = GOOD.replace("10.244.0.0/16", "10.244.0.1/16") + "[rings]\nrx = 5\n";
    let faults = Gateway::parse(&text, "g.toml").unwrap_err();
    let lines: Vec<_> = faults.iter().map(|f| f.source.as_ref().unwrap().line.unwrap()).collect();
    assert_eq!(lines, [3, 15]);
}

#[test]
fn no_toml_and_no_file() {
    let faults = Gateway::parse("[gateway\nname", "g.toml").unwrap_err();
    assert_eq!((faults[0].code, faults[0].source.as_ref().unwrap().line), (Code::Syntax, Some(1)));
    let faults = Gateway::parse("", "g.toml").unwrap_err();
    assert!(faults[0].to_string().contains("missing field `gateway`"));
    let faults = Gateway::load(Path::new("/nonexistent/g.toml")).unwrap_err();
    assert!(faults[0].to_string().starts_with("/nonexistent/g.toml: cannot be read"), "{}", faults[0]);
}
