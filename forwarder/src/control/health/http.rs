//! As much HTTP/1.1 (RFC 9110, RFC 9112) as probes need: GET and HEAD without a body, one request a connection.

use k8s_openapi::jiff::Timestamp;

/// Media type of JSON.
pub const JSON: &str = "application/json";

/// Header lines of a request at most.
const HEADER_LINES: usize = 64;

/// What the bytes of a request say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// There is more to come.
    Incomplete,
    /// A request that can be answered.
    Request {
        /// The method is HEAD: the answer has no body.
        head: bool,
        /// Path of the target, without its query.
        path: String,
    },
    /// A request that is answered by its refusal.
    Refused(Response),
}

/// A status code and its reason phrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16, pub &'static str);

impl Status {
    /// All is well.
    pub const OK: Status = Status(200, "OK");
    /// No HTTP.
    pub const BAD_REQUEST: Status = Status(400, "Bad Request");
    /// Nothing is served by this path.
    pub const NOT_FOUND: Status = Status(404, "Not Found");
    /// Neither GET nor HEAD.
    pub const BAD_METHOD: Status = Status(405, "Method Not Allowed");
    /// More than we read.
    pub const TOO_LARGE: Status = Status(431, "Request Header Fields Too Large");
    /// Not healthy.
    pub const UNAVAILABLE: Status = Status(503, "Service Unavailable");
    /// Another version of HTTP.
    pub const BAD_VERSION: Status = Status(505, "HTTP Version Not Supported");
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Its status.
    pub status: Status,
    /// Media type of the body.
    pub content_type: &'static str,
    /// Header lines besides those that every answer has.
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: String,
}

impl Response {
    /// An answer with the headers that every answer has.
    pub fn new(status: Status, content_type: &'static str, body: String) -> Response {
        Response { status, content_type, headers: Vec::new(), body }
    }

    /// A sentence instead of what was asked for.
    pub fn refusal(status: Status, sentence: &str) -> Response {
        Response::new(status, "text/plain; charset=utf-8", format!("{sentence}\n"))
    }

    /// The answer with one more header line.
    pub fn header(mut self, name: &'static str, value: impl ToString) -> Response {
        self.headers.push((name, value.to_string()));
        self
    }

    /// The answer on the wire. `head`: without its body.
    pub fn to_bytes(&self, head: bool, now: Timestamp) -> Vec<u8> {
        let Status(code, phrase) = self.status;
        // IMF-fixdate, RFC 9110 section 5.6.7.
        let date = now.strftime("%a, %d %b %Y %H:%M:%S GMT");
        let mut text = format!(
            "HTTP/1.1 {code} {phrase}\r\nDate: {date}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n",
            self.content_type,
            self.body.len()
        );
        for (name, value) in &self.headers {
            text += &format!("{name}: {value}\r\n");
        }
        text += "\r\n";
        if !head {
            text += &self.body;
        }
        text.into_bytes()
    }
}

/// Reads a request from what has come of it. `limit`: there will be no more than so many bytes.
pub fn parse(bytes: &[u8], limit: usize) -> Parsed {
    let refused = |status, sentence| Parsed::Refused(Response::refusal(status, sentence));
    let mut lines = [httparse::EMPTY_HEADER; HEADER_LINES];
    let mut request = httparse::Request::new(&mut lines);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if bytes.len() < limit => return Parsed::Incomplete,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return refused(Status::TOO_LARGE, "send a shorter request");
        }
        Err(httparse::Error::Version) => return refused(Status::BAD_VERSION, "use HTTP/1.1"),
        Err(_) => return refused(Status::BAD_REQUEST, "this is no HTTP request"),
    }
    let head = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => {
            let refusal = Response::refusal(Status::BAD_METHOD, "use GET or HEAD");
            return Parsed::Refused(refusal.header("Allow", "GET, HEAD"));
        }
    };
    Parsed::Request { head, path: path_of(request.path.unwrap_or_default()).to_owned() }
}

/// The path of a target in origin form or absolute form (RFC 9112 section 3.2).
fn path_of(target: &str) -> &str {
    let local = match target.split_once("://") {
        Some((_, rest)) if !target.starts_with('/') => rest.find('/').map_or("/", |at| &rest[at..]),
        _ => target,
    };
    local.split(['?', '#']).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 4096;

    fn get(path: &str) -> Parsed {
        Parsed::Request { head: false, path: path.to_owned() }
    }

    #[track_caller]
    fn refuses(bytes: &[u8], status: Status) {
        match parse(bytes, LIMIT) {
            Parsed::Refused(response) => assert_eq!(response.status, status),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_of_probes() {
        for (line, path) in [
            ("GET /healthz HTTP/1.1", "/healthz"),
            ("GET / HTTP/1.0", "/"),
            ("GET /metrics?name[]=up HTTP/1.1", "/metrics"),
            ("GET http://192.0.2.1:10256/livez HTTP/1.1", "/livez"),
            ("GET http://192.0.2.1:10256 HTTP/1.1", "/"),
            ("GET /a://b HTTP/1.1", "/a://b"),
        ] {
            let text = format!("{line}\r\nHost: 192.0.2.1:10256\r\nUser-Agent: kube-probe/1.35\r\n\r\n");
            assert_eq!(parse(text.as_bytes(), LIMIT), get(path), "{line}");
        }
        assert_eq!(
            parse(b"HEAD /healthz HTTP/1.1\r\n\r\n", LIMIT),
            Parsed::Request { head: true, path: "/healthz".into() }
        );
    }

    #[test]
    fn a_request_that_comes_in_pieces_is_waited_for() {
        let text = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n";
        for end in 0..text.len() {
            assert_eq!(parse(&text[..end], LIMIT), Parsed::Incomplete, "{end}");
        }
        assert_eq!(parse(text, LIMIT), get("/healthz"));
    }

    #[test]
    fn what_is_not_for_us_is_refused() {
        refuses(b"POST /healthz HTTP/1.1\r\n\r\n", Status::BAD_METHOD);
        refuses(b"DELETE / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", Status::BAD_METHOD);
        refuses(b"GET /healthz HTTP/2.0\r\n\r\n", Status::BAD_VERSION);
        refuses(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", Status::BAD_REQUEST);
        refuses(b"GET /\0 HTTP/1.1\r\n\r\n", Status::BAD_REQUEST);
        refuses(format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65)).as_bytes(), Status::TOO_LARGE);
        refuses(format!("GET /{}", "a".repeat(LIMIT - 5)).as_bytes(), Status::TOO_LARGE);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(line in "(GET|HEAD|PUT)? ?.{0,40}(HTTP/1.1)?", rest in vec(any::<u8>(), 0..300)) {
            let bytes = [line.as_bytes(), b"\r\n", &rest].concat();
            let _ = parse(&bytes, LIMIT);
            let _ = parse(&rest, rest.len());
        }
    }

    #[test]
    fn an_answer_on_the_wire() {
        let response = Response::new(Status::OK, JSON, "{}".to_owned()).header("X-A", 7);
        let now = Timestamp::from_second(784_111_777).unwrap();
        let head = "HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Type: application/json\r\n\
                    Content-Length: 2\r\nConnection: close\r\nX-A: 7\r\n\r\n";
        assert_eq!(String::from_utf8(response.to_bytes(false, now)).unwrap(), format!("{head}{{}}"));
        assert_eq!(String::from_utf8(response.to_bytes(true, now)).unwrap(), head);
    }
}
