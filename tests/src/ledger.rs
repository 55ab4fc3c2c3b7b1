//! The ledger: where Towpath differs from Linux on purpose, at most eight entries, each with what it does instead.
//!
//! A case that names an entry must differ exactly so; every other case must not differ at all.

use crate::case::{Case, Emitted, Side, Step};
use crate::decode::{decode, difference};
use crate::fragments::{is_fragment, join};
use crate::twin::strictness;

/// An allowed difference.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// As case files name it.
    pub name: &'static str,
    /// What Linux does, what Towpath does, and why.
    pub about: &'static str,
    rule: Rule,
}

/// What Towpath does instead.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// Nothing leaves.
    Silent,
    /// One packet is forwarded, as recorded but for the IP header and its options or extensions, which stay as they came.
    HeadersKept,
    /// The same datagrams leave, in fragments no longer than those that came; or the same error about the first fragment.
    OtherFragments,
    /// The packet is forwarded, its checksum as wrong as it came.
    StaysWrong,
    /// The packet is routed: it leaves by the other port, one hop older and otherwise as it came.
    Routed,
    /// The kernel does it; should the packet get as far as the pipeline, that must not do anything else.
    Kernel,
}

/// Every allowed difference.
pub const ENTRIES: &[Entry] = &[
    Entry {
        name: "fragment-form",
        about: "Linux puts fragments together and makes new ones: over IPv6 with another identification, over IPv4 all with the \
                header of the first. Towpath sends the fragments on that came, and ICMP errors quote the first of them.",
        rule: Rule::OtherFragments,
    },
    Entry {
        name: "hostile-fragments",
        about: "Linux forwards a first fragment that cuts the layer-4 header, and goes on with the rest where a fragment \
                contradicts others in its bytes (or, over IPv6, is empty, or in its end); Towpath drops the datagram.",
        rule: Rule::Silent,
    },
    Entry {
        name: "bad-l4-checksum",
        about: "Linux's conntrack verifies checksums and drops; Towpath updates them incrementally (RFC 1624), so that a wrong \
                one arrives as wrong as it came and the receiver drops it.",
        rule: Rule::StaysWrong,
    },
    Entry {
        name: "record-route",
        about: "Linux writes its address into an IPv4 record route option (RFC 791); Towpath leaves the option as it came, which \
                routers commonly do.",
        rule: Rule::HeadersKept,
    },
    Entry {
        name: "atomic-fragment",
        about: "Linux takes the fragment header off a packet that is not fragmented (RFC 6946); Towpath leaves it on.",
        rule: Rule::HeadersKept,
    },
    Entry {
        name: "udp6-without-checksum",
        about: "Linux translates UDP over IPv6 without a checksum; Towpath drops it (RFC 8200 section 8.1), for nothing would \
                show that its addresses were damaged.",
        rule: Rule::Silent,
    },
    Entry {
        name: "untracked-error",
        about: "Linux tracks what it merely routes, too, and drops an ICMP error about a packet that it never saw; Towpath keeps no \
                state of such packets, and routes errors about them, so that path MTU discovery works for them.",
        rule: Rule::Routed,
    },
    Entry {
        name: "kernel-path",
        about: "Packets that are none of ours are handed to the kernel untouched, which does with them what it did alone.",
        rule: Rule::Kernel,
    },
];

/// Whether a difference is the one that is meant.
#[derive(Debug)]
pub enum Judgement {
    /// It is.
    Meant,
    /// It is not, and why.
    Wrong(String),
}

