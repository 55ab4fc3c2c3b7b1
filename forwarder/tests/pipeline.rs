//! The pipeline on whole packets: a gateway with a client side and a pod side, one Service, no I/O.

#[allow(dead_code)] // the bench uses the rest of it
mod rig;

use std::sync::Arc;

use config::gateway::{MssClamp, SourceChecks};
use forwarder::addr::Addr;
use forwarder::verdict::{Reason, Verdict};
use rig::{
    CLIENT, CLUSTER_IP, Gateway, INSIDE, OUTSIDE, POD_1, POD_2, VIP, checksums_right, describe, tcp, udp,
};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

#[test]
fn a_connection_goes_to_one_endpoint_and_back() {
    let mut gateway = Gateway::new();
    let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, SYN, b""));
    let (endpoint, _) = describe(&out).split_once(" S").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert!(endpoint.starts_with("tcp 198.51.100.7:4242 > 10.244."), "{endpoint}");
    assert!(checksums_right(&out));
    let pod = rig::destination(&out);
    let back = gateway.forwarded(INSIDE, OUTSIDE, &tcp(pod, 8080, CLIENT, 4242, SYN | ACK, b""));
    assert!(describe(&back).starts_with("tcp 203.0.113.10:80 > 198.51.100.7:4242"), "{}", describe(&back));
    assert!(checksums_right(&back));
    let again = gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, ACK, b"GET /"));
    assert_eq!(rig::destination(&again), pod);
    assert_eq!(gateway.flows(), 1);
}

#[test]
fn ttl_counts_and_the_link_layer_is_the_next_hop() {
    let mut gateway = Gateway::new();
    let packet = udp(CLIENT, 1000, VIP, 53, b"?");
    let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
    assert_eq!(out[22], packet[22] - 1);
    assert_eq!(&out[..6], &rig::NODE_MAC);
    assert_eq!(&out[6..12], &rig::port_mac(INSIDE));
}

#[test]
fn a_zero_udp_checksum_stays_zero() {
    let mut gateway = Gateway::new();
    let mut packet = udp(CLIENT, 1000, VIP, 53, b"?");
    packet[40..42].fill(0);
    let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
    assert_eq!(&out[40..42], &[0, 0]);
}

#[test]
fn a_bad_checksum_stays_bad() {
    let mut gateway = Gateway::new();
    let mut packet = udp(CLIENT, 1000, VIP, 53, b"?");
    packet[41] ^= 0x55;
    let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
    assert!(!checksums_right(&out));
}

#[test]
fn an_unfinished_checksum_is_finished_on_veth() {
    let mut gateway = Gateway::new();
    for packet in [
        udp(CLIENT, 1000, VIP, 53, b"odd"),
        tcp(CLIENT, 1001, VIP, 80, SYN, b""),
        udp(rig::addr("2001:db8:1::7"), 1000, rig::addr("2001:db8::10"), 53, b"v6"),
    ] {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &rig::leave_checksum_unfinished(packet));
        assert!(checksums_right(&out), "{}", describe(&out));
    }
}

#[test]
fn ipv6_is_translated_both_ways() {
    let mut gateway = Gateway::new();
    let client: Addr = rig::addr("2001:db8:1::7");
    let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(client, 4242, rig::addr("2001:db8::10"), 80, SYN, b""));
    assert!(checksums_right(&out));
    let pod = rig::destination(&out);
    assert_eq!(pod, rig::addr("fd00:244:0:1::5"));
    let back = gateway.forwarded(INSIDE, OUTSIDE, &tcp(pod, 8080, client, 4242, SYN | ACK, b""));
    assert!(checksums_right(&back));
    assert_eq!(rig::source(&back), rig::addr("2001:db8::10"));
}

