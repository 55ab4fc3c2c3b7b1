//! Addresses as Kubernetes objects spell them, and which of them may stand where.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Parses an address as kube-proxy does (k8s.io/utils/net `ParseIPSloppy`): leading zeros are decimal, and an
/// IPv4-mapped IPv6 address is the IPv4 address in it.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        // Of a mapped address with leading zeros the last part is sloppy too.
        if let Some((head, tail)) = text.rsplit_once(':')
            && tail.contains('.')
        {
            let tail = parse_v4(tail)?.to_bits();
            let v6: Ipv6Addr = format!("{head}:{:x}:{:x}", tail >> 16, tail & 0xffff).parse().ok()?;
            return Some(v6.to_canonical());
        }
        return text.parse::<Ipv6Addr>().ok().map(|v6| v6.to_canonical());
    }
    parse_v4(text).map(IpAddr::V4)
}

fn parse_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    parts.next().is_none().then(|| octets.into())
}

/// Parses a prefix as kube-proxy does (`ParseCIDRSloppy`): spaces around it, leading zeros and host bits are no errors.
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (address, length) = text.trim().split_once('/')?;
    let length: u8 = length.parse().ok()?;
    let net = match parse_ip(address)? {
        // The prefix of a mapped address counts 128 bits.
        IpAddr::V4(v4) if address.contains(':') => Ipv4Net::new(v4, length.checked_sub(96)?).ok()?.into(),
        IpAddr::V4(v4) => IpNet::from(Ipv4Net::new(v4, length).ok()?),
        IpAddr::V6(v6) => Ipv6Net::new(v6, length).ok()?.into(),
    };
    Some(net.trunc())
}

/// Why an address cannot belong to a pod, a node or a Service; `None` if it can. The API server refuses the same ones
/// (kubernetes pkg/apis/core/validation `ValidateNonSpecialIP`).
pub fn special(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("is unspecified (0.0.0.0/8)"),
        IpAddr::V4(v4) if v4.is_loopback() => Some("is a loopback address (127.0.0.0/8)"),
        IpAddr::V4(v4) if v4.is_link_local() => Some("is a link-local address (169.254.0.0/16)"),
        IpAddr::V4(v4) if v4.is_multicast() => Some("is a multicast address (224.0.0.0/4)"),
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => Some("is reserved (240.0.0.0/4)"),
        IpAddr::V6(v6) if v6.is_unspecified() => Some("is unspecified (::)"),
        IpAddr::V6(v6) if v6.is_loopback() => Some("is the loopback address (::1)"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("is a link-local address (fe80::/10)"),
        IpAddr::V6(v6) if v6.is_multicast() => Some("is a multicast address (ff00::/8)"),
        _ => None,
    }
}

/// The prefix that holds only `ip`.
pub fn host_net(ip: IpAddr) -> IpNet {
    IpNet::from(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rule 11.4.
    #[test]
    fn addresses_are_read_as_kube_proxy_reads_them() {
        for (text, expected) in [
            ("10.96.0.1", Some("10.96.0.1")),
            ("010.096.000.001", Some("10.96.0.1")),
            ("::ffff:10.96.0.1", Some("10.96.0.1")),
            ("::ffff:010.096.0.01", Some("10.96.0.1")),
            ("::ffff:a60:1", Some("10.96.0.1")),
            ("fd00::0001", Some("fd00::1")),
            ("64:ff9b::1.2.3.4", Some("64:ff9b::102:304")),
            ("1.2.3", None),
            ("1.2.3.4.5", None),
            ("1.2.3.256", None),
            ("1.2.3.+4", None),
            ("1..3.4", None),
            ("", None),
            ("fe80::1%eth0", None),
            ("localhost", None),
        ] {
            assert_eq!(parse_ip(text).map(|ip| ip.to_string()).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn prefixes_are_read_as_kube_proxy_reads_them() {
        for (text, expected) in [
            (" 10.0.0.0/8 ", Some("10.0.0.0/8")),
            ("10.1.2.3/8", Some("10.0.0.0/8")),
            ("010.0.0.0/08", Some("10.0.0.0/8")),
            ("::ffff:10.0.0.0/104", Some("10.0.0.0/8")),
            ("fd00::1/64", Some("fd00::/64")),
            ("10.0.0.0", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0/-1", None),
        ] {
            assert_eq!(parse_cidr(text).map(|net| net.to_string()).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn special_addresses() {
        for text in [
            "0.1.2.3",
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(special(text.parse().unwrap()).is_some(), "{text}");
        }
        for text in ["10.0.0.1", "203.0.113.1", "fd00::1", "2001:db8::1"] {
            assert!(special(text.parse().unwrap()).is_none(), "{text}");
        }
    }
}
