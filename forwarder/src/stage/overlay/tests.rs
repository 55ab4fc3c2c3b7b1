use super::ecn::{CE, ECT_0, ECT_1, NOT_ECT};
use super::*;

/// RFC 6040 section 4.2, figure 4: rows are inner codepoints, columns outer ones.
#[test]
fn congestion_outside_is_told_inside() {
    let outer = [NOT_ECT, ECT_0, ECT_1, CE];
    for (inner, row) in [
        (NOT_ECT, [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None]),
        (ECT_0, [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)]),
        (ECT_1, [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)]),
        (CE, [Some(CE); 4]),
    ] {
        for (outer, expected) in outer.into_iter().zip(row) {
            assert_eq!(combine(inner, outer), expected, "inner {inner}, outer {outer}");
        }
    }
}

#[test]
fn both_versions_have_their_ecn_in_their_own_place() {
    let mut v4 = [0x45, 0xb8, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    let sum = checksum::checksum(&v4);
    v4[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut v6 = [0x6b, 0x81, 2, 3];
    for header in [&mut v4[..], &mut v6[..]] {
        assert_eq!(tos(header), 0xb8);
        for ecn in [CE, ECT_0, NOT_ECT, ECT_1] {
            set_ecn(header, ecn);
            assert_eq!(tos(header), 0xb8 | ecn);
        }
    }
    assert_eq!(checksum::checksum(&v4), 0);
    assert_eq!(v6, [0x6b, 0x91, 2, 3], "the flow label stays");
}

#[test]
fn room_for_the_outer_headers() {
    assert_eq!(overhead("10.0.0.1".parse::<std::net::IpAddr>().unwrap().into()), 50);
    assert_eq!(overhead("fd00::1".parse::<std::net::IpAddr>().unwrap().into()), 70);
}
