//! `towpathctl` against a daemon that is a thread of the test: what it sends, what it prints, how it ends.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use config::control::{
    Change, Committed, Count, DnsRow, FlowRow, Get, Item, Kind, Noun, ObjectRef, Outcome, Reply, Request,
    ServiceDescription, Stats, Status, VERSION, WorkerRow,
};
use config::fault::{Code, Fault};
use serde_json::json;

const WEB: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20]
  ports:
  - port: 80
    targetPort: 8080
";

/// What the thread does with a request.
enum Act {
    /// Answers with these lines.
    Answer(Vec<Reply>),
    /// Says nothing and reads on.
    Silence,
    /// Writes these bytes and closes.
    Raw(&'static [u8]),
}

/// A daemon of one conversation.
struct Daemon {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    seen: mpsc::Receiver<Request>,
}

impl Daemon {
    /// Serves with the usual hello.
    fn new(mut act: impl FnMut(&Request) -> Act + Send + 'static) -> Daemon {
        Daemon::with_hello(move |request| match request {
            Request::Hello { .. } => Act::Answer(vec![hello(VERSION)]),
            request => act(request),
        })
    }

    fn with_hello(act: impl FnMut(&Request) -> Act + Send + 'static) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, seen) = mpsc::channel();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            serve(stream, act, &sender);
        });
        Daemon { _dir: dir, socket, seen }
    }

    fn ctl(&self, args: &[&str]) -> Command {
        let mut command = ctl();
        command.env("TOWPATH_SOCKET", &self.socket).args(args);
        command
    }

    /// Every request after `hello` so far.
    fn requests(&self) -> Vec<Request> {
        self.seen.try_iter().filter(|r| !matches!(r, Request::Hello { .. })).collect()
    }
}

fn serve(stream: UnixStream, mut act: impl FnMut(&Request) -> Act, seen: &mpsc::Sender<Request>) {
    let mut writer = stream.try_clone().unwrap();
    for line in BufReader::new(stream).lines() {
        let request = Request::from_line(line.unwrap().as_bytes()).unwrap();
        let action = act(&request);
        // The test may be over: nobody needs to hear of it then.
        let _ = seen.send(request);
        match action {
            Act::Silence => {}
            Act::Answer(replies) => {
                for reply in replies {
                    if writer.write_all(reply.to_line().as_bytes()).is_err() {
                        return;
                    }
                }
            }
            Act::Raw(bytes) => {
                let _ = writer.write_all(bytes);
                return;
            }
        }
    }
}

fn hello(version: u32) -> Reply {
    Reply::Hello { version, server: "towpathd 9.9.9".into(), gateway: "gw-1".into(), generation: 6 }
}

fn ctl() -> Command {
    let mut command = Command::cargo_bin("towpathctl").unwrap();
    command.env_remove("TOWPATH_SOCKET").env("NO_COLOR", "1").timeout(Duration::from_secs(60));
    command
}

fn change(kind: Kind, name: &str, outcome: Outcome) -> Change {
    let namespace = if kind.is_namespaced() { "default".into() } else { String::new() };
    Change { object: ObjectRef { kind, namespace, name: name.into() }, outcome }
}

fn committed(changes: Vec<Change>) -> Committed {
    Committed { generation: 7, changes, workers_in_force: 2, workers: 2, ..Default::default() }
}

/// Answers `commit` and nothing else.
fn on_commit(reply: Reply) -> impl FnMut(&Request) -> Act + Send {
    move |request| match request {
        Request::Commit => Act::Answer(vec![reply.clone()]),
        _ => Act::Silence,
    }
}