#[test]
fn masquerade_takes_an_address_of_the_gateway_and_gives_the_answer_back() {
    let mut gateway = Gateway::new();
    gateway.masquerade(true);
    let mut sources = std::collections::HashSet::new();
    for port in 2000..2100 {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &udp(CLIENT, port, VIP, 53, b"?"));
        assert_eq!(rig::source(&out), rig::addr("10.0.0.1"));
        let snat = rig::ports(&out).0;
        assert!((61000..=61999).contains(&snat), "{snat}");
        assert!(sources.insert((rig::destination(&out), snat)), "source port {snat} used twice");
        let back = gateway.forwarded(
            INSIDE,
            OUTSIDE,
            &udp(rig::destination(&out), 5353, rig::addr("10.0.0.1"), snat, b"!"),
        );
        assert_eq!((rig::source(&back), rig::destination(&back)), (VIP, CLIENT));
        assert_eq!(rig::ports(&back), (53, port));
        assert!(checksums_right(&back));
    }
}

#[test]
fn a_client_port_inside_the_range_is_kept() {
    let mut gateway = Gateway::new();
    gateway.masquerade(true);
    let out = gateway.forwarded(OUTSIDE, INSIDE, &udp(CLIENT, 61234, VIP, 53, b"?"));
    assert_eq!(rig::ports(&out).0, 61234);
}

/// Rule 5.6.
#[test]
fn a_pod_that_reaches_itself_is_masqueraded() {
    let mut gateway = Gateway::new();
    for port in 3000..3064 {
        let out = gateway.forwarded(INSIDE, INSIDE, &udp(POD_1, port, CLUSTER_IP, 53, b"?"));
        let hairpin = rig::destination(&out) == POD_1;
        assert_eq!(rig::source(&out) != POD_1, hairpin);
    }
}

/// Rule 5.8.
#[test]
fn two_vips_with_one_endpoint_and_one_client_port_stay_apart() {
    let mut gateway = Gateway::new();
    gateway.one_endpoint();
    let first = gateway.forwarded(INSIDE, INSIDE, &udp(POD_2, 7000, CLUSTER_IP, 53, b"1"));
    let second = gateway.forwarded(INSIDE, INSIDE, &udp(POD_2, 7000, VIP, 53, b"2"));
    assert_eq!(rig::ports(&first).0, 7000);
    assert_ne!(rig::ports(&second).0, 7000);
    let back = gateway.forwarded(INSIDE, INSIDE, &udp(POD_1, 5353, POD_2, rig::ports(&second).0, b"2"));
    assert_eq!((rig::source(&back), rig::ports(&back)), (VIP, (53, 7000)));
}

/// Rules 4.4, 4.7.
#[test]
fn rejects_speak_the_protocol_of_the_client() {
    let mut gateway = Gateway::new();
    let reset = gateway.answered(OUTSIDE, Reason::UnknownPort, &tcp(CLIENT, 4242, VIP, 81, SYN, b""));
    assert!(
        describe(&reset).starts_with("tcp 203.0.113.10:81 > 198.51.100.7:4242 RA"),
        "{}",
        describe(&reset)
    );
    assert!(checksums_right(&reset));
    let unreachable = gateway.answered(OUTSIDE, Reason::UnknownPort, &udp(CLIENT, 4242, VIP, 81, b"x"));
    assert!(
        describe(&unreachable).starts_with("icmp 198.51.100.1 > 198.51.100.7 3/3"),
        "{}",
        describe(&unreachable)
    );
    assert!(checksums_right(&unreachable));
    assert_eq!(gateway.flows(), 0, "a rejected packet never creates a flow");
    let silent = gateway.judge(OUTSIDE, &tcp(CLIENT, 4242, VIP, 81, 0x04, b""));
    assert_eq!(silent.0, Verdict::Drop(Reason::UnknownPort), "a RST is never answered");
    // Three in a second, and three in the next.
    gateway.limit_answers(3);
    for _ in 0..2 {
        for _ in 0..3 {
            gateway.answered(OUTSIDE, Reason::UnknownPort, &udp(CLIENT, 4242, VIP, 81, b"x"));
        }
        let more = gateway.judge(OUTSIDE, &udp(CLIENT, 4242, VIP, 81, b"x"));
        assert_eq!(more.0, Verdict::Drop(Reason::AnswerLimit));
        gateway.now_s += 1;
    }
}

