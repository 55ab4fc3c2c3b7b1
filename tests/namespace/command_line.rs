//! Every command of `towpathctl` on a live daemon, as a user would type it: what it prints, and how it ends.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tests::cluster::{Cluster, SNAT_VIP, VIP, objects, slices};
use tests::gateway::binary;
use tests::worker::{self, Hung};

/// Objects of the kinds that the cluster has not.
const MORE: &str = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n---\n\
    {apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: cart}, spec: {nodeName: node-1, containers: [{name: c}]}, \
     status: {phase: Running, podIP: 10.244.1.90, podIPs: [{ip: 10.244.1.90}]}}\n---\n";
/// A Service that the cluster has not.
const EXTRA: &str = "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: extra}\n\
    spec: {clusterIP: 10.96.0.50, clusterIPs: [10.96.0.50], ports: [{name: http, port: 80}]}\n";

/// What a command printed and how it ended.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    #[track_caller]
    fn ends(self, code: i32) -> Said {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        self
    }

    /// Ended well, without a word on standard error.
    #[track_caller]
    fn well(self) -> String {
        let said = self.ends(0);
        assert_eq!(said.err, "");
        said.out
    }

    #[track_caller]
    fn json(self) -> Value {
        serde_json::from_str(&self.well()).unwrap()
    }

    #[track_caller]
    fn fails(self, code: i32, words: &[&str]) {
        let said = self.ends(code);
        assert_eq!(said.out, "", "data goes to standard output, complaints do not");
        for word in words {
            assert!(said.err.contains(word), "{word:?} is missing in\n{}", said.err);
        }
    }
}

