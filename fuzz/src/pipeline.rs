//! Any frames, in any order, through the whole pipeline on a port in memory.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use tests::frames;
use tests::pure::Pure;

thread_local! {
    /// Flows of earlier inputs are there for later ones, as on a gateway.
    static GATEWAY: RefCell<Pure> = RefCell::new(Pure::golden().expect("tests/golden"));
}

fuzz_target!(|input: &[u8]| {
    GATEWAY.with_borrow_mut(|gateway| {
        for (side, frame) in frames::split(input) {
            frames::check(&gateway.feed(side, frame));
        }
    });
});