/// Rule 14.6.
#[test]
fn a_ping_of_an_owned_address_is_answered() {
    let mut gateway = Gateway::new();
    let reply = gateway.answered(OUTSIDE, Reason::EchoAnswered, &rig::echo(CLIENT, VIP, 7, b"payload"));
    assert!(describe(&reply).starts_with("icmp 203.0.113.10 > 198.51.100.7 0/0"), "{}", describe(&reply));
    assert!(checksums_right(&reply));
}

/// Rules 4.6, 14.4.
#[test]
fn a_cluster_ip_is_for_the_inside() {
    let mut gateway = Gateway::new();
    let from = |gateway: &mut Gateway| gateway.judge(OUTSIDE, &udp(CLIENT, 1, CLUSTER_IP, 53, b"")).0;
    assert_eq!(from(&mut gateway), Verdict::Drop(Reason::ClusterInternal));
    gateway.expose_cluster_ips();
    assert!(matches!(from(&mut gateway), Verdict::Forward { .. }));
    let unknown = gateway.judge(INSIDE, &udp(POD_1, 1, rig::addr("10.96.77.77"), 53, b"")).0;
    assert_eq!(unknown, Verdict::Drop(Reason::UnknownService));
}

/// Rule 4.7.
#[test]
fn errors_about_hops_and_sizes_come_from_the_vip() {
    let mut gateway = Gateway::new();
    let mut packet = udp(CLIENT, 1000, VIP, 53, b"?");
    rig::set_ttl(&mut packet, 1);
    let error = gateway.answered(OUTSIDE, Reason::TtlExceeded, &packet);
    assert!(describe(&error).starts_with("icmp 203.0.113.10 > 198.51.100.7 11/0"), "{}", describe(&error));
    assert!(checksums_right(&error));
    assert_eq!(&error[42..], &packet[14..], "the packet is quoted as it came");
    let error = gateway.answered(OUTSIDE, Reason::PacketTooBig, &udp(CLIENT, 1000, VIP, 53, &[0; 1473]));
    assert!(
        describe(&error).starts_with("icmp 203.0.113.10 > 198.51.100.7 3/4 mtu 1500"),
        "{}",
        describe(&error)
    );
    assert_eq!(error.len(), 14 + 576);
    assert_eq!(gateway.flows(), 0);
}

#[test]
fn an_icmp_error_is_translated_with_the_packet_that_it_quotes() {
    let mut gateway = Gateway::new();
    let request = udp(CLIENT, 1000, VIP, 53, b"?");
    let out = gateway.forwarded(OUTSIDE, INSIDE, &request);
    let pod = rig::destination(&out);
    for sender in [pod, rig::addr("10.244.9.9")] {
        let error = rig::unreachable(sender, CLIENT, &out[14..]);
        let back = gateway.forwarded(INSIDE, OUTSIDE, &error);
        assert!(describe(&back).starts_with("icmp 203.0.113.10 > 198.51.100.7 3/3"), "{}", describe(&back));
        assert!(checksums_right(&back));
        let quoted = &back[42..];
        assert_eq!(
            &quoted[12..28],
            &request[26..42],
            "addresses, ports, length and checksum as the client sent them"
        );
    }
    let unknown = rig::unreachable(rig::addr("198.51.100.9"), VIP, &udp(VIP, 53, CLIENT, 9, b"")[14..]);
    assert_eq!(gateway.judge(OUTSIDE, &unknown).0, Verdict::Drop(Reason::NoFlow));
}

