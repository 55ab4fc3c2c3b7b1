//! A conversation with the daemon: connect, `hello`, one line out, lines back. `config::control` defines the messages.
//!
//! Nothing here waits longer than the timeout, and every failure says what to do about it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use config::control::{Item, MAX_LINE_BYTES, Reply, Request, VERSION};
use config::fault::{Code, Fault};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// One connection, past its `hello`.
pub struct Connection {
    reader: BufReader<UnixStream>,
    timeout: Duration,
}

impl Connection {
    /// Connects and says hello; again, for at most `timeout`, while the daemon has no place for another client.
    ///
    /// # Errors
    /// No daemon, no permission, another version of the protocol, no answer within `timeout`: each in words.
    pub fn open(path: &Path, timeout: Duration) -> Result<Connection> {
        let start = Instant::now();
        loop {
            match Connection::greet(path, timeout) {
                Err(error) if is_full(&error) && start.elapsed() < timeout => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                outcome => return outcome,
            }
        }
    }

    fn greet(path: &Path, timeout: Duration) -> Result<Connection> {
        let stream = dial(path, timeout).map_err(|e| explain_refusal(path, timeout, &e))?;
        let mut connection = Connection { reader: BufReader::with_capacity(64 << 10, stream), timeout };
        let client = concat!("towpathctl ", env!("CARGO_PKG_VERSION")).to_owned();
        match connection.ask(&Request::Hello { version: VERSION, client })? {
            Reply::Hello { version, server, .. } if version != VERSION => bail!(
                "{server} speaks control protocol version {version}, this towpathctl version {VERSION}: \
                 use the towpathctl that came with the daemon"
            ),
            Reply::Hello { .. } => Ok(connection),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends one request that has one answer. A [`Reply::Fault`] becomes an error.
    pub fn ask(&mut self, request: &Request) -> Result<Reply> {
        self.send(request)?;
        self.receive()
    }

    /// Sends one request and hands every item of its list to `each`.
    pub fn list(&mut self, request: &Request, mut each: impl FnMut(Item) -> Result<()>) -> Result<()> {
        self.send(request)?;
        let mut received = 0;
        loop {
            match self.receive()? {
                Reply::Item(item) => {
                    received += 1;
                    each(item)?;
                }
                Reply::End { count } if count == received => return Ok(()),
                Reply::End { count } => bail!("the daemon announced {count} items and sent {received}"),
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Sends one request without waiting for an answer.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        let line = request.to_line();
        if line.len() > MAX_LINE_BYTES {
            let what = match request {
                Request::Apply(apply) => format!("the object of {}", apply.source),
                _ => "the request".to_owned(),
            };
            bail!(
                "{what} is {} bytes as JSON; the daemon takes at most {MAX_LINE_BYTES}: split it",
                line.len()
            );
        }
        let Err(error) = self.reader.get_mut().write_all(line.as_bytes()) else { return Ok(()) };
        // A daemon that gives up in the middle says why before it closes.
        if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) {
            match self.receive() {
                Ok(reply) => return Err(unexpected(&reply)),
                Err(fault) if fault.is::<Fault>() => return Err(fault),
                Err(_) => {}
            }
        }
        Err(self.lost(&error))
    }

    /// From now on waits for an answer as long as it takes.
    pub fn wait_for_ever(&mut self) -> Result<()> {
        set_socket_timeout(self.reader.get_ref(), Timeout::Recv, None)
            .context("cannot change the socket's timeout")
    }

    /// The socket, for another thread to close the client's side of a stream.
    pub fn handle(&self) -> Result<UnixStream> {
        self.reader.get_ref().try_clone().context("cannot share the socket")
    }

    /// True if the next answer has not begun to come.
    pub fn is_drained(&self) -> bool {
        self.reader.buffer().is_empty()
    }

    /// Waits for the next answer. A [`Reply::Fault`] becomes an error.
    pub fn receive(&mut self) -> Result<Reply> {
        let mut line = Vec::new();
        let limit = MAX_LINE_BYTES as u64 + 1;
        self.reader.by_ref().take(limit).read_until(b'\n', &mut line).map_err(|e| self.lost(&e))?;
        if line.last() != Some(&b'\n') {
            if line.len() as u64 == limit {
                bail!(
                    "the daemon's answer has a line longer than {MAX_LINE_BYTES} bytes: is this socket Towpath's?"
                );
            }
            bail!("the daemon closed the connection; see its log");
        }
        match Reply::from_line(&line) {
            Ok(Reply::Fault(fault)) => Err(fault.into()),
            Ok(reply) => Ok(reply),
            Err(fault) => Err(anyhow!(fault).context("the daemon's answer cannot be read")),
        }
    }

    fn lost(&self, error: &io::Error) -> anyhow::Error {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => anyhow!(
                "no answer from the daemon within {} s: see its log, or allow more with --request-timeout",
                self.timeout.as_secs_f64()
            ),
            _ => anyhow!("connection to the daemon lost: {error}"),
        }
    }
}

/// The error for an answer that does not belong to its question.
pub fn unexpected(reply: &Reply) -> anyhow::Error {
    let mut text = reply.to_line();
    text.truncate(text.char_indices().nth(120).map_or(text.len(), |(i, _)| i));
    anyhow!(Fault::new(Code::Request, format!("unexpected answer: {}", text.trim_end())))
}

/// True if the daemon has too many clients at the moment.
fn is_full(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Fault>().is_some_and(|fault| fault.code == Code::Limit)
}

fn dial(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Before connecting: a full backlog blocks `connect` for as long as the send timeout.
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(timeout))?;
    connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

fn explain_refusal(path: &Path, timeout: Duration, error: &io::Error) -> anyhow::Error {
    let shown = path.display();
    let other = "name another socket with --socket or TOWPATH_SOCKET";
    let metadata = std::fs::metadata(path);
    match error.kind() {
        io::ErrorKind::NotFound => anyhow!("no daemon: {shown} does not exist; start towpathd, or {other}"),
        io::ErrorKind::ConnectionRefused if metadata.as_ref().is_ok_and(|m| !m.file_type().is_socket()) => {
            anyhow!("{shown} is not a socket; {other}")
        }
        io::ErrorKind::ConnectionRefused => {
            anyhow!("no daemon: nobody listens on {shown}; start towpathd, or {other}")
        }
        io::ErrorKind::PermissionDenied => match metadata {
            Ok(m) => anyhow!(
                "permission denied on {shown}: run as root or as a member of group {}, which owns it",
                m.gid()
            ),
            Err(_) => anyhow!("permission denied on the way to {shown}: run as root, or {other}"),
        },
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            anyhow!(
                "the daemon on {shown} takes no connection within {} s: see its log",
                timeout.as_secs_f64()
            )
        }
        _ => Err::<(), _>(io::Error::new(error.kind(), error.to_string()))
            .with_context(|| format!("cannot connect to {shown}"))
            .expect_err("it is an error"),
    }
}

/// The error for an item of another kind than was asked for.
pub fn unexpected_item() -> anyhow::Error {
    anyhow!(Fault::new(Code::Request, "unexpected answer: an item of another kind than was asked for"))
}
