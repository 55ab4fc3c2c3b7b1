//! Connections that are to end because their endpoint is gone: who is told, by which RST, and what becomes of the flow.

#[allow(dead_code)] // other tests use the rest of it
mod rig;

use forwarder::addr::Addr;
use forwarder::verdict::{Reason, Verdict};
use rig::{CLIENT, Gateway, INSIDE, OUTSIDE, VIP, addr, checksums_right, describe, sequence, tcp_at};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// An established connection: who the ends are to each other.
struct Connection {
    client: (Addr, u16),
    vip: (Addr, u16),
    pod: (Addr, u16),
    /// The client as the pod knows it.
    seen_as: (Addr, u16),
}

/// From whom a RST came and to whom it went, with its numbers.
type Told = ((Addr, u16), (Addr, u16), u32, u32);

impl Connection {
    fn open(gateway: &mut Gateway, client: Addr, vip: Addr) -> Connection {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp_at(client, 4242, vip, 80, (1000, 0), SYN, b""));
        let (pod, seen_as) = (rig::destination(&out), (rig::source(&out), rig::ports(&out).0));
        let connection = Connection { client: (client, 4242), vip: (vip, 80), pod: (pod, 8080), seen_as };
        let answer = tcp_at(pod, 8080, seen_as.0, seen_as.1, (5000, 1001), SYN | ACK, b"");
        gateway.forwarded(INSIDE, OUTSIDE, &answer);
        gateway.forwarded(OUTSIDE, INSIDE, &connection.client_segment((1001, 5001), ACK, b""));
        connection
    }

    fn client_segment(&self, numbers: (u32, u32), flags: u8, payload: &[u8]) -> Vec<u8> {
        tcp_at(self.client.0, self.client.1, self.vip.0, self.vip.1, numbers, flags, payload)
    }

    fn pod_segment(&self, numbers: (u32, u32), flags: u8, payload: &[u8]) -> Vec<u8> {
        tcp_at(self.pod.0, self.pod.1, self.seen_as.0, self.seen_as.1, numbers, flags, payload)
    }

    fn to_client(&self, seq: u32, ack: u32) -> Told {
        (self.vip, self.client, seq, ack)
    }

    fn to_pod(&self, seq: u32, ack: u32) -> Told {
        (self.seen_as, self.pod, seq, ack)
    }
}

/// A packet that becomes a RST. It leaves by the port where its receiver is.
#[track_caller]
fn reset(gateway: &mut Gateway, port: u8, bytes: &[u8]) -> Told {
    let (verdict, out) = gateway.judge(port, bytes);
    let Verdict::Answer { port: leaves, reason: Reason::EndpointRemoved } = verdict else {
        panic!("{verdict:?}: {}", describe(bytes))
    };
    let text = describe(&out);
    assert!(text.ends_with(" R") || text.ends_with(" RA"), "{text}");
    assert!(checksums_right(&out), "{text}");
    let (seq, ack, payload) = sequence(&out);
    assert_eq!(payload, 0);
    let to = (rig::destination(&out), rig::ports(&out).1);
    // Back to who sent the packet, or to the next hop.
    let mac = match leaves {
        leaves if leaves == port => &bytes[6..12],
        INSIDE => &rig::NODE_MAC,
        _ => &rig::CLIENT_MAC,
    };
    assert_eq!((&out[..6], &out[6..12]), (mac, &rig::port_mac(leaves)[..]), "{text}");
    ((rig::source(&out), rig::ports(&out).0), to, seq, ack)
}

const CLIENT6: &str = "2001:db8:1::7";
const VIP6: &str = "2001:db8::10";

fn each(mut check: impl FnMut(&mut Gateway, Connection)) {
    for (masquerade, client, vip) in
        [(false, CLIENT, VIP), (true, CLIENT, VIP), (false, addr(CLIENT6), addr(VIP6))]
    {
        let mut gateway = Gateway::new();
        gateway.masquerade(masquerade);
        let connection = Connection::open(&mut gateway, client, vip);
        assert_eq!(masquerade, connection.seen_as != connection.client);
        gateway.reset_flows();
        check(&mut gateway, connection);
    }
}