#[test]
fn apply_is_one_change_with_kubectl_s_lines() {
    let daemon = Daemon::new(on_commit(Reply::Committed(committed(vec![
        change(Kind::Service, "web", Outcome::Created),
        change(Kind::Node, "node-1", Outcome::Unchanged),
    ]))));
    daemon
        .ctl(&["apply", "-f", "-", "--prune", "--if-generation", "6"])
        .write_stdin(format!("{WEB}---\napiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: web\n"))
        .assert()
        .code(0)
        .stdout("service/web created\nnode/node-1 unchanged\n")
        .stderr("skipped 1 object of kind Deployment, which Towpath does not use\n");
    let requests = daemon.requests();
    let [Request::Begin(begin), Request::Apply(apply), Request::Commit] = &requests[..] else {
        panic!("{requests:?}")
    };
    assert!(begin.prune && !begin.dry_run);
    assert_eq!(begin.expect_generation, Some(6));
    assert_eq!((apply.source.file.as_str(), apply.source.document), ("-", 1));
    assert_eq!(apply.object["spec"]["ports"][0]["port"], json!(80));
}

#[test]
fn dry_run_takes_kubectl_s_values() {
    for (args, dry) in [
        (&["apply", "-f", "-", "--dry-run"][..], true),
        (&["apply", "-f", "-", "--dry-run=server"], true),
        (&["apply", "-f", "-", "--dry-run=client"], true),
        (&["apply", "-f", "-", "--dry-run=none"], false),
    ] {
        let mut reply = committed(vec![change(Kind::Service, "web", Outcome::Configured)]);
        reply.dry_run = dry;
        let daemon = Daemon::new(on_commit(Reply::Committed(reply)));
        let suffix = if dry { " (dry run)" } else { "" };
        daemon
            .ctl(args)
            .write_stdin(WEB)
            .assert()
            .code(0)
            .stdout(format!("service/web configured{suffix}\n"));
        assert!(matches!(&daemon.requests()[0], Request::Begin(begin) if begin.dry_run == dry));
    }
}

#[test]
fn a_change_that_is_not_in_force_everywhere_ends_with_3() {
    let mut reply = committed(vec![change(Kind::Service, "web", Outcome::Created)]);
    reply.workers_in_force = 1;
    let daemon = Daemon::new(on_commit(Reply::Committed(reply)));
    daemon
        .ctl(&["apply", "-f", "-"])
        .write_stdin(WEB)
        .assert()
        .code(3)
        .stdout("service/web created\n")
        .stderr(
            "warning: accepted as generation 7, in force on 1 of 2 workers: see `towpathctl get workers`\n",
        );
}

#[test]
fn a_refused_change_names_object_field_value_and_remedy() {
    let fault = Fault::new(Code::Conflict, "is served by Service default/other too")
        .object("Service default/web")
        .field("spec.clusterIP")
        .value("10.96.0.20")
        .remedy("take another address");
    let daemon = Daemon::new(on_commit(Reply::Refused { faults: vec![fault], more: 2, warnings: vec![] }));
    daemon.ctl(&["apply", "-f", "-"]).write_stdin(WEB).assert().code(1).stdout("").stderr(
        "error: Service default/web: spec.clusterIP: is served by Service default/other too\n  \
         value: 10.96.0.20\n  remedy: take another address\n\
         error: the change was refused for 3 reasons: nothing was changed\n",
    );
}

#[test]
fn a_bad_object_is_found_before_the_daemon_hears_of_it() {
    let daemon = Daemon::new(|_| Act::Silence);
    let bad = format!("{WEB}---\n{}", WEB.replace("port: 80\n", "port: eighty\n"));
    let output = daemon.ctl(&["apply", "-f", "-"]).write_stdin(bad).assert().code(1).stdout("");
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    for part in
        ["Service default/web: spec.ports[0].port:", "document 2", "value: \"eighty\"", "nothing was done"]
    {
        assert!(stderr.contains(part), "{part} is missing:\n{stderr}");
    }
    assert!(daemon.requests().is_empty());
}

