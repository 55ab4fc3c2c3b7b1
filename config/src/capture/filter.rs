//! The grammar of filters.
//!
//! ```text
//! tcp port 443
//! host 198.51.100.7 and not icmp
//! service default/web and (drop or src net 10.0.0.0/8)
//! reason no_endpoints or reason no_local_endpoints
//! ```
//!
//! | term | the packet |
//! | --- | --- |
//! | `host ADDRESS`, or an address alone | comes from or goes to this address |
//! | `net PREFIX`, or a prefix alone | comes from or goes to an address in it |
//! | `port N`, `port N-M` | has this source or destination port (TCP, UDP, SCTP) |
//! | `src ...`, `dst ...` before one of these | the same for one end only |
//! | `tcp`, `udp`, `sctp`, `icmp`, `proto ...` | is of this protocol; `tcp port 80` is short for `tcp and port 80` |
//! | `service NAMESPACE/NAME[:PORT]` | belongs to this Service |
//! | `drop` | is dropped |
//! | `reason NAME` | is dropped or answered for this reason |
//!
//! `not` binds closest, then `and`, then `or`; parentheses group; `!`, `&&` and `||` are the same words.
//!
//! Addresses, ports and protocol hold if they hold for the packet as it came or for the packet as it leaves. So a client's
//! address finds both frames of a masqueraded packet, and both frames of one packet are captured or none.

use std::fmt;
use std::net::IpAddr;
use std::ops::{Range, RangeInclusive};
use std::str::FromStr;

use ipnet::IpNet;

use crate::fault::{Code, Fault};
use crate::packet::Protocol;

/// Longest filter, bytes.
const MAX_BYTES: usize = 4096;
/// Terms of a filter at most: a worker evaluates all of them for each packet, on a stack of as many bits.
pub const MAX_TERMS: usize = 64;
/// Parentheses and negations within each other at most.
const MAX_DEPTH: usize = 32;

const TERMS: &str = "a term is host, net or port (after src or dst, if one end is meant), tcp, udp, sctp, icmp, proto, \
                     service, drop or reason; terms are joined by and, or, not and parentheses";

/// A filter that has been read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    text: String,
    steps: Vec<Step>,
}

/// A filter is evaluated like a sum on a pocket calculator with a stack: terms push, words take from it and push.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Pushes whether the term holds.
    Term(Term, Word),
    /// Replaces the last.
    Not,
    /// Replaces the last two.
    And,
    /// Replaces the last two.
    Or,
}

/// What a packet is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Term {
    /// The protocol.
    Protocol(Protocol),
    /// An address; a host is a prefix of full length.
    Net(Side, IpNet),
    /// A port.
    Port(Side, RangeInclusive<u16>),
    /// The Service.
    Service {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
        /// Name of the port; absent: any of them.
        port: Option<String>,
    },
    /// The verdict.
    Drop,
    /// Name of the reason.
    Reason(String),
}

/// Which end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source.
    Src,
    /// The destination.
    Dst,
    /// One of them.
    Either,
}

/// Where a word stands in the text of its filter, bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word(Range<usize>);

/// What is wrong with a filter, and at which word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterError {
    filter: String,
    at: Range<usize>,
    message: String,
    remedy: String,
}

impl Filter {
    /// The filter as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What to do, in order; nothing: the filter holds for every packet.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// An error about one of its words.
    pub fn error(&self, word: &Word, message: impl Into<String>, remedy: impl Into<String>) -> FilterError {
        let (message, remedy) = (message.into(), remedy.into());
        FilterError { filter: self.text.clone(), at: word.0.clone(), message, remedy }
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Filter, FilterError> {
        // One line, so that an error can point at a word of it.
        let text: String = text.chars().map(|c| if c.is_whitespace() { ' ' } else { c }).collect();
        let mut parser =
            Parser { words: words(&text), text: &text, next: 0, depth: 0, terms: 0, steps: vec![] };
        if text.len() > MAX_BYTES {
            let at = MAX_BYTES..text.len();
            return Err(parser.error(
                at,
                format!("longer than {MAX_BYTES} bytes"),
                "use prefixes and ranges",
            ));
        }
        if !parser.words.is_empty() {
            parser.any()?;
            if let Some(word) = parser.peek() {
                let message = match word.text {
                    ")" => "no ( before this )".to_owned(),
                    text => format!("expected and, or before '{text}'"),
                };
                return Err(parser.error(word.at, message, TERMS));
            }
        }
        Ok(Filter { steps: parser.steps, text })
    }
}

/// A word with its place.
#[derive(Clone)]
struct Token<'t> {
    text: &'t str,
    at: Range<usize>,
}

