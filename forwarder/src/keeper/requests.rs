//! What the data plane asks of the keeper: the few things that need a privilege.
//!
//! JSON lines over a socket pair. The data plane asks, the keeper answers, one at a time; a descriptor comes along with the answer
//! that it belongs to. The keeper trusts none of it: a line is bounded, garbage ends the data plane, and the worst that a valid
//! request can do is to steer packets to workers, to make ports of interfaces, and to listen where the gateway file lets it.

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use config::control::PortChange;
use config::fault::{Code, Fault};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::kernel::privileged::Care;
use crate::port::xsk::steer::{Contents, SteerChange};

/// Longest line in either direction, bytes. The contents of full steering maps fit.
pub const MAX_LINE_BYTES: u64 = 64 << 20;

/// Entries of a [`SteerChange`] in one request: the keeper looks after other things between them.
const CHANGE_ENTRIES: usize = 1_000;

/// What the data plane asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The workers forward.
    Ready,
    /// What do the steering maps hold? Answer: [`Reply::Contents`].
    SteerContents,
    /// Change the steering maps. What was applied before an error stays applied.
    Steer(SteerChange),
    /// The counters of the steering program, in its order. Answer: [`Reply::Counters`].
    SteerCounters,
    /// Look after a next hop.
    Neighbor {
        /// Index of the interface that it is reached by.
        link: u32,
        /// Its address.
        addr: IpAddr,
        /// What is asked for it.
        care: Care,
    },
    /// Listen for TCP clients of the health server. Answer: [`Reply::Listening`] and a descriptor.
    Listen {
        /// Where; an unspecified address stands for every address of both families.
        addr: SocketAddr,
    },
    /// Add or remove a port. Answered by [`Reply::Fault`] only: otherwise the data plane is started anew, with the ports as they are then.
    Port(PortChange),
}

/// What the keeper answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
    /// As a change from nothing.
    Contents(SteerChange),
    /// In the order of [`SteerCounter`](crate::port::xsk::steer::SteerCounter).
    Counters(Vec<u64>),
    /// The listening socket, which does not block, comes along.
    Listening,
    /// It was refused, and nothing was changed.
    Fault(Fault),
    /// It could not be done, in words for the operator.
    Failed(String),
    /// The kernel refused it, with this error number.
    Refused(i32),
}

/// A reply and the descriptor that comes along, if one does.
#[derive(Debug)]
pub struct Answer {
    /// The reply.
    pub reply: Reply,
    /// The descriptor; the keeper's copy is closed once it is sent.
    pub fd: Option<OwnedFd>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Answer {
        Answer { reply, fd: None }
    }
}

/// Why the keeper did not do what it was asked.
#[derive(Debug, Error)]
pub enum AskError {
    /// The keeper is gone, and this process is about to be.
    #[error("the keeper does not answer: {0}")]
    Gone(#[from] io::Error),
    /// It tried and could not.
    #[error("{0}")]
    Failed(String),
    /// It tried and the kernel refused.
    #[error("{0}")]
    Refused(io::Error),
}

/// The data plane's end. Any thread; one request at a time.
#[derive(Debug)]
pub struct Keeper {
    stream: Mutex<BufReader<Receiver>>,
}

/// Receives bytes, and the descriptors that come along.
#[derive(Debug)]
struct Receiver {
    stream: UnixStream,
    fd: Option<OwnedFd>,
}

impl Read for Receiver {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(buffer)];
        let received = recvmsg(&self.stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fd = fds.last();
            }
        }
        Ok(received.bytes)
    }
}

impl Keeper {
    /// `stream`: this process's end of the socket pair.
    pub fn new(stream: UnixStream) -> Keeper {
        Keeper { stream: Mutex::new(BufReader::new(Receiver { stream, fd: None })) }
    }

    fn ask(&self, request: &Request) -> Result<Reply, AskError> {
        self.ask_for_fd(request).map(|(reply, _)| reply)
    }

