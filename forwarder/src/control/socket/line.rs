//! Bytes to lines: bounded, and charged to one budget for all clients.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use config::control::MAX_LINE_BYTES;
use config::fault::{Code, Fault};

/// Bytes of requests that the daemon may hold at a time, over all clients: unfinished lines and staged changes.
#[derive(Clone, Debug)]
pub struct Budget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Budget {
        Budget { used: Arc::default(), limit }
    }

    /// A charge of nothing, to be grown.
    pub fn charge(&self) -> Charge {
        Charge { budget: self.clone(), bytes: 0 }
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Part of a [`Budget`], given back when dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Budget,
    bytes: usize,
}

impl Charge {
    /// Takes `bytes` more.
    ///
    /// # Errors
    /// The budget is used up; nothing is taken then.
    pub fn grow(&mut self, bytes: usize) -> Result<(), Fault> {
        let before = self.budget.used.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.budget.limit {
            self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Fault::new(Code::Limit, "too much is waiting to be committed, over all clients")
                .field("[control] staging_bytes")
                .value(self.budget.limit)
                .remedy("apply in smaller parts, wait for other clients, or raise it in the gateway file"));
        }
        self.bytes += bytes;
        Ok(())
    }

    /// Gives `bytes` back.
    pub fn shrink(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.shrink(self.bytes);
    }
}

/// What was received and is not a whole line yet, and whole lines whose turn has not come.
#[derive(Debug)]
pub struct Lines {
    bytes: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// No newline before this.
    searched: usize,
    charge: Charge,
}

impl Lines {
    /// Nothing yet; what comes is charged to `budget`.
    pub fn new(budget: &Budget) -> Lines {
        Lines { bytes: Vec::new(), start: 0, searched: 0, charge: budget.charge() }
    }

    /// Adds what was received.
    ///
    /// # Errors
    /// The budget is used up.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.charge.grow(bytes.len())?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes the next whole line, without its newline.
    ///
    /// # Errors
    /// The line is longer than [`MAX_LINE_BYTES`].
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        let newline = self.bytes[self.searched..].iter().position(|b| *b == b'\n').map(|n| n + self.searched);
        let len = newline.unwrap_or(self.bytes.len()) - self.start;
        if len >= MAX_LINE_BYTES {
            return Err(Fault::new(Code::Limit, format!("a line is longer than {MAX_LINE_BYTES} bytes"))
                .remedy("an object larger than that is not for a gateway; cut it into several"));
        }
        let Some(end) = newline else {
            self.searched = self.bytes.len();
            return Ok(None);
        };
        let line = self.bytes[self.start..end].to_vec();
        self.start = end + 1;
        self.searched = self.start;
        // Moving the rest to the front costs as much as is left, so it is done when at most half is left.
        if self.start * 2 >= self.bytes.len() {
            self.bytes.drain(..self.start);
            self.charge.shrink(self.start);
            self.start = 0;
            self.searched = 0;
            if self.bytes.is_empty() && self.bytes.capacity() > 1 << 16 {
                self.bytes = Vec::new();
            }
        }
        Ok(Some(line))
    }

    /// True if part of a line is waiting for the rest of it.
    pub fn is_unfinished(&self) -> bool {
        self.bytes.len() > self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut lines = Lines::new(&Budget::new(1 << 20));
        let mut found = Vec::new();
        for chunk in chunks {
            lines.push(chunk).unwrap();
            while let Some(line) = lines.next_line().unwrap() {
                found.push(line);
            }
        }
        found
    }

    #[test]
    fn the_cuts_between_reads_do_not_matter() {
        let text = b"one\n\ntwo two\r\nthree\nunfinished";
        let expected: Vec<Vec<u8>> =
            [&b"one"[..], b"", b"two two\r", b"three"].iter().map(|l| l.to_vec()).collect();
        assert_eq!(feed(&[text]), expected);
        for size in 1..text.len() {
            assert_eq!(feed(&text.chunks(size).collect::<Vec<_>>()), expected, "chunks of {size}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_limit() {
        let budget = Budget::new(usize::MAX / 2);
        let mut lines = Lines::new(&budget);
        lines.push(&vec![b'x'; MAX_LINE_BYTES - 1]).unwrap();
        assert!(lines.next_line().unwrap().is_none());
        lines.push(b"\n").unwrap();
        assert_eq!(lines.next_line().unwrap().unwrap().len(), MAX_LINE_BYTES - 1);
        lines.push(&vec![b'x'; MAX_LINE_BYTES]).unwrap();
        assert_eq!(lines.next_line().unwrap_err().code, Code::Limit);
    }

    #[test]
    fn the_budget_is_shared_and_given_back() {
        let budget = Budget::new(100);
        let mut first = Lines::new(&budget);
        let mut second = Lines::new(&budget);
        first.push(&[b'a'; 60]).unwrap();
        assert_eq!(second.push(&[b'b'; 41]).unwrap_err().code, Code::Limit);
        second.push(&[b'b'; 40]).unwrap();
        assert_eq!(budget.used(), 100);
        drop(first);
        second.push(b"\n").unwrap();
        assert_eq!(second.next_line().unwrap().unwrap().len(), 40);
        assert_eq!(budget.used(), 0);
    }
}
