//! `towpathctl trace`: what would happen to a packet on the running daemon. The printer serves `explain` too.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use config::control::{
    ActionDescription, EndpointDescription, FrontendDescription, Reply, Request, ServiceDescription, Trace,
};
use config::packet::PacketSpec;
use forwarder::trace::clause;

use crate::connection::unexpected;
use crate::endpoint::EndpointText;
use crate::print::{self, Cell, Output, Paint, Table, Tint, out, out_value};
use crate::{Ending, Global, Usage};

/// Arguments of `trace`.
#[derive(clap::Args)]
pub struct Args {
    /// The packet, such as 'tcp 198.51.100.7:4242 > 203.0.113.10:80 from outside'
    #[arg(value_name = "PACKET", required = true)]
    packet: Vec<String>,
    /// How to print
    #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
    output: Output,
}

/// Runs `trace`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let packets = packets(&args.packet)?;
    let connection = &mut global.connect()?;
    let mut traces = Vec::new();
    for packet in packets {
        match connection.ask(&Request::Trace { packet })? {
            Reply::Trace(trace) => traces.push(*trace),
            other => return Err(unexpected(&other)),
        }
    }
    show(&traces, args.output, global.paint())?;
    Ok(Ending::Done)
}

/// Packets from arguments: one each, or one whose words were not quoted together.
///
/// # Errors
/// The word at fault, and how packets are written.
pub fn packets(args: &[String]) -> Result<Vec<PacketSpec>> {
    if args.iter().any(|arg| arg.contains(char::is_whitespace)) {
        return args.iter().map(|arg| packet(arg)).collect();
    }
    let joined = args.join(" ");
    if !joined.contains('>') {
        // `tcp A > B` without quotes: the shell took `> B` as the name of a file.
        bail!(Usage(format!(
            "{joined:?} has no destination: quote the packet, such as 'tcp 198.51.100.7:4242 > 203.0.113.10:80'"
        )));
    }
    Ok(vec![packet(&joined)?])
}

fn packet(text: &str) -> Result<PacketSpec> {
    text.parse().context(Usage(String::new()))
}

/// Prints traces: as text one after the other, as JSON or YAML one value, or a list of several.
pub fn show(traces: &[Trace], output: Output, paint: Paint) -> Result<()> {
    match (output, traces) {
        (Output::Json | Output::Yaml, [one]) => out_value(output, one),
        (Output::Json | Output::Yaml, _) => out_value(output, &traces),
        _ => {
            let texts: Vec<String> = traces.iter().map(|trace| text(trace, paint)).collect();
            out(&texts.join("\n\n"))
        }
    }
}

/// One trace for people: the verdict first, then what decided it, each endpoint, and the walk.
pub fn text(trace: &Trace, paint: Paint) -> String {
    let mut text = format!("{}\n{}\n", paint.paint(Tint::Bold, &trace.packet), verdict(trace, paint));
    if let Some(service) = &trace.service {
        let matched = trace.frontend.as_deref().and_then(|name| frontend(service, name));
        text += "\n";
        text += &decision(trace, service, matched, paint);
        if let Some(matched) = matched {
            text += &endpoints(trace, service, matched, paint);
        }
    }
    if !trace.steps.is_empty() {
        let _ = write!(text, "\n  {}\n", paint.paint(Tint::Bold, "Walk"));
        let width = trace.steps.iter().map(|step| step.stage.len()).max().unwrap_or(0);
        let mut before = "";
        for step in &trace.steps {
            let stage = if step.stage == before { "" } else { &step.stage };
            before = &step.stage;
            let _ =
                writeln!(text, "    {}{}", paint.paint(Tint::Dim, &format!("{stage:width$}   ")), step.text);
        }
    }
    text
}

