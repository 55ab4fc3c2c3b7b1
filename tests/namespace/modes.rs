//! Other ways for packets to reach the workers: through the kernel's generic path, and in packet memory on hugepages.

use std::path::Path;
use std::time::Duration;

use tests::cluster::{Cluster, GATEWAY, SNAT_VIP, VIP, VIP6};
use tests::process::Process;

/// Requests, masqueraded too, large downloads and pings, in both families.
fn serves(cluster: &Cluster) {
    let answer = cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    assert!(answer.ends_with(" 198.51.100.2\n"), "{answer}");
    let answer = cluster.curl(&[&format!("http://[{VIP6}]/")]).unwrap();
    assert!(answer.ends_with(" 2001:db8:c::2\n"), "{answer}");
    let answer = cluster.curl(&[&format!("http://{SNAT_VIP}/")]).unwrap();
    assert!(answer.ends_with(" 10.2.0.1\n"), "{answer}");
    for host in [VIP, &format!("[{VIP6}]"), SNAT_VIP] {
        cluster.download(host).unwrap();
    }
    // The Service's addresses, a pod, and the gateway itself, whose kernel answers.
    for address in [VIP, VIP6, "10.244.1.11", "fd00:244:1::11", "198.51.100.1", "2001:db8:c::1"] {
        cluster.client.run("ping", &["-c", "3", "-i", "0.2", "-W", "5", address]).unwrap();
    }
}

/// A slow download in the middle of which the data plane is killed.
fn survives_a_kill(cluster: &Cluster) {
    let url = format!("http://{VIP}/slow");
    let args = ["-sS", "--max-time", "60", "-o", "/dev/null", "-w", "%{size_download}", &url];
    let mut download =
        Process::start(&cluster.client, "curl", &args, &cluster.folder.path().join("curl")).unwrap();
    std::thread::sleep(Duration::from_millis(900));
    cluster.daemon().kill_data_plane().unwrap();
    assert!(download.wait(Duration::from_secs(60)).unwrap().success(), "{}", download.log());
    assert_eq!(download.log(), "20000000");
}

#[test]
fn the_generic_path_serves_as_the_native_one_does() {
    let config = GATEWAY.replace("\nrole =", "\nmode = \"generic\"\nrole =");
    let cluster = Cluster::with("generic", 3, 1, &config).unwrap();
    for port in cluster.daemon().status().unwrap().ports {
        assert_eq!(port.mode, "generic", "{}", port.name);
    }
    // In the generic path nobody splits what the other ends of veth pairs leave to the hardware. The log says what to do.
    assert!(cluster.daemon().log().contains("ethtool -K NAME tso off tx-udp-segmentation off"));
    for (namespace, interface) in [(&cluster.client, "c0"), (&cluster.node, "n0")] {
        namespace.run("ethtool", &["-K", interface, "tso", "off", "tx-udp-segmentation", "off"]).unwrap();
    }
    // The kernel itself merges nothing before a program in the generic path.
    for interface in ["g0", "g1"] {
        cluster.gateway.run("ethtool", &["-K", interface, "gro", "on"]).unwrap();
    }
    for interface in ["g0", "g1"] {
        let link = cluster.gateway.ip(&format!("link show {interface}")).unwrap();
        assert!(link.contains("xdpgeneric"), "{link}");
    }
    serves(&cluster);
    survives_a_kill(&cluster);
    cluster.finish(&["no_flow", "echo_answered"]).unwrap();
}

/// The kernel's pool of 2 MiB pages.
fn pool(name: &str) -> u64 {
    let file = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").join(name);
    std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

/// Pages that were added to the pool, and are taken out of it again at the end.
struct Reserved(u64);

impl Reserved {
    fn set(pages: u64) -> Reserved {
        let before = pool("nr_hugepages");
        std::fs::write("/proc/sys/vm/nr_hugepages", pages.to_string()).unwrap();
        Reserved(pool("nr_hugepages").saturating_sub(before))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let left = pool("nr_hugepages").saturating_sub(self.0);
        let _ = std::fs::write("/proc/sys/vm/nr_hugepages", left.to_string());
    }
}

/// Bytes that a process has mapped on 2 MiB pages, as /proc/PID/smaps tells.
fn mapped_on_hugepages(pid: u32) -> u64 {
    let (mut size, mut sum) = (0, 0);
    for line in std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap().lines() {
        let value = |line: &str| line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024;
        match line.split_once(':') {
            Some(("Size", text)) => size = value(text),
            Some(("KernelPageSize", text)) if value(text) == 2 << 20 => sum += size,
            _ => {}
        }
    }
    sum
}

#[test]
fn hugepages_hold_the_packets_once_as_many_are_reserved_as_the_refusal_says() {
    // Two workers, each with more frames than there are pages for now, and small rings.
    let frames = 16_384 + (pool("free_hugepages") - pool("resv_hugepages")) * 512;
    let config = GATEWAY.replace("cpus = [1]", "cpus = [0, 1]")
        + &format!(
            "[umem]\nhugepages = true\nframes = {frames}\n[rings]\nrx = 1024\nfill = 2048\ntx = 1024\ncompletion = 1024\n"
        );
    let refusal = format!("{:#}", Cluster::with("small", 1, 2, &config).unwrap_err());
    println!("{refusal}");
    let remedy = "umem.hugepages: true: ";
    assert!(refusal.contains(remedy), "no {remedy:?} in {refusal}");
    let pages = refusal.split_once("vm.nr_hugepages=").expect("says how many pages to reserve").1;
    let pages: u64 = pages.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();

    let reserved = Reserved::set(pages);
    if pool("nr_hugepages") < pages {
        println!(
            "only {} of {pages} hugepages are to be had on this machine: it stays at the refusal",
            pool("nr_hugepages")
        );
        return;
    }
    let mut cluster = Cluster::with("huge", 3, 2, &config).unwrap();
    let mapped = mapped_on_hugepages(cluster.daemon().data_plane().unwrap());
    assert!(mapped >= 2 * frames * 4096, "{mapped} bytes on hugepages");
    serves(&cluster);
    survives_a_kill(&cluster);
    // The pool is just large enough: the next keeper waits for the pages of the last one.
    cluster.kill_all_and_restart().unwrap();
    cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    cluster.finish(&["no_flow", "echo_answered"]).unwrap();
    drop(reserved);
}
