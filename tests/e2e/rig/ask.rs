//! Asking: what a client in some place learns of a [`Server`](super::server::Server) behind an address.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

use super::cluster::Protocol;
use super::place::Place;
use super::sctp;

/// How long an answer that must come may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for what must not come. Shorter than the second after which TCP sends a SYN again, so that one packet is
/// sent.
pub const QUIET: Duration = Duration::from_millis(700);

/// Who answered, and whom it saw.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    /// Name of the pod.
    pub pod: String,
    /// The client as the pod saw it.
    pub client: SocketAddr,
}

/// What a client that was not answered learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoAnswer {
    /// RST, or ICMP port unreachable: ECONNREFUSED.
    Refused,
    /// ICMP net or host unreachable.
    Unreachable,
    /// Nothing.
    Silence,
}

/// What became of a request.
pub type Outcome = std::result::Result<Answer, NoAnswer>;

/// A TCP connection with a server at its end.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

/// A UDP socket that has one address to speak to.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
}

impl Place {
    /// Asks `to` by a socket of its own for who it is. An error is a failure of the asking itself.
    pub fn ask(&self, protocol: Protocol, to: SocketAddr, patience: Duration) -> Result<Outcome> {
        match protocol {
            Protocol::Tcp => match self.open(to, patience)? {
                Ok(mut connection) => connection.ask().map(Ok),
                Err(why) => Ok(Err(why)),
            },
            Protocol::Udp => self.datagrams(0, to)?.ask(patience),
            Protocol::Sctp => {
                static NEXT: AtomicU16 = AtomicU16::new(20_000);
                let port = NEXT.fetch_add(1, Ordering::Relaxed);
                Ok(match sctp::ask(self, to, port, patience)? {
                    Some(text) => Ok(parse(&text)?),
                    None => Err(NoAnswer::Silence),
                })
            }
        }
    }

    /// A connection that must come about.
    pub fn connect(&self, to: SocketAddr) -> Result<Connection> {
        match self.open(to, PATIENCE)? {
            Ok(connection) => Ok(connection),
            Err(why) => bail!("{} connects to {to}: {why:?}", self.name),
        }
    }

    fn open(&self, to: SocketAddr, patience: Duration) -> Result<std::result::Result<Connection, NoAnswer>> {
        let from = SocketAddr::new(self.address_towards(to.ip()), 0);
        self.namespace.inside(|| {
            let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // Linux takes the sending timeout for that of connect, too.
            set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
            set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
            bind(&socket, &from).with_context(|| format!("{} as {from}", self.name))?;
            match connect(&socket, &to) {
                Ok(()) => Ok(Ok(Connection { stream: BufReader::new(socket.into()) })),
                Err(Errno::CONNREFUSED) => Ok(Err(NoAnswer::Refused)),
                Err(Errno::HOSTUNREACH | Errno::NETUNREACH) => Ok(Err(NoAnswer::Unreachable)),
                Err(Errno::INPROGRESS | Errno::TIMEDOUT) => Ok(Err(NoAnswer::Silence)),
                Err(error) => Err(error).with_context(|| format!("{} connects to {to}", self.name)),
            }
        })
    }

    /// A socket from `port` (0: any) that speaks to `to` alone, so that answers from elsewhere are not received.
    pub fn datagrams(&self, port: u16, to: SocketAddr) -> Result<Datagrams> {
        let from = SocketAddr::new(self.address_towards(to.ip()), port);
        self.namespace.inside(|| {
            let socket = UdpSocket::bind(from).with_context(|| format!("{} as {from}", self.name))?;
            socket.connect(to)?;
            Ok(Datagrams { socket })
        })
    }
}

impl Connection {
    /// Asks who is at the other end.
    pub fn ask(&mut self) -> Result<Answer> {
        parse(&self.request("hostname")?)
    }

    /// Sends a line and returns the line that comes back.
    pub fn request(&mut self, line: &str) -> Result<String> {
        self.say(line)?;
        let mut answer = String::new();
        let length =
            self.stream.read_line(&mut answer).context("the connection was made, but no answer came")?;
        ensure!(length > 0, "the connection was closed without an answer");
        Ok(answer.trim_end().to_owned())
    }

    /// Sends a line that is not answered.
    pub fn say(&mut self, line: &str) -> Result<()> {
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes()).context("write")
    }

    /// Reads to the end, which the server must have announced.
    pub fn read_end(&mut self) -> Result<()> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).context("waiting for the end")?;
        ensure!(rest.is_empty(), "{} bytes came before the end", rest.len());
        Ok(())
    }
}

impl Drop for Connection {
    /// Closes it in both directions, so that none of its packets is late for what comes next.
    fn drop(&mut self) {
        let stream = self.stream.get_mut();
        if stream.shutdown(Shutdown::Write).is_ok() {
            let _ = stream.set_read_timeout(Some(QUIET));
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
}

impl Datagrams {
    /// Asks once who is at the other end.
    pub fn ask(&self, patience: Duration) -> Result<Outcome> {
        Ok(match self.request(b"hostname", patience)? {
            Ok(answer) => Ok(parse(&String::from_utf8_lossy(&answer))?),
            Err(why) => Err(why),
        })
    }

    /// Sends one datagram and returns the one that comes back.
    pub fn request(
        &self,
        bytes: &[u8],
        patience: Duration,
    ) -> Result<std::result::Result<Vec<u8>, NoAnswer>> {
        self.socket.set_read_timeout(Some(patience))?;
        let mut buffer = vec![0; 65_536];
        // An error of an earlier datagram may be told now, by either call.
        let received = self.socket.send(bytes).and_then(|_| self.socket.recv(&mut buffer));
        Ok(match received {
            Ok(length) => {
                buffer.truncate(length);
                Ok(buffer)
            }
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused => Err(NoAnswer::Refused),
                ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Err(NoAnswer::Unreachable),
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Err(NoAnswer::Silence),
                _ => return Err(error).context("datagram"),
            },
        })
    }
}

fn parse(text: &str) -> Result<Answer> {
    let (pod, client) = text.split_once(' ').with_context(|| format!("not an answer: {text:?}"))?;
    let client = client.parse().with_context(|| format!("not an answer: {text:?}"))?;
    Ok(Answer { pod: pod.to_owned(), client })
}