/// `is forwarded as ... by port fabric`.
fn verdict(trace: &Trace, paint: Paint) -> String {
    let reason = match (&trace.help, &trace.reason) {
        (Some(help), Some(reason)) => format!(": {} ({reason})", clause(help)),
        (None, Some(reason)) => format!(": {reason}"),
        _ => String::new(),
    };
    let by = trace.port.as_ref().map(|port| format!(" by port {port}")).unwrap_or_default();
    let (tint, words) = match trace.verdict.as_str() {
        "forward" => match &trace.output {
            Some(output) if *output == trace.packet => (Tint::Good, format!("is forwarded as it is{by}")),
            Some(output) => (Tint::Good, format!("is forwarded as {output}{by}")),
            None => (Tint::Good, format!("is forwarded{by}")),
        },
        "hold" => (Tint::Warn, format!("waits until its next hop answers{by}")),
        "gather" => (Tint::Warn, "waits for the other fragments of its datagram".to_owned()),
        "punt" => (Tint::Warn, "goes to the kernel untouched: it is none of ours".to_owned()),
        "answer" => (Tint::Warn, format!("is answered by the gateway{reason}")),
        "drop" => (Tint::Bad, format!("is dropped{reason}")),
        other => (Tint::Warn, format!("{other}{reason}")),
    };
    format!("  {}", paint.paint(tint, &words))
}

/// The frontend of a Service that is called `address:port/protocol`.
fn frontend<'a>(service: &'a ServiceDescription, name: &str) -> Option<&'a FrontendDescription> {
    service.frontends.iter().find(|f| frontend_name(f) == name)
}

/// `address:port/protocol`, with brackets around an IPv6 address.
pub fn frontend_name(frontend: &FrontendDescription) -> String {
    let FrontendDescription { address, port, protocol, .. } = frontend;
    if address.contains(':') {
        format!("[{address}]:{port}/{protocol}")
    } else {
        format!("{address}:{port}/{protocol}")
    }
}

/// Service, frontend, client, rule, endpoint: a line each.
fn decision(
    trace: &Trace,
    service: &ServiceDescription,
    matched: Option<&FrontendDescription>,
    paint: Paint,
) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {}{value}", paint.paint(Tint::Dim, &format!("{name:<11}")));
    };
    let row = &service.service;
    let version = match service.resource_version.as_str() {
        "" => String::new(),
        version => format!(", resourceVersion {version}"),
    };
    let name = paint.paint(Tint::Accent, &format!("{}/{}", row.namespace, row.name));
    line("Service", format!("{name}, type {}{version}", row.type_));
    if let Some(why) = &service.skipped {
        line("Not served", why.clone());
    }
    let Some(matched) = matched else { return text };
    let port =
        if matched.port_name.is_empty() { String::new() } else { format!(", port {}", matched.port_name) };
    line("Frontend", format!("{}, {}{port}", frontend_name(matched), kind(&matched.kind)));
    let (client, action) = client(trace, matched);
    line("Client", client.to_owned());
    if !matched.source_ranges.is_empty() {
        line("Allowed", format!("loadBalancerSourceRanges {}", matched.source_ranges.join(", ")));
    }
    if !is_stopped_before(trace, action) {
        line("Rule", action.rule.clone());
    }
    if let Some(endpoint) = &trace.endpoint {
        let described = service.endpoints.iter().find(|e| e.endpoint.socket() == *endpoint);
        let place = described.map(place).unwrap_or_default();
        line("Endpoint", format!("{}{place}", paint.paint(Tint::Good, endpoint)));
    }
    if let (Some(before), Some(after)) = (source(&trace.packet), trace.output.as_deref().and_then(source)) {
        line(
            "Source",
            if before == after { format!("{before}, kept") } else { format!("{after}, masqueraded") },
        );
    }
    text
}

/// Who the client is, and what happens to such clients.
fn client<'a>(trace: &Trace, matched: &'a FrontendDescription) -> (&'static str, &'a ActionDescription) {
    match trace.origin.as_deref() {
        Some("pod") => ("a pod of this cluster", &matched.from_pod),
        Some("node") => ("a node of this cluster", &matched.from_node),
        _ => ("outside the cluster", &matched.from_outside),
    }
}

/// The packet would have had an endpoint, but something else stopped it before: a source range, for one.
fn is_stopped_before(trace: &Trace, action: &ActionDescription) -> bool {
    trace.endpoint.is_none() && action.action == "dnat"
}

/// `198.51.100.7:4242` of `tcp 198.51.100.7:4242 > 203.0.113.10:80`.
fn source(packet: &str) -> Option<&str> {
    packet.split_once(" > ")?.0.split_once(' ').map(|(_, source)| source)
}

/// `, Pod/web-1 on node-1`.
fn place(described: &EndpointDescription) -> String {
    let row = &described.endpoint;
    let mut text = String::new();
    if !row.target.is_empty() {
        let _ = write!(text, ", {}", row.target);
    }
    if !row.node.is_empty() {
        let _ = write!(text, " on {}", row.node);
    }
    text
}

