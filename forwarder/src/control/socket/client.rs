//! One client: bytes in, bytes out, and what it has staged. No descriptor and no clock here.

use std::sync::Arc;

use config::control::{Begin, MAX_LINE_BYTES, Reply, Request, VERSION};
use config::fault::{Code, Fault};

use super::line::{Budget, Charge, Lines};
use super::{Answer, Backend, Dump, Event, Stream, Ticket, Transaction};

/// No further request is looked at while so many bytes of replies are unread.
const OUTPUT_PAUSE_BYTES: usize = 64 << 10;

/// What the client waits for before its next request is looked at.
enum Work {
    Nothing,
    Dump(Dump),
    Stream(Box<dyn Stream>),
    Commit,
}

/// The state of a conversation.
pub struct Client {
    id: u64,
    input: Lines,
    budget: Budget,
    output: Vec<u8>,
    written: usize,
    work: Work,
    greeted: bool,
    /// A change that is not committed yet.
    staging: Option<Transaction>,
    /// The client will send nothing more.
    closed: bool,
    /// After a fault that ends the conversation: nothing more is read, what is in `output` is still sent.
    finished: bool,
}

impl Client {
    /// A client that has not said anything yet.
    pub fn new(id: u64, budget: &Budget) -> Client {
        Client {
            id,
            input: Lines::new(budget),
            budget: budget.clone(),
            output: Vec::new(),
            written: 0,
            work: Work::Nothing,
            greeted: false,
            staging: None,
            closed: false,
            finished: false,
        }
    }

    /// Takes bytes that were received.
    pub fn receive(&mut self, bytes: &[u8]) {
        if !self.finished
            && let Err(fault) = self.input.push(bytes)
        {
            self.end(fault);
        }
        self.stop_stream();
    }

    /// The client has closed its side: nothing more will be received.
    pub fn closed(&mut self) {
        self.closed = true;
        self.stop_stream();
    }

    fn stop_stream(&mut self) {
        if let Work::Stream(stream) = &mut self.work {
            stream.stop();
        }
    }

    /// Does one step: a request, or a part of a dump. Returns false if there is nothing to do now.
    pub fn step(&mut self, backend: &dyn Backend, ticket: impl FnOnce(u64) -> Ticket) -> bool {
        if self.unread() >= OUTPUT_PAUSE_BYTES {
            return false;
        }
        match &mut self.work {
            Work::Dump(dump) => {
                match dump.next() {
                    Some(Some(reply)) => self.reply(reply),
                    Some(None) => {}
                    None => self.work = Work::Nothing,
                }
                true
            }
            Work::Stream(stream) => match stream.next() {
                Event::Reply(reply) => {
                    self.reply(*reply);
                    true
                }
                Event::Nothing => false,
                Event::Over => {
                    self.work = Work::Nothing;
                    true
                }
            },
            Work::Commit => false,
            Work::Nothing if self.finished => false,
            Work::Nothing => match self.input.next_line() {
                Ok(Some(line)) => {
                    self.request(&line, backend, ticket);
                    true
                }
                Ok(None) => false,
                Err(fault) => {
                    self.end(fault);
                    true
                }
            },
        }
    }

    fn request(&mut self, line: &[u8], backend: &dyn Backend, ticket: impl FnOnce(u64) -> Ticket) {
        let request = match Request::from_line(line) {
            Ok(request) => request,
            Err(fault) if fault.code == Code::Request && self.greeted && self.staging.is_none() => {
                return self.reply(Reply::Fault(fault));
            }
            Err(fault) => return self.end(fault),
        };
        match request {
            Request::Hello { version, .. } if version != VERSION => self.end(
                Fault::new(
                    Code::Version,
                    format!("the daemon speaks version {VERSION} of the control protocol"),
                )
                .value(version)
                .remedy("use the towpathctl that came with this towpathd"),
            ),
            Request::Hello { .. } => {
                self.greeted = true;
                self.reply(backend.hello());
            }
            _ if !self.greeted => {
                self.end(Fault::new(Code::Request, "the first line of a conversation must be hello"))
            }
            Request::Begin(begin) => self.begin(begin),
            operation @ (Request::Apply(_) | Request::Delete(_)) => self.stage(operation, line.len()),
            Request::Commit => match self.staging.take() {
                Some(transaction) => {
                    self.work = Work::Commit;
                    backend.commit(transaction, ticket(self.id));
                }
                None => self.reply(out_of_order("commit without begin")),
            },
            Request::Abort => match self.staging.take() {
                Some(_) => self.reply(Reply::Done),
                None => self.reply(out_of_order("abort without begin")),
            },
            question => match backend.answer(question) {
                Answer::Reply(reply) => self.reply(*reply),
                Answer::Dump(dump) => self.work = Work::Dump(dump),
                Answer::Stream(stream) => {
                    self.work = Work::Stream(stream);
                    // The end may have come with the request.
                    if self.closed || self.input.is_unfinished() {
                        self.stop_stream();
                    }
                }
            },
        }
    }

