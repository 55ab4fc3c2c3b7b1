//! `towpathctl capture`: packets of the running daemon as they pass, in a capture file, as lines or as JSON.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use config::capture::filter::Filter;
use config::capture::{Capture, CapturedPacket, DEFAULT_SNAPLEN, MAX_SNAPLEN, Point};
use config::control::{Item, Reply, Request, Status};
use config::fault::Fault;
use forwarder::capture::predicate::Predicate;

use crate::connection::{Connection, unexpected, unexpected_item};
use crate::frame::summary;
use crate::pcapng::{self, Writer};
use crate::print::{self, Output, Paint, StdoutClosed, Tint, notice, out, thousands};
use crate::{Ending, Global};

/// Shown below the options.
pub const FILTERS: &str = "\
Filters:
  host ADDRESS, net PREFIX, port N or N-M         source or destination
  src ..., dst ... before these                   one end only
  tcp, udp, sctp, icmp, proto PROTOCOL            tcp port 80 is tcp and port 80
  service NAMESPACE/NAME[:PORT]                   packets of a Service
  drop, reason NAME                               what is dropped, or has a reason (`towpathctl drops --all`)
  and, or, not, ( )                               not binds closest, then and, then or
A term holds if it holds for the packet as it came or as it leaves, so that both are captured.

Points:
  rx        as it came, with what became of it
  post-nat  as it leaves, after translation (tx)
  drop      as it was dropped, with the reason

Examples:
  towpathctl capture -c 10 tcp port 443
  towpathctl capture --at drop 'service default/web and drop'
  towpathctl capture -w - | wireshark -k -i -
  towpathctl capture -w web.pcapng --snaplen 128 'service default/web or host 198.51.100.7'";

/// Arguments of `capture`.
#[derive(clap::Args)]
pub struct Args {
    /// Which packets, such as 'service default/web and not host 198.51.100.7'; all if absent
    #[arg(value_name = "FILTER")]
    filter: Vec<String>,
    /// Write a capture file (pcapng); - is standard output
    #[arg(short, long, value_name = "FILE", conflicts_with = "output")]
    write: Option<String>,
    /// Where to look at packets
    #[arg(long, value_name = "POINTS", value_delimiter = ',', default_value = "rx,post-nat,drop")]
    at: Vec<Point>,
    /// Stop after so many packets
    #[arg(short, long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Bytes to keep of each packet
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_SNAPLEN, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SNAPLEN)))]
    snaplen: u32,
    /// Only at the port of this name
    #[arg(long, value_name = "NAME")]
    port: Option<String>,
    /// How to print: a line for each packet, or a JSON object for each
    #[arg(short, long, value_name = "FORM", value_parser = print::forms_of_stream(), default_value = "table", hide_default_value = true)]
    output: Output,
}

/// Runs `capture`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let filter = filter(&args.filter.join(" "));
    if args.write.as_deref() == Some("-") && io::stdout().is_terminal() {
        bail!("a capture file is not for a terminal: name a file, or pipe it, such as `-w - | tcpdump -r -`");
    }
    let mut at = args.at.clone();
    at.sort();
    at.dedup();
    let mut connection = global.connect()?;
    let before = status(&mut connection)?;
    let request = Capture {
        filter: filter.text().to_owned(),
        at: at.clone(),
        port: args.port.clone(),
        snaplen: args.snaplen,
        count: args.count,
    };
    let ports = match connection.ask(&Request::Capture(request))? {
        Reply::Capturing { ports } => ports,
        other => return Err(unexpected(&other)),
    };
    let mut sink = Sink::open(args, &filter, &ports, &at, global.paint())?;
    let points: Vec<&str> = at.iter().map(|point| point.name()).collect();
    end_on_interrupt(&connection)?;
    notice(&format!("capturing {} of {}, Ctrl-C ends it", points.join(", "), ports.join(", ")));
    // On a machine that has no idle CPU, forwarding packets is worth more than looking at them.
    let _ = rustix::process::nice(10);
    match receive(&mut connection, &mut sink) {
        Ok((count, missed)) => {
            sink.flush()?;
            notice(&format!(
                "{} captured, {} not captured because the reader was slow",
                thousands(count),
                thousands(missed)
            ));
            Ok(Ending::Done)
        }
        Err(Broken::Other(error)) => Err(error),
        Err(Broken::Connection { error, count }) => {
            sink.flush()?;
            Err(why(global, &before, &error, count))
        }
    }
}

/// Reads the filter, or ends the program as clap does for a command line that is wrong. What a word names is checked too, as
/// far as it is known without the daemon.
fn filter(text: &str) -> Filter {
    let read = text.parse::<Filter>().and_then(|filter| {
        Predicate::compile(&filter, |_, _, _| vec![])?;
        Ok(filter)
    });
    read.unwrap_or_else(|error| {
        clap::Error::raw(clap::error::ErrorKind::ValueValidation, format!("{error}\n")).exit()
    })
}