/// Words are separated by blanks; parentheses and `!` are words of their own.
fn words(text: &str) -> Vec<Token<'_>> {
    let mut words: Vec<Token<'_>> = Vec::new();
    let mut begin = None;
    for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
        let single = matches!(c, '(' | ')' | '!');
        if c == ' ' || single {
            if let Some(begin) = begin.take() {
                words.push(Token { text: &text[begin..at], at: begin..at });
            }
            if single {
                words.push(Token { text: &text[at..at + 1], at: at..at + 1 });
            }
        } else {
            begin.get_or_insert(at);
        }
    }
    words
}

struct Parser<'t> {
    text: &'t str,
    words: Vec<Token<'t>>,
    next: usize,
    depth: usize,
    terms: usize,
    steps: Vec<Step>,
}

impl<'t> Parser<'t> {
    fn error(&self, at: Range<usize>, message: impl Into<String>, remedy: impl Into<String>) -> FilterError {
        FilterError { filter: self.text.to_owned(), at, message: message.into(), remedy: remedy.into() }
    }

    fn peek(&self) -> Option<Token<'t>> {
        self.words.get(self.next).cloned()
    }

    /// Takes the next word if it is one of these.
    fn accept(&mut self, words: &[&str]) -> bool {
        let found = self.peek().is_some_and(|word| words.iter().any(|w| word.text.eq_ignore_ascii_case(w)));
        self.next += usize::from(found);
        found
    }

    /// Takes the next word, which must be there.
    fn take(&mut self, what: &str) -> Result<Token<'t>, FilterError> {
        let Some(word) = self.peek() else {
            let end = self.text.trim_end().len();
            return Err(self.error(end..end + 1, format!("{what} is missing at the end"), TERMS));
        };
        self.next += 1;
        Ok(word)
    }

    fn any(&mut self) -> Result<(), FilterError> {
        self.all()?;
        while self.accept(&["or", "||"]) {
            self.all()?;
            self.steps.push(Step::Or);
        }
        Ok(())
    }

    fn all(&mut self) -> Result<(), FilterError> {
        self.one()?;
        while self.accept(&["and", "&&"]) {
            self.one()?;
            self.steps.push(Step::And);
        }
        Ok(())
    }

    fn one(&mut self) -> Result<(), FilterError> {
        let word = self.take("a term")?;
        let negation = word.text == "!" || word.text.eq_ignore_ascii_case("not");
        if !negation && word.text != "(" {
            return self.term(word);
        }
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let message = format!("more than {MAX_DEPTH} parentheses and negations within each other");
            return Err(self.error(word.at, message, "write it flatter"));
        }
        if negation {
            self.one()?;
            self.steps.push(Step::Not);
        } else {
            self.any()?;
            if !self.accept(&[")"]) {
                return Err(self.error(word.at, "no ) for this (", "close it"));
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn push(&mut self, term: Term, at: Range<usize>) -> Result<(), FilterError> {
        self.terms += 1;
        if self.terms > MAX_TERMS {
            return Err(self.error(
                at,
                format!("more than {MAX_TERMS} terms"),
                "use prefixes and ranges of ports",
            ));
        }
        self.steps.push(Step::Term(term, Word(at)));
        Ok(())
    }

    fn term(&mut self, word: Token<'t>) -> Result<(), FilterError> {
        if let Some(protocol) = protocol(word.text) {
            self.push(Term::Protocol(protocol), word.at)?;
            let short = ["src", "dst", "host", "net", "port"];
            if self.peek().is_some_and(|next| short.iter().any(|w| next.text.eq_ignore_ascii_case(w))) {
                let word = self.take("a term")?;
                self.end(word)?;
                self.steps.push(Step::And);
            }
            return Ok(());
        }
        match word.text.to_ascii_lowercase().as_str() {
            "drop" => self.push(Term::Drop, word.at),
            "reason" => {
                let name = self.take("the name of a reason")?;
                self.push(Term::Reason(name.text.to_ascii_lowercase()), name.at)
            }
            "service" => self.service(),
            "proto" => {
                let name = self.take("a protocol")?;
                let known = protocol(name.text).ok_or_else(|| {
                    let message = format!("'{}' is not a protocol", name.text);
                    self.error(name.at.clone(), message, "write tcp, udp, sctp or icmp")
                })?;
                self.push(Term::Protocol(known), name.at)
            }
            _ => self.end(word),
        }
    }

    fn service(&mut self) -> Result<(), FilterError> {
        let word = self.take("NAMESPACE/NAME of the Service")?;
        let (path, port) = match word.text.split_once(':') {
            Some((path, port)) => (path, Some(port.to_owned())),
            None => (word.text, None),
        };
        match path.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                let (namespace, name) = (namespace.to_owned(), name.to_owned());
                self.push(Term::Service { namespace, name, port }, word.at)
            }
            _ => {
                let message = format!("'{}' has no namespace", word.text);
                Err(self.error(word.at, message, format!("write default/{}", word.text.trim_matches('/'))))
            }
        }
    }

    /// `[src|dst] host ADDRESS | net PREFIX | port N | ADDRESS | PREFIX`; `word` is the first of it.
    fn end(&mut self, word: Token<'t>) -> Result<(), FilterError> {
        let (side, word) = match word.text.to_ascii_lowercase().as_str() {
            "src" => (Side::Src, self.take("host, net or port after src")?),
            "dst" => (Side::Dst, self.take("host, net or port after dst")?),
            _ => (Side::Either, word),
        };
        match word.text.to_ascii_lowercase().as_str() {
            "host" => {
                let value = self.take("an address")?;
                let host: IpAddr = value.text.parse().map_err(|_| {
                    let message = format!("'{}' is not an address", value.text);
                    let remedy =
                        "write 198.51.100.7 or 2001:db8::1; names are not looked up; a prefix follows net";
                    self.error(value.at.clone(), message, remedy)
                })?;
                self.push(Term::Net(side, host.into()), value.at)
            }
            "net" => {
                let value = self.take("a prefix")?;
                let net = net(value.text).ok_or_else(|| {
                    let message = format!("'{}' is not a prefix", value.text);
                    self.error(value.at.clone(), message, "write 10.244.0.0/16 or 2001:db8::/32")
                })?;
                self.push(Term::Net(side, net), value.at)
            }
            "port" => {
                let value = self.take("a port")?;
                let ports = ports(value.text).ok_or_else(|| {
                    let message = format!("'{}' is not a port", value.text);
                    self.error(
                        value.at.clone(),
                        message,
                        "write a number from 1 to 65535, or two as 8000-8080",
                    )
                })?;
                self.push(Term::Port(side, ports), value.at)
            }
            _ => match net(word.text) {
                Some(net) => self.push(Term::Net(side, net), word.at),
                None => {
                    let message = format!("'{}' is not understood here", word.text);
                    Err(self.error(word.at, message, TERMS))
                }
            },
        }
    }
}

