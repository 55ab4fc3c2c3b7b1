//! Workers: where they run, what they cost when there is nothing to do, what happens when one hangs, and packets of one flow that
//! come in by another queue than before.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tests::cluster::{Cluster, GATEWAY, VIP, VIP6};
use tests::length;
use tests::worker::{self, Hung};

/// Kernel threads of the workers, in the order of their indexes: thread id and folder in /proc.
fn workers(cluster: &Cluster) -> Vec<(i32, PathBuf)> {
    worker::threads(cluster.daemon().data_plane().expect("a data plane runs")).unwrap()
}

/// CPU time of a thread so far, in hundredths of a second.
fn cpu_ticks(folder: &std::path::Path) -> u64 {
    let stat = std::fs::read_to_string(folder.join("stat")).unwrap();
    // After the name, which may hold blanks: state is field 3, utime and stime are 14 and 15.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn two_workers() -> String {
    GATEWAY.replace("cpus = [1]", "cpus = [0, 1]")
}

#[test]
fn each_worker_is_pinned_to_its_cpu() {
    let cluster = Cluster::with("pinned", 1, 2, &two_workers()).unwrap();
    let allowed: Vec<String> = workers(&cluster)
        .iter()
        .map(|(_, folder)| {
            let status = std::fs::read_to_string(folder.join("status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
            line.trim().to_owned()
        })
        .collect();
    assert_eq!(allowed, ["0", "1"]);
    cluster.finish(&["no_flow"]).unwrap();
}

#[test]
fn an_idle_worker_costs_little_and_wakes_at_once() {
    let cluster = Cluster::new("idle", 1).unwrap();
    let (_, folder) = workers(&cluster).remove(0);
    // Connections of the start are over.
    std::thread::sleep(Duration::from_secs(1));
    let (before, start) = (cpu_ticks(&folder), Instant::now());
    std::thread::sleep(Duration::from_secs(length::pick(5u32, 60).into()));
    let share = (cpu_ticks(&folder) - before) as f64 / (start.elapsed().as_secs_f64() * 100.0);
    println!("an idle worker takes {:.1} % of a CPU", share * 100.0);
    assert!(share <= 0.03, "{:.1} % of a CPU with nothing to do", share * 100.0);
    let ping = cluster.client.run("ping", &["-c", "1", "-W", "2", VIP]).unwrap();
    println!("first packet after that: {}", ping.lines().nth(1).unwrap_or_default());
    cluster.finish(&["no_flow", "echo_answered"]).unwrap();
}

#[test]
fn a_worker_that_hangs_is_named_and_goes_on_without_doubling_anything() {
    let cluster = Cluster::with("hang", 1, 2, &two_workers()).unwrap();
    let (victim, _) = workers(&cluster).remove(1);
    let hung = Hung::new(victim).unwrap();
    let start = Instant::now();
    let problem = loop {
        let problems = cluster.daemon().status().unwrap().problems;
        if let Some(problem) = problems.iter().find(|problem| problem.to_string().contains("worker 1")) {
            break problem.to_string();
        }
        // Noticed within 100 ms; the machine may be slow. After two seconds the keeper would act.
        assert!(start.elapsed() < Duration::from_millis(1500), "nobody says that worker 1 hangs");
        std::thread::sleep(Duration::from_millis(5));
    };
    println!("after {:?}: {problem}", start.elapsed());
    drop(hung);
    let start = Instant::now();
    while !cluster.daemon().status().unwrap().problems.is_empty() {
        assert!(start.elapsed() < Duration::from_secs(5), "the worker goes on, but is still called stuck");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(workers(&cluster)[1].0, victim, "the data plane was not started again");
    for vip in [VIP, VIP6] {
        cluster
            .client
            .run("ping", &["-c", "20", "-i", "0.01", "-W", "2", vip])
            .map(|text| {
                assert!(text.contains("20 received") && !text.contains("duplicates"), "{text}");
            })
            .unwrap();
    }
    cluster.finish(&["no_flow", "echo_answered"]).unwrap();
}

/// The client's link loses a queue and gets it back: packets of known flows come in by another queue, and so by another worker,
/// than the rest of their connection.
#[test]
fn flows_go_on_when_their_packets_change_queues() {
    let cluster = Cluster::with("queues", 10, 2, &two_workers()).unwrap();
    let connections = length::pick(100, 1000);
    let stop = AtomicBool::new(false);
    let rounds = AtomicU32::new(0);
    let mut sockets: Vec<(TcpStream, String)> = (0..connections)
        .map(|_| {
            let mut socket = cluster
                .client
                .inside(|| {
                    Ok(TcpStream::connect_timeout(&format!("{VIP}:80").parse()?, Duration::from_secs(10))?)
                })
                .unwrap();
            socket.set_nodelay(true).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let who = ask(&mut socket);
            (socket, who)
        })
        .collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for queues in [1, 2].iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                for (namespace, interface) in [(&cluster.client, "c0"), (&cluster.node, "n0")] {
                    namespace.run("ethtool", &["-L", interface, "tx", &queues.to_string()]).unwrap();
                }
                rounds.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        while rounds.load(Ordering::Relaxed) < length::pick(10, 200) {
            for (socket, who) in &mut sockets {
                assert_eq!(&ask(socket), who, "a connection answers from another pod");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{connections} connections over {} changes of queues", rounds.load(Ordering::Relaxed));
    drop(sockets);
    cluster.finish(&["no_flow"]).unwrap();
}

/// One request of a connection that stays open; returns the body, which is who answered whom.
fn ask(socket: &mut TcpStream) -> String {
    socket.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = socket.read(&mut buffer).unwrap();
        assert!(count > 0, "closed: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&buffer[..count]);
        let answer = String::from_utf8_lossy(&text);
        if let Some((_, body)) = answer.split_once("\r\n\r\n")
            && body.ends_with('\n')
        {
            return body.to_owned();
        }
    }
}
