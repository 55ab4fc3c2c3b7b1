//! Any text as a Kubernetes manifest, compiled into tables as far as it is accepted; as a gateway file; and as a packet.
#![no_main]

use std::sync::{Arc, LazyLock};

use config::gateway::Gateway;
use config::packet::PacketSpec;
use forwarder::control::compile::{Compiler, compile};
use forwarder::control::state::State;
use libfuzzer_sys::fuzz_target;

/// The gateway for input that is none itself.
static GOLDEN: LazyLock<Arc<Gateway>> = LazyLock::new(|| {
    let text = include_str!("../../tests/golden/gateway.toml");
    Arc::new(Gateway::parse(text, "gateway.toml").expect("the gateway file of the golden packets"))
});

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let _ = text.parse::<PacketSpec>();
    let gateway = Gateway::parse(text, "fuzz.toml").map_or_else(|_| GOLDEN.clone(), Arc::new);
    let manifests = config::object::parse(text, "-");
    let (state, _) = State::load(&Compiler::new(gateway.clone()).rules(), manifests.manifests);
    compile(&state, &gateway, &[]);
});
