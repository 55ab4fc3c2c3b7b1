//! Thousands of Services out of a seed, compiled by Towpath and by rules that kube-proxy would give Linux: the same packets
//! through both must meet the same fate, among the same endpoints, with the same source.
//!
//! `kube_proxy.py` writes the rules. Differences that are meant have an entry in [`LEDGER`], with how many there are: the
//! seeds are fixed, so the counts are exact, and a new difference fails the test, as does one that is gone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use config::gateway::Gateway;
use forwarder::pipeline::Rng;
use forwarder::verdict::{Reason, Verdict};
use probe::{Fate, Kind, NUMBERS, PACKETS, Probe};
use serde_json::Value;
use tests::case::Side;
use tests::length;
use tests::pure::Pure;
use tests::twin::Twin;
use tests::wire::Wire;

mod objects;
mod probe;

/// Services of one round.
const SERVICES: u32 = 60;
/// Probes whose packets are under way together.
const BATCH: usize = 250;
/// Nothing has come for so long: the rest is dropped.
const QUIET: Duration = Duration::from_millis(60);

/// A difference that is meant.
struct Entry {
    name: &'static str,
    about: &'static str,
    /// How many there are in the short run and in the full one.
    counts: [u32; 2],
    /// True if the probe is of this kind, and the two fates differ just so.
    meant: fn(&Probe, &Fate, &Fate) -> bool,
}

const LEDGER: &[Entry] = &[
    Entry {
        name: "unknown-port",
        about: "kube-proxy lets packets to a port that a load balancer address or externalIP does not have pass by; the gateway \
                owns these addresses and refuses",
        counts: [627, 5848],
        meant: |probe, linux, towpath| {
            probe.kind == Kind::UnknownPortOutside && linux.untouched > 0 && towpath.refused > 0
        },
    },
    Entry {
        name: "node-client",
        about: "a node of the cluster that asks for an external address of a Service with externalTrafficPolicy Local is \
                inside for a gateway, and gets any endpoint, masqueraded; for kube-proxy only its own node is",
        counts: [98, 978],
        meant: |probe, _, towpath| {
            probe.client.name == "node"
                && probe.kind == Kind::Frontend
                && towpath.endpoints.iter().all(|(_, _, src)| *src != probe.client.addr)
                && !towpath.endpoints.is_empty()
        },
    },
    Entry {
        name: "cluster-internal",
        about: "without expose_cluster_ips ClusterIPs are not served to the outside; kube-proxy serves whoever reaches it",
        counts: [520, 5180],
        meant: |probe, _, towpath| {
            probe.client.side == Side::Outside
                && matches!(probe.kind, Kind::Frontend | Kind::UnknownPort)
                && probe.about.contains("ClusterIP")
                && towpath.silent > 0
                && towpath.endpoints.is_empty()
                && towpath.refused == 0
        },
    },
];

/// What the gateway file says but for its switches.
fn gateway(expose_cluster_ips: bool) -> Result<Gateway> {
    let text = format!(
        "[gateway]\nname = \"{}\"\ncluster_cidrs = [\"10.244.0.0/16\", \"fd00:244::/32\"]\n\
         service_cidrs = [\"10.96.0.0/16\", \"fd00:96::/112\"]\nexternal_ip_cidrs = [\"192.0.2.0/24\", \"2001:db8:e::/64\"]\n\
         return = \"routed\"\nexternal_traffic_policy = \"literal\"\n[workers]\ncpus = [0]\n[flows]\ncapacity = 1048576\n\
         [[port]]\nname = \"uplink\"\ninterface = \"g0\"\nrole = \"outside\"\nexpose_cluster_ips = {expose_cluster_ips}\n\
         [[port]]\nname = \"fabric\"\ninterface = \"g1\"\nrole = \"inside\"\n",
        objects::NODE,
    );
    Gateway::parse(&text, "gateway.toml").map_err(|faults| anyhow::anyhow!("{faults:?}"))
}

/// Linux with kube-proxy's rules.
struct Linux {
    /// Keeps the namespaces alive.
    _twin: Twin,
    wires: [Wire; 2],
}

impl Linux {
    fn new(name: &str, list: &Value) -> Result<Linux> {
        let twin = Twin::new(name)?;
        // So that packets to service addresses get as far as the rules.
        for range in ["10.96.0.0/16", "203.0.113.0/24", "192.0.2.0/24"] {
            twin.gateway.ip(&format!("route add {range} via 10.2.0.11"))?;
        }
        for range in ["fd00:96::/112", "2001:db8::/64", "2001:db8:e::/64"] {
            twin.gateway.ip(&format!("route add {range} via fd00:2::11"))?;
        }
        twin.gateway.sysctl(&["net.ipv4.icmp_msgs_per_sec=10000000", "net.ipv4.icmp_msgs_burst=10000000"])?;
        let wires = [Wire::open(&twin.far, "w0")?, Wire::open(&twin.far, "w1")?];
        for wire in &wires {
            wire.enlarge(64 << 20)?;
        }
        let folder = tempfile::tempdir()?;
        let (objects, rules) = (folder.path().join("objects.json"), folder.path().join("rules.nft"));
        std::fs::write(&objects, list.to_string())?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/difference/kube_proxy.py");
        let arguments = [script, objects::NODE, objects::ZONE, &objects.to_string_lossy()];
        std::fs::write(&rules, tests::namespace::run("/usr/bin/python3", &arguments)?)?;
        twin.gateway.run("nft", &["-f", &rules.to_string_lossy()])?;
        Ok(Linux { _twin: twin, wires })
    }

