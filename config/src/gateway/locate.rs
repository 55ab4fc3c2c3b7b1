//! Where in a TOML text a field stands, so that complaints name line, field and value.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::fault::{Code, Fault, Source};

/// Fields with their byte ranges in the text, in file order; a table comes before its fields.
pub(super) struct Places(Vec<(String, Range<usize>)>);

impl Places {
    /// Finds the fields of `text`; none if it is no TOML.
    pub(super) fn of(text: &str) -> Places {
        let mut places = Places(Vec::new());
        if let Ok(table) = DeTable::parse(text) {
            places.walk_table("", table.get_ref());
        }
        places
    }

    fn walk_table(&mut self, path: &str, table: &DeTable<'_>) {
        for (key, value) in table.iter() {
            let path =
                if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
            // A complaint about a key, such as an unknown one, points at the key.
            self.0.push((path.clone(), key.span()));
            self.walk_value(path, value);
        }
    }

    fn walk_value(&mut self, path: String, value: &Spanned<DeValue<'_>>) {
        self.0.push((path.clone(), value.span()));
        match value.get_ref() {
            DeValue::Table(table) => self.walk_table(&path, table),
            DeValue::Array(array) => {
                for (index, element) in array.iter().enumerate() {
                    self.walk_value(format!("{path}[{index}]"), element);
                }
            }
            _ => {}
        }
    }

    /// Line of a field, from 1; of a field that is absent, the line of what it should stand in.
    pub(super) fn line(&self, text: &str, field: &str) -> Option<u32> {
        let mut field = field;
        loop {
            if let Some((_, span)) = self.0.iter().find(|(path, _)| path == field) {
                return Some(line_of(text, span.start));
            }
            field = &field[..field.rfind(['.', '['])?];
        }
    }

    /// Puts an error of the TOML library into our form.
    pub(super) fn describe(&self, text: &str, error: &toml::de::Error) -> Fault {
        let message = error.message().trim();
        let code = if self.0.is_empty() && !text.trim().is_empty() {
            Code::Syntax
        } else if message.starts_with("unknown field") {
            Code::UnknownField
        } else if message.starts_with("missing field") {
            Code::Missing
        } else if message.starts_with("invalid type") {
            Code::WrongType
        } else {
            Code::Invalid
        };
        let mut fault = Fault::new(code, message);
        if let Some(span) = error.span() {
            let inside = |outer: &Range<usize>| outer.start <= span.start && span.end <= outer.end;
            // The shortest range that holds the span is the field; of equals the last one is the deepest.
            let place = self.0.iter().filter(|(_, outer)| inside(outer)).min_by_key(|(_, outer)| outer.len());
            if let Some((field, _)) = place {
                fault = fault.field(field);
            }
            let value = text.get(span.clone()).unwrap_or_default();
            if code != Code::UnknownField && !value.is_empty() && value.len() <= 80 && !value.contains('\n') {
                fault = fault.value(value);
            }
            fault = fault.source(&Source { line: Some(line_of(text, span.start)), ..Source::default() });
        }
        fault
    }
}

fn line_of(text: &str, offset: usize) -> u32 {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count() as u32
}