/// Types a command, with `input` on its standard input. `socket`: TOWPATH_SOCKET.
fn typed(socket: &Path, args: &[&str], input: &str) -> Said {
    let mut command = Command::new(binary("towpathctl").unwrap());
    command.env("TOWPATH_SOCKET", socket).args(args);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// A cluster and the way to speak about it.
struct User {
    cluster: Cluster,
}

impl User {
    fn types(&self, args: &[&str]) -> Said {
        typed(&self.cluster.daemon().socket(), args, "")
    }

    fn pipes(&self, input: &str, args: &[&str]) -> Said {
        typed(&self.cluster.daemon().socket(), args, input)
    }

    /// A file or folder of the test.
    fn path(&self, name: &str) -> String {
        self.cluster.folder.path().join(name).display().to_string()
    }

    /// The words of the first line: the headers of the columns.
    #[track_caller]
    fn columns(&self, args: &[&str]) -> Vec<String> {
        let out = self.types(args).well();
        assert!(out.lines().count() > 1, "{args:?} lists nothing:\n{out}");
        out.lines()
            .next()
            .unwrap()
            .split("  ")
            .map(|word| word.trim().to_owned())
            .filter(|w| !w.is_empty())
            .collect()
    }
}

#[test]
fn every_command_does_what_is_typed() {
    let user = User { cluster: Cluster::new("typed", 2).unwrap() };
    for vip in [VIP, SNAT_VIP] {
        user.cluster.curl(&[&format!("http://{vip}/")]).unwrap();
    }
    changes(&user);
    lists(&user);
    forms(&user);
    counters(&user);
    flows(&user);
    packets(&user);
    closed_pipes(&user);
    wrong_words(&user);
    a_worker_that_lags(&user);
    user.cluster.finish(&["no_flow"]).unwrap();
}

/// apply, diff and delete.
fn changes(user: &User) {
    std::fs::create_dir(user.path("manifests")).unwrap();
    let (more, extra, folder) =
        (user.path("manifests/1.yaml"), user.path("manifests/2.yaml"), user.path("manifests"));
    std::fs::write(&more, MORE).unwrap();
    std::fs::write(&extra, EXTRA).unwrap();

    let said = user.types(&["diff", "-f", &folder]).ends(1);
    assert!(
        said.out.contains("--- /dev/null (in force)\n+++ Service shop/extra (applied)\n"),
        "{}",
        said.out
    );
    let generation = user.types(&["status", "-o", "json"]).json()["generation"].as_u64().unwrap();
    let dry = user.types(&["apply", "-f", &folder, "--dry-run"]).well();
    assert_eq!(
        dry,
        "namespace/shop created (dry run)\npod/cart created (dry run)\nservice/extra created (dry run)\n"
    );
    assert_eq!(user.types(&["status", "-o", "json"]).json()["generation"], generation);
    let created = user.types(&["apply", "-f", &folder]).well();
    assert_eq!(created, "namespace/shop created\npod/cart created\nservice/extra created\n");
    assert_eq!(user.types(&["diff", "-f", &folder]).well(), "");
    assert_eq!(user.pipes(EXTRA, &["apply", "-f", "-"]).well(), "service/extra unchanged\n");
    let other = EXTRA.replace("port: 80", "port: 81");
    let said = user.pipes(&other, &["diff", "-f", "-"]).ends(1);
    assert!(
        said.out.contains("\n-  - name: http\n-    port: 80\n")
            || said.out.contains("-    port: 80\n+    port: 81\n"),
        "{}",
        said.out
    );
    let answer = user.pipes(&other, &["apply", "-f", "-", "-o", "json"]).json();
    assert_eq!(answer["changes"][0]["outcome"], "configured");
    assert_eq!((&answer["workers"], &answer["workers_in_force"]), (&1.into(), &1.into()));
    assert_eq!(user.pipes(EXTRA, &["apply", "-f", "-", "-o", "name"]).well(), "service/extra\n");

    let stale = ["apply", "-f", &extra, "--if-generation", "1"];
    user.types(&stale).fails(1, &["the generation is", "value: 1", "remedy:"]);
    user.types(&["diff", "-f", &user.path("nosuch.yaml")])
        .fails(2, &["cannot read", "nosuch.yaml: No such file"]);
    user.types(&["apply", "-f", &user.path("nosuch.yaml")])
        .fails(1, &["cannot read", "nosuch.yaml: No such file"]);
    user.types(&["apply"]).fails(2, &["no objects: name a file, a folder or - with -f"]);

    // Names are of a namespace.
    user.types(&["delete", "service", "extra"])
        .fails(1, &["Service default/extra: not found", "--ignore-not-found"]);
    assert_eq!(user.types(&["delete", "svc", "extra", "--ignore-not-found"]).well(), "");
    assert_eq!(
        user.types(&["delete", "svc/extra", "pod/cart", "-n", "shop"]).well(),
        "service/extra deleted\npod/cart deleted\n"
    );
    user.types(&["delete", "-f", &folder])
        .fails(1, &["Pod shop/cart: not found", "1.yaml:3", "nothing was changed"]);
    let deleted = user.types(&["delete", "-f", &folder, "--ignore-not-found"]).well();
    assert_eq!(deleted, "namespace/shop deleted\n");

    // Everything else goes, and comes back.
    let whole = objects() + &slices(1..=2);
    let pruned = user.pipes(&format!("{MORE}{EXTRA}---\n{whole}"), &["apply", "--prune", "-f", "-"]).well();
    assert!(pruned.contains("service/web unchanged\n") && !pruned.contains("pruned"), "{pruned}");
    let pruned = user.pipes(&format!("{MORE}---\n{whole}"), &["apply", "--prune", "-f", "-"]).well();
    assert!(pruned.ends_with("service/extra pruned\n"), "{pruned}");
}

/// Every noun has its columns, kubectl's where kubectl has it.
fn lists(user: &User) {
    for (noun, columns, more) in [
        ("services", "NAME TYPE CLUSTER-IP EXTERNAL-IP PORT(S) AGE", "SELECTOR"),
        ("endpoints", "SERVICE ENDPOINT PORT STATE NODE TARGET", "ZONE"),
        ("nodes", "NAME STATUS ROLE AGE INTERNAL-IP POD-CIDRS", "EXTERNAL-IP"),
        ("namespaces", "NAME STATUS AGE", "NAME"),
        ("routes", "PREFIX KIND VIA PORT", "MTU"),
        ("neighbors", "ADDRESS PORT MAC STATE", "MAC"),
        ("ports", "NAME INTERFACE ROLE LINK MODE QUEUES ADDRESSES", "MTU"),
        ("workers", "WORKER CPU POLL STATE HEARTBEAT GENERATION", "FORWARDED"),
        ("flows", "PROTO STATE CLIENT FRONTEND ENDPOINT SERVICE IDLE EXPIRES", "AGE"),
        ("dns", "NAME RECORD ADDRESS", "ADDRESS"),
    ] {
        let found = user.columns(&["get", noun]);
        assert_eq!(found[..columns.split(' ').count()].join(" "), columns, "{noun}");
        let wide = user.columns(&["get", noun, "-o", "wide"]);
        assert!(wide.contains(&more.to_owned()) && wide.starts_with(&found), "{noun}: {wide:?}");
        assert!(user.types(&["get", noun, "-o", "yaml"]).well().contains("kind: List\n"), "{noun}");
        let list = user.types(&["get", noun, "-o", "json"]).json();
        assert!(!list["items"].as_array().unwrap().is_empty(), "{noun}");
        for name in user.types(&["get", noun, "-o", "name"]).well().lines() {
            assert!(
                name.split_once('/').is_some_and(|(kind, name)| !kind.is_empty() && !name.is_empty()),
                "{name}"
            );
        }
    }
    assert_eq!(user.columns(&["get", "po", "-n", "shop"])[..5].join(" "), "NAME STATUS AGE IP NODE");
    let said = user.types(&["get", "pods"]).ends(0);
    assert_eq!((said.out.as_str(), said.err.as_str()), ("", "No pods found in default namespace.\n"));
    assert_eq!(user.columns(&["get", "svc", "-A"])[..2].join(" "), "NAMESPACE NAME");
    let all = user.types(&["get", "all", "-A"]).well();
    for heading in ["services:", "endpoints:", "pods:", "nodes:", "namespaces:"] {
        assert!(all.lines().any(|line| line == heading), "{heading} is missing in\n{all}");
    }
    let two = user.types(&["get", "svc,nodes"]).well();
    assert!(two.starts_with("services:\nNAME ") && two.contains("\n\nnodes:\nNAME "), "{two}");
    assert_eq!(user.types(&["get", "svc/web", "svc/shop", "--no-headers"]).well().lines().count(), 2);
    user.types(&["get", "svc", "nosuch"]).fails(1, &["services \"nosuch\" not found in namespace default"]);
    let hosts = user.types(&["get", "dns", "-o", "hosts"]).well();
    assert!(hosts.contains("10.96.0.10 web.default.svc.cluster.local\n"), "{hosts}");
}

/// Fields that programs read, and what people read.
fn forms(user: &User) {
    let service = user.types(&["get", "svc", "web", "-o", "json"]).json();
    assert_eq!((&service["kind"], &service["spec"]["clusterIP"]), (&"Service".into(), &"10.96.0.10".into()));
    assert_eq!(service["status"]["loadBalancer"]["ingress"][0]["ip"], VIP);
    let slices = user.types(&["get", "endpointslices", "-o", "json"]).json();
    assert_eq!(slices["items"][0]["kind"], "EndpointSlice");
    let ports = user.types(&["get", "ports", "-o", "json"]).json();
    assert_eq!((&ports["items"][0]["name"], &ports["items"][0]["up"]), (&"uplink".into(), &true.into()));
    let worker = user.types(&["get", "worker/0", "-o", "json"]).json();
    assert_eq!(worker["cpu"], 1);
    assert!(["running", "sleeping"].contains(&worker["state"].as_str().unwrap()), "{worker}");

    let described = user.types(&["describe", "service", "web"]).well();
    for word in [
        "Name:                     web\n",
        "External Traffic Policy:  Local",
        "203.0.113.10",
        "10.244.1.11:80",
        "cluster,local",
    ] {
        assert!(described.contains(word), "{word:?} is missing in\n{described}");
    }
    assert_eq!(user.types(&["describe", "svc/web", "-n", "default"]).well(), described);
    let fields = user.types(&["describe", "svc", "default/web", "-o", "json"]).json();
    assert_eq!((&fields["service"]["name"], &fields["frontends"].is_array()), (&"web".into(), &true));
    user.types(&["describe", "svc", "nosuch"])
        .fails(1, &["Service default/nosuch: not found", "get services -A"]);

    let status = user.types(&["status"]).well();
    for word in
        ["Gateway:    gw-1, towpathd", "in force on 1 of 1 workers", "Services", "uplink", "No problems."]
    {
        assert!(status.contains(word), "{word:?} is missing in\n{status}");
    }
    let status = user.types(&["status", "-o", "json"]).json();
    for field in
        ["gateway", "generation", "workers_in_force", "objects", "ports", "problems", "flows_capacity"]
    {
        assert!(!status[field].is_null(), "{field} is missing in {status}");
    }
}

/// stats, drops and metrics.
fn counters(user: &User) {
    let stats = user.types(&["stats"]).well();
    assert!(stats.starts_with("COUNTER ") && stats.contains("Packets taken from receive rings."), "{stats}");
    assert!(stats.contains("To a worker: for an address of a Service."), "{stats}");
    assert!(user.types(&["stats", "-o", "wide"]).well().lines().next().unwrap().contains("WORKER-0"));
    let stats = user.types(&["stats", "-o", "json"]).json();
    let received =
        stats["totals"].as_array().unwrap().iter().find(|count| count["name"] == "rx_packets").unwrap();
    assert!(received["value"].as_u64().unwrap() > 10, "{stats}");
    let watch = ["stats", "--watch", "--count", "3", "--interval", "0.1"];
    let lines = user.types(&watch).well();
    assert!(lines.lines().count() == 4 && lines.trim_start().starts_with("rx/s"), "{lines}");
    let lines = user.types(&[&watch[..], &["-o", "json"]].concat()).well();
    assert_eq!(
        lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter(|l| l["rx_packets_s"].is_number())
            .count(),
        3
    );
    let metrics = user.types(&["metrics"]).well();
    for word in ["# TYPE ", "# HELP ", "towpath_"] {
        assert!(metrics.lines().any(|line| line.starts_with(word)), "{word:?} is missing in\n{metrics}");
    }
    let drops = user.types(&["drops", "--all"]).well();
    assert!(
        drops.starts_with("REASON ") && drops.contains("no_route") && drops.contains("No route to the"),
        "{drops}"
    );
    assert!(user.types(&["drops", "-o", "json"]).json().to_string().contains("\"no_route\""));
}

/// flows list, count and flush with filters.
fn flows(user: &User) {
    let count = |filter: &[&str]| -> u32 {
        user.types(&[&["flows", "count"], filter].concat()).well().trim().parse().unwrap()
    };
    let all = count(&[]);
    assert!(all >= 2, "{all} flows");
    assert_eq!(count(&["--vip", &format!("{VIP}:80")]) + count(&["--frontend", SNAT_VIP]), all);
    assert_eq!((count(&["--protocol", "tcp"]), count(&["--protocol", "udp"])), (all, 0));
    assert_eq!((count(&["--client", "198.51.100.0/24"]), count(&["--client", "198.51.100.3"])), (all, 0));
    assert_eq!(count(&["--service", "web"]) + count(&["--service", "default/shop"]), all);
    assert_eq!(count(&["--endpoint", "10.244.1.11"]) + count(&["--endpoint", "10.244.1.12:80"]), all);
    let rows = user.types(&["flows", "list", "--vip", SNAT_VIP, "-o", "json"]).json();
    let row = &rows["items"][0];
    assert!(row["client"].as_str().unwrap().starts_with("198.51.100.2:"), "{row}");
    assert!(row["masqueraded_as"].as_str().unwrap().starts_with("10.2.0.1:"), "{row}");
    assert_eq!(user.types(&["flows", "list", "--limit", "1"]).well().lines().count(), 2);
    user.types(&["flows", "flush"]).fails(2, &["say which ones, or --all"]);
    assert_eq!(user.types(&["flows", "flush", "--vip", SNAT_VIP]).well(), "1 flow removed\n");
    assert_eq!(user.types(&["flows", "flush", "--all", "-o", "json"]).json()["count"], all - 1);
    let said = user.types(&["flows", "list"]).ends(0);
    assert_eq!((said.out.as_str(), said.err.as_str()), ("", "No flows found.\n"));
}

/// trace and explain.
fn packets(user: &User) {
    let packet = format!("tcp 198.51.100.7:4242 > {VIP}:80");
    let said = user.types(&["trace", &packet]).well();
    for word in [
        "is forwarded as tcp 198.51.100.7:4242 > 10.244.1.1",
        "by port fabric",
        "Service    default/web",
        "Walk",
    ] {
        assert!(said.contains(word), "{word:?} is missing in\n{said}");
    }
    let trace = user.types(&["trace", &packet, "-o", "json"]).json();
    assert_eq!((&trace["verdict"], &trace["port"]), (&"forward".into(), &"fabric".into()));
    assert_eq!(user.types(&["flows", "count"]).well(), "0\n", "a trace changes nothing");
    user.types(&["trace", "tcp 198.51.100.7:4242"])
        .fails(2, &["no > after the source", "remedy: write PROTOCOL"]);
    user.types(&["trace", &format!("{packet} from nosuch")]).fails(1, &["\"nosuch\"", "uplink, fabric"]);

    // The same from what `get` prints, without the daemon.
    let file = user.path("all.yaml");
    std::fs::write(&file, user.types(&["get", "all", "-o", "yaml"]).well()).unwrap();
    let gateway = user.cluster.daemon().file("gateway.toml").display().to_string();
    let nowhere = Path::new("/no/such/socket");
    let explained =
        typed(nowhere, &["explain", "-f", &file, "--config", &gateway, &packet, "-o", "json"], "").json();
    assert_eq!((&explained["verdict"], &explained["endpoint"]), (&trace["verdict"], &trace["endpoint"]));
    let served = typed(nowhere, &["explain", "-f", &file], "").ends(0);
    assert!(
        served.out.starts_with("SERVICE ") && served.err.contains("Now ask about a packet"),
        "{}",
        served.out
    );
}

/// A reader that has seen enough is no failure, and nobody panics.
fn closed_pipes(user: &User) {
    let ctl = binary("towpathctl").unwrap();
    let script = "set -o pipefail; \"$0\" \"$@\" | head -1 >/dev/null";
    for line in [
        "get all -o yaml",
        "get svc -A",
        "get endpoints -o json",
        "status",
        "stats",
        "stats -w -c 5 -i 0.05",
        "drops --all",
        "metrics",
        "describe svc web",
        "completions bash",
        "--help",
    ] {
        let mut command = Command::new("bash");
        command
            .args(["-c", script])
            .arg(&ctl)
            .args(line.split(' '))
            .env("TOWPATH_SOCKET", user.cluster.daemon().socket());
        let output = command.output().unwrap();
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
            (Some(0), ""),
            "{line}"
        );
    }
}