    fn ask_for_fd(&self, request: &Request) -> Result<(Reply, Option<OwnedFd>), AskError> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.get_mut().stream.write_all(&to_line(request))?;
        let reply = read_line(&mut *stream)?;
        let fd = stream.get_mut().fd.take();
        match reply {
            Some(Reply::Failed(message)) => Err(AskError::Failed(message)),
            Some(Reply::Refused(number)) => Err(AskError::Refused(io::Error::from_raw_os_error(number))),
            Some(reply) => Ok((reply, fd)),
            None => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        }
    }

    /// Says that the workers forward.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn ready(&self) -> Result<(), AskError> {
        self.ask(&Request::Ready).map(drop)
    }

    /// What the steering maps hold.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn steer_contents(&self) -> Result<Contents, AskError> {
        let mut contents = Contents::default();
        if let Reply::Contents(change) = self.ask(&Request::SteerContents)? {
            contents.apply(&change);
        }
        Ok(contents)
    }

    /// Changes the steering maps and returns when it is done.
    ///
    /// # Errors
    /// A map is full: the message names the setting to raise. What was applied before stays applied.
    pub fn steer(&self, change: SteerChange) -> Result<(), AskError> {
        change
            .split(CHANGE_ENTRIES)
            .into_iter()
            .try_for_each(|part| self.ask(&Request::Steer(part)).map(drop))
    }

    /// The counters of the steering program, in the order of [`SteerCounter`](crate::port::xsk::steer::SteerCounter).
    ///
    /// # Errors
    /// The kernel refused the read.
    pub fn steer_counters(&self) -> Result<Vec<u64>, AskError> {
        match self.ask(&Request::SteerCounters)? {
            Reply::Counters(counters) => Ok(counters),
            _ => Ok(Vec::new()),
        }
    }

    /// A socket that listens at `addr` and does not block.
    ///
    /// # Errors
    /// Somebody listens there, this machine has no such address, or the gateway file does not let us.
    pub fn listen(&self, addr: SocketAddr) -> Result<TcpListener, AskError> {
        match self.ask_for_fd(&Request::Listen { addr })? {
            (Reply::Listening, Some(fd)) => Ok(TcpListener::from(fd)),
            // The kernel leaves a descriptor out that does not fit.
            _ => Err(AskError::Failed("no descriptor is free; raise LimitNOFILE".to_owned())),
        }
    }

    /// Adds or removes a port. If it is done, this process is ended, and another one has the ports as they are then; so this returns only
    /// what is wrong.
    pub fn change_port(&self, change: PortChange) -> Fault {
        match self.ask(&Request::Port(change)) {
            Ok(Reply::Fault(fault)) => fault,
            Ok(_) => Fault::new(Code::Other, "the keeper answered something else; this is a bug"),
            Err(error) => Fault::new(Code::Other, error.to_string()),
        }
    }

    /// Has the kernel look after a next hop.
    ///
    /// # Errors
    /// What the kernel answered, or the keeper is gone.
    pub fn neighbor(&self, link: u32, addr: IpAddr, care: Care) -> io::Result<()> {
        match self.ask(&Request::Neighbor { link, addr, care }) {
            Ok(_) => Ok(()),
            Err(AskError::Refused(cause) | AskError::Gone(cause)) => Err(cause),
            Err(AskError::Failed(message)) => Err(io::Error::other(message)),
        }
    }
}

/// A message as a line, newline included.
pub fn to_line<T: Serialize>(message: &T) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("messages have string keys only");
    line.push(b'\n');
    line
}

/// Reads one message; `None` at the end of the stream.
///
/// # Errors
/// The line is too long or no such message.
pub fn read_line<T: serde::de::DeserializeOwned>(stream: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    stream.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(io::Error::from)
}

/// The keeper's end: bytes come in without waiting, whole lines go out.
#[derive(Debug)]
pub struct Requests {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Requests {
    /// `stream`: the keeper's end of the socket pair.
    pub fn new(stream: UnixStream) -> Requests {
        Requests { stream, pending: Vec::new() }
    }

