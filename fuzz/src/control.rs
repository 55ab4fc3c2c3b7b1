//! Any bytes on the control socket: a whole conversation with a server that keeps nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    forwarder::control::socket::client::fuzz_conversation(input);
});
