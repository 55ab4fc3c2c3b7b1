//! What a Service says.

use config::fault::{Code, Fault};
use config::gateway::{Algorithm, OnEndpointRemoved};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServiceSpec};

use super::annotation::Annotations;
use super::{protocol_name, read_addr, read_port, read_protocol, read_word};
use crate::addr::Addr;
use crate::control::address::parse_cidr;

/// What Towpath reads from a Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceFacts {
    /// `spec.type`.
    pub type_: ServiceType,
    /// Why it is not served, if it is not (kubernetes pkg/proxy/util `ShouldSkipService`, KEP-2447).
    pub skip: Option<Skip>,
    /// Every address it is served on, NodePorts excepted.
    pub addresses: Vec<ServiceAddress>,
    /// `spec.ports`.
    pub ports: Vec<PortFacts>,
    /// `spec.internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `spec.externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `spec.healthCheckNodePort`, where it counts: type LoadBalancer, externalTrafficPolicy Local.
    pub health_check_node_port: Option<u16>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Vec<IpNet>,
    /// Seconds of `sessionAffinity: ClientIP`.
    pub affinity_timeout_s: Option<u32>,
    /// `spec.trafficDistribution`; decided by hints, kept for display.
    pub distribution: Distribution,
    /// Annotation `towpath.dev/lb-algorithm`.
    pub algorithm: Option<Algorithm>,
    /// Annotation `towpath.dev/on-endpoint-removed`.
    pub on_endpoint_removed: Option<OnEndpointRemoved>,
    /// Annotation `towpath.dev/drain-seconds`.
    pub drain_s: Option<u32>,
}

/// `spec.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceType {
    /// Inside the cluster only.
    #[default]
    ClusterIp,
    /// On a port of every node too.
    NodePort,
    /// On addresses of a load balancer too.
    LoadBalancer,
    /// A name for another name.
    ExternalName,
}

impl ServiceType {
    /// Its word in the API.
    pub const fn name(self) -> &'static str {
        match self {
            ServiceType::ClusterIp => "ClusterIP",
            ServiceType::NodePort => "NodePort",
            ServiceType::LoadBalancer => "LoadBalancer",
            ServiceType::ExternalName => "ExternalName",
        }
    }
}

/// `spec.trafficDistribution`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Distribution {
    /// Absent.
    #[default]
    Everywhere,
    /// `PreferSameZone`, or its old name `PreferClose`.
    PreferSameZone,
    /// `PreferSameNode`.
    PreferSameNode,
}

/// Why a Service is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// `clusterIP: None`.
    Headless,
    /// `clusterIP` is empty: the API server has not given one yet.
    NoClusterIp,
    /// `type: ExternalName`.
    ExternalName,
    /// Label `service.kubernetes.io/service-proxy-name`.
    OtherProxy,
    /// Label `service.kubernetes.io/headless`.
    HeadlessLabel,
}

impl Skip {
    /// In a sentence.
    pub const fn reason(self) -> &'static str {
        match self {
            Skip::Headless => "clusterIP is None: a headless Service has names only, no address",
            Skip::NoClusterIp => "clusterIP is empty: the API server has not given an address yet",
            Skip::ExternalName => "type ExternalName: a name for another name, nothing to forward",
            Skip::OtherProxy => "label service.kubernetes.io/service-proxy-name: another proxy serves it",
            Skip::HeadlessLabel => "label service.kubernetes.io/headless: served by no proxy",
        }
    }
}

/// One address that a Service is served on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAddress {
    /// The address.
    pub addr: Addr,
    /// Where it comes from.
    pub kind: AddressKind,
    /// Path of the field.
    pub field: String,
}

/// Where an address of a Service comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressKind {
    /// `spec.clusterIPs`.
    Cluster,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// `spec.externalIPs`.
    External,
}

/// One of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortFacts {
    /// Its name, may be empty.
    pub name: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Its port.
    pub port: u16,
    /// Its NodePort, if it has one that is served.
    pub node_port: Option<u16>,
}