fn status(connection: &mut Connection) -> Result<Status> {
    match connection.ask(&Request::Status)? {
        Reply::Status(status) => Ok(*status),
        other => Err(unexpected(&other)),
    }
}

/// Why a capture did not come to its end.
enum Broken {
    /// The daemon went away after so many packets.
    Connection { error: anyhow::Error, count: u64 },
    /// Anything else.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Broken {
    fn from(error: anyhow::Error) -> Broken {
        Broken::Other(error)
    }
}

/// Takes packets until the end; returns how many were captured, and how many were missed.
fn receive(connection: &mut Connection, sink: &mut Sink) -> Result<(u64, u64), Broken> {
    connection.wait_for_ever()?;
    let mut count = 0;
    loop {
        if connection.is_drained() {
            sink.flush()?;
        }
        match connection.receive() {
            Ok(Reply::Item(Item::Packet(packet))) => {
                count += 1;
                sink.packet(&packet)?;
            }
            Ok(Reply::Captured { count, missed }) => return Ok((count, missed)),
            Ok(Reply::Item(_)) => return Err(unexpected_item().into()),
            Ok(other) => return Err(unexpected(&other).into()),
            Err(error) if error.is::<Fault>() => return Err(error.into()),
            Err(error) => return Err(Broken::Connection { error, count }),
        }
    }
}

/// The capture ended without a word: the daemon that comes next knows more.
fn why(global: &Global, before: &Status, error: &anyhow::Error, count: u64) -> anyhow::Error {
    let kept = format!(
        "the capture has ended after {} packet{}",
        thousands(count),
        if count == 1 { "" } else { "s" }
    );
    match global.connect().and_then(|mut connection| status(&mut connection)) {
        Ok(now) if now.restarts != before.restarts || now.uptime_ms < before.uptime_ms => anyhow!(
            "the data plane died or was stopped while packets were captured, and was started again (restarts: {}): {kept}",
            now.restarts
        ),
        Ok(_) => anyhow!("the daemon ended the capture, since nothing of it was read for 5 s: {kept}"),
        Err(_) => anyhow!("the daemon is gone ({error:#}): {kept}"),
    }
}

/// The client's side of a running capture.
static STREAM: Mutex<Option<UnixStream>> = Mutex::new(None);

fn end_on_interrupt(connection: &Connection) -> Result<()> {
    *STREAM.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection.handle()?);
    Ok(())
}

/// Asks the daemon to end the running capture, which then ends in order. False: none runs, or it was asked before.
pub fn end() -> bool {
    let stream = STREAM.lock().unwrap_or_else(PoisonError::into_inner).take();
    stream.is_some_and(|stream| stream.shutdown(Shutdown::Write).is_ok())
}

/// Where packets go.
enum Sink {
    Lines(Paint),
    Json,
    File(CaptureFile),
}

/// A capture file and what is needed to write packets into it.
struct CaptureFile {
    writer: Writer<BufWriter<Box<dyn Write>>>,
    /// `FILE`, for errors; `-` is standard output.
    name: String,
    /// Names of the interfaces by their number: `uplink:rx`.
    interfaces: Vec<String>,
    missed: u64,
}

impl Sink {
    fn open(args: &Args, filter: &Filter, ports: &[String], at: &[Point], paint: Paint) -> Result<Sink> {
        let Some(name) = &args.write else {
            return Ok(if args.output == Output::Json { Sink::Json } else { Sink::Lines(paint) });
        };
        let file: Box<dyn Write> = match name.as_str() {
            "-" => Box::new(io::stdout()),
            name => Box::new(File::create(name).with_context(|| format!("cannot write {name}"))?),
        };
        let interfaces: Vec<String> = at
            .iter()
            .flat_map(|point| ports.iter().map(|port| format!("{port}:{}", point.suffix())))
            .collect();
        let program = concat!("towpathctl ", env!("CARGO_PKG_VERSION"));
        let begun = Writer::new(BufWriter::with_capacity(64 << 10, file), program).and_then(|mut writer| {
            for interface in &interfaces {
                writer.interface(interface, filter.text(), args.snaplen)?;
            }
            writer.flush()?;
            Ok(writer)
        });
        let writer = begun.map_err(|error| cannot_write(name, error))?;
        Ok(Sink::File(CaptureFile { writer, name: name.clone(), interfaces, missed: 0 }))
    }

    fn packet(&mut self, packet: &CapturedPacket) -> Result<()> {
        match self {
            Sink::Lines(paint) => out(&line(packet, *paint)),
            Sink::Json => out(&(serde_json::to_string(packet)? + "\n")),
            Sink::File(file) => file.packet(packet),
        }
    }

    fn flush(&mut self) -> Result<()> {
        match self {
            Sink::File(file) => file.writer.flush().map_err(|error| cannot_write(&file.name, error)),
            Sink::Lines(_) | Sink::Json => Ok(()),
        }
    }
}

