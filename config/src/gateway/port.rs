//! `[[port]]` and `[[attach]]`: the interfaces that packets are taken from and put on.

use serde::{Deserialize, Serialize};

/// `[[port]]`: an interface that packets are taken from and put on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSection {
    /// Name of the port in output and in `from`.
    pub name: String,
    /// Name of the network interface.
    pub interface: String,
    /// Who is behind it.
    pub role: Role,
    /// Serve ClusterIPs to clients outside the cluster that come in here.
    #[serde(default)]
    pub expose_cluster_ips: bool,
    /// How packets are exchanged with the driver.
    #[serde(default)]
    pub mode: Mode,
}

/// `[[attach]]`: interfaces that are ports while they exist, named as their interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachSection {
    /// Names of interfaces; `*` stands for any characters.
    pub pattern: String,
    /// Who is behind them.
    #[serde(default = "AttachSection::role")]
    pub role: Role,
    /// How packets are exchanged with the driver.
    #[serde(default)]
    pub mode: Mode,
}

impl AttachSection {
    const fn role() -> Role {
        Role::Pod
    }

    /// True if an interface of this name becomes a port.
    pub fn matches(&self, interface: &str) -> bool {
        let (mut parts, mut rest) = (self.pattern.split('*'), interface);
        // What stands in front of the first star, then each part where it is found first, the last one at the end.
        match parts.next().and_then(|first| rest.strip_prefix(first)) {
            Some(behind) => rest = behind,
            None => return false,
        }
        let mut parts: Vec<&str> = parts.collect();
        let Some(last) = parts.pop() else { return rest.is_empty() };
        for part in parts {
            match rest.split_once(part) {
                Some((_, behind)) => rest = behind,
                None => return false,
            }
        }
        rest.ends_with(last)
    }

    /// The port that an interface becomes.
    pub fn port(&self, interface: &str) -> PortSection {
        PortSection {
            name: interface.to_owned(),
            interface: interface.to_owned(),
            role: self.role,
            expose_cluster_ips: false,
            mode: self.mode,
        }
    }
}

/// Who is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Clients.
    Outside,
    /// Nodes and pods.
    Inside,
    /// Both: a one-armed gateway.
    Both,
    /// One pod, at the other end of a veth pair. It may send from the addresses that are routed to it, and from no others.
    Pod,
}

impl Role {
    /// Its word in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Outside => "outside",
            Role::Inside => "inside",
            Role::Both => "both",
            Role::Pod => "pod",
        }
    }

    /// True if clients are behind the port.
    pub const fn is_outside(self) -> bool {
        matches!(self, Role::Outside | Role::Both)
    }

    /// True if nodes and pods are behind the port.
    pub const fn is_inside(self) -> bool {
        matches!(self, Role::Inside | Role::Both | Role::Pod)
    }
}

/// How packets are exchanged with the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The best that the driver has.
    #[default]
    Auto,
    /// Zero copy, or refuse to start.
    ZeroCopy,
    /// XDP in the driver, packets copied, or refuse to start.
    Copy,
    /// XDP in the network stack, for drivers without XDP.
    Generic,
}

impl Mode {
    /// Its word in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::ZeroCopy => "zero-copy",
            Mode::Copy => "copy",
            Mode::Generic => "generic",
        }
    }
}
