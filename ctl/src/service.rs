//! Services: `get services` and `describe service`.

use std::fmt::Write as _;

use config::control::{ActionDescription, EndpointDescription, Item, ServiceDescription, ServiceRow};

use crate::endpoint::EndpointText;
use crate::get::{Row, View};
use crate::print::{self, Cell, NONE, Paint, Table, Tint, age_of};

impl Row for ServiceRow {
    const SINGULAR: &'static str = "service";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Service(row) => Some(row),
            _ => None,
        }
    }

    fn namespace(&self) -> Option<&str> {
        Some(&self.namespace)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "READY"];
        if view.wide {
            header.extend(["FRONTENDS", "SELECTOR"]);
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        // kubectl shows one ClusterIP; the second family is worth its width only in the wide form.
        let shown = if view.wide { self.cluster_ips.len() } else { 1 };
        let cluster_ips: Vec<&str> = self.cluster_ips.iter().take(shown).map(String::as_str).collect();
        let pending = self.type_ == "LoadBalancer" && self.external_ips.is_empty();
        let external =
            if pending { Cell::new(Tint::Warn, "<pending>") } else { self.external_ips.join(",").into() };
        let mut cells = vec![
            self.name.as_str().into(),
            self.type_.as_str().into(),
            cluster_ips.join(",").into(),
            external,
            self.ports.join(",").into(),
            age_of(self.created.as_deref(), view.now_s).into(),
            ready(self.endpoints_ready, self.endpoints),
        ];
        if view.wide {
            let frontends = match self.frontends_off {
                0 => self.frontends.to_string().into(),
                off => Cell::new(Tint::Warn, format!("{} ({off} off)", self.frontends)),
            };
            cells.extend([frontends, self.selector.as_str().into()]);
        }
        cells
    }
}

/// `ready/all` endpoints.
fn ready(ready: u32, all: u32) -> Cell {
    let tint = match (ready, all) {
        (0, _) => Tint::Bad,
        (r, a) if r < a => Tint::Warn,
        _ => Tint::Good,
    };
    Cell::new(tint, format!("{ready}/{all}"))
}

/// `describe service`: what is served, by what rule, and what each endpoint is used for.
pub fn describe(description: &ServiceDescription, paint: Paint) -> String {
    let row = &description.service;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let value = if value.is_empty() { NONE } else { value };
        let _ = writeln!(text, "{:<26}{value}", format!("{name}:"));
    };
    line("Name", &row.name);
    line("Namespace", &row.namespace);
    line("Selector", &row.selector);
    line("Type", &row.type_);
    line("IPs", &row.cluster_ips.join(","));
    line("External IPs", &row.external_ips.join(","));
    line("Ports", &row.ports.join(","));
    line("Session Affinity", &description.session_affinity);
    line("Algorithm", &description.lb_algorithm);
    line("On Endpoint Removed", &description.on_endpoint_removed);
    line("Internal Traffic Policy", &description.internal_traffic_policy);
    line("External Traffic Policy", &description.external_traffic_policy);
    if !description.traffic_distribution.is_empty() {
        line("Traffic Distribution", &description.traffic_distribution);
    }
    line("Resource Version", &description.resource_version);
    line("Endpoints", &format!("{} ready of {}", row.endpoints_ready, row.endpoints));
    if let Some(why) = &description.skipped {
        let _ = writeln!(text, "\n{} {why}", paint.paint(Tint::Warn, "Not served:"));
    }
    if !description.frontends.is_empty() {
        let _ = writeln!(text, "\n{}", paint.paint(Tint::Bold, "Frontends:"));
        text.push_str(&frontends(description, paint));
    }
    if !description.endpoints.is_empty() {
        let _ = writeln!(text, "\n{}", paint.paint(Tint::Bold, "Endpoints:"));
        text.push_str(&endpoints(description, paint));
    }
    for warning in &description.warnings {
        let _ = writeln!(text, "\n{}", print::fault(paint, Tint::Warn, "Warning:", warning));
    }
    text
}