impl ServiceFacts {
    pub(super) fn read(
        service: &Service,
        faults: &mut Vec<Fault>,
        warnings: &mut Vec<Fault>,
    ) -> ServiceFacts {
        let Some(spec) = &service.spec else {
            let remedy = "a Service needs at least clusterIP and ports";
            faults.push(Fault::new(Code::Missing, "missing").field("spec").remedy(remedy));
            return ServiceFacts::default();
        };
        let types = [
            ("ClusterIP", ServiceType::ClusterIp),
            ("NodePort", ServiceType::NodePort),
            ("LoadBalancer", ServiceType::LoadBalancer),
            ("ExternalName", ServiceType::ExternalName),
        ];
        let type_ = read_word("spec.type", spec.type_.as_deref(), &types, faults).unwrap_or_default();
        let policies = [("Cluster", false), ("Local", true)];
        let mut local = |field, value: &Option<String>| {
            read_word(field, value.as_deref(), &policies, faults).unwrap_or_default()
        };
        let internal_local = local("spec.internalTrafficPolicy", &spec.internal_traffic_policy);
        let external_local = local("spec.externalTrafficPolicy", &spec.external_traffic_policy);
        let mut annotations = Annotations::of(&service.metadata, warnings);
        let algorithm = annotations.word("lb-algorithm", &Algorithm::WORDS);
        let on_endpoint_removed = annotations.word("on-endpoint-removed", &OnEndpointRemoved::WORDS);
        let drain_s = annotations.number("drain-seconds", 0..=86_400);
        if drain_s.is_some() && on_endpoint_removed == Some(OnEndpointRemoved::Leave) {
            annotations.has_no_effect(
                "drain-seconds",
                "towpath.dev/on-endpoint-removed is leave",
                "remove one of them",
            );
        }
        annotations.finish("Service");
        let cluster_ips = cluster_ips(spec);
        let skip = skip(service, type_, &cluster_ips);
        let mut facts = ServiceFacts {
            type_,
            skip,
            internal_local,
            external_local,
            affinity_timeout_s: affinity(spec, faults),
            distribution: distribution(spec, warnings),
            health_check_node_port: health_check_node_port(spec, type_, external_local, faults),
            ports: ports(spec, type_, skip, faults),
            algorithm,
            on_endpoint_removed,
            drain_s,
            ..ServiceFacts::default()
        };
        if !matches!(skip, Some(Skip::Headless | Skip::ExternalName)) {
            for (field, text) in cluster_ips {
                facts.add_address(field, &text, AddressKind::Cluster, faults);
            }
        }
        if facts.addresses.len() > 2
            || facts.addresses.len() == 2
                && facts.addresses[0].addr.is_v4() == facts.addresses[1].addr.is_v4()
        {
            let fault =
                Fault::new(Code::Invalid, "more than one address of a family").field("spec.clusterIPs");
            faults.push(fault.remedy("give one IPv4 address, one IPv6 address, or one of each"));
        }
        for (index, text) in spec.external_ips.iter().flatten().enumerate() {
            facts.add_address(format!("spec.externalIPs[{index}]"), text, AddressKind::External, faults);
        }
        facts.load_balancer(service, faults, warnings);
        for (index, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
            match parse_cidr(text) {
                Some(net) => facts.source_ranges.push(net),
                None => {
                    let field = format!("spec.loadBalancerSourceRanges[{index}]");
                    let fault = Fault::new(Code::Invalid, "not a prefix").field(field).value(text);
                    faults.push(fault.remedy("write it as 198.51.100.0/24 or 2001:db8::/64"));
                }
            }
        }
        facts
    }

    fn add_address(&mut self, field: String, text: &str, kind: AddressKind, faults: &mut Vec<Fault>) {
        if let Some(addr) = read_addr(&field, text, faults) {
            self.addresses.push(ServiceAddress { addr, kind, field });
        }
    }

