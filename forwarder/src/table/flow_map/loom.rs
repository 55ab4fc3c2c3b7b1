//! Models, checked by loom: every order of atomic operations that the memory model allows, up to a bound on preemptions.