    fn ask(&self, probes: &[Probe]) -> Result<Vec<Fate>> {
        let mut fates = vec![Fate::default(); probes.len()];
        let mut answered = vec![0u32; probes.len()];
        for (index, probe) in probes.iter().enumerate() {
            // One after the other: endpoints are taken in turn.
            for packet in 0..PACKETS {
                let number = index as u32 * NUMBERS + packet;
                let port = 61_000 + (index as u32 % 300 * PACKETS + packet) as u16;
                self.wires[usize::from(probe.client.side == Side::Inside)]
                    .send(&probe.frame(number, port))?;
            }
        }
        let mut last = Instant::now();
        while last.elapsed() < QUIET {
            let mut idle = true;
            for wire in &self.wires {
                while let Some(frame) = wire.receive(Duration::ZERO)? {
                    (idle, last) = (false, Instant::now());
                    let Some(seen) = probe::read(&frame) else { continue };
                    let index = (seen.number / NUMBERS) as usize;
                    if let Some(probe) = probes.get(index) {
                        fates[index].note(probe, &seen);
                        answered[index] += 1;
                    }
                }
            }
            if idle {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        for (fate, answered) in fates.iter_mut().zip(answered) {
            fate.silent = PACKETS.saturating_sub(answered);
        }
        Ok(fates)
    }
}

/// Asks Towpath until every endpoint of the list that Linux used has been seen, or long enough that it would have been.
fn ask_towpath(towpath: &mut Pure, probe: &Probe, linux: &Fate) -> Fate {
    let mut fate = Fate::default();
    for packet in 0..NUMBERS {
        let outcome = towpath.feed(probe.client.side, &probe.frame(packet, 20_000 + packet as u16));
        match (outcome.verdict, outcome.emitted.first()) {
            // Not a packet of the gateway's: on live ports it would never have been taken.
            (Verdict::Punt | Verdict::Answer { reason: Reason::NoRoute, .. }, _) => fate.untouched += 1,
            (_, Some(emitted)) => match probe::read(&emitted.frame) {
                Some(seen) => fate.note(probe, &seen),
                None => fate.silent += 1,
            },
            _ => fate.silent += 1,
        }
        let enough = if linux.endpoints.len() > 1 { 64 * linux.endpoints.len() as u32 } else { PACKETS };
        if packet + 1 >= enough || packet + 1 >= PACKETS && fate.agrees(linux) {
            break;
        }
    }
    fate
}

/// Rules 2.1, 2.5, 3.1, 3.2, 3.3, 3.6, 3.7, 4.1, 4.2, 4.3, 4.5, 4.6, 5.1, 5.2, 5.4, 5.5, 5.6, 6.1, 6.2, 6.3, 14.2.
#[test]
fn services_mean_what_kube_proxy_makes_of_them() {
    let rounds = length::pick(2, 20);
    let (mut cases, mut services) = (0, 0);
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    let mut failures = String::new();
    let mut failed = 0;
    for round in 0..rounds {
        let list = objects::cluster(&mut Rng::new(round * 7 + 1), SERVICES);
        let probes = probe::probes(&list);
        // One of its own for each round: the kernel remembers connections beyond its rules.
        let linux = Linux::new(&format!("differ{round}"), &list).unwrap();
        let mut towpath = Pure::new(gateway(round % 2 == 0).unwrap(), &list.to_string())
            .context("the objects of a round")
            .unwrap();
        for batch in probes.chunks(BATCH) {
            for (probe, linux) in batch.iter().zip(linux.ask(batch).unwrap()) {
                let got = ask_towpath(&mut towpath, probe, &linux);
                cases += 1;
                if got.agrees(&linux) {
                    continue;
                }
                if let Some(entry) = LEDGER.iter().find(|entry| (entry.meant)(probe, &linux, &got)) {
                    *counts.entry(entry.name).or_default() += 1;
                    continue;
                }
                failed += 1;
                if failed <= 20 {
                    let _ = writeln!(
                        failures,
                        "round {round}, {} at {} asks for the {}, {}:{} {}:\n  Linux:   {}\n  Towpath: {}",
                        probe.client.name,
                        probe.client.addr,
                        probe.about,
                        probe.addr,
                        probe.port,
                        if probe.udp { "UDP" } else { "TCP" },
                        linux.say(),
                        got.say()
                    );
                }
            }
        }
        services += SERVICES;
    }
    println!("{cases} cases of {services} Services, {failed} unexplained differences");
    for entry in LEDGER {
        println!("  {:<18}{:>6}  {}", entry.name, counts.get(entry.name).unwrap_or(&0), entry.about);
    }
    assert_eq!(failed, 0, "of {cases} cases:\n{failures}");
    for entry in LEDGER {
        let expected = length::pick(entry.counts[0], entry.counts[1]);
        assert_eq!(
            counts.get(entry.name).copied().unwrap_or(0),
            expected,
            "entry {} of the ledger",
            entry.name
        );
    }
}