#[test]
fn delete_takes_names_and_files() {
    let gone = || Reply::Committed(committed(vec![change(Kind::Service, "web", Outcome::Deleted)]));
    let daemon = Daemon::new(on_commit(gone()));
    daemon.ctl(&["delete", "svc", "web", "-n", "shop"]).assert().code(0).stdout("service/web deleted\n");
    let named = |requests: Vec<Request>| match &requests[1] {
        Request::Delete(delete) => (delete.object.to_string(), delete.ignore_not_found),
        other => panic!("{other:?}"),
    };
    assert_eq!(named(daemon.requests()), ("Service shop/web".to_owned(), false));
    let daemon = Daemon::new(on_commit(gone()));
    daemon.ctl(&["delete", "-f", "-", "--ignore-not-found"]).write_stdin(WEB).assert().code(0);
    assert_eq!(named(daemon.requests()), ("Service default/web".to_owned(), true));
}

#[test]
fn a_daemon_that_gives_up_in_the_middle_is_heard() {
    let fault = Fault::new(Code::Limit, "the staging budget of 256 MiB is used up").remedy("apply in parts");
    let line: &'static [u8] = Reply::Fault(fault).to_line().leak().as_bytes();
    let daemon = Daemon::new(move |request| match request {
        Request::Apply(_) => Act::Raw(line),
        _ => Act::Silence,
    });
    let many: String =
        (0..2000).map(|i| format!("{}---\n", WEB.replace("web", &format!("web-{i}")))).collect();
    daemon
        .ctl(&["apply", "-f", "-"])
        .write_stdin(many)
        .assert()
        .code(1)
        .stdout("")
        .stderr("error: the staging budget of 256 MiB is used up\n  remedy: apply in parts\n");
}

fn items(items: Vec<Item>) -> Vec<Reply> {
    let count = items.len() as u64;
    items.into_iter().map(Reply::Item).chain([Reply::End { count }]).collect()
}

#[test]
fn get_asks_for_what_kubectl_would_ask_for() {
    let ask = |args: &[&str]| {
        let daemon = Daemon::new(|_| Act::Answer(items(vec![])));
        daemon.ctl(args).assert().code(0);
        match &daemon.requests()[..] {
            [Request::Get(get)] => get.clone(),
            other => panic!("{other:?}"),
        }
    };
    let get = |what, namespace: Option<&str>, objects| Get {
        what,
        namespace: namespace.map(str::to_owned),
        name: None,
        objects,
    };
    assert_eq!(ask(&["get", "svc"]), get(Noun::Services, Some("default"), false));
    assert_eq!(ask(&["get", "po", "-n", "shop"]), get(Noun::Pods, Some("shop"), false));
    assert_eq!(ask(&["get", "endpoints", "-A"]), get(Noun::Endpoints, None, false));
    assert_eq!(ask(&["get", "nodes"]), get(Noun::Nodes, None, false));
    assert_eq!(ask(&["get", "svc", "-o", "yaml"]), get(Noun::Services, Some("default"), true));
    assert_eq!(ask(&["get", "routes", "-o", "json"]), get(Noun::Routes, None, false));
    assert_eq!(ask(&["get", "dns", "-o", "hosts"]), get(Noun::Dns, None, false));
}

#[test]
fn get_prints_columns_hosts_and_json() {
    let dns = || {
        let row = |address: &str| {
            Item::Dns(DnsRow { name: "web.default.svc.cluster.local".into(), address: address.into() })
        };
        Daemon::new(move |_| Act::Answer(items(vec![row("10.96.0.20"), row("fd00:96::20")])))
    };
    dns()
        .ctl(&["get", "dns", "-o", "hosts"])
        .assert()
        .code(0)
        .stdout("10.96.0.20 web.default.svc.cluster.local\nfd00:96::20 web.default.svc.cluster.local\n");
    dns().ctl(&["get", "dns", "--no-headers"]).assert().code(0).stdout(
        "web.default.svc.cluster.local   A        10.96.0.20\n\
         web.default.svc.cluster.local   AAAA     fd00:96::20\n",
    );
    let output = dns().ctl(&["get", "dns", "-o", "json"]).assert().code(0);
    let value: serde_json::Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(value["items"][1]["address"], "fd00:96::20");
}