fn kind(kind: &str) -> &str {
    match kind {
        "ClusterIP" => "a ClusterIP",
        "LoadBalancer" => "a LoadBalancer address",
        "ExternalIP" => "an externalIP",
        "NodePort" => "a NodePort",
        other => other,
    }
}

/// Every endpoint of the port that was asked for, and why it was chosen or not.
fn endpoints(
    trace: &Trace,
    service: &ServiceDescription,
    matched: &FrontendDescription,
    paint: Paint,
) -> String {
    let (_, action) = client(trace, matched);
    if is_stopped_before(trace, action) {
        return String::new();
    }
    let family = |address: &str| address.contains(':');
    let of_port = service.endpoints.iter().filter(|e| {
        e.endpoint.port_name == matched.port_name
            && e.endpoint.protocol == matched.protocol
            && family(&e.endpoint.address) == family(&matched.address)
    });
    let mut table = Table::new(["ENDPOINT", "STATE", "NODE", "TARGET", "WHY"]);
    for described in of_port {
        let row = &described.endpoint;
        let chosen = trace.endpoint.as_ref() == Some(&row.socket());
        table.row([
            if chosen { Cell::new(Tint::Good, row.socket()) } else { row.socket().into() },
            row.state(),
            row.node.as_str().into(),
            row.target.as_str().into(),
            why(chosen, described, action.list.as_deref(), &matched.kind),
        ]);
    }
    if table.len() == 0 {
        return "\n  The Service has no endpoint for this port and address family.\n".to_owned();
    }
    format!("\n{}", table.take(paint, 2))
}