/// What was not meant ends with 2.
fn wrong_words(user: &User) {
    for (line, words) in [
        ("get deployments", "no resource is called \"deployments\"; there are services, endpoints"),
        ("get svc -o table2", "[possible values: table, wide, json, yaml, name, hosts]"),
        ("get svc -o hosts", "-o hosts is a form of `get dns` only"),
        ("get flows 17", "flows have no names"),
        ("delete svc", "which svc? name it, or say -f FILE"),
        ("delete routes 10.0.0.0/8", "routes are not objects"),
        ("flows count --client web", "not an address or a prefix"),
        ("stats --count 3", "--watch"),
        ("status --request-timeout 0", "use more than 0 and at most 3600 seconds"),
        ("aply -f x", "unrecognized subcommand 'aply'"),
    ] {
        let words_of_line: Vec<&str> = line.split(' ').collect();
        user.types(&words_of_line).fails(2, &["error: ", words]);
    }
    assert!(user.types(&["--version"]).well().starts_with("towpathctl "));
    assert!(user.types(&["apply", "--help"]).well().contains("one change, all or nothing"));
    // The option wins over the environment.
    let socket = user.cluster.daemon().socket();
    typed(Path::new("/no/such/socket"), &["--socket", &socket.to_string_lossy(), "status"], "").well();
}