    /// `status.loadBalancer.ingress`: `.ip` only, and not those of `ipMode: Proxy` (KEP-1860).
    fn load_balancer(&mut self, service: &Service, faults: &mut Vec<Fault>, warnings: &mut Vec<Fault>) {
        let ingress =
            service.status.as_ref().and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
        for (index, ingress) in ingress.into_iter().flatten().enumerate() {
            let field = format!("status.loadBalancer.ingress[{index}].ip");
            let Some(ip) = &ingress.ip else { continue };
            if self.type_ != ServiceType::LoadBalancer {
                // The API server clears the status when the type changes.
                let fault =
                    Fault::new(Code::Ignored, "ignored: the type is not LoadBalancer").field(field).value(ip);
                warnings.push(fault.remedy("set spec.type: LoadBalancer or remove the address"));
                continue;
            }
            match ingress.ip_mode.as_deref() {
                None | Some("VIP") => self.add_address(field, ip, AddressKind::LoadBalancer, faults),
                Some("Proxy") => {}
                Some(other) => {
                    let field = format!("status.loadBalancer.ingress[{index}].ipMode");
                    let fault = Fault::new(Code::Invalid, "not an ipMode").field(field).value(other);
                    faults.push(fault.remedy("use VIP or Proxy"));
                }
            }
        }
    }

    /// True if clients outside the cluster can reach it (kubernetes pkg/proxy/serviceport.go `ExternallyAccessible`).
    pub fn is_external(&self) -> bool {
        self.ports.iter().any(|port| port.node_port.is_some())
            || self.addresses.iter().any(|address| address.kind != AddressKind::Cluster)
    }

    /// True if a list of endpoints anywhere is needed (`UsesClusterEndpoints`): the internal policy is Cluster, or it is
    /// reachable from outside at all, since pods and nodes are short-circuited to that list.
    pub fn uses_cluster_endpoints(&self) -> bool {
        !self.internal_local || self.is_external()
    }

    /// True if a list of local endpoints is needed (`UsesLocalEndpoints`).
    pub fn uses_local_endpoints(&self) -> bool {
        self.internal_local || self.external_local && self.is_external()
    }
}

/// `spec.clusterIPs`, or `spec.clusterIP` alone in manifests that the API server has not completed.
fn cluster_ips(spec: &ServiceSpec) -> Vec<(String, String)> {
    let listed = spec.cluster_ips.iter().flatten().filter(|text| !text.is_empty()).enumerate();
    let listed: Vec<_> =
        listed.map(|(index, text)| (format!("spec.clusterIPs[{index}]"), text.clone())).collect();
    match &spec.cluster_ip {
        Some(text) if listed.is_empty() && !text.is_empty() => vec![("spec.clusterIP".into(), text.clone())],
        _ => listed,
    }
}

fn skip(service: &Service, type_: ServiceType, cluster_ips: &[(String, String)]) -> Option<Skip> {
    let has_label =
        |label: &str| service.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label));
    if type_ == ServiceType::ExternalName {
        Some(Skip::ExternalName)
    } else if has_label("service.kubernetes.io/service-proxy-name") {
        Some(Skip::OtherProxy)
    } else if has_label("service.kubernetes.io/headless") {
        Some(Skip::HeadlessLabel)
    } else {
        match cluster_ips.first() {
            None => Some(Skip::NoClusterIp),
            Some((_, text)) if text == "None" => Some(Skip::Headless),
            Some(_) => None,
        }
    }
}