/// Rule 9.7.
#[test]
fn data_of_the_client_tells_the_endpoint_and_the_same_data_again_tells_the_client() {
    each(|gateway, connection| {
        let request = connection.client_segment((1001, 5001), ACK, b"GET /");
        assert_eq!(reset(gateway, OUTSIDE, &request), connection.to_pod(1001, 5001));
        assert_eq!(reset(gateway, OUTSIDE, &request), connection.to_client(5001, 0));
        // Whatever comes late is answered with what its sender accepts, and never forwarded.
        assert_eq!(reset(gateway, OUTSIDE, &request), connection.to_client(5001, 0));
        let late = connection.pod_segment((5001, 1001), ACK, b"200");
        assert_eq!(reset(gateway, INSIDE, &late), connection.to_pod(1001, 0));
        assert_eq!(gateway.flows(), 1);
        gateway.rest(241);
        assert_eq!(gateway.flows(), 0);
    });
}

#[test]
fn data_of_the_endpoint_tells_the_client_at_once() {
    each(|gateway, connection| {
        // A client that waits for an answer sends nothing by itself.
        let data = connection.pod_segment((5001, 1006), ACK, b"200");
        assert_eq!(reset(gateway, INSIDE, &data), connection.to_client(5001, 1006));
        assert_eq!(reset(gateway, INSIDE, &data), connection.to_pod(1006, 0));
        // The client does not take it in the middle of what it has not got yet; it asks, and gets what it waits for (RFC 5961).
        let challenge = connection.client_segment((1006, 4999), ACK, b"");
        assert_eq!(reset(gateway, OUTSIDE, &challenge), connection.to_client(4999, 0));
    });
}

#[test]
fn an_acknowledgment_is_answered_since_it_is_not_sent_again() {
    each(|gateway, connection| {
        let ack = connection.client_segment((1001, 6001), ACK, b"");
        assert_eq!(reset(gateway, OUTSIDE, &ack), connection.to_client(6001, 0));
        // The client is told already: the endpoint need not wait for a second packet of its own.
        let data = connection.pod_segment((6001, 1001), ACK, b"more");
        assert_eq!(reset(gateway, INSIDE, &data), connection.to_pod(1001, 0));
    });
}

#[test]
fn a_fin_counts_as_data_and_a_rst_goes_on() {
    each(|gateway, connection| {
        let fin = connection.client_segment((1001, 5001), FIN | ACK, b"");
        assert_eq!(reset(gateway, OUTSIDE, &fin), connection.to_pod(1001, 5001));
        assert_eq!(reset(gateway, OUTSIDE, &fin), connection.to_client(5001, 0));
        let own = connection.pod_segment((5001, 0), RST, b"");
        let out = gateway.forwarded(INSIDE, OUTSIDE, &own);
        assert_eq!((rig::source(&out), sequence(&out).0), (connection.vip.0, 5001));
    });
}

#[test]
fn a_new_connection_from_the_same_port_begins_anew() {
    each(|gateway, connection| {
        let syn = connection.client_segment((9000, 0), SYN, b"");
        gateway.forwarded(OUTSIDE, INSIDE, &syn);
        gateway.forwarded(OUTSIDE, INSIDE, &connection.client_segment((9001, 1), ACK, b"x"));
        assert_eq!(gateway.flows(), 1);
    });
}

#[test]
fn if_the_endpoint_cannot_be_reached_the_client_is_told_at_once() {
    each(|gateway, connection| {
        gateway.lose_next_hop(INSIDE);
        let request = connection.client_segment((1001, 5001), ACK, b"GET /");
        assert_eq!(reset(gateway, OUTSIDE, &request), connection.to_client(5001, 0));
    });
}

#[test]
fn whoever_was_not_told_for_want_of_answers_is_told_later() {
    each(|gateway, connection| {
        gateway.limit_answers(0);
        let data = connection.pod_segment((5001, 1006), ACK, b"200");
        assert_eq!(gateway.judge(INSIDE, &data).0, Verdict::Drop(Reason::AnswerLimit));
        gateway.limit_answers(1_000);
        assert_eq!(reset(gateway, INSIDE, &data), connection.to_client(5001, 1006));
    });
}

#[test]
fn a_trace_tells_nobody() {
    each(|gateway, connection| {
        let request = connection.client_segment((1001, 5001), ACK, b"GET /");
        for _ in 0..2 {
            let steps = gateway.trace(OUTSIDE, &request);
            assert!(
                steps.iter().any(|step| step.contains("its Service resets such connections")),
                "{steps:#?}"
            );
            assert!(steps.iter().any(|step| step.contains("endpoint_removed")), "{steps:#?}");
        }
        assert_eq!(reset(gateway, OUTSIDE, &request), connection.to_pod(1001, 5001));
    });
}
