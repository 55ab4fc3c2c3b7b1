//! Where somebody is: a namespace and the addresses that its programs speak from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use tests::namespace::Namespace;

/// A namespace with one address of each family. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Place {
    /// For messages: `client`, `node-1`, the name of a pod.
    pub name: String,
    /// Where its sockets are.
    pub namespace: Arc<Namespace>,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Place {
    /// The address of the family that `peer` is of.
    pub fn address_towards(&self, peer: IpAddr) -> IpAddr {
        if peer.is_ipv4() { self.v4.into() } else { self.v6.into() }
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The same place under another address of each family, if it has several.
    pub fn with_addresses(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> Place {
        Place { v4, v6, ..self.clone() }
    }
}