#[test]
fn one_named_object_is_itself_and_several_are_a_list() {
    let object =
        |name: &str| Item::Object(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}}));
    let daemon = Daemon::new(move |_| Act::Answer(items(vec![object("web")])));
    let output = daemon.ctl(&["get", "svc/web", "-o", "json"]).assert().code(0);
    let value: serde_json::Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(value["kind"], "Service");
    let daemon = Daemon::new(move |_| Act::Answer(items(vec![object("web")])));
    daemon.ctl(&["get", "svc", "-o", "yaml"]).assert().code(0).stdout(
        "apiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata:\n    name: web\nkind: List\n",
    );
}

#[test]
fn nothing_found_is_a_notice_but_a_name_is_an_error() {
    let none = || Daemon::new(|_| Act::Answer(items(vec![])));
    none()
        .ctl(&["get", "svc"])
        .assert()
        .code(0)
        .stdout("")
        .stderr("No services found in default namespace.\n");
    none()
        .ctl(&["get", "svc", "web"])
        .assert()
        .code(1)
        .stderr("error: services \"web\" not found in namespace default\n");
}

#[test]
fn a_long_list_into_a_closed_pipe_ends_quietly() {
    let daemon = Daemon::new(|_| {
        let row = FlowRow { protocol: "tcp".into(), state: "established".into(), ..Default::default() };
        Act::Answer(items(vec![Item::Flow(row); 20_000]))
    });
    let script = format!(
        "{} flows list -o name | head -1; echo ${{PIPESTATUS[0]}}",
        assert_cmd::cargo::cargo_bin("towpathctl").display()
    );
    let output = std::process::Command::new("bash")
        .arg("-c")
        .arg(script)
        .env("TOWPATH_SOCKET", &daemon.socket)
        .output();
    let output = output.unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(stdout.lines().count(), 2, "{stdout}");
    assert_eq!(stdout.lines().last(), Some("0"));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn describe_takes_both_forms_of_a_name() {
    for args in [&["describe", "service", "shop/web"][..], &["describe", "service", "web", "-n", "shop"]] {
        let daemon = Daemon::new(|_| Act::Answer(vec![Reply::Service(Box::<ServiceDescription>::default())]));
        daemon.ctl(args).assert().code(0);
        let expected = Request::DescribeService { namespace: "shop".into(), name: "web".into() };
        assert_eq!(daemon.requests(), [expected]);
    }
}

#[test]
fn a_fault_is_an_error_with_its_remedy() {
    let fault = Fault::new(Code::NotFound, "there is no Service shop/web");
    let daemon = Daemon::new(move |_| Act::Answer(vec![Reply::Fault(fault.clone())]));
    daemon
        .ctl(&["describe", "service", "shop/web"])
        .assert()
        .code(1)
        .stderr("error: there is no Service shop/web\n");
}

#[test]
fn status_tells_by_its_code_whether_workers_lag() {
    for (in_force, code) in [(2, 0), (1, 3)] {
        let status = Status { workers: 2, workers_in_force: in_force, ..Default::default() };
        let daemon = Daemon::new(move |_| Act::Answer(vec![Reply::Status(Box::new(status.clone()))]));
        daemon.ctl(&["status"]).assert().code(code);
    }
}

#[test]
fn stats_watch_prints_lines_and_stops() {
    let mut uptime_ms = 0;
    let daemon = Daemon::new(move |_| {
        uptime_ms += 100;
        let totals = vec![Count { name: "rx_packets".into(), value: uptime_ms * 10, help: String::new() }];
        Act::Answer(vec![Reply::Stats(Stats { uptime_ms, totals, ..Default::default() })])
    });
    let args = ["stats", "--watch", "--interval", "0.01", "--count", "2", "-o", "json"];
    let output = daemon.ctl(&args).assert().code(0);
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    let rates: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rates.len(), 2);
    assert!(rates.iter().all(|rate| rate["rx_packets_s"] == 10_000.0), "{text}");
}

