//! Interfaces, possibly in other network namespaces, and the sockets on them.

use std::fs::{self, File};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::str::FromStr;

use af_xdp::redirect::{UdpForward, UdpRedirect};
use af_xdp::{FramePool, Socket, SocketConfig, Umem};
use anyhow::{Context, bail};
use rustix::net::netdevice::name_to_index;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `[NAMESPACE/]INTERFACE`, as arguments name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    namespace: Option<String>,
    /// The interface.
    pub interface: String,
}

/// A queue of an interface, and the frames for it.
pub struct Port {
    /// Receives and sends.
    pub socket: Socket,
    /// The frames that are not on a ring.
    pub pool: FramePool,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let (namespace, interface) = match text.rsplit_once('/') {
            Some((namespace, interface)) => (Some(namespace.to_owned()), interface),
            None => (None, text),
        };
        if interface.is_empty() {
            return Err("write INTERFACE, or NAMESPACE/INTERFACE".into());
        }
        Ok(Place { namespace, interface: interface.to_owned() })
    }
}

impl Place {
    /// Moves this thread into the namespace, if one is named.
    pub fn enter(&self) -> anyhow::Result<()> {
        let Some(namespace) = &self.namespace else { return Ok(()) };
        let path = format!("/run/netns/{namespace}");
        let file = File::open(&path).with_context(|| format!("network namespace {namespace} ({path})"))?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("enter network namespace {namespace}"))
    }

    /// Index of the interface, seen from this thread's namespace.
    fn index(&self) -> anyhow::Result<u32> {
        let any = UdpSocket::bind("0.0.0.0:0").or_else(|_| UdpSocket::bind("[::]:0"))?;
        name_to_index(&any, &self.interface).with_context(|| format!("interface {}", self.interface))
    }

    /// Link-layer address of the interface, seen from this thread's namespace.
    pub fn mac(&self) -> anyhow::Result<[u8; 6]> {
        // /sys shows the namespace that it was mounted in, netlink's text form the right one.
        let output =
            std::process::Command::new("ip").args(["-o", "link", "show", "dev", &self.interface]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mac = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        parse_mac(mac.with_context(|| format!("interface {} has no Ethernet address", self.interface))?)
    }

    /// Opens the first `queues` queues, each with a UMEM of its own.
    pub fn open(&self, queues: u32) -> anyhow::Result<Vec<Port>> {
        (0..queues).map(|queue| self.open_queue(queue)).collect()
    }

    fn open_queue(&self, queue: u32) -> anyhow::Result<Port> {
        let config = SocketConfig {
            tx_len: 4096,
            completion_len: 4096,
            multi_frame: false,
            ..SocketConfig::default()
        };
        let mut pool = Umem::anonymous(config.chunks(), 2048).take_frames().expect("just made");
        let socket = Socket::open(&self.interface, queue, 0, &mut pool, &config)?;
        Ok(Port { socket, pool })
    }

    /// From here on UDP packets of the interface go to the sockets, one for each queue.
    pub fn redirect<'a>(&self, sockets: impl IntoIterator<Item = &'a Socket>) -> anyhow::Result<UdpRedirect> {
        let program = UdpRedirect::attach(self.index()?)
            .with_context(|| format!("attach an XDP program to {} (another one there?)", self.interface))?;
        for (queue, socket) in (0..).zip(sockets) {
            program.set_socket(queue, socket)?;
        }
        Ok(program)
    }

    /// From here on UDP packets of the interface leave by `other`, which is in the same namespace.
    pub fn forward(&self, other: &Place) -> anyhow::Result<UdpForward> {
        UdpForward::attach(self.index()?, other.index()?)
            .with_context(|| format!("attach an XDP program to {} (another one there?)", self.interface))
    }
}

/// Six bytes in hexadecimal.
pub fn parse_mac(text: &str) -> anyhow::Result<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map_while(|part| u8::from_str_radix(part, 16).ok()).collect();
    match bytes.try_into() {
        Ok(mac) if text.split(':').count() == 6 => Ok(mac),
        _ => bail!("`{text}` is not an Ethernet address"),
    }
}

/// The CPU's name, for reports.
pub fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": "))
        .map_or_else(|| "unknown CPU".into(), |(_, name)| name.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_addresses_are_read() {
        let place: Place = "perf-cli/v0".parse().unwrap();
        assert_eq!((place.namespace.as_deref(), place.interface.as_str()), (Some("perf-cli"), "v0"));
        assert_eq!("eth0".parse::<Place>().unwrap().namespace, None);
        assert!("ns/".parse::<Place>().is_err());
        assert_eq!(parse_mac("02:00:00:00:00:fF").unwrap(), [2, 0, 0, 0, 0, 255]);
        assert!(parse_mac("02:00:00:00:00").is_err() && parse_mac("02:00:00:00:00:0g").is_err());
    }
}
