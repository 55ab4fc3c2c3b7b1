//! What a program that is not `towpathctl` may send to the control socket: each gets an answer that says why, or an end, and
//! whoever asks in the usual way is answered at once meanwhile.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use config::control::{MAX_LINE_BYTES, Reply};
use config::fault::{Code, Fault};
use tests::cluster::{Cluster, VIP};

use super::{cluster, undisturbed};

const HELLO: &[u8] = b"{\"hello\":{\"version\":1,\"client\":\"a stranger\"}}\n";
const BEGIN: &[u8] = b"{\"begin\":{}}\n";

/// The slowest answer to an honest question that is still prompt on a machine that is busy with others.
const PROMPT: Duration = Duration::from_secs(3);

fn connect(cluster: &Cluster) -> UnixStream {
    let stream = UnixStream::connect(cluster.daemon().socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Sends what may be cut off in the middle, and returns the replies up to the end.
fn converse(cluster: &Cluster, bytes: &[u8]) -> Vec<Reply> {
    let mut stream = connect(cluster);
    // A daemon that has heard enough closes; what it said before is still there.
    let _ = stream.write_all(bytes);
    until_closed(stream)
}

fn until_closed(mut stream: UnixStream) -> Vec<Reply> {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    text.split_inclusive(|byte| *byte == b'\n').map(|line| Reply::from_line(line).unwrap()).collect()
}

/// The one fault among the replies, the last of them.
#[track_caller]
fn fault(replies: &[Reply]) -> &Fault {
    match replies {
        [before @ .., Reply::Fault(fault)] => {
            assert!(before.iter().all(|reply| matches!(reply, Reply::Hello { .. })), "{replies:?}");
            println!("{fault}");
            fault
        }
        other => panic!("no fault at the end: {other:?}"),
    }
}

#[test]
fn whatever_is_sent_the_others_are_served_and_nothing_takes_effect() {
    let mut cluster = cluster("socket");
    cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    cluster.daemon.as_mut().unwrap().warmed_up().unwrap();
    let before = cluster.daemon().status().unwrap();
    undisturbed(&cluster, || {
        let over = AtomicBool::new(false);
        let (slowest, asked) = std::thread::scope(|scope| {
            let honest = scope.spawn(|| ask_all_the_time(&cluster, &over));
            let _over = super::OnDrop(&over);
            let half = half_written(&cluster, false);
            let lazy = never_reads(&cluster);
            no_protocol(&cluster);
            too_much(&cluster);
            // Closed in the middle: gone without a trace.
            drop(half_written(&cluster, true));
            three_hundred(&cluster);
            let cut = until_closed(half);
            assert_eq!(fault(&cut).message, "a line stayed unfinished for too long");
            cut_off(lazy);
            over.store(true, Ordering::Relaxed);
            honest.join().unwrap()
        });
        println!("{asked} times asked for the status meanwhile, answered within {slowest:?}");
        assert!(asked > 10 && slowest < PROMPT, "{slowest:?}");
    });
    let after = cluster.daemon().status().unwrap();
    assert_eq!((after.generation, after.objects), (before.generation, before.objects));
    assert_eq!(after.problems, []);
    cluster.finish(&["no_flow"]).unwrap();
}

/// `towpathctl status` again and again: the longest that one took, and how many there were.
fn ask_all_the_time(cluster: &Cluster, over: &AtomicBool) -> (Duration, u32) {
    let (mut slowest, mut asked) = (Duration::ZERO, 0);
    while !over.load(Ordering::Relaxed) {
        let start = Instant::now();
        cluster.daemon().ctl(&["status"]).unwrap();
        slowest = slowest.max(start.elapsed());
        asked += 1;
    }
    (slowest, asked)
}

/// A change of which the last line lacks its end; `closing`: the object is complete but for the newline and a commit.
fn half_written(cluster: &Cluster, closing: bool) -> UnixStream {
    let mut stream = connect(cluster);
    let object = "{\"apply\":{\"object\":{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{\"name\":\"half\"}}}}";
    let cut = if closing { object.len() } else { object.len() / 2 };
    let text = [HELLO, BEGIN, &object.as_bytes()[..cut]].concat();
    stream.write_all(&text).unwrap();
    stream
}

/// Asks for everything a thousand times, and reads nothing of it.
fn never_reads(cluster: &Cluster) -> UnixStream {
    let mut stream = connect(cluster);
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let all = b"{\"get\":{\"what\":\"all\",\"objects\":true}}\n".repeat(1000);
    // The daemon stops reading requests while replies wait.
    let _ = stream.write_all(&[HELLO, &all].concat());
    stream
}

/// It has been cut off in the middle of its replies.
fn cut_off(mut lazy: UnixStream) {
    std::thread::sleep(Duration::from_secs(1));
    let mut received = Vec::new();
    // Closed with requests unread: the end may come as a reset.
    let _ = lazy.read_to_end(&mut received);
    let ends = received.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"{\"end\"")).count();
    assert!(ends < 1000, "all {ends} dumps were kept for a client that did not read");
}