/// Accepted, and in force as soon as the worker goes on.
fn a_worker_that_lags(user: &User) {
    let pid = user.cluster.daemon().data_plane().unwrap();
    let (thread, _) = worker::threads(pid).unwrap().remove(0);
    let hung = Hung::new(thread).unwrap();
    let said = user.pipes("{apiVersion: v1, kind: Namespace, metadata: {name: late}}", &["apply", "-f", "-"]);
    // Before the keeper finds it stuck, which takes two seconds.
    drop(hung);
    let said = said.ends(3);
    assert_eq!(said.out, "namespace/late created\n");
    assert!(said.err.contains("in force on 0 of 1 workers: see `towpathctl get workers`"), "{}", said.err);
    let again = || user.types(&["status"]).code;
    let start = std::time::Instant::now();
    while again() != Some(0) {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "the worker goes on, and the generation is not in force"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn without_a_daemon_the_way_out_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("file"), "").unwrap();
    drop(std::os::unix::net::UnixListener::bind(path("stale")).unwrap());
    for (name, words) in [
        ("nosuch", "does not exist; start towpathd"),
        ("stale", "nobody listens on"),
        ("file", "is not a socket"),
    ] {
        for command in [&["status"][..], &["get", "svc"], &["stats", "--watch"], &["flows", "flush", "--all"]]
        {
            typed(&path(name), command, "").fails(1, &[words, "--socket or TOWPATH_SOCKET"]);
        }
    }
    typed(&path("nosuch"), &["diff", "-f", "-"], EXTRA).fails(2, &["no daemon"]);
    typed(&path("nosuch"), &["apply", "-f", "-"], EXTRA).fails(1, &["no daemon"]);
    // Somebody who accepts and says nothing.
    let _mute = std::os::unix::net::UnixListener::bind(path("mute")).unwrap();
    let ask = ["status", "--request-timeout", "0.3"];
    typed(&path("mute"), &ask, "").fails(1, &["no answer from the daemon within 0.3 s", "--request-timeout"]);
}

