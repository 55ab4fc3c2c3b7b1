//! `[overlay]`: tunnels to nodes whose pods cannot be reached otherwise.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `[overlay]`: how pods on other nodes are reached. Without annotations `towpath.dev/overlay` on Nodes, and without this section, by
/// plain routes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OverlaySection {
    /// Of Nodes without an annotation.
    pub default: OverlayKind,
    /// VXLAN network identifier, the same on every node: 1 with flannel, 4096 with Calico.
    pub vni: u32,
    /// UDP port of VXLAN: 4789, or 8472 where Linux' own default is used, as by flannel.
    pub port: u16,
    /// Largest packet that the network between nodes carries, bytes; absent: what the routes to nodes and their ports say.
    pub mtu: Option<u16>,
    /// Own addresses that nodes send to, the first of each family being what they see as sender; empty: those of the ports.
    pub addresses: Vec<IpAddr>,
    /// Link-layer address of VXLAN devices of Nodes that do not tell theirs.
    pub mac: Option<Mac>,
}

impl Default for OverlaySection {
    fn default() -> OverlaySection {
        OverlaySection {
            default: OverlayKind::Native,
            vni: 1,
            port: 4789,
            mtu: None,
            addresses: Vec::new(),
            mac: None,
        }
    }
}

/// How the pods of a node are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OverlayKind {
    /// By plain routes.
    #[default]
    Native,
    /// Inside UDP packets between the gateway and the node (RFC 7348).
    Vxlan,
}

impl OverlayKind {
    /// All of them, with their words in the gateway file and in annotations.
    pub const WORDS: [(&'static str, OverlayKind); 2] =
        [("native", OverlayKind::Native), ("vxlan", OverlayKind::Vxlan)];

    /// Its word in the gateway file and in annotations.
    pub const fn name(self) -> &'static str {
        OverlayKind::WORDS[self as usize].0
    }
}

/// A link-layer address of one interface, written `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        let is_read = mac.iter_mut().all(|byte| {
            let part = parts.next().filter(|part| (1..=2).contains(&part.len()) && !part.starts_with('+'));
            part.and_then(|part| u8::from_str_radix(part, 16).ok()).map(|value| *byte = value).is_some()
        });
        // One of a group of interfaces, or of none, is nobody's.
        if !is_read || parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err("not a link-layer address of one interface; write it as 02:00:00:00:00:01".to_owned());
        }
        Ok(Mac(mac))
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_in_the_order_of_their_kinds() {
        for (word, kind) in OverlayKind::WORDS {
            assert_eq!(kind.name(), word);
        }
    }

    #[test]
    fn addresses_of_one_interface_are_read() {
        assert_eq!("02:00:0a:FF:1:99".parse(), Ok(Mac([2, 0, 10, 255, 1, 0x99])));
        assert_eq!(Mac([2, 0, 10, 255, 1, 0x99]).to_string(), "02:00:0a:ff:01:99");
        for bad in [
            "",
            "02",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:001",
            "02:00:00:00:00:g1",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "02:00:00:00:00:+1",
            "02-00-00-00-00-01",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
