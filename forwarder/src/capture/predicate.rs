//! A filter as workers evaluate it: a few comparisons with what is known of a packet, one after the other.

use std::ops::RangeInclusive;

use config::capture::filter::{Filter, FilterError, MAX_TERMS, Side, Step, Term};
use config::packet::Protocol;
use ipnet::IpNet;

use super::Note;
use crate::addr::{Addr, Tuple, protocol};
use crate::verdict::{Reason, Verdict};

/// A filter that can be evaluated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Predicate {
    operations: Vec<Operation>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Operation {
    Protocol(Protocol),
    Net {
        side: Side,
        net: Range,
    },
    Port {
        side: Side,
        ports: RangeInclusive<u16>,
    },
    /// Stable ids of the service's ports.
    Service(Vec<u64>),
    Drop,
    Reason(Reason),
    Not,
    And,
    Or,
}

/// Addresses from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: Addr,
    last: Addr,
}

impl Predicate {
    /// Compiles a filter. `service`: stable ids of the ports of a Service, by namespace, name and, if it matters, port.
    ///
    /// # Errors
    /// A reason that does not exist.
    pub fn compile(
        filter: &Filter,
        mut service: impl FnMut(&str, &str, Option<&str>) -> Vec<u64>,
    ) -> Result<Predicate, FilterError> {
        let mut operations = Vec::with_capacity(filter.steps().len());
        for step in filter.steps() {
            operations.push(match step {
                Step::Not => Operation::Not,
                Step::And => Operation::And,
                Step::Or => Operation::Or,
                Step::Term(Term::Protocol(protocol), _) => Operation::Protocol(*protocol),
                Step::Term(Term::Net(side, net), _) => Operation::Net { side: *side, net: Range::of(*net) },
                Step::Term(Term::Port(side, ports), _) => {
                    Operation::Port { side: *side, ports: ports.clone() }
                }
                Step::Term(Term::Service { namespace, name, port }, _) => {
                    Operation::Service(service(namespace, name, port.as_deref()))
                }
                Step::Term(Term::Drop, _) => Operation::Drop,
                Step::Term(Term::Reason(name), word) => {
                    let reason = Reason::ALL.iter().find(|reason| reason.name() == name);
                    Operation::Reason(*reason.ok_or_else(|| {
                        let message = format!("'{name}' is not the name of a reason");
                        filter.error(word, message, "see `towpathctl drops --all`")
                    })?)
                }
            });
        }
        Ok(Predicate { operations })
    }

    /// True if the filter holds for the packet. At most [`MAX_TERMS`] terms, no allocation.
    #[inline]
    pub fn matches(&self, note: &Note) -> bool {
        const { assert!(MAX_TERMS <= 64, "a term is a bit of the stack") };
        if self.operations.is_empty() {
            return true;
        }
        let mut stack = 0u64;
        for operation in &self.operations {
            let (top, second) = (stack & 1, stack >> 1 & 1);
            stack = match operation {
                Operation::Not => stack ^ 1,
                Operation::And => stack >> 2 << 1 | top & second,
                Operation::Or => stack >> 2 << 1 | top | second,
                term => stack << 1 | u64::from(term.holds(note)),
            };
        }
        stack & 1 == 1
    }

    /// True if it asks for Services, whose ports may change.
    pub fn names_services(&self) -> bool {
        self.operations.iter().any(|operation| matches!(operation, Operation::Service(_)))
    }
}

impl Operation {
    /// Whether a term holds.
    fn holds(&self, note: &Note) -> bool {
        match self {
            Operation::Protocol(wanted) => either(note, |tuple| is_of(tuple.protocol, *wanted)),
            Operation::Net { side, net } => either(note, |tuple| match side {
                Side::Src => net.contains(tuple.src),
                Side::Dst => net.contains(tuple.dst),
                Side::Either => net.contains(tuple.src) || net.contains(tuple.dst),
            }),
            Operation::Port { side, ports } => either(note, |tuple| {
                let (src, dst) = (ports.contains(&tuple.src_port), ports.contains(&tuple.dst_port));
                has_ports(tuple.protocol)
                    && match side {
                        Side::Src => src,
                        Side::Dst => dst,
                        Side::Either => src || dst,
                    }
            }),
            Operation::Service(ids) => note.service != 0 && ids.contains(&note.service),
            Operation::Drop => matches!(note.verdict, Verdict::Drop(_)),
            Operation::Reason(wanted) => match note.verdict {
                Verdict::Drop(reason) | Verdict::Answer { reason, .. } => reason == *wanted,
                _ => false,
            },
            Operation::Not | Operation::And | Operation::Or => false,
        }
    }
}

/// True if it holds for the packet as it came or as it leaves.
fn either(note: &Note, holds: impl Fn(&Tuple) -> bool) -> bool {
    holds(&note.before) || holds(&note.after)
}

fn is_of(number: u8, protocol: Protocol) -> bool {
    match protocol {
        Protocol::Tcp => number == protocol::TCP,
        Protocol::Udp => number == protocol::UDP,
        Protocol::Sctp => number == protocol::SCTP,
        Protocol::Icmp => matches!(number, protocol::ICMP | protocol::ICMPV6),
    }
}

fn has_ports(number: u8) -> bool {
    matches!(number, protocol::TCP | protocol::UDP | protocol::SCTP)
}

impl Range {
    fn of(net: IpNet) -> Range {
        match net {
            IpNet::V4(net) => Range { first: net.network().into(), last: net.broadcast().into() },
            IpNet::V6(net) => Range { first: net.network().into(), last: net.broadcast().into() },
        }
    }

