//! YAML whose fields know their lines: documents of a text, and the tree of one document.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Number, Value};
use serde_saphyr::Spanned;

use super::plain;
use crate::fault::{Code, Fault};

/// One document of a text.
pub(super) struct Document<'a> {
    /// From 1, empty documents not counted.
    pub(super) number: u32,
    /// Line of the text that the first line of `text` is, from 1.
    pub(super) first_line: u32,
    pub(super) text: &'a str,
}

/// Splits at document markers. A marker at the start of a line is one everywhere (YAML 1.2.2 section 9.1.2), even in a
/// quoted or block scalar, so that no parsing is needed.
pub(super) fn documents(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let (mut start, mut first_line) = (0, 1);
    let mut add = |from: usize, to: usize, line: u32| {
        let body = &text[from..to];
        let is_empty = body.lines().all(|line| {
            let line = line.trim_start_matches("---").trim();
            line.is_empty() || line.starts_with('#') || line.starts_with('%')
        });
        if !is_empty {
            documents.push(Document { number: documents.len() as u32 + 1, first_line: line, text: body });
        }
    };
    let mut offset = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let line_number = index as u32 + 1;
        let bare = line.trim_end();
        if bare == "---" || bare.starts_with("--- ") || bare.starts_with("---\t") {
            add(start, offset, first_line);
            (start, first_line) = (offset, line_number);
        } else if bare == "..." {
            add(start, offset, first_line);
            (start, first_line) = (offset + line.len(), line_number + 1);
        }
        offset += line.len();
    }
    add(start, text.len(), first_line);
    documents
}

/// A value and the line of the text that it begins on.
#[derive(Debug, PartialEq)]
pub(super) struct Located {
    pub(super) line: u32,
    pub(super) node: Node,
}

#[derive(Debug, PartialEq)]
pub(super) enum Node {
    Scalar(Value),
    List(Vec<Located>),
    Map(Vec<(String, Located)>),
}

/// Reads one document. Errors: the line and what is wrong there.
pub(super) fn read(document: &Document<'_>) -> Result<Located, (u32, Fault)> {
    let lines_before = document.first_line - 1;
    match plain::read(document.text, lines_before) {
        Some(root) => Ok(root),
        None => read_all_of_yaml(document.text, lines_before),
    }
}

/// Reads a document of any kind. Errors: the line and what is wrong there.
pub(super) fn read_all_of_yaml(text: &str, lines_before: u32) -> Result<Located, (u32, Fault)> {
    // Lists of a whole cluster are larger than what the library takes for reasonable; nesting and aliases stay bounded.
    let budget = serde_saphyr::budget! {
        max_events: 100_000_000,
        max_nodes: 50_000_000,
        max_total_scalar_bytes: 1 << 30,
        max_depth: 40,
        max_recorded_anchor_events: 20_000,
    };
    // Booleans are those of YAML 1.2: a Node named `n` is no `false`, and a field that takes a boolean refuses `yes` aloud.
    let options = serde_saphyr::options! {
        budget: budget,
        with_snippet: false,
        emit_comments: false,
        strict_booleans: true,
    };
    match serde_saphyr::from_str_with_options::<Spanned<Node>>(text, options) {
        Ok(root) => Ok(Located::of(root, lines_before)),
        Err(error) => {
            let line = error.location().map_or(1, |location| location.line() as u32).max(1);
            // The library tells the line within the document; ours is that of the file.
            Err((lines_before + line, syntax(&error)))
        }
    }
}

/// What is wrong with the text, in words for whoever wrote it.
fn syntax(error: &serde_saphyr::Error) -> Fault {
    use serde_saphyr::Error;
    let text = error.to_string();
    let (message, remedy) = match error {
        Error::AliasError { error, .. } => return syntax(error),
        Error::DuplicateMappingKey { key, .. } => {
            (format!("{} stands there twice", key.as_deref().unwrap_or("a key")), "remove one of them")
        }
        _ if matches!(error, Error::Budget { .. }) || text.contains("recursion limit") => (
            "nested too deeply, or built of too many aliases".to_owned(),
            "write the object as `kubectl get -o yaml` prints it",
        ),
        _ => (
            text.split_once(" at line ").map_or(text.as_str(), |(message, _)| message).to_owned(),
            "indent with spaces and quote values with special characters; `kubectl apply --dry-run=client` checks too",
        ),
    };
    Fault::new(Code::Syntax, message).remedy(remedy)
}

impl Located {
    fn of(spanned: Spanned<Node>, lines_before: u32) -> Located {
        let mut located = Located { line: spanned.referenced.line() as u32, node: spanned.value };
        located.shift(lines_before);
        located
    }

    fn shift(&mut self, lines: u32) {
        self.line += lines;
        match &mut self.node {
            Node::Scalar(_) => {}
            Node::List(elements) => elements.iter_mut().for_each(|element| element.shift(lines)),
            Node::Map(fields) => fields.iter_mut().for_each(|(_, field)| field.shift(lines)),
        }
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self.node, Node::Scalar(Value::Null))
    }

    /// A field of a map.
    pub(super) fn field(&self, name: &str) -> Option<&Located> {
        match &self.node {
            Node::Map(fields) => fields.iter().find(|(key, _)| key == name).map(|(_, value)| value),
            _ => None,
        }
    }

    /// The text of a field of a map.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match &self.field(name)?.node {
            Node::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The elements of a list.
    pub(super) fn elements(&self) -> Option<&[Located]> {
        match &self.node {
            Node::List(elements) => Some(elements),
            _ => None,
        }
    }

    /// Line of a field by its path, such as `spec.ports[0].port`; of an absent field, that of its parent.
    pub(super) fn line_of(&self, path: &str) -> Option<u32> {
        let mut here = self;
        // A key may contain dots (labels), so that the longest key that fits is taken.
        let mut rest = path;
        while !rest.is_empty() {
            rest = rest.trim_start_matches('.');
            if let Some(index) = rest.strip_prefix('[') {
                let (index, after) = index.split_once(']')?;
                let Some(element) = here.elements().and_then(|all| all.get(index.parse::<usize>().ok()?))
                else {
                    break;
                };
                (here, rest) = (element, after);
                continue;
            }
            let Node::Map(fields) = &here.node else { break };
            let fits = |key: &str| {
                rest.strip_prefix(key).is_some_and(|after| after.is_empty() || after.starts_with(['.', '[']))
            };
            let longest = fields.iter().filter(|(key, _)| fits(key)).max_by_key(|(key, _)| key.len());
            let Some((key, value)) = longest else { break };
            (here, rest) = (value, &rest[key.len()..]);
        }
        Some(here.line)
    }

    /// The value without its lines.
    pub(super) fn to_value(&self) -> Value {
        match &self.node {
            Node::Scalar(value) => value.clone(),
            Node::List(elements) => elements.iter().map(Located::to_value).collect(),
            Node::Map(fields) => fields.iter().map(|(key, value)| (key.clone(), value.to_value())).collect(),
        }
    }
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Located, D::Error> {
        Ok(Located::of(Spanned::deserialize(deserializer)?, 0))
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        // What JSON cannot hold (.inf, .nan) has no place in a manifest either: it is refused as a text where a number is due.
        Ok(Node::Scalar(Number::from_f64(value).map_or_else(|| value.to_string().into(), Value::Number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = access.next_element()? {
            elements.push(element);
        }
        Ok(Node::List(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = access.next_entry()? {
            fields.push(field);
        }
        Ok(Node::Map(fields))
    }
}
