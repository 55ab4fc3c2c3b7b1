//! Addresses and ports as arguments: `A`, `A-B`, and with a port `A-B:80` or `[A-B]:80`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Consecutive addresses of one family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddrRange {
    first: u128,
    last: u128,
    /// True for IPv4.
    pub is_v4: bool,
}

/// Consecutive addresses with a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// The addresses.
    pub addrs: AddrRange,
    /// The port.
    pub port: u16,
}

fn bits(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(addr) => addr.to_bits().into(),
        IpAddr::V6(addr) => addr.to_bits(),
    }
}

impl AddrRange {
    /// The address at `index`, starting over behind the last.
    pub fn get(&self, index: u64) -> IpAddr {
        let addr = self.first + u128::from(index) % (self.last - self.first + 1);
        if self.is_v4 { Ipv4Addr::from_bits(addr as u32).into() } else { Ipv6Addr::from_bits(addr).into() }
    }

    /// How many addresses there are, at most 2^64 - 1.
    pub fn len(&self) -> u64 {
        u64::try_from(self.last - self.first).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// True if `addr` is one of them.
    pub fn contains(&self, addr: IpAddr) -> bool {
        addr.is_ipv4() == self.is_v4 && (self.first..=self.last).contains(&bits(addr))
    }
}

impl FromStr for AddrRange {
    type Err = String;

    fn from_str(text: &str) -> Result<AddrRange, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let parse = |part: &str| part.parse::<IpAddr>().map_err(|_| format!("`{part}` is not an IP address"));
        let (first, last) = (parse(first)?, parse(last)?);
        if first.is_ipv4() != last.is_ipv4() || bits(first) > bits(last) {
            return Err(format!("`{text}`: the range must go upwards inside one family"));
        }
        Ok(AddrRange { first: bits(first), last: bits(last), is_v4: first.is_ipv4() })
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let (addrs, port) =
            text.rsplit_once(':').ok_or_else(|| format!("`{text}` has no port; write ADDRESS:PORT"))?;
        let inner = addrs.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let addrs: AddrRange = inner.unwrap_or(addrs).parse()?;
        if !addrs.is_v4 && inner.is_none() {
            return Err(format!("`{text}`: write an IPv6 address as [ADDRESS]:PORT"));
        }
        let port = port.parse().map_err(|_| format!("`{port}` is not a port"))?;
        Ok(Target { addrs, port })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = if self.addrs.len() > 1 {
            format!(" (and {} more)", self.addrs.len() - 1)
        } else {
            String::new()
        };
        match self.addrs.get(0) {
            IpAddr::V4(addr) => write!(f, "{addr}:{}{more}", self.port),
            IpAddr::V6(addr) => write!(f, "[{addr}]:{}{more}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_wrap_and_keep_their_family() {
        let range: AddrRange = "10.0.0.254-10.0.1.1".parse().unwrap();
        assert_eq!(range.len(), 4);
        assert_eq!(range.get(3).to_string(), "10.0.1.1");
        assert_eq!(range.get(4).to_string(), "10.0.0.254");
        assert!(range.contains("10.0.1.0".parse().unwrap()));
        assert!(!range.contains("10.0.1.2".parse().unwrap()));
        assert!(!range.contains("::ffff:10.0.1.0".parse().unwrap()));
    }

    #[test]
    fn targets_are_read_and_mistakes_named() {
        let target: Target = "[fd00::1-fd00::ff]:53".parse().unwrap();
        assert_eq!((target.addrs.len(), target.port), (255, 53));
        assert_eq!(target.to_string(), "[fd00::1]:53 (and 254 more)");
        assert_eq!("10.0.0.1:80".parse::<Target>().unwrap().to_string(), "10.0.0.1:80");
        for wrong in
            ["10.0.0.1", "fd00::1:80", "10.0.0.2-10.0.0.1:80", "10.0.0.1-fd00::1:80", "10.0.0.1:70000"]
        {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