    /// The descriptor to poll.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Takes what has arrived and answers every whole request in it, but for those that `act` has no answer to. Call when the stream is
    /// readable.
    ///
    /// # Errors
    /// The data plane is gone, or spoke nonsense.
    pub fn answer(&mut self, mut act: impl FnMut(Request) -> Option<Answer>) -> io::Result<()> {
        let mut chunk = [0; 65_536];
        let count = self.stream.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.pending.extend_from_slice(&chunk[..count]);
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let request = serde_json::from_slice(&self.pending[..end])?;
            self.pending.drain(..=end);
            if let Some(Answer { reply, fd }) = act(request) {
                self.send(&to_line(&reply), fd.as_ref())?;
            }
        }
        if self.pending.len() as u64 > MAX_LINE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a request of more than 64 MiB"));
        }
        Ok(())
    }

    fn send(&mut self, line: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
        let Some(fd) = fd else { return self.stream.write_all(line) };
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(&self.stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
        self.stream.write_all(&line[sent..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::xsk::steer::{AddressEntry, SteerChange};

    fn a_change(entries: u8) -> SteerChange {
        let entry = AddressEntry { flags: 1, snat_first: 1, snat_last: 0 };
        let addresses = (0..entries).map(|low| (IpAddr::from([203, 0, 113, low]), Some(entry))).collect();
        SteerChange { addresses, ..SteerChange::default() }
    }

    #[test]
    fn asks_and_is_answered() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let keeper = std::thread::spawn(move || {
            let mut requests = Requests::new(theirs);
            let mut contents = Contents::default();
            while requests
                .answer(|request| {
                    Some(match request {
                        Request::Steer(change) if change.len() == 3 => Reply::Failed("full".into()).into(),
                        Request::Steer(change) => {
                            contents.apply(&change);
                            Reply::Done.into()
                        }
                        Request::SteerContents => {
                            Reply::Contents(Contents::default().difference(&contents).0).into()
                        }
                        Request::SteerCounters => Reply::Counters(vec![7, 8]).into(),
                        Request::Listen { addr } if addr.port() == 1 => Reply::Failed("taken".into()).into(),
                        Request::Listen { addr } => {
                            let listener = TcpListener::bind(addr).unwrap();
                            Answer { reply: Reply::Listening, fd: Some(listener.into()) }
                        }
                        Request::Port(PortChange::Remove { name }) => {
                            Reply::Fault(Fault::new(Code::NotFound, "no such port").value(name)).into()
                        }
                        // The data plane is ended instead.
                        Request::Port(PortChange::Add(_)) => return None,
                        _ => Reply::Done.into(),
                    })
                })
                .is_ok()
            {}
        });
        let data_plane = Keeper::new(ours);
        data_plane.ready().unwrap();
        data_plane.steer(a_change(200)).unwrap();
        assert_eq!(data_plane.steer_contents().unwrap().addresses.len(), 200);
        assert_eq!(data_plane.steer_counters().unwrap(), [7, 8]);
        assert!(matches!(data_plane.steer(a_change(3)), Err(AskError::Failed(message)) if message == "full"));
        for _ in 0..3 {
            let listener = data_plane.listen("127.0.0.1:0".parse().unwrap()).unwrap();
            let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_, from) = listener.accept().unwrap();
            assert_eq!(from, client.local_addr().unwrap());
            assert_eq!(data_plane.steer_counters().unwrap(), [7, 8], "answers without descriptors go on");
        }
        let taken = data_plane.listen("127.0.0.1:1".parse().unwrap());
        assert!(matches!(taken, Err(AskError::Failed(message)) if message == "taken"));
        let refused = data_plane.change_port(PortChange::Remove { name: "pod7".into() });
        assert_eq!((refused.code, refused.value.as_deref()), (Code::NotFound, Some("pod7")));
        drop(data_plane);
        keeper.join().unwrap();
    }

    #[test]
    fn garbage_is_an_error_and_not_a_request() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"{\"format_disk\":{}}\n").unwrap();
        let mut requests = Requests::new(theirs);
        assert!(requests.answer(|request| panic!("{request:?}")).is_err());
    }
}
