//! What runs in a pod: a server that says who it is and whom it sees, like agnhost's netexec.
//!
//! A request is a line over TCP, a datagram over UDP, a message over SCTP:
//!
//! - `hostname`: the pod's name and the client's address and port as they arrived here, `web-1 198.51.100.2:40000`;
//! - `echo TEXT`: TEXT;
//! - `send N`: N bytes;
//! - `shut`: nothing, and this side of the connection is closed.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::cluster::{Port, Protocol};
use super::place::Place;
use super::sctp;

/// A running server; when it is dropped, its sockets are closed as when a process is killed.
#[derive(Debug)]
pub struct Server {
    /// Closed to stop the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// A socket and what waits on it.
enum Socket {
    Listener(TcpListener),
    /// A connection and the beginning of its next request.
    Connection(TcpStream, SocketAddr, Vec<u8>),
    Datagrams(UdpSocket),
    Associations(sctp::Socket, u16),
}

impl Server {
    /// Listens on every port on both addresses of `place`, as the pod `name`.
    pub fn start(place: &Place, name: &str, ports: &[Port]) -> Result<Server> {
        let sockets = place.namespace.inside(|| {
            let mut sockets = Vec::new();
            for port in ports {
                for address in place.addresses() {
                    let at = SocketAddr::new(address, port.number);
                    sockets.push(open(port.protocol, at).with_context(|| format!("{name}: listen on {at}"))?);
                }
            }
            Ok(sockets)
        })?;
        let (stopped, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let name = name.to_owned();
        let thread =
            std::thread::Builder::new().name(name.clone()).spawn(move || serve(&name, sockets, &stopped))?;
        Ok(Server { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("a server panicked");
        }
    }
}

fn open(protocol: Protocol, at: SocketAddr) -> Result<Socket> {
    Ok(match protocol {
        Protocol::Tcp => {
            // Reusable: the pod before may have left connections in TIME_WAIT.
            let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(family, SocketType::STREAM, flags, None)?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            bind(&socket, &at)?;
            listen(&socket, 1024)?;
            Socket::Listener(socket.into())
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind(at)?;
            socket.set_nonblocking(true)?;
            Socket::Datagrams(socket)
        }
        Protocol::Sctp => Socket::Associations(sctp::Socket::open(at.ip())?, at.port()),
    })
}

/// Answers until `stopped` is hung up.
fn serve(name: &str, mut sockets: Vec<Socket>, stopped: &OwnedFd) {
    loop {
        let mut waiting: Vec<PollFd<'_>> =
            sockets.iter().map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)).collect();
        waiting.push(PollFd::new(stopped, PollFlags::IN));
        if poll(&mut waiting, None).is_err() {
            continue;
        }
        let ready: Vec<bool> = waiting.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready.last() == Some(&true) {
            return;
        }
        let mut accepted = Vec::new();
        let mut index = 0;
        sockets.retain_mut(|socket| {
            index += 1;
            !ready[index - 1] || socket.answer(name, &mut accepted)
        });
        sockets.extend(accepted);
    }
}

impl Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Listener(socket) => socket.as_fd(),
            Socket::Connection(socket, ..) => socket.as_fd(),
            Socket::Datagrams(socket) => socket.as_fd(),
            Socket::Associations(socket, _) => socket.as_fd(),
        }
    }

    /// Answers what waits; false when it is over.
    fn answer(&mut self, name: &str, accepted: &mut Vec<Socket>) -> bool {
        let mut buffer = [0; 65_536];
        match self {
            Socket::Listener(listener) => {
                while let Ok((connection, peer)) = listener.accept() {
                    accepted.push(Socket::Connection(connection, peer, Vec::new()));
                }
            }
            Socket::Connection(connection, peer, begun) => {
                let Ok(length @ 1..) = connection.read(&mut buffer) else { return false };
                begun.extend(&buffer[..length]);
                while let Some(end) = begun.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = begun.drain(..=end).collect();
                    if line == b"shut\n" {
                        let _ = connection.shutdown(Shutdown::Write);
                        continue;
                    }
                    let mut answer = reply(name, *peer, &line[..end]);
                    answer.push(b'\n');
                    if connection.write_all(&answer).is_err() {
                        return false;
                    }
                }
            }
            Socket::Datagrams(socket) => {
                // Errors are those of datagrams that were sent before: a client that has gone.
                while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&reply(name, peer, buffer[..length].trim_ascii_end()), peer);
                }
            }
            Socket::Associations(socket, port) => {
                if let Err(error) = socket.serve(*port, |peer| format!("{name} {peer}")) {
                    eprintln!("{name}: {error:#}");
                }
            }
        }
        true
    }
}

fn reply(name: &str, peer: SocketAddr, request: &[u8]) -> Vec<u8> {
    if let Some(text) = request.strip_prefix(b"echo ") {
        return text.to_vec();
    }
    let number = |text: &[u8]| std::str::from_utf8(text).ok()?.parse().ok();
    match request.strip_prefix(b"send ").map(number) {
        Some(Some(length)) => vec![b'x'; length],
        _ if request == b"hostname" => format!("{name} {peer}").into_bytes(),
        _ => b"what?".to_vec(),
    }
}