#[test]
fn completions_are_taken_by_their_shells() {
    let script = |shell: &str| typed(Path::new("/no/such/socket"), &["completions", shell], "").well();
    let bash = "source /dev/stdin; complete -p towpathctl; COMP_WORDS=(towpathctl ge); COMP_CWORD=1; \
                _towpathctl towpathctl ge towpathctl; echo \"${COMPREPLY[@]}\"; COMP_WORDS=(towpathctl get serv); COMP_CWORD=2; \
                _towpathctl towpathctl serv get; echo \"${COMPREPLY[@]}\"";
    let mut shell =
        Command::new("bash").args(["-c", bash]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    shell.stdin.take().unwrap().write_all(script("bash").as_bytes()).unwrap();
    let output = shell.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].ends_with("-F _towpathctl towpathctl"), "{said}");
    assert_eq!(lines[1..], ["get", "services"], "{said}");
    let (zsh, fish) = (script("zsh"), script("fish"));
    assert!(zsh.starts_with("#compdef towpathctl\n") && zsh.contains("neighbors"), "{zsh}");
    assert!(fish.contains("complete -c towpathctl") && fish.contains("-a \"apply\""), "{fish}");
    typed(Path::new("/no/such/socket"), &["completions", "tcsh"], "").fails(2, &["bash", "zsh", "fish"]);
}