    #[inline]
    fn contains(&self, addr: Addr) -> bool {
        // IPv4 addresses lie within ::/0; a frame whose headers are not sound has no address at all.
        self.first <= addr
            && addr <= self.last
            && addr.is_v4() == self.first.is_v4()
            && addr != Addr::UNSPECIFIED
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn tuple(text: &str) -> Tuple {
        let words: Vec<&str> = text.split(' ').collect();
        let end = |text: &str| -> (Addr, u16) {
            match text.parse::<std::net::SocketAddr>() {
                Ok(end) => (end.ip().into(), end.port()),
                Err(_) => (text.parse::<IpAddr>().unwrap().into(), 0),
            }
        };
        let ((src, src_port), (dst, dst_port)) = (end(words[1]), end(words[2]));
        let protocol = match words[0] {
            "tcp" => protocol::TCP,
            "udp" => protocol::UDP,
            "icmp" => protocol::ICMP,
            "icmpv6" => protocol::ICMPV6,
            other => panic!("{other}"),
        };
        Tuple { src, dst, src_port, dst_port, protocol }
    }

    fn predicate(text: &str) -> Predicate {
        let filter = text.parse::<Filter>().unwrap_or_else(|error| panic!("{error}"));
        let service = |namespace: &str, name: &str, port: Option<&str>| match (namespace, name, port) {
            ("default", "web", None) => vec![7, 8],
            ("default", "web", Some("http")) => vec![7],
            _ => vec![],
        };
        Predicate::compile(&filter, service).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A client's packet that is masqueraded on its way to a pod.
    fn request() -> Note {
        Note {
            before: tuple("tcp 198.51.100.7:4242 203.0.113.10:80"),
            after: tuple("tcp 10.2.0.1:61000 10.244.1.7:8080"),
            service: 7,
            verdict: Verdict::Forward { port: 1 },
            ..Note::default()
        }
    }

    #[test]
    fn terms_hold_before_or_after_translation() {
        let request = request();
        for (text, holds) in [
            ("", true),
            ("host 198.51.100.7", true),
            ("host 10.244.1.7", true),
            ("src host 10.244.1.7", false),
            ("dst host 10.244.1.7", true),
            ("src 10.2.0.1", true),
            ("dst host 198.51.100.7", false),
            ("net 10.244.0.0/16", true),
            ("net 10.245.0.0/16", false),
            ("net 0.0.0.0/0", true),
            ("net ::/0", false),
            ("port 80", true),
            ("src port 80", false),
            ("dst port 8000-8080", true),
            ("port 60999", false),
            ("tcp", true),
            ("udp", false),
            ("tcp port 443", false),
            ("service default/web", true),
            ("service default/web:http", true),
            ("service default/shop", false),
            ("drop", false),
            ("reason no_route", false),
        ] {
            assert_eq!(predicate(text).matches(&request), holds, "{text}");
            assert_eq!(
                predicate(&format!("not ({text})").replace("not ()", "")).matches(&request),
                !holds || text.is_empty(),
                "not {text}"
            );
        }
    }

    #[test]
    fn words_join_as_they_bind() {
        // The first is true, the second false.
        for (text, holds) in [
            ("tcp and udp", false),
            ("tcp or udp", true),
            ("udp or udp", false),
            ("udp and udp or tcp", true),
            ("tcp or udp and udp", true),
            ("(tcp or udp) and udp", false),
            ("not udp and tcp", true),
            ("not (udp or tcp)", false),
            ("not (not tcp or udp)", true),
            ("tcp and tcp and not udp and tcp", true),
        ] {
            assert_eq!(predicate(text).matches(&request()), holds, "{text}");
        }
        // As deep as the stack gets.
        let deep = format!("{}tcp{}", "(tcp and ".repeat(31), ")".repeat(31));
        assert!(predicate(&deep).matches(&request()));
        let wide = ["udp"; MAX_TERMS - 1].join(" or ");
        assert!(predicate(&format!("{wide} or tcp")).matches(&request()));
        assert!(!predicate(&format!("{wide} or udp")).matches(&request()));
    }

    #[test]
    fn drops_and_reasons() {
        let dropped = Note { verdict: Verdict::Drop(Reason::NoRoute), ..request() };
        let answered =
            Note { verdict: Verdict::Answer { port: 0, reason: Reason::UnknownPort }, ..request() };
        assert!(predicate("drop").matches(&dropped) && predicate("reason no_route").matches(&dropped));
        assert!(!predicate("reason unknown_port").matches(&dropped));
        assert!(!predicate("drop").matches(&answered) && predicate("reason UNKNOWN_PORT").matches(&answered));
        let filter: Filter = "tcp and reason no_rout".parse().unwrap();
        let error = Predicate::compile(&filter, |_, _, _| vec![]).unwrap_err().to_string();
        assert!(error.contains("'no_rout' is not the name of a reason"), "{error}");
        assert!(error.contains("\n                 ^^^^^^^\n"), "{error}");
    }

    #[test]
    fn pings_have_no_ports_and_garbage_has_no_address() {
        let ping = Note {
            before: Tuple { src_port: 80, dst_port: 80, ..tuple("icmpv6 2001:db8::1 2001:db8::2") },
            ..Note::default()
        };
        assert!(predicate("icmp and net ::/0").matches(&ping));
        assert!(!predicate("port 80 or net 0.0.0.0/0 or service default/web").matches(&ping));
        for text in ["net ::/0", "net 0.0.0.0/0", "tcp", "port 80", "service default/none"] {
            assert!(!predicate(text).matches(&Note::default()), "{text}");
        }
        assert!(predicate("").matches(&Note::default()));
        assert!(predicate("service default/web").names_services() && !predicate("tcp").names_services());
    }
}