    fn begin(&mut self, begin: Begin) {
        if self.staging.is_some() {
            return self.end(Fault::new(Code::Request, "begin within a change; commit or abort it first"));
        }
        let charge: Charge = self.budget.charge();
        self.staging = Some(Transaction::new(begin, charge));
    }

    fn stage(&mut self, operation: Request, bytes: usize) {
        let Some(transaction) = &mut self.staging else {
            return self.end(Fault::new(Code::Request, "apply or delete without begin"));
        };
        match transaction.charge.grow(bytes) {
            Ok(()) => transaction.add(operation),
            Err(fault) => self.end(fault),
        }
    }

    /// Ends the conversation with a fault; what was staged is forgotten.
    fn end(&mut self, fault: Fault) {
        self.reply(Reply::Fault(fault));
        self.cut();
    }

    /// The daemon cuts this client off, saying why.
    pub fn cut_off(&mut self, why: &str, remedy: &str) {
        self.end(Fault::new(Code::Limit, why).remedy(remedy));
    }

    fn cut(&mut self) {
        self.finished = true;
        self.staging = None;
        self.work = Work::Nothing;
        self.input = Lines::new(&self.budget);
    }

    fn reply(&mut self, reply: Reply) {
        let mut line = reply.to_line();
        if line.len() > MAX_LINE_BYTES {
            let fault = Fault::new(Code::Limit, "the answer is longer than a line of the protocol may be");
            line = Reply::Fault(fault.remedy("ask for less at a time")).to_line();
        }
        self.output.extend_from_slice(line.as_bytes());
    }

    /// The answer to a commit has come.
    pub fn committed(&mut self, reply: Reply) {
        if matches!(self.work, Work::Commit) {
            self.work = Work::Nothing;
            self.reply(reply);
        }
    }

    /// Bytes to be sent.
    pub fn output(&self) -> &[u8] {
        &self.output[self.written..]
    }

    /// `bytes` of the output were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.written += bytes;
        if self.written == self.output.len() {
            self.written = 0;
            self.output.clear();
            if self.output.capacity() > 2 * OUTPUT_PAUSE_BYTES {
                self.output = Vec::new();
            }
        }
    }

    /// How many bytes of replies the client has not taken yet.
    pub fn unread(&self) -> usize {
        self.output.len() - self.written
    }

    /// True if more input is of use now.
    pub fn wants_input(&self) -> bool {
        let listens = matches!(self.work, Work::Nothing | Work::Stream(_));
        !self.finished && listens && self.unread() < OUTPUT_PAUSE_BYTES
    }

    /// True if part of a line is waiting for its rest.
    pub fn is_unfinished(&self) -> bool {
        matches!(self.work, Work::Nothing) && self.input.is_unfinished()
    }

    /// True between `begin` and `commit`.
    pub fn is_staging(&self) -> bool {
        self.staging.is_some()
    }

    /// True if the client has not said hello yet.
    pub fn is_stranger(&self) -> bool {
        !self.greeted
    }

    /// True while a stream is under way.
    pub fn is_streaming(&self) -> bool {
        matches!(self.work, Work::Stream(_))
    }

    /// True if a commit, a dump or a stream is under way.
    pub fn is_working(&self) -> bool {
        !matches!(self.work, Work::Nothing)
    }

    /// True if the conversation is over as soon as the output is sent.
    pub fn is_finished(&self) -> bool {
        self.finished
    }
}

fn out_of_order(message: &str) -> Reply {
    Reply::Fault(Fault::new(Code::Request, message))
}

