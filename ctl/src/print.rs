//! How answers reach the reader: kubectl's columns, colours on a terminal only, JSON and YAML for programs.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use config::fault::Fault;
use serde::Serialize;

/// When to colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Always, also into a pipe.
    Always,
    /// Never.
    Never,
}

/// What an answer looks like, kubectl's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns for people.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
    /// One `kind/name` a line.
    Name,
    /// `/etc/hosts` lines (`get dns` only).
    Hosts,
}

/// The forms that every command has.
pub fn forms() -> impl TypedValueParser<Value = Output> {
    some_forms(&["table", "wide", "json", "yaml"])
}

/// The forms of a command that changes or lists objects.
pub fn forms_with_name() -> impl TypedValueParser<Value = Output> {
    some_forms(&["table", "wide", "json", "yaml", "name"])
}

/// The forms of a command that prints for as long as it runs.
pub fn forms_of_stream() -> impl TypedValueParser<Value = Output> {
    some_forms(&["table", "json"])
}

fn some_forms(names: &'static [&'static str]) -> impl TypedValueParser<Value = Output> {
    PossibleValuesParser::new(names).map(|name| Output::from_str(&name, false).unwrap_or_default())
}

/// The few meanings that have a colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tint {
    /// As it is.
    #[default]
    Plain,
    /// A heading.
    Bold,
    /// In use, in order.
    Good,
    /// Worth a look.
    Warn,
    /// Wrong, dropped.
    Bad,
    /// Background information.
    Dim,
    /// The thing that was asked for.
    Accent,
}

impl Tint {
    /// The SGR parameters of ECMA-48 section 8.3.117.
    const fn sgr(self) -> &'static str {
        match self {
            Tint::Plain => "",
            Tint::Bold => "1",
            Tint::Good => "32",
            Tint::Warn => "33",
            Tint::Bad => "31",
            Tint::Dim => "2",
            Tint::Accent => "36",
        }
    }
}

/// Text with or without colours, decided once at the start.
#[derive(Clone, Copy, Debug)]
pub struct Paint {
    enabled: bool,
}

impl Paint {
    /// Plain text.
    #[cfg(test)]
    pub const PLAIN: Paint = Paint { enabled: false };

    /// Decides for standard output. `NO_COLOR` (no-color.org) and `TERM=dumb` switch colours off.
    pub fn new(color: Color) -> Paint {
        Paint::decide(color, || io::stdout().is_terminal())
    }

    /// Decides for standard error.
    pub fn for_stderr(color: Color) -> Paint {
        Paint::decide(color, || io::stderr().is_terminal())
    }

    fn decide(color: Color, is_terminal: impl Fn() -> bool) -> Paint {
        let enabled = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
                    && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
            }
        };
        Paint { enabled }
    }

    /// `text` in the colour of `tint`.
    pub fn paint(self, tint: Tint, text: &str) -> String {
        if self.enabled && tint != Tint::Plain && !text.is_empty() {
            format!("\x1b[{}m{text}\x1b[0m", tint.sgr())
        } else {
            text.to_owned()
        }
    }
}

/// One field of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tint: Tint,
}

impl Cell {
    /// A field in a colour.
    pub fn new(tint: Tint, text: impl Into<String>) -> Cell {
        Cell { text: text.into(), tint }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell { text: text.into(), tint: Tint::Plain }
    }
}

/// Columns as kubectl prints them: upper-case headers, left-aligned, three spaces between, no rules.
///
/// A long list can be taken out in parts ([`Table::take`]): the header comes once and columns only grow.
#[derive(Clone, Debug)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
    widths: Vec<usize>,
    header_taken: bool,
}

/// What kubectl prints where there is nothing to print.
pub const NONE: &str = "<none>";

const GAP: usize = 3;

impl Table {
    /// An empty table.
    pub fn new(header: impl Into<Vec<&'static str>>) -> Table {
        let header: Vec<&'static str> = header.into();
        let widths = header.iter().map(|h| h.chars().count()).collect();
        Table { header, rows: Vec::new(), widths, header_taken: false }
    }