fn why(chosen: bool, described: &EndpointDescription, list: Option<&str>, kind: &str) -> Cell {
    if chosen {
        return Cell::new(Tint::Good, "chosen");
    }
    if let Some(why) = &described.unused {
        return Cell::new(Tint::Dim, why.as_str());
    }
    // A local list says whose: `local (own node)` for ClusterIPs, `local (every node)` where the gateway is the frontend.
    let is_in = |list: &str| {
        described.lists.iter().any(|known| match known.split_once(' ') {
            Some((name, place)) => name == list && (kind != "ClusterIP" || place == "(own node)"),
            None => known == list,
        })
    };
    match list {
        Some(list) if is_in(list) => "in the list: other connections come here".into(),
        Some(list) => Cell::new(Tint::Dim, format!("in list {}, not in {list}", described.lists.join(", "))),
        None => {
            Cell::new(Tint::Dim, format!("in list {}, which is not used here", described.lists.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::control::{ActionDescription, EndpointRow, ServiceRow, TraceStep};

    fn trace() -> Trace {
        let endpoint = |address: &str, ready, lists: &[&str], unused: Option<&str>| EndpointDescription {
            endpoint: EndpointRow {
                address: address.into(),
                port: 80,
                port_name: "http".into(),
                protocol: "TCP".into(),
                ready,
                serving: ready,
                node: "node-1".into(),
                target: format!("Pod/web-{}", address.rsplit('.').next().unwrap()),
                ..Default::default()
            },
            lists: lists.iter().map(|l| l.to_string()).collect(),
            weight: 1,
            unused: unused.map(str::to_owned),
            ..Default::default()
        };
        let cluster = ActionDescription {
            action: "dnat".into(),
            list: Some("cluster".into()),
            endpoints: 2,
            masquerade: true,
            reason: None,
            rule: "externalTrafficPolicy: Cluster".into(),
        };
        let service = ServiceDescription {
            service: ServiceRow {
                namespace: "default".into(),
                name: "web".into(),
                type_: "LoadBalancer".into(),
                ..Default::default()
            },
            resource_version: "4711".into(),
            frontends: vec![FrontendDescription {
                address: "203.0.113.10".into(),
                port: 8080,
                protocol: "TCP".into(),
                port_name: "http".into(),
                kind: "LoadBalancer".into(),
                from_outside: cluster,
                ..Default::default()
            }],
            endpoints: vec![
                endpoint("10.244.1.7", true, &["cluster"], None),
                endpoint("10.244.1.8", true, &["cluster"], None),
                endpoint("10.244.1.9", false, &[], Some("not ready")),
            ],
            ..Default::default()
        };
        let step = |stage: &str, text: &str| TraceStep { stage: stage.into(), text: text.into() };
        Trace {
            packet: "tcp 198.51.100.7:4242 > 203.0.113.10:8080".into(),
            steps: vec![
                step("parse", "headers are sound"),
                step("service", "one"),
                step("service", "two"),
                step("verdict", "forwarded"),
            ],
            verdict: "forward".into(),
            origin: Some("outside".into()),
            output: Some("tcp 192.0.2.1:4242 > 10.244.1.8:80".into()),
            port: Some("fabric".into()),
            service: Some(service),
            frontend: Some("203.0.113.10:8080/TCP".into()),
            endpoint: Some("10.244.1.8:80".into()),
            ..Default::default()
        }
    }

    #[test]
    fn a_forwarded_service_packet() {
        insta::assert_snapshot!(text(&trace(), Paint::PLAIN), @"
        tcp 198.51.100.7:4242 > 203.0.113.10:8080
          is forwarded as tcp 192.0.2.1:4242 > 10.244.1.8:80 by port fabric

          Service    default/web, type LoadBalancer, resourceVersion 4711
          Frontend   203.0.113.10:8080/TCP, a LoadBalancer address, port http
          Client     outside the cluster
          Rule       externalTrafficPolicy: Cluster
          Endpoint   10.244.1.8:80, Pod/web-8 on node-1
          Source     192.0.2.1:4242, masqueraded

          ENDPOINT        STATE       NODE     TARGET      WHY
          10.244.1.7:80   ready       node-1   Pod/web-7   in the list: other connections come here
          10.244.1.8:80   ready       node-1   Pod/web-8   chosen
          10.244.1.9:80   not ready   node-1   Pod/web-9   not ready

          Walk
            parse     headers are sound
            service   one
                      two
            verdict   forwarded
        ");
    }

    #[test]
    fn a_packet_that_is_stopped_before_its_rule_has_no_endpoints_to_show() {
        let stopped = Trace {
            verdict: "drop".into(),
            reason: Some("source_range".into()),
            help: Some("The source is not in loadBalancerSourceRanges.".into()),
            output: None,
            endpoint: None,
            steps: vec![],
            ..trace()
        };
        insta::assert_snapshot!(text(&stopped, Paint::PLAIN), @"
        tcp 198.51.100.7:4242 > 203.0.113.10:8080
          is dropped: the source is not in loadBalancerSourceRanges (source_range)

          Service    default/web, type LoadBalancer, resourceVersion 4711
          Frontend   203.0.113.10:8080/TCP, a LoadBalancer address, port http
          Client     outside the cluster
        ");
    }

    #[test]
    fn local_lists_are_told_apart_by_their_place() {
        let described = EndpointDescription {
            lists: vec!["cluster".into(), "local (every node)".into()],
            ..Default::default()
        };
        let in_list = Cell::from("in the list: other connections come here");
        assert_eq!(why(false, &described, Some("local"), "LoadBalancer"), in_list);
        assert_eq!(why(false, &described, Some("cluster"), "ClusterIP"), in_list);
        assert_ne!(why(false, &described, Some("local"), "ClusterIP"), in_list);
    }

    #[test]
    fn a_dropped_packet_says_why_first() {
        let dropped = Trace {
            packet: "udp 198.51.100.7:4242 > 10.96.0.99:53".into(),
            verdict: "drop".into(),
            reason: Some("unknown_service".into()),
            help: Some("An address inside a service range without a Service.".into()),
            ..Default::default()
        };
        insta::assert_snapshot!(text(&dropped, Paint::PLAIN), @"
        udp 198.51.100.7:4242 > 10.96.0.99:53
          is dropped: an address inside a service range without a Service (unknown_service)
        ");
    }

    #[test]
    fn packets_may_be_unquoted_words() {
        let words = |text: &[&str]| packets(&text.iter().map(|w| w.to_string()).collect::<Vec<_>>());
        assert_eq!(words(&["tcp", "192.0.2.1:1", ">", "192.0.2.2:2"]).unwrap().len(), 1);
        assert_eq!(words(&["tcp 192.0.2.1:1 > 192.0.2.2:2", "icmp 192.0.2.1 > 192.0.2.2"]).unwrap().len(), 2);
        let error = words(&["tcp", "192.0.2.1:1"]).unwrap_err().to_string();
        assert!(error.contains("quote the packet"), "{error}");
        assert!(words(&["tcp 192.0.2.1:1 > 192.0.2.2:99999"]).is_err());
    }
}