/// Runs a conversation of arbitrary bytes against a daemon that answers everything with `done`; for fuzzing.
///
/// Returns how many bytes it would have answered.
pub fn fuzz_conversation(bytes: &[u8]) -> usize {
    struct Nothing;
    impl Backend for Nothing {
        fn hello(&self) -> Reply {
            Reply::Done
        }
        fn answer(&self, _: Request) -> Answer {
            Reply::Done.into()
        }
        fn commit(&self, _: Transaction, ticket: Ticket) {
            ticket.answer(Reply::Done);
        }
    }
    let budget = Budget::new(1 << 20);
    let outbox = Arc::new(super::Outbox::new().expect("an eventfd"));
    let mut client = Client::new(1, &budget);
    let mut answered = 0;
    for chunk in bytes.chunks(1000) {
        client.receive(chunk);
        while client.step(&Nothing, |id| Ticket::new(id, &outbox)) {
            for (_, reply) in outbox.take() {
                client.committed(reply);
            }
            answered += client.unread();
            client.sent(client.unread());
        }
    }
    drop(client);
    assert_eq!(budget.used(), 0, "the staging budget leaks");
    answered
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Says `done` twice, then nothing until it is stopped.
    #[derive(Default)]
    struct Twice {
        said: u32,
        stopped: bool,
    }

    impl Stream for Twice {
        fn next(&mut self) -> Event {
            self.said += 1;
            match (self.said, self.stopped) {
                (1 | 2, _) => Event::reply(Reply::Done),
                (_, false) => Event::Nothing,
                (3, true) => Event::reply(Reply::Captured { count: 2, missed: 0 }),
                (_, true) => Event::Over,
            }
        }

        fn stop(&mut self) {
            self.said = 2;
            self.stopped = true;
        }
    }

    /// Keeps what is committed; `get` is an endless dump.
    #[derive(Default)]
    struct Fake {
        commits: Mutex<Vec<Transaction>>,
    }

    impl Backend for Fake {
        fn hello(&self) -> Reply {
            Reply::Hello { version: VERSION, server: "s".into(), gateway: "g".into(), generation: 0 }
        }
        fn answer(&self, request: Request) -> Answer {
            match request {
                Request::Get(_) => {
                    Answer::Dump(Box::new(std::iter::repeat_with(|| Some(Reply::End { count: 1 }))))
                }
                Request::Capture(_) => Answer::Stream(Box::new(Twice::default())),
                _ => Reply::Done.into(),
            }
        }
        fn commit(&self, transaction: Transaction, ticket: Ticket) {
            self.commits.lock().unwrap().push(transaction);
            ticket.answer(Reply::Done);
        }
    }

    struct Talk {
        client: Client,
        backend: Fake,
        outbox: Arc<super::super::Outbox>,
        budget: Budget,
    }

    impl Talk {
        fn new() -> Talk {
            let budget = Budget::new(8 << 20);
            let outbox = Arc::new(super::super::Outbox::new().unwrap());
            Talk { client: Client::new(7, &budget), backend: Fake::default(), outbox, budget }
        }

        /// Sends text and returns the replies to it.
        fn say(&mut self, text: impl AsRef<[u8]>) -> Vec<Reply> {
            if !text.as_ref().is_empty() {
                self.client.receive(text.as_ref());
            }
            let mut replies = Vec::new();
            while self.client.step(&self.backend, |id| Ticket::new(id, &self.outbox)) {
                for (id, reply) in self.outbox.take() {
                    assert_eq!(id, 7);
                    self.client.committed(reply);
                }
            }
            let output = self.client.output().to_vec();
            self.client.sent(output.len());
            for line in output.split_inclusive(|b| *b == b'\n') {
                replies.push(Reply::from_line(line).unwrap());
            }
            replies
        }

        fn hello(mut self) -> Talk {
            let replies = self.say("{\"hello\":{\"version\":1,\"client\":\"test\"}}\n");
            assert!(matches!(replies[..], [Reply::Hello { .. }]));
            self
        }
    }

    fn fault(replies: &[Reply]) -> &Fault {
        match replies {
            [Reply::Fault(fault)] => fault,
            other => panic!("not one fault: {other:?}"),
        }
    }

    const APPLY: &str = "{\"apply\":{\"object\":{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{\"name\":\"a\"}}}}\n";

    #[test]
    fn a_change_is_handed_over_whole() {
        let mut talk = Talk::new().hello();
        assert!(talk.say("{\"begin\":{\"dry_run\":true}}\n").is_empty());
        for _ in 0..3 {
            assert!(talk.say(APPLY).is_empty());
        }
        assert!(talk.backend.commits.lock().unwrap().is_empty());
        assert_eq!(talk.say("\"commit\"\n"), [Reply::Done]);
        {
            let commits = talk.backend.commits.lock().unwrap();
            assert_eq!(commits[0].operations.len(), 3);
            assert!(commits[0].begin.dry_run);
            assert!(talk.budget.used() >= 3 * (APPLY.len() - 1), "charged until the change is done");
        }
        talk.backend.commits.lock().unwrap().clear();
        assert_eq!(talk.budget.used(), 0);
    }

    #[test]
    fn abort_and_death_leave_nothing_behind() {
        let mut talk = Talk::new().hello();
        talk.say(format!("{{\"begin\":{{}}}}\n{APPLY}"));
        assert_eq!(talk.say("\"abort\"\n"), [Reply::Done]);
        assert_eq!(fault(&talk.say("\"commit\"\n")).code, Code::Request);
        talk.say(format!("{{\"begin\":{{}}}}\n{APPLY}{{\"apply\":"));
        drop(talk.client);
        assert_eq!(talk.budget.used(), 0);
        assert!(talk.backend.commits.lock().unwrap().is_empty());
    }

    #[test]
    fn bad_input_is_answered_clearly_and_ends_the_conversation() {
        let nested_array = "[".repeat(100_000);
        let nested_object = "{\"a\":".repeat(100_000);
        let nested_apply = format!(
            "{{\"begin\":{{}}}}\n{{\"apply\":{{\"object\":{}{}}}}}",
            "[".repeat(50_000),
            "]".repeat(50_000)
        );
        let oversized = "x".repeat(MAX_LINE_BYTES + 1);
        let noun = b"{\"get\":{\"what\":\"everything\"}}\n";
        // Name, bytes, code of the fault, and whether the conversation is over.
        let cases: [(&str, &[u8], Code, bool); 14] = [
            ("garbage", b"GET / HTTP/1.1\r\n", Code::Syntax, true),
            ("binary", &[0xde, 0xad, 0xbe, 0xef, b'\n'], Code::Syntax, true),
            ("NUL", b"\0\0\0\0\n", Code::Syntax, true),
            ("NUL inside", b"{\"hello\":{\"version\":1,\"client\":\"a\0b\"}}\n", Code::Syntax, true),
            ("invalid UTF-8", b"{\"hello\":{\"version\":1,\"client\":\"\xff\"}}\n", Code::Syntax, true),
            ("an empty line", b"\n", Code::Syntax, true),
            ("a cut request", b"{\"status\n", Code::Syntax, true),
            ("nested arrays", nested_array.as_bytes(), Code::Syntax, true),
            ("a deeply nested object", nested_apply.as_bytes(), Code::Syntax, true),
            ("an oversized line", oversized.as_bytes(), Code::Limit, true),
            ("apply without begin", APPLY.as_bytes(), Code::Request, true),
            ("begin twice", b"{\"begin\":{}}\n{\"begin\":{}}\n", Code::Request, true),
            ("an unknown request", nested_object.as_bytes(), Code::Request, false),
            ("a value of the wrong type", noun, Code::Request, false),
        ];
        for (name, bytes, code, over) in cases {
            let mut talk = Talk::new().hello();
            let mut line = bytes.to_vec();
            if line.last() != Some(&b'\n') {
                line.push(b'\n');
            }
            let replies = talk.say(&line);
            let fault = fault(&replies);
            assert_eq!(fault.code, code, "{name}: {fault}");
            assert!(!fault.message.is_empty() && fault.message.len() < 1000, "{name}: {fault}");
            assert_eq!(talk.client.is_finished(), over, "{name}");
            assert_eq!(talk.say("\"status\"\n").is_empty(), over, "{name}");
        }
    }

    #[test]
    fn every_valid_request_cut_at_every_byte_has_no_effect() {
        let text = format!(
            "{{\"hello\":{{\"version\":1,\"client\":\"t\"}}}}\n{{\"begin\":{{}}}}\n{APPLY}{APPLY}\"commit\"\n"
        );
        for cut in 0..text.len() {
            let mut talk = Talk::new();
            talk.say(&text[..cut]);
            assert!(talk.backend.commits.lock().unwrap().is_empty(), "cut at {cut}");
            talk.say(&text[cut..]);
            assert_eq!(talk.backend.commits.lock().unwrap().len(), 1, "cut at {cut}");
        }
    }

    #[test]
    fn one_byte_at_a_time_is_as_good_as_all_at_once() {
        let mut talk = Talk::new();
        for byte in format!(
            "{{\"hello\":{{\"version\":1,\"client\":\"t\"}}}}\n{{\"begin\":{{}}}}\n{APPLY}\"commit\"\n"
        )
        .bytes()
        {
            talk.say([byte]);
        }
        assert_eq!(talk.backend.commits.lock().unwrap().len(), 1);
    }

    #[test]
    fn versions_are_compared_before_anything_else() {
        let mut talk = Talk::new();
        let replies = talk.say("{\"hello\":{\"version\":2,\"client\":\"newer\"}}\n\"status\"\n");
        assert_eq!(fault(&replies).code, Code::Version);
        assert!(talk.client.is_finished());
        let mut talk = Talk::new();
        assert_eq!(fault(&talk.say("\"status\"\n")).code, Code::Request, "hello comes first");
    }

    #[test]
    fn an_unknown_request_is_answered_and_the_conversation_goes_on() {
        let mut talk = Talk::new().hello();
        assert_eq!(fault(&talk.say("{\"teleport\":{}}\n")).code, Code::Request);
        assert_eq!(talk.say("\"status\"\n"), [Reply::Done]);
    }

    #[test]
    fn an_endless_dump_stops_at_the_pause() {
        let mut talk = Talk::new().hello();
        talk.client.receive(b"{\"get\":{\"what\":\"services\"}}\n\"status\"\n");
        while talk.client.step(&talk.backend, |id| Ticket::new(id, &talk.outbox)) {}
        let unread = talk.client.unread();
        assert!((OUTPUT_PAUSE_BYTES..OUTPUT_PAUSE_BYTES + 100).contains(&unread), "{unread}");
        assert!(!talk.client.wants_input());
        talk.client.sent(unread);
        assert!(talk.client.step(&talk.backend, |id| Ticket::new(id, &talk.outbox)));
    }

    #[test]
    fn a_stream_ends_with_the_next_byte_or_the_end_of_input() {
        const CAPTURE: &str = "{\"capture\":{}}\n";
        let end = Reply::Captured { count: 2, missed: 0 };
        let mut talk = Talk::new().hello();
        assert_eq!(talk.say(CAPTURE), [Reply::Done, Reply::Done]);
        assert!(talk.client.is_streaming() && talk.client.is_working() && talk.client.wants_input());
        assert!(talk.say("").is_empty(), "nothing has happened");
        assert_eq!(talk.say("\"sta"), std::slice::from_ref(&end));
        assert_eq!(talk.say("tus\"\n"), [Reply::Done], "and the conversation goes on");

        assert_eq!(talk.say(CAPTURE), [Reply::Done, Reply::Done]);
        talk.client.closed();
        assert_eq!(talk.say(""), std::slice::from_ref(&end));
        assert!(!talk.client.is_working());

        // The end came with the request.
        let mut talk = Talk::new().hello();
        assert_eq!(talk.say(format!("{CAPTURE}\"status\"\n")), [end, Reply::Done]);
    }

    #[test]
    fn the_budget_ends_the_client_that_exceeds_it_only() {
        let mut talk = Talk::new().hello();
        talk.say("{\"begin\":{}}\n");
        let big = format!("{{\"apply\":{{\"object\":{{\"x\":\"{}\"}}}}}}\n", "y".repeat(1 << 20));
        let mut replies = Vec::new();
        for _ in 0..9 {
            replies.extend(talk.say(&big));
        }
        let fault = fault(&replies);
        assert_eq!(fault.code, Code::Limit);
        assert!(fault.to_string().contains("staging_bytes"), "{fault}");
        assert_eq!(talk.budget.used(), 0, "all of it is free for others");
    }

    #[test]
    fn random_and_mutated_conversations_do_no_harm() {
        use proptest::prelude::*;
        let valid = format!(
            "{{\"hello\":{{\"version\":1,\"client\":\"t\"}}}}\n\"status\"\n{{\"begin\":{{}}}}\n{APPLY}\"commit\"\n\"abort\"\n"
        );
        proptest!(ProptestConfig::with_cases(512), |(
            noise in proptest::collection::vec(any::<u8>(), 0..300),
            flips in proptest::collection::vec((0..valid.len(), 0..8u8), 0..6),
        )| {
            fuzz_conversation(&noise);
            let mut bytes = valid.clone().into_bytes();
            for (at, bit) in flips {
                bytes[at] ^= 1 << bit;
            }
            fuzz_conversation(&bytes);
        });
    }
}
