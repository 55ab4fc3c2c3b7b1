//! Processes die in the middle of everything: no packet and no connection may be lost with the data plane, and nothing may
//! block the next start when all are gone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tests::case::folder;
use tests::cluster::{Cluster, VIP, VIP6};
use tests::gateway::{Towpathd, binary};
use tests::length;
use tests::probe;
use tests::process::Process;
use tests::twin::Twin;

#[test]
fn ten_kills_of_the_data_plane_lose_no_packet() {
    let twin = Twin::new("kill").unwrap();
    let config = std::fs::read_to_string(folder().join("gateway.toml")).unwrap();
    // Room for what comes in while the next data plane starts.
    let config = format!("{config}\n[rings]\nrx = 32768\nfill = 32768\n");
    let daemon = Towpathd::start(&twin.gateway, &config).unwrap();
    daemon.apply(&std::fs::read_to_string(folder().join("objects.yaml")).unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    let rate = 50_000;
    let report = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            probe::run((&twin.far, "w0"), (&twin.far, "w1"), &probe::datagram(), rate, &stop).unwrap()
        });
        for _ in 0..length::pick(10, 100) {
            std::thread::sleep(Duration::from_millis(700));
            daemon.kill_data_plane().unwrap();
        }
        std::thread::sleep(Duration::from_millis(700));
        stop.store(true, Ordering::Relaxed);
        traffic.join().unwrap()
    });
    println!("{report:?} at {rate}/s");
    assert_eq!((report.arrived, report.doubled), (report.sent, 0), "{report:?}");
    daemon.finish(&[]).unwrap();
}

#[test]
fn downloads_go_on_over_kills_of_the_data_plane() {
    let cluster = Cluster::new("down", 3).unwrap();
    let mut downloads: Vec<Process> = [format!("http://{VIP}/slow"), format!("http://[{VIP6}]/slow")]
        .iter()
        .enumerate()
        .map(|(i, url)| {
            let args = ["-sS", "--max-time", "60", "-o", "/dev/null", "-w", "%{size_download}", url];
            Process::start(&cluster.client, "curl", &args, &cluster.folder.path().join(format!("curl-{i}")))
                .unwrap()
        })
        .collect();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(900));
        cluster.daemon().kill_data_plane().unwrap();
    }
    for download in &mut downloads {
        assert!(download.wait(Duration::from_secs(60)).unwrap().success(), "{}", download.log());
        assert_eq!(download.log(), "20000000");
    }
    cluster.finish(&["no_flow"]).unwrap();
}

/// Rule 1.2.
#[test]
fn after_the_death_of_all_the_next_start_has_objects_and_flows() {
    let mut cluster = Cluster::new("all", 3).unwrap();
    cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    let url = format!("http://{VIP}/slow");
    let args = ["-sS", "--max-time", "60", "-o", "/dev/null", "-w", "%{size_download}", &url];
    let log = cluster.folder.path().join("curl");
    let mut download = Process::start(&cluster.client, "curl", &args, &log).unwrap();
    std::thread::sleep(Duration::from_millis(1000));
    let before = cluster.daemon().status().unwrap();
    cluster.kill_all_and_restart().unwrap();
    let after = cluster.daemon().status().unwrap();
    assert_eq!(after.objects, before.objects);
    assert!(
        after.flows >= before.flows && before.flows > 0,
        "{} flows before, {} after",
        before.flows,
        after.flows
    );
    // The connection in the middle of its download among them.
    assert!(download.wait(Duration::from_secs(60)).unwrap().success(), "{}", download.log());
    assert_eq!(download.log(), "20000000");
    cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    cluster.finish(&["no_flow"]).unwrap();
}

#[test]
fn a_second_daemon_on_the_same_queues_says_so_and_harms_nobody() {
    let cluster = Cluster::new("two", 1).unwrap();
    let first = std::fs::read_to_string(cluster.daemon().file("gateway.toml")).unwrap();
    for (what, config) in [
        ("the same files", first.clone()),
        (
            "the same queues",
            first.replace("control.sock", "second.sock").replace("/dev/shm/", "/dev/shm/second-"),
        ),
    ] {
        let file = cluster.folder.path().join("second.toml");
        std::fs::write(&file, config).unwrap();
        let program = binary("towpathd").unwrap();
        let args = ["30", &program.to_string_lossy(), "--config", &file.to_string_lossy()];
        let output = cluster.gateway.output("timeout", &args).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{what}: {said}");
        println!("{what}: {}", said.lines().last().unwrap_or_default());
        cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    }
    cluster.finish(&["no_flow"]).unwrap();
}