#[test]
fn an_icmp_error_about_a_routed_packet_is_routed_as_it_is() {
    let mut gateway = Gateway::new();
    // The gateway keeps no state of it, and the client must learn of a small MTU all the same.
    let out = gateway.forwarded(OUTSIDE, INSIDE, &udp(CLIENT, 1000, POD_1, 9000, b"?"));
    for sender in [POD_1, rig::addr("10.244.9.9")] {
        let error = rig::unreachable(sender, CLIENT, &out[14..]);
        let back = gateway.forwarded(INSIDE, OUTSIDE, &error);
        assert_eq!(back[26..], error[26..], "addresses and message as they came");
        assert!(checksums_right(&back));
    }
    // To an address of the gateway itself, it is the kernel's.
    let own = rig::addr("10.0.0.1");
    let error = rig::unreachable(POD_1, own, &udp(own, 61000, POD_1, 9, b"")[14..]);
    assert_eq!(gateway.judge(INSIDE, &error).0, Verdict::Punt);
}

#[test]
fn an_icmp_error_that_is_made_up_goes_nowhere() {
    let mut gateway = Gateway::new();
    let out = gateway.forwarded(OUTSIDE, INSIDE, &udp(CLIENT, 1000, VIP, 53, b"?"));
    let pod = rig::destination(&out);
    let no_flow = Verdict::Drop(Reason::NoFlow);
    let other = rig::unreachable(pod, rig::addr("198.51.100.8"), &out[14..]);
    assert_eq!(gateway.judge(INSIDE, &other).0, no_flow, "not to who sent the packet");
    let mut later_fragment = out[14..].to_vec();
    later_fragment[7] = 1;
    let error = rig::unreachable(pod, CLIENT, &later_fragment);
    assert_eq!(gateway.judge(INSIDE, &error).0, no_flow, "about a packet without ports");
    let mut garbage = out[14..].to_vec();
    garbage[0] = 0x65;
    let error = rig::unreachable(pod, CLIENT, &garbage);
    assert_eq!(gateway.judge(INSIDE, &error).0, no_flow, "about a packet of no version");
    let mut redirect = rig::unreachable(pod, CLIENT, &out[14..]);
    // Type and code, and what they change in the checksum.
    redirect[34..36].copy_from_slice(&[5, 1]);
    redirect[36] -= 2;
    redirect[37] += 2;
    assert!(checksums_right(&redirect));
    let verdict = gateway.judge(INSIDE, &redirect).0;
    assert_eq!(verdict, Verdict::Drop(Reason::IcmpNotForUs), "another way to the pod is not for the client");
    assert!(matches!(
        gateway.judge(INSIDE, &rig::unreachable(pod, CLIENT, &out[14..])).0,
        Verdict::Forward { .. }
    ));
}

/// A packet that one source check refuses, with the side that it comes in by.
struct Refused {
    reason: Reason,
    port: u8,
    packet: Vec<u8>,
    what: &'static str,
}

fn refused() -> Vec<Refused> {
    let (own, vip6) = (rig::addr("198.51.100.1"), rig::addr("2001:db8::10"));
    let refused =
        |reason, port, src, dst, what| Refused { reason, port, packet: udp(src, 1, dst, 53, b""), what };
    let mut all = vec![
        refused(Reason::PodFromOutside, OUTSIDE, POD_1, VIP, "pod source from the outside"),
        refused(Reason::ClientFromInside, INSIDE, CLIENT, VIP, "client source from the inside"),
        refused(Reason::OwnSource, OUTSIDE, own, VIP, "own address"),
        refused(Reason::OwnSource, OUTSIDE, VIP, POD_1, "VIP as source"),
        refused(Reason::Land, INSIDE, POD_1, POD_1, "from itself to itself"),
    ];
    for source in ["127.0.0.1", "0.0.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "ff02::1"] {
        let source = rig::addr(source);
        let to = if source.is_v4() { VIP } else { vip6 };
        all.push(refused(Reason::MartianSource, OUTSIDE, source, to, "martian"));
    }
    all
}

/// The switch of a source check.
fn switch(checks: &mut SourceChecks, reason: Reason) -> &mut bool {
    match reason {
        Reason::PodFromOutside => &mut checks.pod_from_outside,
        Reason::ClientFromInside => &mut checks.client_from_inside,
        Reason::ForeignSource => &mut checks.foreign_source,
        Reason::OwnSource => &mut checks.own_source,
        Reason::MartianSource => &mut checks.martian_source,
        Reason::Land => &mut checks.land,
        _ => unreachable!("no source check"),
    }
}