    /// Adds a row; it has as many cells as the header. Empty cells become [`NONE`].
    pub fn row(&mut self, cells: impl Into<Vec<Cell>>) {
        let mut cells: Vec<Cell> = cells.into();
        assert_eq!(cells.len(), self.header.len(), "a row of {:?} has the wrong width", self.header);
        for (cell, width) in cells.iter_mut().zip(&mut self.widths) {
            if cell.text.is_empty() {
                *cell = Cell::new(Tint::Dim, NONE);
            }
            *width = (*width).max(cell.text.chars().count());
        }
        self.rows.push(cells);
    }

    /// How many rows wait to be taken.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The rows added since the last call as text, indented by `indent` spaces; no line ends with a space.
    pub fn take(&mut self, paint: Paint, indent: usize) -> String {
        let mut out = String::new();
        if !std::mem::replace(&mut self.header_taken, true) {
            let header: Vec<Cell> = self.header.iter().map(|&h| Cell::new(Tint::Bold, h)).collect();
            self.line(&mut out, &header, paint, indent);
        }
        for row in std::mem::take(&mut self.rows) {
            self.line(&mut out, &row, paint, indent);
        }
        out
    }

    fn line(&self, out: &mut String, row: &[Cell], paint: Paint, indent: usize) {
        let _ = write!(out, "{:indent$}", "");
        for (i, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
            out.push_str(&paint.paint(cell.tint, &cell.text));
            if i + 1 < row.len() {
                let pad = width - cell.text.chars().count() + GAP;
                let _ = write!(out, "{:pad$}", "");
            }
        }
        out.push('\n');
    }
}

/// Standard output was closed by its reader.
#[derive(Debug)]
pub struct StdoutClosed;

impl std::fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for StdoutClosed {}

/// Writes to standard output at once.
///
/// # Errors
/// [`StdoutClosed`] when the reader is gone (`| head -1`), which `main` ends on without a word.
pub fn out(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => StdoutClosed.into(),
        _ => anyhow::Error::from(e).context("cannot write to standard output"),
    })
}

/// Writes a value as JSON (two spaces, a newline at the end) or YAML.
///
/// # Errors
/// A closed pipe, or `output` is a form for people.
pub fn out_value<T: Serialize>(output: Output, value: &T) -> Result<()> {
    match output {
        Output::Json => out(&(serde_json::to_string_pretty(value)? + "\n")),
        Output::Yaml => {
            // Through JSON values, so that both forms have the same fields in the same shapes.
            let mut text = serde_saphyr::to_string(&serde_json::to_value(value)?)?;
            if !text.ends_with('\n') {
                text.push('\n');
            }
            out(&text)
        }
        other => anyhow::bail!("{other:?} is not a form for programs"),
    }
}

/// A notice for people: on standard error, so that a pipe carries data only.
pub fn notice(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A fault for people: what is wrong on the first line, where and what to do below it.
///
/// ```text
/// error: Service default/web: spec.ports[0].port: not a port
///   at: web.yaml:7 (document 2)
///   value: 70000
///   remedy: use 1 to 65535
/// ```
pub fn fault(paint: Paint, tint: Tint, label: &str, fault: &Fault) -> String {
    let mut text = paint.paint(tint, label);
    for part in [&fault.object, &fault.field].into_iter().flatten() {
        let _ = write!(text, " {part}:");
    }
    let _ = write!(text, " {}", fault.message);
    let source = fault.source.as_ref().map(ToString::to_string);
    let lines =
        [("at", source.as_deref()), ("value", fault.value.as_deref()), ("remedy", fault.remedy.as_deref())];
    for (name, value) in lines {
        if let Some(value) = value {
            let _ = write!(text, "\n  {} {value}", paint.paint(Tint::Dim, &format!("{name}:")));
        }
    }
    text
}

/// Seconds since 1970 now.
pub fn now_s() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |duration| duration.as_secs().cast_signed())
}

/// How long ago `created` (RFC 3339) was, as kubectl prints it; `<unknown>` if it says nothing.
pub fn age_of(created: Option<&str>, now_s: i64) -> String {
    created
        .and_then(|text| text.parse::<k8s_openapi::jiff::Timestamp>().ok())
        .map_or_else(|| "<unknown>".to_owned(), |t| age(u64::try_from(now_s - t.as_second()).unwrap_or(0)))
}