fn ports(
    spec: &ServiceSpec,
    type_: ServiceType,
    skip: Option<Skip>,
    faults: &mut Vec<Fault>,
) -> Vec<PortFacts> {
    let listed = spec.ports.as_deref().unwrap_or_default();
    if listed.is_empty() && !matches!(skip, Some(Skip::Headless | Skip::ExternalName)) {
        let remedy = "list at least one port; a Service without ports must be headless (clusterIP: None)";
        faults.push(Fault::new(Code::Missing, "a Service needs ports").field("spec.ports").remedy(remedy));
    }
    let mut ports: Vec<PortFacts> = Vec::with_capacity(listed.len());
    for (index, given) in listed.iter().enumerate() {
        let path = |name: &str| format!("spec.ports[{index}].{name}");
        let name = given.name.clone().unwrap_or_default();
        let protocol = read_protocol(&path("protocol"), given.protocol.as_deref(), faults);
        let port = read_port(&path("port"), given.port, faults);
        let has_node_ports = matches!(type_, ServiceType::NodePort | ServiceType::LoadBalancer);
        let node_port = match given.node_port {
            None | Some(0) => None,
            Some(node_port) => read_port(&path("nodePort"), node_port, faults).filter(|_| has_node_ports),
        };
        if listed.len() > 1 && name.is_empty() {
            let fault = Fault::new(Code::Missing, "missing, and there are several ports").field(path("name"));
            faults.push(fault.remedy("name each port: slices refer to ports by name"));
        }
        let (Some(protocol), Some(port)) = (protocol, port) else { continue };
        for earlier in &ports {
            if earlier.name == name && !name.is_empty() {
                let fault =
                    Fault::new(Code::Conflict, "two ports have this name").field(path("name")).value(&name);
                faults.push(fault.remedy("rename one of them"));
            }
            let same = |field: &str, value: u16| {
                let value = format!("{value}/{}", protocol_name(protocol));
                let fault = Fault::new(Code::Conflict, "stands there twice").field(path(field)).value(value);
                fault.remedy("one port can lead to one place only: remove one of them")
            };
            if earlier.protocol == protocol && earlier.port == port {
                faults.push(same("port", port));
            }
            if let Some(node_port) =
                node_port.filter(|_| earlier.protocol == protocol && earlier.node_port == node_port)
            {
                faults.push(same("nodePort", node_port));
            }
        }
        ports.push(PortFacts { name, protocol, port, node_port });
    }
    ports
}

/// As kubernetes pkg/api/v1/service `NeedsHealthCheck`: other Services have no such port, or one left from before.
fn health_check_node_port(
    spec: &ServiceSpec,
    type_: ServiceType,
    external_local: bool,
    faults: &mut Vec<Fault>,
) -> Option<u16> {
    let given = spec.health_check_node_port.filter(|port| *port != 0)?;
    let port = read_port("spec.healthCheckNodePort", given, faults)?;
    (type_ == ServiceType::LoadBalancer && external_local).then_some(port)
}

/// Seconds of `sessionAffinity: ClientIP`: 10800 unless said otherwise.
fn affinity(spec: &ServiceSpec, faults: &mut Vec<Fault>) -> Option<u32> {
    let kinds = [("None", false), ("ClientIP", true)];
    if read_word("spec.sessionAffinity", spec.session_affinity.as_deref(), &kinds, faults) != Some(true) {
        return None;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|config| config.timeout_seconds).unwrap_or(10_800);
    if !(1..=86_400).contains(&seconds) {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        let fault = Fault::new(Code::Invalid, "out of range").field(field).value(seconds);
        faults.push(fault.remedy("use 1 to 86400 seconds"));
        return None;
    }
    Some(seconds as u32)
}

fn distribution(spec: &ServiceSpec, warnings: &mut Vec<Fault>) -> Distribution {
    match spec.traffic_distribution.as_deref() {
        None | Some("") => Distribution::Everywhere,
        Some("PreferClose" | "PreferSameZone") => Distribution::PreferSameZone,
        Some("PreferSameNode") => Distribution::PreferSameNode,
        Some(other) => {
            let fault = Fault::new(Code::Ignored, "not known: ignored")
                .field("spec.trafficDistribution")
                .value(other);
            warnings.push(fault.remedy("use PreferSameZone or PreferSameNode"));
            Distribution::Everywhere
        }
    }
}