#[test]
fn each_source_that_cannot_be_right_is_dropped_for_its_own_reason() {
    let mut gateway = Gateway::new();
    for Refused { reason, port, packet, what } in refused() {
        assert_eq!(gateway.judge(port, &packet).0, Verdict::Drop(reason), "{what}");
    }
    assert_eq!(gateway.judge(OUTSIDE, &udp(VIP, 53, VIP, 53, b"")).0, Verdict::Drop(Reason::Land));
}

#[test]
fn each_source_check_has_a_switch_of_its_own() {
    let off = SourceChecks {
        pod_from_outside: false,
        client_from_inside: false,
        foreign_source: false,
        own_source: false,
        martian_source: false,
        land: false,
    };
    for Refused { reason, port, packet, what } in refused() {
        let mut gateway = Gateway::new();
        let mut judge = |checks| {
            Arc::make_mut(&mut gateway.tables.settings).source_checks = checks;
            gateway.judge(port, &packet).0
        };
        let mut checks = off;
        *switch(&mut checks, reason) = true;
        assert_eq!(judge(checks), Verdict::Drop(reason), "{what}: all others are off");
        checks = SourceChecks::default();
        *switch(&mut checks, reason) = false;
        assert!(matches!(judge(checks), Verdict::Forward { .. }), "{what}: it is off");
    }
}

#[test]
fn a_pod_at_its_own_port_sends_from_its_own_address_only() {
    let mut gateway = Gateway::new();
    Arc::make_mut(&mut gateway.tables.settings).ports[usize::from(INSIDE)].pod = true;
    assert!(matches!(gateway.judge(INSIDE, &udp(POD_1, 1, VIP, 53, b"")).0, Verdict::Forward { .. }));
    let foreign = udp(CLIENT, 1, VIP, 53, b"");
    assert_eq!(gateway.judge(INSIDE, &foreign).0, Verdict::Drop(Reason::ForeignSource));
    *switch(&mut Arc::make_mut(&mut gateway.tables.settings).source_checks, Reason::ForeignSource) = false;
    assert!(matches!(gateway.judge(INSIDE, &foreign).0, Verdict::Forward { .. }));
}

#[test]
fn a_mapped_source_is_never_taken_for_ipv4() {
    let mut gateway = Gateway::new();
    let mut packet = udp(rig::addr("2001:db8:c::2"), 1, rig::addr("2001:db8::10"), 53, b"");
    packet[22..38].copy_from_slice(&std::net::Ipv4Addr::new(198, 51, 100, 2).to_ipv6_mapped().octets());
    Arc::make_mut(&mut gateway.tables.settings).source_checks.martian_source = false;
    assert_eq!(gateway.judge(OUTSIDE, &packet).0, Verdict::Drop(Reason::MartianSource));
}

#[test]
fn frames_for_others_are_not_forwarded() {
    let mut gateway = Gateway::new();
    for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 9, 9, 9, 9, 9]] {
        let mut packet = udp(CLIENT, 1, VIP, 53, b"");
        packet[..6].copy_from_slice(&mac);
        assert_eq!(gateway.judge(OUTSIDE, &packet).0, Verdict::Drop(Reason::NotOurMac));
    }
}

#[test]
fn what_is_not_ours_is_punted_untouched() {
    let mut gateway = Gateway::new();
    let mut arp = vec![0u8; 60];
    arp[..6].copy_from_slice(&rig::port_mac(OUTSIDE));
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    for packet in [
        arp,
        udp(CLIENT, 1, rig::addr("198.51.100.1"), 22, b""),
        udp(CLIENT, 1, rig::addr("224.0.0.5"), 22, b""),
    ] {
        let (verdict, after) = gateway.judge(OUTSIDE, &packet);
        assert_eq!(verdict, Verdict::Punt);
        assert_eq!(after[6..], packet[6..]);
    }
}

