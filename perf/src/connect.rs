//! TCP connections by real sockets, one after the other: connect, request, answer, close. Clients and servers run here, in
//! their namespaces, so that one program knows of every connection what became of it.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::clock::{busy_s, now_ns};
use crate::place::Place;
use crate::range::Target;
use crate::report::{Latency, commit, kernel, machine};
use crate::run::pin;

/// Arguments of `connect`.
#[derive(Args)]
pub struct ConnectArguments {
    /// Where clients are: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    client_if: Place,
    /// Where servers are: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    server_if: Place,
    /// Service: ADDRESS:PORT
    #[arg(long)]
    dst: Target,
    /// Endpoints: FIRST-LAST:PORT; they must be addresses of the server's namespace
    #[arg(long = "expect")]
    expected: Target,
    /// Connections at one time
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Seconds of measurement
    #[arg(long, default_value_t = 10.0)]
    time: f64,
    /// Seconds of the same load before it, which are not counted
    #[arg(long, default_value_t = 0.3)]
    warm_up: f64,
    /// CPU of clients and servers
    #[arg(long)]
    cpu: Option<usize>,
    /// Name in reports
    #[arg(long, default_value = "connect")]
    name: String,
    /// Write the report as JSON to standard output
    #[arg(long)]
    json: bool,
}

/// What has shown.
#[derive(Serialize)]
struct Report {
    scenario: String,
    /// Connections that were opened, served and closed.
    connections: u64,
    /// Connections that failed, or did not reach an endpoint.
    errors: u64,
    connections_per_s: f64,
    /// Busy time of all CPUs of this machine, clients and servers included.
    busy_cpu_s: f64,
    /// From connecting to the end of the answer.
    latency: Latency,
    machine: String,
    kernel: String,
    commit: String,
}

/// Bytes of a request, and of its answer.
const MESSAGE_LEN: usize = 64;
/// Long enough for a lost packet to be sent again, twice.
const PATIENCE: Duration = Duration::from_secs(5);

/// The command `connect`. Exit code 2 if a connection failed.
pub fn connect(arguments: &ConnectArguments) -> anyhow::Result<ExitCode> {
    ensure!(
        arguments.clients > 0 && arguments.time > 0.0 && arguments.warm_up >= 0.0,
        "--clients and --time must be more than 0, --warm-up not less"
    );
    thread::scope(|scope| scope.spawn(|| serve(arguments)).join().expect("opening does not panic"))?;
    let begin_ns = now_ns() + (arguments.warm_up * 1e9) as u64;
    let end_ns = begin_ns + (arguments.time * 1e9) as u64;
    let (results, busy) = thread::scope(|scope| {
        let clients: Vec<_> =
            (0..arguments.clients).map(|_| scope.spawn(|| client(arguments, begin_ns, end_ns))).collect();
        thread::sleep(Duration::from_nanos(begin_ns.saturating_sub(now_ns())));
        let before = busy_s();
        thread::sleep(Duration::from_nanos(end_ns.saturating_sub(now_ns())));
        let busy = busy_s() - before;
        let results: anyhow::Result<Vec<Outcome>> =
            clients.into_iter().map(|client| client.join().expect("connecting does not panic")).collect();
        anyhow::Ok((results?, busy))
    })?;
    let mut all = Outcome::new();
    for one in results {
        all.errors += one.errors;
        all.time_ns.add(&one.time_ns).expect("histograms of the same bounds");
    }
    let report = Report {
        scenario: arguments.name.clone(),
        connections: all.time_ns.len(),
        errors: all.errors,
        connections_per_s: all.time_ns.len() as f64 / arguments.time,
        busy_cpu_s: busy,
        latency: Latency::of(&all.time_ns),
        machine: machine(),
        kernel: kernel(),
        commit: commit(),
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "{}: {:.0} connections/s, {} errors, p50 {:.0} us, p99 {:.0} us, {:.0} per busy CPU-second",
            report.scenario,
            report.connections_per_s,
            report.errors,
            report.latency.p50_us,
            report.latency.p99_us,
            report.connections as f64 / report.busy_cpu_s.max(1e-9),
        );
    }
    Ok(if report.errors == 0 { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// Starts a server for each client; they end with the program.
fn serve(arguments: &ConnectArguments) -> anyhow::Result<()> {
    arguments.server_if.enter()?;
    pin(arguments.cpu)?;
    let expected = arguments.expected;
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), expected.port);
    let listener = TcpListener::bind(any).with_context(|| format!("listen on {any}"))?;
    for _ in 0..arguments.clients {
        let listener = listener.try_clone()?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // The client sees what failed.
                let _ = answer(stream, expected);
            }
        });
    }
    Ok(())
}

/// Sends the request back, if it reached an endpoint, and waits until the client closes.
fn answer(mut stream: TcpStream, expected: Target) -> io::Result<()> {
    let mut message = [0; MESSAGE_LEN];
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read_exact(&mut message)?;
    let reached: IpAddr = stream.local_addr()?.ip().to_canonical();
    if expected.addrs.contains(reached) {
        stream.write_all(&message)?;
        stream.read_exact(&mut message[..1])?;
    }
    Ok(())
}

/// What a client has seen between begin and end.
struct Outcome {
    time_ns: Histogram<u64>,
    errors: u64,
}

impl Outcome {
    fn new() -> Outcome {
        Outcome {
            time_ns: Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("valid bounds"),
            errors: 0,
        }
    }
}

fn client(arguments: &ConnectArguments, begin_ns: u64, end_ns: u64) -> anyhow::Result<Outcome> {
    arguments.client_if.enter()?;
    pin(arguments.cpu)?;
    let service = SocketAddr::new(arguments.dst.addrs.get(0), arguments.dst.port);
    let mut outcome = Outcome::new();
    loop {
        let start_ns = now_ns();
        if start_ns >= end_ns {
            return Ok(outcome);
        }
        let result = exchange(service, start_ns);
        let now_ns = now_ns();
        if result.is_err() {
            outcome.errors += 1;
        } else if start_ns >= begin_ns && now_ns < end_ns {
            outcome.time_ns.saturating_record(now_ns - start_ns);
        }
    }
}

/// One connection, with a message of its own.
fn exchange(service: SocketAddr, number: u64) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&service, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = [0; MESSAGE_LEN];
    request[..8].copy_from_slice(&number.to_be_bytes());
    stream.write_all(&request)?;
    let mut reply = [0; MESSAGE_LEN];
    stream.read_exact(&mut reply)?;
    if reply == request { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_the_request_and_comes_from_an_endpoint_only() {
        for (endpoints, is_served) in [("127.0.0.1:1", true), ("127.0.0.2:1", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let service = listener.local_addr().unwrap();
            let server =
                thread::spawn(move || answer(listener.accept().unwrap().0, endpoints.parse().unwrap()));
            assert_eq!(exchange(service, 7).is_ok(), is_served);
            // The client closed: that is the end which a server waits for.
            assert_eq!(server.join().unwrap().is_ok(), !is_served);
        }
    }
}
