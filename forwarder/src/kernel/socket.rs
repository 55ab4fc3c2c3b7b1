//! A netlink socket of the routing family: dumps, acknowledged requests, notifications.
//!
//! Opening one, dumping and listening take no privilege; requests that change something take CAP_NET_ADMIN.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::message::{Message, Request, kind, messages, u32_at};

/// The kernel fills at most 32 KiB of a dump into one datagram.
const DATAGRAM_BYTES: usize = 64 << 10;
/// What a subscriber asks for; the kernel gives at most net.core.rmem_max. More rides out longer bursts of changes.
const EVENT_BUFFER_BYTES: usize = 4 << 20;
/// The kernel answers in microseconds. This is for a kernel that never does.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a dump is begun again when the tables changed meanwhile.
const DUMP_ATTEMPTS: usize = 5;

/// A netlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    datagram: Vec<u8>,
    sequence: u32,
}

impl Socket {
    /// A socket for dumps and requests. It waits for its answers.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn open() -> io::Result<Socket> {
        let socket = Socket::bind(SocketFlags::CLOEXEC, 0)?;
        sockopt::set_socket_timeout(&socket.fd, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(socket)
    }

    /// A socket for notifications, which never waits. `groups`: bit n-1 stands for group RTNLGRP n.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn subscribe(groups: u32) -> io::Result<Socket> {
        let socket = Socket::bind(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, groups)?;
        // A refusal costs nothing but a full dump more often.
        let _ = sockopt::set_socket_recv_buffer_size(&socket.fd, EVENT_BUFFER_BYTES);
        Ok(socket)
    }

    fn bind(flags: SocketFlags, groups: u32) -> io::Result<Socket> {
        // Protocol 0 is NETLINK_ROUTE.
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        Ok(Socket { fd, datagram: vec![0; DATAGRAM_BYTES], sequence: 0 })
    }

    /// Everything of one type. `header`: the fixed part of the request, which chooses the family; `decode`: a body to what is
    /// wanted, none to skip it.
    ///
    /// A dump during which the tables changed is begun again, at most 5 times; the last is taken as it is, and the notification of
    /// the change makes good what it lacks.
    ///
    /// # Errors
    /// The kernel refuses the dump, or does not answer within 5 s.
    pub fn dump<T>(
        &mut self,
        get: u16,
        header: &[u8],
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for attempt in 1.. {
            let request = Request::new(get, kind::F_DUMP, header);
            let mut found = Vec::new();
            let mut interrupted = false;
            self.ask(request, |message| {
                interrupted |= message.flags & kind::F_DUMP_INTERRUPTED != 0;
                // A GET type is its NEW type plus 2.
                if message.kind == get - 2 {
                    found.extend(decode(message.body));
                }
            })?;
            if !interrupted || attempt == DUMP_ATTEMPTS {
                return Ok(found);
            }
        }
        unreachable!("the last attempt returns")
    }

    /// Sends a request that changes something, and waits for the acknowledgement.
    ///
    /// # Errors
    /// What the kernel says of the request.
    pub fn request(&mut self, request: Request) -> io::Result<()> {
        self.ask(request, |_| {})
    }

    /// Sends, and hands every message of the answer to `each` until the kernel says that it was the last.
    fn ask(&mut self, request: Request, mut each: impl FnMut(Message<'_>)) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request.finish(self.sequence);
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        let sequence = self.sequence;
        loop {
            let mut outcome = None;
            let received = self.receive(|message| {
                match message.kind {
                    _ if message.sequence != sequence => {}
                    // Both carry an errno, negated; DONE may lack it.
                    kind::ERROR | kind::DONE => outcome = Some(u32_at(message.body, 0).unwrap_or(0) as i32),
                    _ => each(message),
                }
            })?;
            match outcome {
                Some(0) => return Ok(()),
                Some(errno) => return Err(io::Error::from_raw_os_error(errno.wrapping_neg())),
                None if !received => return Err(io::ErrorKind::TimedOut.into()),
                None => {}
            }
        }
    }

    /// Hands the messages of the next datagram to `each`; false if there is none. What does not come from the kernel is skipped.
    ///
    /// # Errors
    /// ENOBUFS: the kernel had notifications that did not fit, so that only a dump tells the state.
    pub fn receive(&mut self, each: impl FnMut(Message<'_>)) -> io::Result<bool> {
        let (len, from) = loop {
            match rustix::net::recvfrom(&self.fd, &mut self.datagram[..], RecvFlags::empty()) {
                Ok((len, _, from)) => break (len, from),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        };
        let kernel =
            from.and_then(|from| SocketAddrNetlink::try_from(from).ok()).is_some_and(|from| from.pid() == 0);
        if kernel {
            messages(&self.datagram[..len]).for_each(each);
        }
        Ok(true)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
