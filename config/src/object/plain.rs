//! The YAML that machines write, read fast.
//!
//! `kubectl get` prints 40 MB of it for a large cluster. Here the events of the parser become a tree at once, without the
//! generality of serde. Whatever is out of the ordinary (an anchor, a tag, a merge key, a doubled key, a scalar that may not
//! be a text, anything wrong) is left to [`located::read`](super::located::read), which knows all of YAML and says what is
//! wrong. What is read here is exactly what it would read.

use std::borrow::Cow;

use granit_parser::{Event, Parser, ScalarStyle, options};
use serde_json::Value;

use super::located::{Located, Node};

/// Deepest nesting; manifests of what Towpath keeps have 12 levels.
const DEPTH: usize = 30;
/// Most fields of a map, which are compared with each other.
const FIELDS: usize = 100;

/// A list or map whose end has not come yet.
struct Open {
    line: u32,
    node: Node,
    /// Of a map: the key whose value comes next.
    key: Option<String>,
}

/// Reads one document whose first line is `lines_before + 1`; `None` if it is not as plain as that.
pub(super) fn read(text: &str, lines_before: u32) -> Option<Located> {
    let mut open: Vec<Open> = Vec::new();
    let mut root = None;
    for event in Parser::new_from_str_with_options(text, options! { emit_comments: false }) {
        let (event, span) = event.ok()?;
        let line = span.start.line() as u32 + lines_before;
        let done = match event {
            Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
            Event::DocumentStart(_, None) if root.is_none() => continue,
            Event::Scalar(text, style, 0, None) => match open.last_mut() {
                Some(Open { node: Node::Map(fields), key: key @ None, .. }) => {
                    *key = Some(field_name(text, style, fields)?);
                    continue;
                }
                _ => Located { line, node: Node::Scalar(scalar(text, style)?) },
            },
            Event::SequenceStart(_, 0, None) if open.len() < DEPTH => {
                open.push(Open { line, node: Node::List(Vec::new()), key: None });
                continue;
            }
            Event::MappingStart(_, 0, None) if open.len() < DEPTH => {
                open.push(Open { line, node: Node::Map(Vec::new()), key: None });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Open { line, node, .. } = open.pop()?;
                Located { line, node }
            }
            _ => return None,
        };
        match open.last_mut() {
            Some(Open { node: Node::List(elements), .. }) => elements.push(done),
            Some(Open { node: Node::Map(fields), key, .. }) => fields.push((key.take()?, done)),
            None if root.is_none() => root = Some(done),
            _ => return None,
        }
    }
    root
}

/// The name of the next field of a map that has `fields` already.
fn field_name(text: Cow<'_, str>, style: ScalarStyle, fields: &[(String, Located)]) -> Option<String> {
    match scalar(text, style)? {
        Value::String(name) if name != "<<" && fields.len() < FIELDS => {
            fields.iter().all(|(other, _)| *other != name).then_some(name)
        }
        _ => None,
    }
}

/// The value of a scalar, if there is no doubt about its type.
fn scalar(text: Cow<'_, str>, style: ScalarStyle) -> Option<Value> {
    if style != ScalarStyle::Plain {
        return Some(Value::String(text.into_owned()));
    }
    match (text.as_bytes(), &*text) {
        (_, "" | "~" | "null") => Some(Value::Null),
        (_, "true") => Some(Value::Bool(true)),
        (_, "false") => Some(Value::Bool(false)),
        ([b'0'..=b'9', ..], _) => begins_with_digit(text),
        ([b'A'..=b'Z' | b'a'..=b'z' | b'/', ..], word) if !is_doubtful(word) => {
            Some(Value::String(text.into_owned()))
        }
        _ => None,
    }
}

