//! `towpathctl status`: the daemon's health at a glance.

use std::fmt::Write as _;

use anyhow::Result;
use config::control::{Reply, Request, Status};

use crate::connection::unexpected;
use crate::get::{View, add_row, table_of};
use crate::print::{self, Output, Paint, Tint, age, out, out_value, thousands};
use crate::{Ending, Global};

/// Arguments of `status`.
#[derive(clap::Args)]
pub struct Args {
    /// How to print
    #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
    output: Output,
}

/// Runs `status`. Ends as [`Ending::NotInForce`] while a worker lags behind the desired generation.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let status = match global.connect()?.ask(&Request::Status)? {
        Reply::Status(status) => status,
        other => return Err(unexpected(&other)),
    };
    match args.output {
        Output::Json | Output::Yaml => out_value(args.output, &status)?,
        _ => out(&text(&status, args.output == Output::Wide, global.paint()))?,
    }
    Ok(if status.workers_in_force < status.workers { Ending::NotInForce } else { Ending::Done })
}

fn text(status: &Status, wide: bool, paint: Paint) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{:<12}{value}", format!("{name}:"));
    };
    let restarts = match status.restarts {
        0 => String::new(),
        1 => paint.paint(Tint::Warn, ", restarted once by its keeper"),
        n => paint.paint(Tint::Warn, &format!(", restarted {n} times by its keeper")),
    };
    line(
        "Gateway",
        format!("{}, {}, up {}{restarts}", status.gateway, status.server, age(status.uptime_ms / 1000)),
    );
    let in_force = format!("in force on {} of {} workers", status.workers_in_force, status.workers);
    let tint = if status.workers_in_force == status.workers { Tint::Good } else { Tint::Bad };
    line(
        "Generation",
        format!(
            "{}, {}; forwarding table epoch {}",
            status.generation,
            paint.paint(tint, &in_force),
            status.epoch
        ),
    );
    let objects: Vec<String> = status
        .objects
        .iter()
        .filter(|(_, n)| **n > 0)
        .map(|(kind, n)| format!("{} {kind}{}", thousands(*n), if *n == 1 { "" } else { "s" }))
        .collect();
    let waiting = match status.slices_waiting {
        0 => String::new(),
        1 => paint.paint(Tint::Warn, "; 1 slice waits for its Service"),
        n => paint.paint(Tint::Warn, &format!("; {n} slices wait for their Service")),
    };
    line(
        "Objects",
        format!("{}{waiting}", if objects.is_empty() { "none".to_owned() } else { objects.join(", ") }),
    );
    let off = match status.frontends_off {
        0 => String::new(),
        n => paint.paint(Tint::Warn, &format!(", {} off", thousands(n))),
    };
    line("Frontends", format!("{} served{off}", thousands(status.frontends)));
    line(
        "Flows",
        format!(
            "{} of {}, {} embryonic",
            thousands(status.flows),
            thousands(status.flows_capacity),
            thousands(status.flows_embryonic)
        ),
    );
    if !status.ports.is_empty() {
        let view = View { wide, namespaces: false, now_s: 0 };
        let mut table = table_of::<config::control::PortRow>(view);
        status.ports.iter().for_each(|port| add_row(&mut table, port, view));
        let _ = write!(text, "\n{}", table.take(paint, 0));
    }
    text.push('\n');
    if status.problems.is_empty() {
        let _ = writeln!(text, "{}", paint.paint(Tint::Good, "No problems."));
    }
    for problem in &status.problems {
        let _ = writeln!(text, "{}", print::fault(paint, Tint::Bad, "Problem:", problem));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::control::PortRow;
    use config::fault::{Code, Fault};

    fn status() -> Status {
        Status {
            server: "towpathd 0.1.0".into(),
            gateway: "gw-1".into(),
            uptime_ms: 12_600_000,
            generation: 7,
            epoch: 12,
            workers: 2,
            workers_in_force: 2,
            objects: [("Service".to_owned(), 5), ("EndpointSlice".to_owned(), 1200), ("Pod".to_owned(), 0)]
                .into(),
            frontends: 18,
            flows: 1234,
            flows_embryonic: 12,
            flows_capacity: 262_144,
            ports: vec![PortRow {
                name: "uplink".into(),
                interface: "g0".into(),
                role: "outside".into(),
                mode: "copy".into(),
                queues: 1,
                up: true,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_healthy_daemon() {
        insta::assert_snapshot!(text(&status(), false, Paint::PLAIN), @"
        Gateway:    gw-1, towpathd 0.1.0, up 3h30m
        Generation: 7, in force on 2 of 2 workers; forwarding table epoch 12
        Objects:    1,200 EndpointSlices, 5 Services
        Frontends:  18 served
        Flows:      1,234 of 262,144, 12 embryonic

        NAME     INTERFACE   ROLE      LINK   MODE   QUEUES   ADDRESSES
        uplink   g0          outside   up     copy   1        <none>

        No problems.
        ");
    }

    #[test]
    fn a_daemon_with_problems() {
        let sick = Status {
            restarts: 2,
            workers_in_force: 1,
            slices_waiting: 3,
            frontends_off: 1,
            ports: Vec::new(),
            problems: vec![
                Fault::new(Code::Other, "worker 1 has made no progress for 1200 ms").remedy("see its log"),
            ],
            ..status()
        };
        insta::assert_snapshot!(text(&sick, false, Paint::PLAIN), @"
        Gateway:    gw-1, towpathd 0.1.0, up 3h30m, restarted 2 times by its keeper
        Generation: 7, in force on 1 of 2 workers; forwarding table epoch 12
        Objects:    1,200 EndpointSlices, 5 Services; 3 slices wait for their Service
        Frontends:  18 served, 1 off
        Flows:      1,234 of 262,144, 12 embryonic

        Problem: worker 1 has made no progress for 1200 ms
          remedy: see its log
        ");
    }
}