#[test]
fn flushing_everything_must_be_said() {
    let flush = |args: &[&str]| {
        let daemon = Daemon::new(|_| Act::Answer(vec![Reply::FlowCount { count: 1234 }]));
        daemon.ctl(args).assert()
    };
    flush(&["flows", "flush"])
        .code(2)
        .stderr("error: this would remove every flow: say which ones, or --all\n");
    flush(&["flows", "flush", "--all"]).code(0).stdout("1,234 flows removed\n");
    flush(&["flows", "flush", "--vip", "203.0.113.10:80"]).code(0);
    flush(&["flows", "count"]).code(0).stdout("1234\n");
    flush(&["flows", "count", "--client", "web"]).code(2);
}

#[test]
fn a_diff_ends_as_kubectl_diff_does() {
    let live = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"], "ports": [{"port": 80, "targetPort": 8080}]}
    });
    let run = |manifest: String| {
        let live = live.clone();
        let daemon = Daemon::new(move |_| Act::Answer(items(vec![Item::Object(live.clone())])));
        daemon.ctl(&["diff", "-f", "-"]).write_stdin(manifest).assert()
    };
    run(WEB.to_owned()).code(0).stdout("");
    let output = run(WEB.replace("8080", "8081")).code(1);
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert!(text.contains("-    targetPort: 8080\n+    targetPort: 8081\n"), "{text}");
    ctl().args(["diff", "-f", "-", "--socket", "/nonexistent"]).write_stdin(WEB).assert().code(2);
}

#[test]
fn a_daemon_that_is_full_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().unwrap();
            let full = Reply::Fault(Fault::new(Code::Limit, "too many clients"));
            let _ = stream.write_all(full.to_line().as_bytes());
        }
        let (stream, _) = listener.accept().unwrap();
        let (seen, _requests) = mpsc::channel();
        serve(
            stream,
            |request| match request {
                Request::Hello { .. } => Act::Answer(vec![hello(VERSION)]),
                _ => Act::Answer(vec![Reply::FlowCount { count: 7 }]),
            },
            &seen,
        );
    });
    ctl().env("TOWPATH_SOCKET", &socket).args(["flows", "count"]).assert().code(0).stdout("7\n");
}

#[test]
fn a_daemon_of_another_version_is_named() {
    let daemon = Daemon::with_hello(|_| Act::Answer(vec![hello(VERSION + 1)]));
    daemon.ctl(&["status"]).assert().code(1).stderr(format!(
        "error: towpathd 9.9.9 speaks control protocol version {}, this towpathctl version {VERSION}: \
         use the towpathctl that came with the daemon\n",
        VERSION + 1
    ));
}

#[test]
fn what_is_not_the_protocol_is_told() {
    for (bytes, word) in [
        (&b"HTTP/1.1 400 Bad Request\r\n"[..], "not a reply of control protocol"),
        (b"", "closed the connection"),
        (b"{\"status\":", "closed the connection"),
    ] {
        let daemon = Daemon::new(move |_| Act::Raw(bytes));
        let output = daemon.ctl(&["status"]).assert().code(1);
        let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
        assert!(stderr.contains(word), "{stderr}");
    }
}

#[test]
fn silence_ends_at_the_timeout() {
    let daemon = Daemon::new(|_| Act::Silence);
    let started = Instant::now();
    let output = daemon.ctl(&["status", "--request-timeout", "0.3"]).assert().code(1);
    assert!(started.elapsed() >= Duration::from_millis(300));
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("no answer from the daemon within 0.3 s"), "{stderr}");
}

#[test]
fn silence_after_a_commit_says_that_the_change_may_be_in_force() {
    let daemon = Daemon::new(|_| Act::Silence);
    let args = ["apply", "-f", "-", "--request-timeout", "0.3"];
    let output = daemon.ctl(&args).write_stdin(WEB).assert().code(1).stdout("");
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(stderr.starts_with("error: the change was sent and may be in force"), "{stderr}");
}