/// True for words that some YAML or other takes for something else.
fn is_doubtful(word: &str) -> bool {
    const WORDS: [&str; 12] =
        ["null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "nan", "infinity"];
    word.len() <= 8 && WORDS.iter().any(|doubtful| doubtful.eq_ignore_ascii_case(word))
}

/// A port, an address, a date, a uid or a quantity.
fn begins_with_digit(text: Cow<'_, str>) -> Option<Value> {
    let bytes = text.as_bytes();
    if bytes.iter().all(u8::is_ascii_digit) {
        let is_decimal = bytes.len() == 1 || bytes.len() <= 18 && bytes[0] != b'0';
        return if is_decimal { text.parse::<u64>().ok().map(Value::from) } else { None };
    }
    let count = |wanted: u8| bytes.iter().filter(|byte| **byte == wanted).count();
    let has_radix = bytes[0] == b'0' && bytes[1].is_ascii_alphabetic();
    let has_letter = bytes.iter().any(|byte| byte.is_ascii_alphabetic() && !matches!(byte, b'e' | b'E'));
    let is_text = has_letter || count(b'.') > 1 || count(b':') > 1 || count(b'/') > 0 || count(b'-') > 1;
    (is_text && !has_radix && count(b'_') == 0).then(|| Value::String(text.into_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::object::located;

    /// What all of YAML makes of it.
    fn slow(text: &str) -> Result<Located, (u32, crate::fault::Fault)> {
        located::read_all_of_yaml(text, 0)
    }

    fn agrees(text: &str) -> bool {
        match read(text, 0) {
            Some(fast) => {
                assert_eq!(slow(text).as_ref(), Ok(&fast), "{text}");
                true
            }
            None => false,
        }
    }

    #[test]
    fn what_kubectl_prints_is_read_fast() {
        let cluster = include_str!("../../../ctl/tests/manifests/cluster.yaml");
        assert!(agrees(cluster));
        assert!(agrees("a: 10.96.0.1\nb: 2001:db8::1\nc: 8080\nd: \"8080\"\ne:\nf: {g: [1, x-y, 16Gi]}\n"));
        assert!(agrees("- |\n  block\n  text\n- >-\n  folded\n  text\n- 'single'\n-\n  - deeper\n"));
    }

    #[test]
    fn the_extraordinary_is_left_alone() {
        for text in [
            "a: &x 1\nb: *x\n",
            "a: !!str 1\n",
            "<<: {a: 1}\n",
            "a: 1\na: 2\n",
            "a: yes\n",
            "a: No\n",
            "a: 0x10\n",
            "a: 010\n",
            "a: 1e3\n",
            "a: 1.5\n",
            "a: 1_000\n",
            "a: .inf\n",
            "a: -1\n",
            "a: 12345678901234567890\n",
            "1: a\n",
            "? {a: b}\n: c\n",
            "a: b\n--- \nc: d\n",
            "a: [1\n",
            "a: b: c\n",
            "%YAML 1.1\n---\na: b\n",
        ] {
            assert_eq!(read(text, 0), None, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn scalars_are_what_all_of_yaml_says(scalar in "[0-9.:/+_eExXoObBtTyYnNfFaAlLsSuUrRiI~-]{1,9}") {
            agrees(&format!("key: {scalar}\n"));
            agrees(&format!("{scalar}: value\n"));
        }

        #[test]
        fn documents_are_what_all_of_yaml_says(text in "([a-c1{}\\[\\],:#'\"|> -]|: |- |\n|\n  |\n    ){1,40}") {
            agrees(&text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn damaged_manifests_are_what_all_of_yaml_says(
            at in 0usize..10_000, cut in 0usize..40, put in "[ \n:'\"{}\\[\\]#&*!|>-]{0,3}",
        ) {
            let mut text = include_str!("../../../ctl/tests/manifests/cluster.yaml").to_owned();
            let (from, to) = (at.min(text.len()), (at + cut).min(text.len()));
            prop_assume!(text.is_char_boundary(from) && text.is_char_boundary(to));
            text.replace_range(from..to, &put);
            agrees(&text);
        }
    }
}