/// Judges what Towpath made of a case that names `entry`. `emitted`: what left for each step.
pub fn judge(entry: &str, case: &Case, emitted: &[Vec<Emitted>]) -> Judgement {
    let Some(entry) = ENTRIES.iter().find(|known| known.name == entry) else {
        return Judgement::Wrong(format!("the ledger has no entry {entry}"));
    };
    for (step, got) in case.steps.iter().zip(emitted) {
        let wrong = |why: &str| {
            let lines: Vec<String> = got.iter().flat_map(Emitted::lines).collect();
            Judgement::Wrong(format!("{why}; emitted:\n{}", difference(&[], &lines)))
        };
        match entry.rule {
            Rule::Silent if !got.is_empty() => return wrong("nothing may leave"),
            Rule::Kernel if !got.is_empty() && !same(&step.expected, got) => {
                return wrong("not what Linux does");
            }
            Rule::OtherFragments => {
                let longest = case.steps.iter().map(|step| step.frame.len()).max().unwrap_or(0);
                if got.iter().any(|out| out.side != step.side && out.frame.len() > longest) {
                    return wrong("a fragment grew");
                }
                if whole(step, &step.expected) != whole(step, got) {
                    return wrong("another datagram than Linux sends");
                }
            }
            Rule::HeadersKept => {
                let rest = |out: &Emitted| {
                    let mut lines = out.lines();
                    lines.retain(|line| {
                        !["ipv4 ", "ipv6 ", "extension "].iter().any(|word| line.starts_with(word))
                    });
                    lines
                };
                let alike =
                    got.len() == 1 && step.expected.len() == 1 && rest(&got[0]) == rest(&step.expected[0]);
                if !alike || got[0].frame.len() != step.frame.len() {
                    return wrong("one packet with its headers as they came must leave");
                }
            }
            // A fragment waits for the last one.
            Rule::StaysWrong if got.is_empty() && is_fragment(&step.frame) => {}
            Rule::StaysWrong => {
                let forwarded = got.iter().all(|out| out.side != step.side);
                let whole = whole(step, got);
                let bad = whole.iter().any(|line| line.contains("right is"));
                let packets = whole.iter().filter(|line| line.starts_with("leaves by")).count();
                if !forwarded || !bad || packets != 1 {
                    return wrong("one packet with a wrong checksum must leave");
                }
            }
            Rule::Routed => {
                let routed = |out: &Emitted| {
                    out.side != step.side
                        && without_hop(&decode(&out.frame, out.strictness))
                            == without_hop(&decode(&step.frame, out.strictness))
                };
                if got.len() != 1 || !routed(&got[0]) {
                    return wrong("the packet must leave as it came");
                }
            }
            Rule::Silent | Rule::Kernel => {}
        }
    }
    if matches!(entry.rule, Rule::StaysWrong) && emitted.iter().all(Vec::is_empty) {
        return Judgement::Wrong("nothing left".into());
    }
    Judgement::Meant
}

/// The lines of a frame without what changes with every hop: link-layer addresses and the first TTL.
fn without_hop(lines: &[String]) -> Vec<String> {
    let mut lines = lines.to_vec();
    lines.retain(|line| !line.starts_with("ethernet "));
    if let Some(ip) = lines.iter_mut().find(|line| line.starts_with("ipv4 ") || line.starts_with("ipv6 ")) {
        let words = ip.split(' ').collect::<Vec<_>>();
        let ttl =
            words.iter().position(|word| matches!(*word, "ttl" | "hops")).map_or(words.len(), |at| at + 1);
        *ip = words
            .iter()
            .enumerate()
            .filter(|(at, _)| *at != ttl)
            .map(|(_, word)| *word)
            .collect::<Vec<_>>()
            .join(" ");
    }
    lines
}

/// True if both are the same datagrams in fragments of the same number, whatever identifications they have.
pub fn same_datagrams(step: &Step, expected: &[Emitted], got: &[Emitted]) -> bool {
    expected.len() == got.len() && whole(step, expected) == whole(step, got)
}

/// What left for a step as lines, datagrams put together, without the IP headers that ICMP errors quote.
fn whole(step: &Step, emitted: &[Emitted]) -> Vec<String> {
    let mut all = Vec::new();
    for side in [Side::Outside, Side::Inside] {
        let frames: Vec<Vec<u8>> =
            emitted.iter().filter(|out| out.side == side).map(|out| out.frame.clone()).collect();
        for frame in join(&frames) {
            let strictness = strictness(step.side, &step.frame, side, &frame);
            let mut quoted = false;
            let mut lines = Emitted { side, frame, strictness }.lines();
            lines.retain(|line| {
                quoted |= line == "quotes";
                !quoted || !["ipv4 ", "ipv6 ", "extension "].iter().any(|word| line.starts_with(word))
            });
            all.extend(lines);
        }
    }
    all
}

/// True if both say the same on the wire, as closely as [`crate::decode::Strictness`] of what was recorded asks for.
pub fn same(expected: &[Emitted], got: &[Emitted]) -> bool {
    expected.len() == got.len()
        && expected.iter().zip(got).all(|(e, g)| {
            e.side == g.side && decode(&e.frame, e.strictness) == decode(&g.frame, e.strictness)
        })
}