#[test]
fn link_layer_padding_does_not_leave() {
    let mut gateway = Gateway::new();
    let mut packet = udp(CLIENT, 1, VIP, 53, b"x");
    packet.extend([0xa5; 17]);
    let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
    assert_eq!(out.len(), 14 + 20 + 8 + 1);
}

#[test]
fn a_vlan_tag_is_kept() {
    let mut gateway = Gateway::new();
    let mut packet = udp(CLIENT, 1, VIP, 53, b"x");
    packet.splice(12..12, [0x81, 0x00, 0x00, 0x2a]);
    let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
    assert_eq!(&out[12..16], &[0x81, 0x00, 0x00, 0x2a]);
    assert_eq!(&out[16..18], &[0x08, 0x00]);
}

#[test]
fn session_affinity_goes_by_client_whatever_the_vip() {
    let mut gateway = Gateway::new();
    gateway.affinity(10_800);
    let first = rig::destination(&gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 1, VIP, 80, SYN, b"")));
    for port in 2..40 {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, SYN, b""));
        assert_eq!(rig::destination(&out), first);
    }
    gateway.now_s += 10_801;
    let mut seen = std::collections::HashSet::new();
    for port in 100..140 {
        gateway.now_s += 10_801;
        seen.insert(rig::destination(&gateway.forwarded(
            OUTSIDE,
            INSIDE,
            &tcp(CLIENT, port, VIP, 80, SYN, b""),
        )));
    }
    assert_eq!(seen.len(), 2, "after expiry the choice is random again");
}

#[test]
fn the_end_of_a_connection_frees_its_ports() {
    let mut gateway = Gateway::new();
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, SYN, b""));
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, 0x04, b""));
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, SYN, b""));
    assert_eq!(gateway.flows(), 1);
    for reason in [0x04u8, 0x11] {
        let verdict = gateway.judge(OUTSIDE, &tcp(CLIENT, 5555, VIP, 80, reason, b"")).0;
        assert_eq!(verdict, Verdict::Drop(Reason::NoFlow), "the end of a connection that nobody knows");
    }
}

#[test]
fn every_truncation_has_a_verdict() {
    let mut gateway = Gateway::new();
    let packets = [
        udp(CLIENT, 1, VIP, 53, b"payload"),
        tcp(CLIENT, 1, VIP, 80, SYN, b"payload"),
        tcp(rig::addr("2001:db8:1::7"), 1, rig::addr("2001:db8::10"), 80, SYN, b"payload"),
        rig::unreachable(POD_1, CLIENT, &udp(CLIENT, 1, POD_1, 53, b"payload")[14..]),
        rig::echo(CLIENT, VIP, 7, b"payload"),
    ];
    for packet in packets {
        for len in 0..=packet.len() {
            let (verdict, _) = gateway.judge(OUTSIDE, &packet[..len]);
            assert_ne!(verdict, Verdict::Undecided, "{len} bytes");
        }
    }
}

/// The option that names `mss` as the maximum segment size.
fn mss(mss: u16) -> Vec<u8> {
    let [high, low] = mss.to_be_bytes();
    vec![2, 4, high, low]
}

/// What becomes of the MSS 1460 of a client's SYN and of the endpoint's SYN-ACK.
fn clamped(gateway: &mut Gateway, client: Addr, vip: Addr) -> (Vec<u8>, Vec<u8>) {
    let out = gateway.forwarded(OUTSIDE, INSIDE, &rig::syn(client, 4242, vip, 80, SYN, &mss(1460)));
    assert!(checksums_right(&out));
    let pod = rig::destination(&out);
    let back = gateway.forwarded(INSIDE, OUTSIDE, &rig::syn(pod, 8080, client, 4242, SYN | ACK, &mss(1460)));
    assert!(checksums_right(&back));
    (rig::options(&out), rig::options(&back))
}