/// Frontends, a row for each different answer: most have one for all clients.
fn frontends(description: &ServiceDescription, paint: Paint) -> String {
    let mut table = Table::new(["ADDRESS", "PORT", "KIND", "CLIENTS", "ACTION", "RULE"]);
    for frontend in &description.frontends {
        let answers = [
            ("outside", &frontend.from_outside),
            ("pods", &frontend.from_pod),
            ("nodes", &frontend.from_node),
        ];
        let mut groups: Vec<(Vec<&str>, &ActionDescription)> = Vec::new();
        for (client, action) in answers {
            match groups.iter_mut().find(|(_, known)| *known == action) {
                Some((clients, _)) => clients.push(client),
                None => groups.push((vec![client], action)),
            }
        }
        for (i, (clients, action)) in groups.iter().enumerate() {
            let first = |text: String| if i == 0 { text } else { " ".to_owned() };
            let clients = if clients.len() == 3 { "all".to_owned() } else { clients.join(",") };
            table.row([
                first(frontend.address.clone()).into(),
                first(port(frontend.port, &frontend.protocol, &frontend.port_name)).into(),
                first(frontend.kind.clone()).into(),
                clients.into(),
                action_cell(action),
                action.rule.as_str().into(),
            ]);
        }
    }
    let mut text = table.take(paint, 2);
    let ranges: Vec<&str> =
        description.frontends.iter().flat_map(|f| &f.source_ranges).map(String::as_str).collect();
    if !ranges.is_empty() {
        let mut ranges = ranges;
        ranges.sort_unstable();
        ranges.dedup();
        let _ = writeln!(text, "  LoadBalancer addresses only for clients of {}", ranges.join(", "));
    }
    text
}

/// `8080/TCP http`.
fn port(port: u16, protocol: &str, name: &str) -> String {
    if name.is_empty() { format!("{port}/{protocol}") } else { format!("{port}/{protocol} {name}") }
}

/// `dnat to 2 (cluster), masquerade`.
pub fn action_cell(action: &ActionDescription) -> Cell {
    match (action.action.as_str(), &action.reason) {
        ("dnat", _) => {
            let list = action.list.as_deref().unwrap_or("cluster");
            let masquerade = if action.masquerade { ", masquerade" } else { "" };
            Cell::new(Tint::Good, format!("dnat to {} ({list}){masquerade}", action.endpoints))
        }
        (other, Some(reason)) => Cell::new(Tint::Bad, format!("{other} ({reason})")),
        (other, None) => Cell::new(Tint::Bad, other),
    }
}

/// Endpoints and what each is used for.
fn endpoints(description: &ServiceDescription, paint: Paint) -> String {
    let counted = description.endpoints.iter().any(|described| described.connections.is_some());
    let mut header = vec!["ENDPOINT", "PORT", "STATE", "NODE", "ZONE", "TARGET", "WEIGHT", "SHARE"];
    header.extend(counted.then_some("CONNECTIONS"));
    header.push("USED");
    let mut table = Table::new(header);
    for described in &description.endpoints {
        let row = &described.endpoint;
        let mut cells = vec![
            row.socket().into(),
            row.port_name.as_str().into(),
            row.state(),
            row.node.as_str().into(),
            row.zone.as_str().into(),
            row.target.as_str().into(),
            described.weight.to_string().into(),
            shares(described).into(),
        ];
        if counted {
            cells.push(described.connections.map(|count| count.to_string()).unwrap_or_default().into());
        }
        cells.push(used(described));
        table.row(cells);
    }
    table.take(paint, 2)
}

/// `33.3 %`, or one for each list if they differ.
fn shares(described: &EndpointDescription) -> String {
    let mut shares: Vec<String> =
        described.shares_bp.iter().map(|share| format!("{:.1} %", f64::from(*share) / 100.0)).collect();
    shares.dedup();
    shares.join(",")
}

