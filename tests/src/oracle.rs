//! Linux as the oracle: the gateway of [`Twin`] with the Services of tests/golden/objects.yaml as nft rules.
//!
//! tests/golden/oracle.nft holds the rules, after those of kube-proxy (pkg/proxy/nftables).

use std::time::Duration;

use anyhow::{Context, Result};

use crate::case::{Case, Emitted, folder};
use crate::twin::Twin;

/// The kernel's gateway.
#[derive(Debug)]
pub struct Oracle {
    twin: Twin,
}

impl Oracle {
    /// Builds the twin and loads the rules.
    pub fn new(name: &str) -> Result<Oracle> {
        let twin = Twin::new(name)?;
        // Routes, so that packets to service addresses get as far as the rules.
        for range in ["10.96.0.0/16", "203.0.113.0/24"] {
            twin.gateway.ip(&format!("route add {range} via 10.2.0.11"))?;
        }
        for range in ["fd00:96::/112", "2001:db8::/64"] {
            twin.gateway.ip(&format!("route add {range} via fd00:2::11"))?;
        }
        let rules = folder().join("oracle.nft");
        twin.gateway.run("nft", &["-f", &rules.to_string_lossy()])?;
        // Known only once a rule has asked for connection tracking.
        twin.gateway
            .sysctl(&["net.netfilter.nf_conntrack_tcp_be_liberal=1", "net.netfilter.nf_conntrack_checksum=1"])
            .context("connection tracking")?;
        Ok(Oracle { twin })
    }

    /// What the kernel makes of a case; see [`Twin::play`].
    pub fn play(&mut self, case: &Case, linger: Duration) -> Result<Vec<Vec<Emitted>>> {
        self.twin.play(case, linger)
    }
}