/// What is not the protocol.
fn no_protocol(cluster: &Cluster) {
    let noise: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let cases: [(&str, Vec<u8>, Code); 8] = [
        ("noise", noise, Code::Syntax),
        ("another protocol", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(), Code::Syntax),
        (
            "text that is not UTF-8",
            b"{\"hello\":{\"version\":1,\"client\":\"\xff\xfe\"}}\n".to_vec(),
            Code::Syntax,
        ),
        ("zeroes", [vec![0; 4096], b"\n".to_vec()].concat(), Code::Syntax),
        ("deep nesting", [b"[".repeat(100_000), b"\n".to_vec()].concat(), Code::Syntax),
        ("deep nesting in an object", deep_object(), Code::Syntax),
        ("a question before hello", b"\"status\"\n".to_vec(), Code::Request),
        ("an operation without begin", [HELLO, b"{\"apply\":{\"object\":{}}}\n"].concat(), Code::Request),
    ];
    for (what, bytes, code) in cases {
        let replies = converse(cluster, &bytes);
        let fault = fault(&replies);
        assert_eq!(fault.code, code, "{what}: {fault}");
        assert!(!fault.message.is_empty() && fault.to_string().len() < 500, "{what}: {fault}");
    }
}

fn deep_object() -> Vec<u8> {
    let deep =
        [&b"{\"apply\":{\"object\":"[..], &b"{\"a\":".repeat(100_000), b"1", &b"}".repeat(100_000), b"}}\n"]
            .concat();
    [HELLO, BEGIN, &deep].concat()
}

/// More than a line, and more than a change may take.
fn too_much(cluster: &Cluster) {
    let replies = converse(cluster, &[HELLO, &b"x".repeat(MAX_LINE_BYTES + (1 << 20))].concat());
    let said = fault(&replies);
    assert!(
        said.code == Code::Limit && said.message.contains(&format!("longer than {MAX_LINE_BYTES}")),
        "{said}"
    );

    let padded = format!("{{\"apply\":{{\"object\":{{\"kind\":\"{}\"}}}}}}\n", "x".repeat(1 << 20));
    let replies = converse(cluster, &[HELLO, BEGIN, &padded.as_bytes().repeat(5)].concat());
    let said = fault(&replies);
    assert_eq!((said.code, said.value.as_deref()), (Code::Limit, Some("4194304")), "{said}");
    assert!(said.to_string().contains("staging_bytes") && said.remedy.is_some(), "{said}");

    // The same from somebody who means well.
    let annotated: String = (0..5)
        .map(|index| {
            let note = "x".repeat(1 << 20);
            format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: n{index}, annotations: {{note: {note}}}}}}}\n")
        })
        .collect();
    let file = cluster.folder.path().join("large.yaml");
    std::fs::write(&file, annotated).unwrap();
    let output = cluster.daemon().ctl_output(&["apply", "-f", &file.to_string_lossy()]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in ["staging_bytes", "value: 4194304", "remedy: apply in smaller parts"] {
        assert!(said.contains(word), "{word:?} is missing in\n{said}");
    }
}

/// Connections of somebody who says nothing: all of them come in or are told why not, and none keeps an honest client out.
fn three_hundred(cluster: &Cluster) {
    let silent: Vec<UnixStream> = (0..300).map(|_| connect(cluster)).collect();
    // Longer than it takes until the silent ones have to make room.
    std::thread::sleep(Duration::from_millis(500));
    drop(silent);
}
