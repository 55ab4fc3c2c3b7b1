//! Linux as the oracle: the gateway of [`Twin`] with the Services of tests/golden/objects.yaml as nft rules.
//!
//! tests/golden/oracle.nft holds the rules, after those of kube-proxy (pkg/proxy/nftables). The service addresses are on the
//! gateway's loopback, so that the kernel itself answers pings and unknown ports of an address that is owned.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::case::{Case, Emitted, folder};
use crate::twin::Twin;

/// Addresses of Services; of 10.96.0.0/16 and fd00:96::/112 only these exist.
const OWNED: &[&str] = &[
    "203.0.113.10",
    "203.0.113.20",
    "203.0.113.30",
    "203.0.113.40",
    "203.0.113.50",
    "2001:db8::10",
    "2001:db8::20",
    "2001:db8::30",
    "2001:db8::40",
    "2001:db8::50",
];

/// The kernel's gateway.
#[derive(Debug)]
pub struct Oracle {
    twin: Twin,
}

impl Oracle {
    /// Builds the twin and loads the rules.
    pub fn new(name: &str) -> Result<Oracle> {
        let twin = Twin::new(name)?;
        for address in OWNED {
            let (len, nodad) = if address.contains(':') { (128, "nodad") } else { (32, "") };
            twin.gateway.ip(&format!("address add {address}/{len} dev lo {nodad}"))?;
        }
        // A route, so that packets of the service ranges get as far as the rules.
        twin.gateway.ip("route add 10.96.0.0/16 via 10.2.0.11")?;
        twin.gateway.ip("route add fd00:96::/112 via fd00:2::11")?;
        let rules = folder().join("oracle.nft");
        twin.gateway.run("nft", &["-f", &rules.to_string_lossy()])?;
        // Known only once a rule has asked for connection tracking.
        twin.gateway
            .sysctl(&["net.netfilter.nf_conntrack_tcp_be_liberal=1", "net.netfilter.nf_conntrack_checksum=1"])
            .context("connection tracking")?;
        Ok(Oracle { twin })
    }

    /// What the kernel makes of a case.
    pub fn play(&self, case: &Case) -> Result<Vec<Vec<Emitted>>> {
        self.twin.play(case, Duration::from_millis(40))
    }
}