#[test]
fn segments_are_clamped_to_the_smaller_mtu_of_both_ways() {
    let v6 = |text| rig::addr(text);
    for (client, vip, headers) in [(CLIENT, VIP, 40), (v6("2001:db8:1::7"), v6("2001:db8::10"), 60)] {
        for (outside, inside) in
            [((1280, 1280), (1500, 1500)), ((1500, 1500), (1280, 1280)), ((1500, 1280), (9000, 9000))]
        {
            let mut gateway = Gateway::new();
            gateway.set_mtu(OUTSIDE, outside.0, outside.1);
            gateway.set_mtu(INSIDE, inside.0, inside.1);
            let expected = mss(1280 - headers);
            assert_eq!(clamped(&mut gateway, client, vip), (expected.clone(), expected), "{vip}");
        }
    }
}

#[test]
fn segments_that_fit_are_left_alone() {
    let mut gateway = Gateway::new();
    assert_eq!(clamped(&mut gateway, CLIENT, VIP), (mss(1460), mss(1460)));
    gateway.clamp_mss(MssClamp::AtMost(1400));
    assert_eq!(clamped(&mut gateway, CLIENT, VIP), (mss(1400), mss(1400)));
    gateway.set_mtu(OUTSIDE, 1280, 1280);
    assert_eq!(
        clamped(&mut gateway, CLIENT, VIP),
        (mss(1240), mss(1240)),
        "the number is not all that counts"
    );
    gateway.clamp_mss(MssClamp::Off);
    assert_eq!(clamped(&mut gateway, CLIENT, VIP), (mss(1460), mss(1460)));
    // Without the option there is nothing to lower; with a smaller one neither.
    gateway.clamp_mss(MssClamp::Auto);
    for options in [&[][..], &mss(536), &[2, 3, 5, 1], &[4, 2, 1, 1]] {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &rig::syn(CLIENT, 4242, VIP, 80, SYN, options));
        assert_eq!(rig::options(&out), options);
        assert!(checksums_right(&out));
    }
}

#[test]
fn the_option_is_found_at_any_offset_and_its_checksum_stays_right_or_wrong() {
    let mut gateway = Gateway::new();
    gateway.set_mtu(OUTSIDE, 1280, 1280);
    let (big, small) = (mss(1460), mss(1240));
    for (before, after) in [(&[][..], &[][..]), (&[1], &[1, 1, 1]), (&[4, 2, 1], &[0]), (&[8, 3, 9], &[1])] {
        let around = |mss: &[u8]| [before, mss, after].concat();
        let packet = rig::syn(CLIENT, 4242, VIP, 80, SYN, &around(&big));
        for packet in [packet.clone(), rig::leave_checksum_unfinished(packet.clone())] {
            let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
            assert_eq!(rig::options(&out), around(&small));
            assert!(checksums_right(&out), "{before:?}");
        }
        let mut bad = packet;
        bad[50] ^= 0x55;
        let out = gateway.forwarded(OUTSIDE, INSIDE, &bad);
        assert_eq!(rig::options(&out), around(&small));
        assert!(!checksums_right(&out));
    }
    let twice = [mss(1460), mss(1300)].concat();
    let out = gateway.forwarded(OUTSIDE, INSIDE, &rig::syn(CLIENT, 4242, VIP, 80, SYN, &twice));
    assert_eq!(rig::options(&out), [mss(1240), mss(1240)].concat());
    assert!(checksums_right(&out));
}

#[test]
fn routed_connections_are_clamped_too_and_data_is_not() {
    let mut gateway = Gateway::new();
    gateway.set_mtu(OUTSIDE, 1280, 1280);
    let out = gateway.forwarded(OUTSIDE, INSIDE, &rig::syn(CLIENT, 4242, POD_1, 80, SYN, &mss(1460)));
    assert_eq!((rig::options(&out), rig::destination(&out)), (mss(1240), POD_1));
    assert!(checksums_right(&out));
    // What looks like the option in the payload of a segment without SYN is data.
    let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, POD_1, 80, ACK, &mss(1460)));
    assert_eq!(&out[54..58], mss(1460));
}
