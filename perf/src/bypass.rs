//! Least possible forwarders: packets go from each of two interfaces to the other, untouched. `bypass` takes Towpath's rings
//! for it, so that the difference is what the pipeline costs end to end; `redirect` the kernel's XDP.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use af_xdp::{Burst, BusyPoll, FramePool, Socket, SocketConfig, Umem};
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
    #[command(flatten)]
    tricks: Tricks,
}

/// What Towpath's rings do by default, to be left out or done otherwise, so that it shows what it is good for.
#[derive(Args, Clone, Copy)]
struct Tricks {
    /// Descriptors of each ring; twice as many of the fill ring [default: Towpath's]
    #[arg(long)]
    rings: Option<u32>,
    /// Packets that one system call may send [default: Towpath's]
    #[arg(long)]
    tx_budget: Option<u32>,
    /// Have the worker poll the driver for so many microseconds a system call
    #[arg(long)]
    busy_poll: Option<u32>,
    /// Packets a burst
    #[arg(long, default_value_t = 64)]
    burst: usize,
    /// Look at empty rings again at once
    #[arg(long)]
    spin: bool,
}

impl Tricks {
    fn config(&self) -> SocketConfig {
        let mut config = SocketConfig::default();
        if let Some(len) = self.rings {
            (config.rx_len, config.tx_len, config.completion_len, config.fill_len) = (len, len, len, 2 * len);
        }
        config.tx_budget = self.tx_budget.unwrap_or(config.tx_budget);
        config.busy_poll = self.busy_poll.map(|time_us| BusyPoll { time_us, budget: 64 });
        config
    }
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
pub fn bypass(BypassArguments { sides, cpus, tricks }: &BypassArguments) -> anyhow::Result<ExitCode> {
    sides.left.enter()?;
    let mut queues: Vec<Queue> =
        (0..).zip(cpus).map(|(queue, _)| Queue::open(sides, queue, tricks)).collect::<anyhow::Result<_>>()?;
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
            .map(|(queue, &cpu)| scope.spawn(move || pin(Some(cpu)).map(|()| queue.forward(end, tricks))))
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
    fn open(sides: &Sides, queue: u32, tricks: &Tricks) -> anyhow::Result<Queue> {
        let config = tricks.config();
        let mut pool = Umem::anonymous(2 * config.chunks(), 2048).take_frames().expect("just made");
        let sockets = [
            Socket::open(&sides.left.interface, queue, 0, &mut pool, &config)?,
            Socket::open(&sides.right.interface, queue, 1, &mut pool, &config)?,
        ];
        Ok(Queue { sockets, pool })
    }

    fn forward(&mut self, end: Instant, tricks: &Tricks) {
        let Queue { sockets, pool } = self;
        let mut burst = Burst::with_capacity(tricks.burst);
        while Instant::now() < end {
            let mut is_idle = true;
            for from in 0..2 {
                let to = 1 - from;
                if sockets[from].receive(pool, &mut burst, tricks.burst) > 0 {
                    is_idle = false;
                    sockets[to].transmit(pool, &mut burst);
                    burst.recycle(pool); // the ring is full: dropped
                    sockets[to].kick();
                    sockets[from].release(pool);
                }
                sockets[to].complete(pool);
                sockets[from].refill(pool);
            }
            if is_idle && !tricks.spin {
                af_xdp::pause();
            }
        }
    }
}
