//! A start that cannot work is refused with field, value and remedy, and leaves nothing behind; `towpathd check` says the same
//! wherever it can know.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tests::cluster::GATEWAY;
use tests::gateway::{Towpathd, binary, with_paths};
use tests::namespace::{Namespace, veth};
use tests::probe;
use tests::process::Process;

/// A gateway whose uplink may have two queues and has one, and a bridge over it, which has no XDP of its own.
struct Machine {
    gateway: Namespace,
    client: Namespace,
    node: Namespace,
    folder: TempDir,
}

impl Machine {
    fn new() -> Machine {
        let [gateway, client, node] =
            ["start-gw", "start-cli", "start-node"].map(|n| Namespace::new(n).unwrap());
        veth((&client, "c0", "02:00:00:00:02:02"), (&gateway, "g0", "02:00:00:00:02:01"), 2).unwrap();
        veth((&gateway, "g1", "02:00:00:00:03:01"), (&node, "n0", "02:00:00:00:03:11"), 2).unwrap();
        // From the outside in: no end may send by more queues than the other receives by, or it has no XDP.
        for (namespace, interface) in [(&client, "c0"), (&node, "n0"), (&gateway, "g0"), (&gateway, "g1")] {
            namespace.sh(&format!("ethtool -L {interface} rx 1 tx 1")).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        // Where every account may start it.
        fs::copy(binary("towpathd").unwrap(), folder.path().join("towpathd")).unwrap();
        Machine { gateway, client, node, folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Writes a gateway file with the paths of this folder.
    fn write(&self, config: &str) -> String {
        let file = self.path("gateway.toml");
        fs::write(&file, with_paths(config, self.folder.path(), &self.folder.path().join("flows"))).unwrap();
        file
    }

    /// What is printed to stderr by a program that ends with 1, run in front of `towpathd`.
    #[track_caller]
    fn refuses(&self, wrapper: &[&str], args: &[&str], words: &[&str]) -> String {
        let daemon = self.path("towpathd");
        let mut command = vec!["20"];
        command.extend(wrapper);
        command.push(&daemon);
        command.extend(args);
        let output = self.gateway.output("timeout", &command).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
        assert!(output.stdout.is_empty(), "{:?}", output.stdout);
        for word in words {
            assert!(said.contains(word), "{word:?} is missing in\n{said}");
        }
        let faults: Vec<&str> = said.lines().filter(|line| line.starts_with("towpathd: ")).collect();
        assert!(!faults.is_empty(), "{said}");
        println!("{}", faults.join("\n"));
        faults.join("\n")
    }

    /// The start is refused, and `check` knows why as well.
    #[track_caller]
    fn refuses_file(&self, config: &str, words: &[&str]) -> String {
        let file = self.write(config);
        self.refuses(&[], &["check", &file], words);
        self.refuses(&[], &["--config", &file], words)
    }
}

fn with(from: &str, to: &str) -> String {
    assert!(GATEWAY.contains(from), "{from}");
    GATEWAY.replace(from, to)
}

#[test]
fn files_that_do_not_fit_this_machine_are_refused_and_check_knows() {
    let machine = Machine::new();
    let snat = |ports: &str| format!("{GATEWAY}[snat]\nports = \"{ports}\"\n");
    let refuses = |config: &str, words: &[&str]| machine.refuses_file(config, words);
    refuses(
        &with("interface = \"g0\"", "interface = \"nosuch0\""),
        &["port[0].interface: nosuch0: no such interface", "ip link show"],
    );
    refuses(
        &with("interface = \"g0\"", "interface = \"lo\""),
        &["port[0].interface: lo: has no Ethernet", "link/ether"],
    );
    refuses(&with("cpus = [1]", "cpus = [4000]"), &["workers.cpus[0]: 4000: no such CPU", "use some of 0"]);
    refuses(
        &format!("{GATEWAY}[rings]\nrx = 1000\n"),
        &["gateway.toml:", "rings.rx: 1000: not a power of two", "use 1024"],
    );
    refuses(
        &snat("40000-41000"),
        &["snat.ports: 40000-41000: overlaps the kernel's own source ports", "sysctl -w net.ipv4"],
    );
    refuses(
        &snat("29000-30000"),
        &["gateway.toml:", "snat.ports: 29000-30000: overlaps the range of NodePorts", "61000"],
    );
    refuses(
        &with("capacity", "capactiy"),
        &["gateway.toml:", "flows.capactiy: unknown field", "expected one of `capacity`"],
    );
    refuses(
        &with("[flows]", "[flows]\nudp_s = \"long\""),
        &["gateway.toml:", "flows.udp_s: \"long\"", "expected u32"],
    );
    refuses(
        &format!("{GATEWAY}[control]\nuser = \"nobodyelse\"\n"),
        &["control.user: nobodyelse: no such account", "useradd"],
    );
    refuses(
        &format!("{GATEWAY}[control]\ngroup = \"nosuch\"\n"),
        &["control.group: nosuch: no such group", "groupadd"],
    );
    refuses("[gateway", &["gateway.toml:1", "unclosed table"]);
    // Two at once are two lines.
    let two = with("interface = \"g0\"", "interface = \"nosuch0\"").replace("cpus = [1]", "cpus = [4000]");
    refuses(&two, &["nosuch0", "4000"]);
    machine.refuses(&[], &["--config", "/no/such/file"], &["/no/such/file: cannot be read: No such file"]);

    let socket = machine.path("control.sock");
    fs::write(&socket, "precious").unwrap();
    refuses(GATEWAY, &["control.socket:", &socket, "not a socket", "remove it, or name another path"]);
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
    fs::remove_file(&socket).unwrap();

    // The lines that are printed are what it takes.
    let two_workers = with("cpus = [1]", "cpus = [0, 1]");
    let said = refuses(
        &two_workers,
        &["port[0].interface: g0: has 1 receive queue(s) for 2 worker(s); each worker needs one"],
    );
    let lines: Vec<&str> =
        said.lines().filter_map(|line| Some(line.split_once("mend it with: ")?.1)).collect();
    assert_eq!(lines, ["ethtool -L g0 rx 2 tx 2", "ethtool -L g1 rx 2 tx 2"]);
    lines.iter().for_each(|line| drop(machine.gateway.sh(line).unwrap()));
    refuses(
        GATEWAY,
        &[
            "port[0].interface: g0: has 2 receive queue(s) for 1 worker(s); packets of the others",
            "ethtool -L g0 rx 1 tx 1",
        ],
    );
    refuses(&with("cpus = [1]", "cpus = [0]").replace("g0", "lo"), &["lo: has no Ethernet"]);
    let check =
        machine.gateway.run(&machine.path("towpathd"), &["check", &machine.write(&two_workers)]).unwrap();
    assert!(check.ends_with("gateway.toml: fine\n"), "{check}");
    Towpathd::start(&machine.gateway, &two_workers).unwrap().finish(&[]).unwrap();
}

#[test]
fn missing_privileges_and_limits_are_named() {
    let machine = Machine::new();
    let file = machine.write(GATEWAY);
    let start = ["--config", &file];
    let refuses = |wrapper: &[&str], words: &[&str]| machine.refuses(wrapper, &start, words);
    let nobody = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"];
    refuses(
        &nobody,
        &[
            "missing privileges CAP_NET_ADMIN, which",
            "CAP_NET_RAW",
            "CAP_BPF",
            "run as root",
            "AmbientCapabilities=",
        ],
    );
    for (left_out, name) in [
        ("net_admin", "CAP_NET_ADMIN"),
        ("net_raw", "CAP_NET_RAW"),
        ("bpf", "CAP_BPF"),
        ("kill", "CAP_KILL"),
        ("setuid", "CAP_SETUID"),
    ] {
        let bounding = format!("-{left_out}");
        let without = ["setpriv", "--bounding-set", &bounding, "--inh-caps", &bounding];
        let said = refuses(&without, &["missing privilege ", name, "CapabilityBoundingSet="]);
        assert_eq!(said.matches("CAP_").count(), 1, "{said}");
    }
    // 2 ports of 1 worker, and as many frames of 4096 bytes as fit all rings twice, as a power of two: 32,768.
    let without_lock =
        ["prlimit", "--memlock=8388608", "setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"];
    refuses(
        &without_lock,
        &[
            "umem.frames: 32768:",
            "needs 268435456 bytes of locked memory, the limit is 8388608",
            "LimitMEMLOCK=268435456",
            "ulimit -l 262144",
        ],
    );
    // What fits the limit is fine.
    let small = format!(
        "{GATEWAY}[rings]\nrx = 128\ntx = 128\nfill = 128\ncompletion = 128\n[umem]\nframes = 1024\n"
    );
    let check = machine.gateway.run(&machine.path("towpathd"), &["check", &machine.write(&small)]).unwrap();
    assert!(check.ends_with("fine\n"), "{check}");
}

/// A bridge has no XDP of its own: refused where it was demanded, and forwarded through the generic path where it was not.
#[test]
fn interfaces_without_xdp_are_refused_or_served_by_the_generic_path() {
    let machine = Machine::new();
    machine
        .gateway
        .sh("ip link add br0 address 02:00:00:00:02:01 type bridge; ip link set g0 master br0; ip link set br0 up; \
             ip address add 198.51.100.1/24 dev br0; ip address add 10.2.0.1/24 dev g1; \
             ip neighbor add 10.2.0.11 lladdr 02:00:00:00:03:11 dev g1; sysctl -qw net.ipv4.ip_forward=1")
        .unwrap();
    machine.node.sh("ip address add 10.2.0.11/24 dev n0").unwrap();
    for mode in ["copy", "zero-copy"] {
        let file =
            machine.write(&with("interface = \"g0\"", &format!("interface = \"br0\"\nmode = \"{mode}\"")));
        let value = format!("port[0].mode: {mode} on br0: ");
        machine.refuses(
            &[],
            &["--config", &file],
            &[&value, "takes no XDP program (native: its driver has no XDP)", "use mode = \"auto\""],
        );
    }
    let file = machine.write(&with("interface = \"g0\"", "interface = \"g0\"\nmode = \"zero-copy\""));
    let words = ["port[0].mode: zero-copy", "no zero copy", "use mode = \"auto\" or \"copy\""];
    machine.refuses(&[], &["--config", &file], &words);

    let config = with("interface = \"g0\"", "interface = \"br0\"");
    let daemon = Towpathd::start(&machine.gateway, &config).unwrap();
    let ports = daemon.ctl(&["get", "ports"]).unwrap();
    let row = ports.lines().find(|line| line.starts_with("uplink")).unwrap();
    assert!(row.contains("br0") && row.contains("generic"), "{ports}");
    let told = daemon.log().lines().any(|line| line.contains("generic path") && line.contains("has no XDP"));
    assert!(told, "{}", daemon.log());
    daemon
        .apply(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {type: LoadBalancer, externalTrafficPolicy: Local, \
             clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10], ports: [{protocol: UDP, port: 5201}]}\n\
             status: {loadBalancer: {ingress: [{ip: 203.0.113.10}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web, labels: {kubernetes.io/service-name: web}}\n\
             addressType: IPv4\nports: [{protocol: UDP, port: 5201}]\nendpoints: [{addresses: [10.2.0.11], nodeName: node-1}]\n",
        )
        .unwrap();
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let datagrams = scope.spawn(|| {
            probe::run((&machine.client, "c0"), (&machine.node, "n0"), &super::datagram(), 1000, &stop)
                .unwrap()
        });
        std::thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        datagrams.join().unwrap()
    });
    println!("{report:?} through a bridge in the generic path");
    assert_eq!((report.arrived, report.doubled), (report.sent, 0), "{report:?}");

    // Others that want what this one has.
    let own = fs::read_to_string(daemon.file("gateway.toml")).unwrap();
    let file = machine.path("second.toml");
    let other_region = own.replace("/dev/shm/", "/dev/shm/second-");
    fs::write(&file, &other_region).unwrap();
    machine.refuses(
        &[],
        &["--config", &file],
        &["control.socket: ", "another daemon listens there", "stop it first"],
    );
    fs::write(&file, other_region.replace("control.sock", "second.sock")).unwrap();
    machine.refuses(
        &[],
        &["--config", &file],
        &["port[0].interface: br0: another XDP program", "towpathd", "ip link set dev br0 xdp off"],
    );
    for ending in ["", ".affinity"] {
        fs::remove_file(format!("/dev/shm/second-{}-flows{ending}", machine.gateway.name())).unwrap();
    }
    daemon.finish(&[]).unwrap();
}

#[test]
fn the_socket_of_a_daemon_that_is_gone_is_replaced() {
    let machine = Machine::new();
    let file = machine.write(GATEWAY);
    drop(UnixListener::bind(machine.path("control.sock")).unwrap());
    let (program, log) = (machine.path("towpathd"), machine.folder.path().join("log"));
    let mut daemon = Process::start(&machine.gateway, &program, &["--config", &file], &log).unwrap();
    let ready = || daemon_answers(&machine.path("control.sock"));
    daemon.wait_until(Duration::from_secs(20), ready).unwrap();
    daemon.signal(Signal::TERM).unwrap();
    assert!(daemon.wait(Duration::from_secs(20)).unwrap().success(), "{}", daemon.log());
    assert!(!fs::exists(machine.path("control.sock")).unwrap(), "a daemon that ends takes its socket along");
}

fn daemon_answers(socket: &str) -> bool {
    let mut command = std::process::Command::new(binary("towpathctl").unwrap());
    command.args(["--socket", socket, "status"]).output().unwrap().status.success()
}