fn used(described: &EndpointDescription) -> Cell {
    match &described.unused {
        Some(why) => Cell::new(Tint::Dim, format!("no: {why}")),
        None => Cell::new(Tint::Good, described.lists.join(",")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;
    use config::control::{EndpointRow, FrontendDescription};
    use config::fault::{Code, Fault};

    fn row() -> ServiceRow {
        ServiceRow {
            namespace: "default".into(),
            name: "my-nginx".into(),
            type_: "LoadBalancer".into(),
            cluster_ips: vec!["10.96.142.17".into(), "fd00:96::8e11".into()],
            external_ips: vec!["203.0.113.10".into(), "2001:db8:cafe::10".into()],
            ports: vec!["8080:31704/TCP".into(), "443:32453/TCP".into()],
            created: Some("2026-11-02T08:15:40Z".into()),
            selector: "run=my-nginx".into(),
            frontends: 12,
            frontends_off: 2,
            endpoints_ready: 2,
            endpoints: 4,
        }
    }

    #[test]
    fn rows_have_kubectl_s_columns() {
        let headless = ServiceRow {
            name: "db".into(),
            type_: "ClusterIP".into(),
            cluster_ips: vec!["None".into()],
            ports: vec!["5432/TCP".into()],
            ..Default::default()
        };
        let pending = ServiceRow { name: "new".into(), type_: "LoadBalancer".into(), ..Default::default() };
        insta::assert_snapshot!(print_rows(&[row(), headless, pending], View::NARROW), @"
        NAME       TYPE           CLUSTER-IP     EXTERNAL-IP                      PORT(S)                        AGE         READY
        my-nginx   LoadBalancer   10.96.142.17   203.0.113.10,2001:db8:cafe::10   8080:31704/TCP,443:32453/TCP   19d         2/4
        db         ClusterIP      None           <none>                           5432/TCP                       <unknown>   0/0
        new        LoadBalancer   <none>         <pending>                        <none>                         <unknown>   0/0
        ");
        insta::assert_snapshot!(print_rows(&[row()], View::WIDE), @"
        NAMESPACE   NAME       TYPE           CLUSTER-IP                   EXTERNAL-IP                      PORT(S)                        AGE   READY   FRONTENDS    SELECTOR
        default     my-nginx   LoadBalancer   10.96.142.17,fd00:96::8e11   203.0.113.10,2001:db8:cafe::10   8080:31704/TCP,443:32453/TCP   19d   2/4     12 (2 off)   run=my-nginx
        ");
    }

    #[test]
    fn a_description_gives_rules_and_uses() {
        let dnat = |masquerade, rule: &str| ActionDescription {
            action: "dnat".into(),
            list: Some("cluster".into()),
            endpoints: 2,
            masquerade,
            reason: None,
            rule: rule.into(),
        };
        let endpoint = |address: &str, ready| EndpointRow {
            address: address.into(),
            port: 80,
            port_name: "http".into(),
            ready,
            serving: ready,
            node: "node-1".into(),
            target: "Pod/a".into(),
            ..Default::default()
        };
        let description = ServiceDescription {
            service: row(),
            resource_version: "4711".into(),
            internal_traffic_policy: "Cluster".into(),
            external_traffic_policy: "Cluster".into(),
            session_affinity: "None".into(),
            lb_algorithm: "maglev".into(),
            on_endpoint_removed: "leave".into(),
            frontends: vec![FrontendDescription {
                address: "203.0.113.10".into(),
                port: 8080,
                protocol: "TCP".into(),
                port_name: "http".into(),
                kind: "LoadBalancer".into(),
                source_ranges: vec!["198.51.100.0/24".into()],
                from_outside: dnat(true, "externalTrafficPolicy: Cluster"),
                from_pod: dnat(false, "pods keep their address"),
                from_node: dnat(false, "pods keep their address"),
            }],
            endpoints: vec![
                EndpointDescription {
                    endpoint: endpoint("10.244.1.7", true),
                    lists: vec!["cluster".into()],
                    shares_bp: vec![7_500],
                    weight: 3,
                    connections: Some(17),
                    unused: None,
                },
                EndpointDescription {
                    endpoint: endpoint("10.244.2.9", false),
                    weight: 1,
                    connections: Some(2),
                    unused: Some("not ready".into()),
                    ..Default::default()
                },
            ],
            warnings: vec![Fault::new(Code::Ignored, "has no effect").field("spec.x").value("1")],
            ..Default::default()
        };
        insta::assert_snapshot!(describe(&description, Paint::PLAIN), @"
        Name:                     my-nginx
        Namespace:                default
        Selector:                 run=my-nginx
        Type:                     LoadBalancer
        IPs:                      10.96.142.17,fd00:96::8e11
        External IPs:             203.0.113.10,2001:db8:cafe::10
        Ports:                    8080:31704/TCP,443:32453/TCP
        Session Affinity:         None
        Algorithm:                maglev
        On Endpoint Removed:      leave
        Internal Traffic Policy:  Cluster
        External Traffic Policy:  Cluster
        Resource Version:         4711
        Endpoints:                2 ready of 4

        Frontends:
          ADDRESS        PORT            KIND           CLIENTS      ACTION                            RULE
          203.0.113.10   8080/TCP http   LoadBalancer   outside      dnat to 2 (cluster), masquerade   externalTrafficPolicy: Cluster
                                                        pods,nodes   dnat to 2 (cluster)               pods keep their address
          LoadBalancer addresses only for clients of 198.51.100.0/24

        Endpoints:
          ENDPOINT        PORT   STATE       NODE     ZONE     TARGET   WEIGHT   SHARE    CONNECTIONS   USED
          10.244.1.7:80   http   ready       node-1   <none>   Pod/a    3        75.0 %   17            cluster
          10.244.2.9:80   http   not ready   node-1   <none>   Pod/a    1        <none>   2             no: not ready

        Warning: spec.x: has no effect
          value: 1
        ");
    }
}
