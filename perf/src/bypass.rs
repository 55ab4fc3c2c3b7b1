//! The rings alone: packets go from each of two interfaces to the other, untouched. What Towpath's pipeline costs end to
//! end is the difference to this.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use af_xdp::{Burst, Socket, SocketConfig, Umem};
use clap::Args;

use crate::place::Place;
use crate::run::pin;

/// Arguments of `bypass`.
#[derive(Args)]
pub struct BypassArguments {
    /// One side: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    left: Place,
    /// The other side, in the same namespace
    #[arg(long)]
    right: Place,
    /// CPU to run on
    #[arg(long)]
    cpu: Option<usize>,
    /// Seconds to run
    #[arg(long, default_value_t = 3600.0)]
    time: f64,
}

/// The command `bypass`. Says `ready` on standard output once it forwards.
pub fn bypass(arguments: &BypassArguments) -> anyhow::Result<ExitCode> {
    pin(arguments.cpu)?;
    arguments.left.enter()?;
    let config = SocketConfig::default();
    let mut pool = Umem::anonymous(2 * config.chunks(), 2048).take_frames().expect("just made");
    let mut sockets = [
        Socket::open(&arguments.left.interface, 0, 0, &mut pool, &config)?,
        Socket::open(&arguments.right.interface, 0, 1, &mut pool, &config)?,
    ];
    let _programs = [arguments.left.redirect(&sockets[0])?, arguments.right.redirect(&sockets[1])?];
    println!("ready");
    let end = Instant::now() + Duration::from_secs_f64(arguments.time);
    let mut burst = Burst::with_capacity(64);
    while Instant::now() < end {
        for from in 0..2 {
            let to = 1 - from;
            if sockets[from].receive(&mut pool, &mut burst, 64) > 0 {
                sockets[to].transmit(&mut pool, &mut burst);
                burst.recycle(&mut pool); // the ring is full: dropped
                sockets[to].kick();
                sockets[from].release(&mut pool);
            }
            sockets[to].complete(&mut pool);
            sockets[from].refill(&mut pool);
        }
    }
    Ok(ExitCode::SUCCESS)
}