/// A duration as kubectl prints ages: the largest one or two units (pkg/util/duration `HumanDuration`).
pub fn age(seconds: u64) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    let two = |large: u64, large_unit: &str, small: u64, small_unit: &str| {
        if small == 0 {
            format!("{large}{large_unit}")
        } else {
            format!("{large}{large_unit}{small}{small_unit}")
        }
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(seconds / MINUTE, "m", seconds % MINUTE, "s"),
        600..10_800 => format!("{}m", seconds / MINUTE),
        10_800..28_800 => two(seconds / HOUR, "h", seconds % HOUR / MINUTE, "m"),
        28_800..172_800 => format!("{}h", seconds / HOUR),
        172_800..691_200 => two(seconds / DAY, "d", seconds % DAY / HOUR, "h"),
        _ => format!("{}d", seconds / DAY),
    }
}

/// A count with a comma between thousands: `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_kubectl_prints_them() {
        let mut table = Table::new(["NAME", "TYPE", "CLUSTER-IP"]);
        table.row(["my-nginx".into(), "ClusterIP".into(), Cell::from("10.96.0.10")]);
        table.row([Cell::new(Tint::Bad, "a-much-longer-name"), "LoadBalancer".into(), "".into()]);
        assert_eq!(
            table.take(Paint::PLAIN, 0),
            "NAME                 TYPE           CLUSTER-IP\n\
             my-nginx             ClusterIP      10.96.0.10\n\
             a-much-longer-name   LoadBalancer   <none>\n"
        );
    }

    #[test]
    fn colours_do_not_move_columns() {
        let mut table = Table::new(["A", "B"]);
        table.row([Cell::new(Tint::Good, "up"), Cell::new(Tint::Bad, "no")]);
        let mut plain = table.clone();
        let coloured = table.take(Paint { enabled: true }, 2);
        assert!(coloured.contains("\x1b[32mup\x1b[0m   \x1b[31mno\x1b[0m\n"), "{coloured:?}");
        let mut stripped = coloured;
        for sgr in ["\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"] {
            stripped = stripped.replace(sgr, "");
        }
        assert_eq!(stripped, plain.take(Paint::PLAIN, 2));
    }

    #[test]
    fn a_long_list_comes_in_parts_with_one_header() {
        let mut table = Table::new(["A", "B"]);
        table.row([Cell::from("wide-cell"), "1".into()]);
        assert_eq!(table.take(Paint::PLAIN, 0), "A           B\nwide-cell   1\n");
        table.row([Cell::from("x"), "2".into()]);
        assert_eq!((table.len(), table.take(Paint::PLAIN, 0)), (1, "x           2\n".to_owned()));
    }

    #[test]
    fn a_fault_names_where_what_and_the_remedy() {
        use config::fault::{Code, Source};
        let with_all = Fault::new(Code::Invalid, "not a port")
            .source(&Source { file: "web.yaml".into(), document: 2, line: Some(7) })
            .object("Service default/web")
            .field("spec.ports[0].port")
            .value(70000)
            .remedy("use 1 to 65535");
        assert_eq!(
            fault(Paint::PLAIN, Tint::Bad, "error:", &with_all),
            "error: Service default/web: spec.ports[0].port: not a port\n  at: web.yaml:7 (document 2)\n  \
             value: 70000\n  remedy: use 1 to 65535"
        );
        assert_eq!(fault(Paint::PLAIN, Tint::Warn, "warning:", &Fault::new(Code::Other, "m")), "warning: m");
    }

    #[test]
    fn an_age_needs_a_timestamp() {
        assert_eq!(age_of(Some("2026-11-02T08:00:00Z"), 1_793_606_400 + 3 * 86_400), "3d");
        assert_eq!(age_of(Some("yesterday"), 0), "<unknown>");
        assert_eq!(age_of(None, 0), "<unknown>");
    }

    #[test]
    fn ages_are_kubectl_s() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (135, "2m15s"),
            (599, "9m59s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (12_600, "3h30m"),
            (86_400, "24h"),
            (172_800, "2d"),
            (176_400, "2d1h"),
            (691_200, "8d"),
        ] {
            assert_eq!(age(seconds), text);
        }
    }

    #[test]
    fn thousands_have_commas() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_000), "1,000");
        assert_eq!(thousands(1_234_567), "1,234,567");
    }
}