#[test]
fn no_daemon_is_told_with_the_path_and_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let dead = dir.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    let missing = dir.path().join("missing.sock");
    for (path, word) in [(&file, "is not a socket"), (&dead, "nobody listens"), (&missing, "does not exist")]
    {
        let output = ctl().arg("--socket").arg(path).arg("status").assert().code(1).stdout("");
        let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
        let shown = path.display().to_string();
        for part in [word, &shown, "TOWPATH_SOCKET"] {
            assert!(stderr.contains(part), "{part} is missing:\n{stderr}");
        }
    }
}

#[test]
fn an_interruption_says_that_nothing_was_changed() {
    // The pipe of standard input stays open, so that `apply` waits for it.
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("towpathctl"))
        .args(["apply", "-f", "-"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // It catches the signal from the first thing that it does; before that the default action ends it.
    let status = format!("/proc/{}/status", child.id());
    let deadline = Instant::now() + Duration::from_secs(30);
    let caught = |text: &str| {
        let mask = text.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap_or("0");
        u64::from_str_radix(mask.trim(), 16).unwrap_or(0) & (1 << 1) != 0
    };
    while !caught(&std::fs::read_to_string(&status).unwrap()) {
        assert!(Instant::now() < deadline, "no handler for SIGINT");
        thread::sleep(Duration::from_millis(5));
    }
    let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let stdin = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "interrupted, nothing was changed\n");
}

#[test]
fn a_capture_that_breaks_off_says_so_and_keeps_what_it_has() {
    let mut packet = String::from("{\"capturing\":{\"ports\":[\"uplink\"]}}\n");
    packet += "{\"item\":{\"packet\":{\"id\":1,\"time_ns\":0,\"point\":\"rx\",\"port\":\"uplink\",\"worker\":0,\"len\":4,\
               \"data\":\"AAECAw==\",\"generation\":1,\"verdict\":\"punt\"}}}\n";
    let bytes: &'static [u8] = packet.leak().as_bytes();
    let daemon = Daemon::new(move |request| match request {
        Request::Status => Act::Answer(vec![Reply::Status(Box::default())]),
        _ => Act::Raw(bytes),
    });
    daemon
        .ctl(&["capture", "--request-timeout", "0.2"])
        .assert()
        .code(1)
        .stdout("00:00:00.000000 uplink:rx    #1 runt length 4, generation 1, to the kernel\n")
        .stderr(
            "capturing rx, post-nat, drop of uplink, Ctrl-C ends it\n\
             error: the daemon is gone (the daemon closed the connection; see its log): \
             the capture has ended after 1 packet\n",
        );
}

#[test]
fn usage_errors_end_with_2() {
    for args in [
        &["frobnicate"][..],
        &["get"],
        &["apply", "--dry-run=maybe", "-f", "-"],
        &["stats", "--count", "3"],
        &["status", "--request-timeout", "never"],
        &["delete"],
    ] {
        ctl().args(args).assert().code(2).stdout("");
    }
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = ctl().args(["completions", shell]).assert().code(0);
        let script = String::from_utf8(output.get_output().stdout.clone()).unwrap();
        assert!(script.contains("towpathctl") && script.contains("flows"), "{shell}");
        // Shells that complete values of arguments know the nouns.
        assert!(!["bash", "zsh"].contains(&shell) || script.contains("neighbors"), "{shell}");
    }
}

#[test]
fn workers_may_be_named_by_their_index() {
    let worker = WorkerRow { index: 1, cpu: 3, state: "running".into(), ..Default::default() };
    let daemon = Daemon::new(move |_| Act::Answer(items(vec![Item::Worker(worker.clone())])));
    daemon.ctl(&["get", "worker/1", "-o", "name"]).assert().code(0).stdout("worker/1\n");
}