impl CaptureFile {
    fn packet(&mut self, packet: &CapturedPacket) -> Result<()> {
        let name = interface(packet);
        let Some(interface) = self.interfaces.iter().position(|known| *known == name) else {
            return Err(unexpected_item());
        };
        let lost = packet.missed.saturating_sub(self.missed);
        self.missed = packet.missed;
        let written = self.writer.packet(&pcapng::Packet {
            interface: interface as u32,
            time_ns: packet.time_ns,
            data: &packet.data,
            len: packet.len,
            inbound: packet.point != Point::PostNat,
            id: packet.id,
            lost,
            comment: &comment(packet),
        });
        written.map_err(|error| cannot_write(&self.name, error))
    }
}

fn cannot_write(name: &str, error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe if name == "-" => StdoutClosed.into(),
        _ => anyhow!(error).context(format!("cannot write {name}")),
    }
}

/// `uplink:rx`, `fabric:tx`.
fn interface(packet: &CapturedPacket) -> String {
    format!("{}:{}", packet.port, packet.point.suffix())
}

/// What a capture file says of a packet: words for people that a display filter finds, such as
/// `frame.comment contains "reason=no_route"`.
fn comment(packet: &CapturedPacket) -> String {
    let mut words = vec![format!("packet={}", packet.id)];
    let mut word = |name: &str, value: Option<&String>| {
        words.extend(value.map(|value| format!("{name}={value}")));
    };
    word("service", packet.service.as_ref());
    word("endpoint", packet.endpoint.as_ref());
    word("generation", Some(&packet.generation.to_string()));
    word("flow", packet.direction.as_ref());
    word("flow-generation", packet.flow_generation.map(|generation| generation.to_string()).as_ref());
    word("verdict", Some(&packet.verdict));
    word("reason", packet.reason.as_ref());
    words.join(" ")
}

/// A packet on a line: time (UTC), place, number, headers, then what Towpath knows of it.
fn line(packet: &CapturedPacket, paint: Paint) -> String {
    let (seconds, ns) = (packet.time_ns / 1_000_000_000, packet.time_ns % 1_000_000_000);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let time = paint.paint(Tint::Dim, &format!("{h:02}:{m:02}:{s:02}.{:06}", ns / 1000));
    let place = paint.paint(Tint::Bold, &format!("{:<12}", interface(packet)));
    let mut text = format!("{time} {place} #{} {}", packet.id, summary(&packet.data, packet.len));
    if let Some(service) = &packet.service {
        text += &format!(", {}", paint.paint(Tint::Accent, service));
    }
    if let Some(endpoint) = &packet.endpoint {
        text += &format!(", endpoint {endpoint}");
    }
    if let Some(direction) = &packet.direction {
        text += &format!(", {direction}");
    }
    text += &format!(", generation {}", packet.generation);
    let reason = packet.reason.as_deref().unwrap_or_default();
    let (tint, verdict) = match packet.verdict.as_str() {
        "forward" => (Tint::Good, "forwarded".to_owned()),
        "drop" => (Tint::Bad, format!("dropped: {reason}")),
        "answer" => (Tint::Warn, format!("answered: {reason}")),
        "punt" => (Tint::Warn, "to the kernel".to_owned()),
        "hold" => (Tint::Warn, "waits for its next hop".to_owned()),
        "gather" => (Tint::Warn, "waits for its other fragments".to_owned()),
        other => (Tint::Warn, other.to_owned()),
    };
    format!("{text}, {}\n", paint.paint(tint, &verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet() -> CapturedPacket {
        CapturedPacket {
            id: 17,
            time_ns: 1_793_577_600_000_000_000 + 3_723_004_005_006,
            point: Point::PostNat,
            port: "fabric".into(),
            worker: 0,
            len: 42,
            data: vec![0; 14],
            before: None,
            after: None,
            service: Some("default/web:http".into()),
            endpoint: Some("10.244.1.7:8080".into()),
            generation: 3,
            flow_generation: Some(2),
            direction: Some("original".into()),
            verdict: "forward".into(),
            reason: None,
            missed: 0,
        }
    }

    fn dropped() -> CapturedPacket {
        CapturedPacket {
            point: Point::Drop,
            port: "uplink".into(),
            service: None,
            endpoint: None,
            flow_generation: None,
            direction: None,
            verdict: "drop".into(),
            reason: Some("no_route".into()),
            ..packet()
        }
    }

    #[test]
    fn lines_and_comments() {
        insta::assert_snapshot!(line(&packet(), Paint::PLAIN), @"01:02:03.004005 fabric:tx    #17 ethertype 0x0000 length 42, default/web:http, endpoint 10.244.1.7:8080, original, generation 3, forwarded");
        insta::assert_snapshot!(line(&dropped(), Paint::PLAIN), @"01:02:03.004005 uplink:drop  #17 ethertype 0x0000 length 42, generation 3, dropped: no_route");
        insta::assert_snapshot!(comment(&packet()), @"packet=17 service=default/web:http endpoint=10.244.1.7:8080 generation=3 flow=original flow-generation=2 verdict=forward");
        insta::assert_snapshot!(comment(&dropped()), @"packet=17 generation=3 verdict=drop reason=no_route");
    }
}
