//! Captures: what `towpathctl capture` asks for and what it gets. The grammar of its filters is in [`filter`].
//!
//! A packet is seen at one [`Point`] or at two of them: as it came, then as it leaves or as it was dropped. Its
//! [`CapturedPacket::id`] is the same at each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub mod filter;

/// Bytes of a packet that are kept unless the client says otherwise: all of an Ethernet frame, the start of a jumbo one.
pub const DEFAULT_SNAPLEN: u32 = 2048;

/// Bytes of a packet that can be kept: the longest IP packet with its link-layer header and two VLAN tags.
pub const MAX_SNAPLEN: u32 = 65_535 + 14 + 8;

/// Where a packet is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// As it was received, with what became of it.
    Rx,
    /// As it is put on a transmit ring, after translation; answers of the gateway too.
    PostNat,
    /// As it was dropped, with the reason.
    Drop,
}

impl Point {
    /// Every point, in the order in which a packet comes by.
    pub const ALL: [Point; 3] = [Point::Rx, Point::PostNat, Point::Drop];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Point::Rx => "rx",
            Point::PostNat => "post-nat",
            Point::Drop => "drop",
        }
    }

    /// What follows the name of a port in the name of a capture file's interface, `fabric:tx`.
    pub const fn suffix(self) -> &'static str {
        match self {
            Point::PostNat => "tx",
            point => point.name(),
        }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Point {
    type Err = String;

    /// Its name, or `tx` for [`Point::PostNat`].
    fn from_str(text: &str) -> Result<Point, String> {
        let named = |point: &Point| text == point.name() || text == point.suffix();
        Point::ALL.into_iter().find(named).ok_or_else(|| "not one of rx, post-nat (or tx), drop".to_owned())
    }
}

/// Asks for packets as they pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    /// Which packets, in the grammar of [`filter`]; empty: all of them.
    #[serde(default)]
    pub filter: String,
    /// Where they are looked at.
    #[serde(default = "all_points")]
    pub at: Vec<Point>,
    /// Only at the port of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Bytes of each packet to keep, at most [`MAX_SNAPLEN`].
    #[serde(default = "default_snaplen")]
    pub snaplen: u32,
    /// End after so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

impl Default for Capture {
    fn default() -> Capture {
        Capture { filter: String::new(), at: all_points(), port: None, snaplen: DEFAULT_SNAPLEN, count: None }
    }
}

fn all_points() -> Vec<Point> {
    Point::ALL.to_vec()
}

fn default_snaplen() -> u32 {
    DEFAULT_SNAPLEN
}

/// A packet at one point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedPacket {
    /// Number of the packet, the same at every point. Unique while the data plane lives.
    pub id: u64,
    /// Nanoseconds since 1970, of the burst that it was part of.
    pub time_ns: u64,
    /// Where it was looked at.
    pub point: Point,
    /// Name of the port: the one that it leaves by for [`Point::PostNat`], else the one that it came in by.
    pub port: String,
    /// Worker that handled it.
    pub worker: u32,
    /// Its length, bytes.
    pub len: u32,
    /// Its first bytes, from the Ethernet header on; base64 (RFC 4648 section 4) on the wire.
    #[serde(with = "base64_text")]
    pub data: Vec<u8>,
    /// Addresses and ports as it came, such as `tcp 198.51.100.7:4242 > 203.0.113.10:80`, if its headers are sound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// Addresses and ports as it leaves, or would have left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// `namespace/name:port` of the Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Endpoint of the Service, `address:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Generation of the tables that it was judged by.
    pub generation: u64,
    /// Generation of the tables that its flow was created under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow_generation: Option<u64>,
    /// `original` if the client of its flow sent it, `reply` if the endpoint did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<String>,
    /// `forward`, `answer`, `punt`, `hold`, `gather` (a fragment that waits for the others) or `drop`.
    pub verdict: String,
    /// Name of the reason, for `answer` and `drop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Packets that this capture wanted and could not keep so far, since its reader was slow.
    #[serde(default)]
    pub missed: u64,
}

/// Bytes as base64.
mod base64_text {
    use base64::prelude::{BASE64_STANDARD, Engine as _};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        BASE64_STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_may_leave_everything_out() {
        assert_eq!(serde_json::from_str::<Capture>("{}").unwrap(), Capture::default());
        let all = Capture {
            filter: "tcp".into(),
            at: vec![Point::PostNat],
            port: Some("uplink".into()),
            snaplen: 96,
            count: Some(3),
        };
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(text, r#"{"filter":"tcp","at":["post-nat"],"port":"uplink","snaplen":96,"count":3}"#);
        assert_eq!(serde_json::from_str::<Capture>(&text).unwrap(), all);
    }

    #[test]
    fn points_have_two_names_at_most() {
        for point in Point::ALL {
            assert_eq!(point.name().parse(), Ok(point));
            assert_eq!(point.suffix().parse(), Ok(point));
        }
        assert!("pre-nat".parse::<Point>().is_err());
    }

    #[test]
    fn bytes_survive_the_round_trip() {
        let packet = CapturedPacket {
            id: 7,
            time_ns: 1,
            point: Point::Drop,
            port: "uplink".into(),
            worker: 0,
            len: 1500,
            data: (0..=255).collect(),
            before: None,
            after: None,
            service: None,
            endpoint: None,
            generation: 2,
            flow_generation: None,
            direction: None,
            verdict: "drop".into(),
            reason: Some("no_route".into()),
            missed: 0,
        };
        let text = serde_json::to_string(&packet).unwrap();
        assert!(text.contains(r#""data":"AAECAwQF"#) && !text.contains("before"), "{text}");
        assert_eq!(serde_json::from_str::<CapturedPacket>(&text).unwrap(), packet);
        assert!(serde_json::from_str::<CapturedPacket>(&text.replace("AAEC", "====")).is_err());
    }
}
