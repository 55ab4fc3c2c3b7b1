//! Least possible forwarders: packets go from each of two interfaces to the other, untouched. `bypass` takes Towpath's rings
//! for it, so that the difference is what the pipeline costs end to end; `redirect` the kernel's XDP.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use af_xdp::{Burst, FramePool, Socket, SocketConfig, Umem};
use clap::Args;

use crate::place::Place;
use crate::run::pin;

/// The two sides.
#[derive(Args)]
struct Sides {
    /// One side: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    left: Place,
    /// The other side, in the same namespace
    #[arg(long)]
    right: Place,
    /// Seconds to run
    #[arg(long, default_value_t = 3600.0)]
    time: f64,
}

/// Arguments of `bypass`.
#[derive(Args)]
pub struct BypassArguments {
    #[command(flatten)]
    sides: Sides,
    /// CPU to run on; may be repeated, for a thread and a queue each
    #[arg(long = "cpu", required = true)]
    cpus: Vec<usize>,
}

/// Arguments of `redirect`.
#[derive(Args)]
pub struct RedirectArguments {
    #[command(flatten)]
    sides: Sides,
}

/// The command `redirect`. Says `ready` on standard output once it forwards.
pub fn redirect(RedirectArguments { sides }: &RedirectArguments) -> anyhow::Result<ExitCode> {
    sides.left.enter()?;
    let _programs = [sides.left.forward(&sides.right)?, sides.right.forward(&sides.left)?];
    println!("ready");
    thread::sleep(Duration::from_secs_f64(sides.time));
    Ok(ExitCode::SUCCESS)
}

/// The command `bypass`. Says `ready` on standard output once it forwards.
pub fn bypass(BypassArguments { sides, cpus }: &BypassArguments) -> anyhow::Result<ExitCode> {
    sides.left.enter()?;
    let mut queues: Vec<Queue> =
        (0..).zip(cpus).map(|(queue, _)| Queue::open(sides, queue)).collect::<anyhow::Result<_>>()?;
    let _programs = [
        sides.left.redirect(queues.iter().map(|queue| &queue.sockets[0]))?,
        sides.right.redirect(queues.iter().map(|queue| &queue.sockets[1]))?,
    ];
    println!("ready");
    let end = Instant::now() + Duration::from_secs_f64(sides.time);
    thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .zip(cpus)
            .map(|(queue, &cpu)| scope.spawn(move || pin(Some(cpu)).map(|()| queue.forward(end))))
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("forwarding does not panic"))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The same queue of both sides, with the frames for it.
struct Queue {
    sockets: [Socket; 2],
    pool: FramePool,
}

impl Queue {
    fn open(sides: &Sides, queue: u32) -> anyhow::Result<Queue> {
        let config = SocketConfig::default();
        let mut pool = Umem::anonymous(2 * config.chunks(), 2048).take_frames().expect("just made");
        let sockets = [
            Socket::open(&sides.left.interface, queue, 0, &mut pool, &config)?,
            Socket::open(&sides.right.interface, queue, 1, &mut pool, &config)?,
        ];
        Ok(Queue { sockets, pool })
    }

    fn forward(&mut self, end: Instant) {
        let Queue { sockets, pool } = self;
        let mut burst = Burst::with_capacity(64);
        while Instant::now() < end {
            let mut is_idle = true;
            for from in 0..2 {
                let to = 1 - from;
                if sockets[from].receive(pool, &mut burst, 64) > 0 {
                    is_idle = false;
                    sockets[to].transmit(pool, &mut burst);
                    burst.recycle(pool); // the ring is full: dropped
                    sockets[to].kick();
                    sockets[from].release(pool);
                }
                sockets[to].complete(pool);
                sockets[from].refill(pool);
            }
            if is_idle {
                af_xdp::pause();
            }
        }
    }
}