fn protocol(text: &str) -> Option<Protocol> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        "sctp" => Some(Protocol::Sctp),
        "icmp" | "icmp6" | "icmpv6" => Some(Protocol::Icmp),
        _ => None,
    }
}

/// A prefix, or an address as the longest of them.
fn net(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().map(|net| net.trunc()).or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    (first <= last).then_some(first..=last)
}

impl fmt::Display for FilterError {
    /// The message, the filter with the word underlined, and the remedy, each on a line of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.filter.get(..self.at.start).unwrap_or(&self.filter).chars().count();
        let len = self.filter.get(self.at.clone()).map_or(1, |word| word.chars().count().max(1));
        writeln!(f, "filter: {}", self.message)?;
        writeln!(f, "  {}", self.filter)?;
        writeln!(f, "  {}{}", " ".repeat(before), "^".repeat(len))?;
        write!(f, "  {}", self.remedy)
    }
}

impl std::error::Error for FilterError {}

impl From<FilterError> for Fault {
    /// On one line, with the word as the value.
    fn from(error: FilterError) -> Fault {
        let fault = Fault::new(Code::Invalid, error.message).field("filter").remedy(error.remedy);
        match error.filter.get(error.at) {
            Some(word) if !word.is_empty() && word.len() < 200 => fault.value(word),
            _ => fault,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps in a compact form.
    fn shown(text: &str) -> String {
        let filter: Filter = text.parse().unwrap_or_else(|error| panic!("{error}"));
        let show = |step: &Step| match step {
            Step::Not => "not".to_owned(),
            Step::And => "and".to_owned(),
            Step::Or => "or".to_owned(),
            Step::Term(Term::Protocol(protocol), _) => protocol.name().to_owned(),
            Step::Term(Term::Net(side, net), _) => format!("{side:?}:{net}"),
            Step::Term(Term::Port(side, ports), _) => format!("{side:?}:{ports:?}"),
            Step::Term(Term::Service { namespace, name, port }, _) => format!("{namespace}/{name}:{port:?}"),
            Step::Term(Term::Drop, _) => "drop".to_owned(),
            Step::Term(Term::Reason(name), _) => format!("reason:{name}"),
        };
        filter.steps().iter().map(show).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn reads_every_term() {
        for (text, steps) in [
            ("", ""),
            ("  \t\n ", ""),
            ("host 10.0.0.1", "Either:10.0.0.1/32"),
            ("src host 2001:db8::1", "Src:2001:db8::1/128"),
            ("dst net 10.1.2.3/8", "Dst:10.0.0.0/8"),
            ("net 10.0.0.1", "Either:10.0.0.1/32"),
            ("src 10.0.0.1", "Src:10.0.0.1/32"),
            ("10.0.0.0/8", "Either:10.0.0.0/8"),
            ("port 80", "Either:80..=80"),
            ("dst port 8000-8080", "Dst:8000..=8080"),
            ("proto icmp6", "icmp"),
            ("UDP", "udp"),
            ("sctp", "sctp"),
            ("tcp port 443", "tcp Either:443..=443 and"),
            ("tcp src host 10.0.0.1", "tcp Src:10.0.0.1/32 and"),
            ("service default/web", "default/web:None"),
            ("service shop/web:http", "shop/web:Some(\"http\")"),
            ("drop", "drop"),
            ("reason No_Route", "reason:no_route"),
        ] {
            assert_eq!(shown(text), steps, "{text}");
        }
    }

    #[test]
    fn not_binds_closest_then_and_then_or() {
        for (text, steps) in [
            ("tcp or udp and drop", "tcp udp drop and or"),
            ("(tcp or udp) and drop", "tcp udp or drop and"),
            ("not tcp and drop", "tcp not drop and"),
            ("not (tcp and drop)", "tcp drop and not"),
            ("!!tcp || udp && drop", "tcp not not udp drop and or"),
            ("! tcp port 80", "tcp Either:80..=80 and not"),
            ("tcp or udp or drop", "tcp udp or drop or"),
        ] {
            assert_eq!(shown(text), steps, "{text}");
        }
    }

    #[test]
    fn errors_point_at_the_word() {
        for (text, word, message) in [
            ("tcp port http and drop", "http", "'http' is not a port"),
            ("port 0", "0", "not a port"),
            ("port 80-79", "80-79", "not a port"),
            ("host 10.0.0.0/8", "10.0.0.0/8", "not an address"),
            ("src host web", "web", "not an address"),
            ("net 10.0.0.0/33", "10.0.0.0/33", "not a prefix"),
            ("proto gre", "gre", "not a protocol"),
            ("service web", "web", "no namespace"),
            ("service /web", "/web", "no namespace"),
            ("tcp udp", "udp", "expected and, or"),
            ("host 10.0.0.1 port 80", "port", "expected and, or"),
            ("(tcp", "(", "no ) for this ("),
            ("tcp)", ")", "no ( before"),
            ("tcp and foo", "foo", "not understood"),
            ("src tcp", "tcp", "not understood"),
            ("and tcp", "and", "not understood"),
            ("()", ")", "not understood"),
        ] {
            let error = text.parse::<Filter>().expect_err(text);
            assert_eq!(&text[error.at.clone()], word, "{text}: {error}");
            assert!(error.to_string().contains(message), "{text}: {error}");
            assert_eq!(Fault::from(error).value.as_deref(), Some(word), "{text}");
        }
        for text in ["tcp and", "not", "host", "src", "tcp dst", "service", "reason", "drop or"] {
            let error = text.parse::<Filter>().expect_err(text);
            assert!(error.message.contains("missing at the end"), "{text}: {error}");
            assert_eq!(error.at, text.len()..text.len() + 1, "{text}");
        }
        let error = "drop or\ttcp port ssh and udp".parse::<Filter>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "filter: 'ssh' is not a port\n  \
             drop or tcp port ssh and udp\n  \
             ___              ^^^\n  \
             write a number from 1 to 65535, or two as 8000-8080"
                .replace('_', " ")
        );
    }

    #[test]
    fn filters_are_bounded() {
        let terms = |n: usize| vec!["tcp"; n].join(" or ");
        assert!(terms(MAX_TERMS).parse::<Filter>().is_ok());
        assert!(terms(MAX_TERMS + 1).parse::<Filter>().unwrap_err().message.contains("more than 64 terms"));
        let nested = |n: usize| format!("{}tcp{}", "(".repeat(n), ")".repeat(n));
        assert!(nested(MAX_DEPTH).parse::<Filter>().is_ok());
        assert!(nested(MAX_DEPTH + 1).parse::<Filter>().unwrap_err().message.contains("within each other"));
        assert!("(".repeat(4000).parse::<Filter>().is_err());
        assert!("x".repeat(5000).parse::<Filter>().unwrap_err().message.contains("longer than"));
        // Negations that follow each other are not within each other.
        assert!(vec!["not tcp"; 40].join(" and ").parse::<Filter>().is_ok());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_filter_or_an_error_in_words(
            words in proptest::collection::vec(
                proptest::sample::select(&[
                    "host", "net", "port", "src", "dst", "tcp", "proto", "service", "drop", "reason", "and", "or", "not",
                    "(", ")", "!", "10.0.0.1", "::1", "10.0.0.0/8", "80", "a/b", "x", "\u{20ac}", "\t",
                ][..]),
                0..12,
            ),
            noise in ".{0,20}",
        ) {
            for text in [words.join(" "), format!("{} {noise}", words.join(" ")), noise] {
                match text.parse::<Filter>() {
                    // What is evaluated leaves one value.
                    Ok(filter) => {
                        let depth = filter.steps().iter().fold(0i32, |depth, step| match step {
                            Step::Term(..) => depth + 1,
                            Step::Not => depth,
                            Step::And | Step::Or => depth - 1,
                        });
                        assert_eq!(depth, i32::from(!filter.steps().is_empty()), "{text}");
                    }
                    Err(error) => {
                        assert_eq!(error.to_string().lines().count(), 4, "{error}");
                        assert!(!Fault::from(error).message.is_empty());
                    }
                }
            }
        }
    }
}
