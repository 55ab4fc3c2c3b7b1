//! `[health]`: who may ask how the gateway is, and where.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `[health]`: servers that tell load balancers, kubelet and Prometheus how the gateway is, as kube-proxy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HealthSection {
    /// Where `/healthz`, `/livez` and `/metrics` are served.
    pub listen: Listen,
    /// Serve `/metrics` there too; `towpathctl metrics` prints them in any case.
    pub metrics: bool,
    /// Serve the `healthCheckNodePort` of Services, on the addresses that serve NodePorts.
    pub node_ports: bool,
}

impl Default for HealthSection {
    fn default() -> HealthSection {
        // As kube-proxy's --healthz-bind-address.
        let listen = Listen(Some(SocketAddr::from(([0, 0, 0, 0], 10_256))));
        HealthSection { listen, metrics: true, node_ports: true }
    }
}

/// An address and port to listen on, written `192.0.2.1:10256`, `[2001:db8::1]:10256`, or `off`. The unspecified address of
/// either family stands for every address of both, as in kube-proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen(pub Option<SocketAddr>);

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(addr) => addr.fmt(f),
            None => f.write_str("off"),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        match text {
            "off" => Ok(Listen(None)),
            _ => text.parse().map(|addr| Listen(Some(addr))).map_err(|_| {
                "not an address with a port; write it as \"0.0.0.0:10256\" or \"[2001:db8::1]:10256\", or \"off\"".to_owned()
            }),
        }
    }
}

impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Listen, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
