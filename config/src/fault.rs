//! Errors and warnings for people: where it is, which field, which value, what is wrong, and what to do.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where an object was read from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Path as the user gave it, `-` for standard input.
    pub file: String,
    /// Number of the YAML document in the file, from 1; 0 where documents do not apply.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub document: u32,
    /// Line in the file, from 1, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = if self.file == "-" { "stdin" } else { &self.file };
        write!(f, "{file}")?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if self.document > 0 {
            write!(f, " (document {})", self.document)?;
        }
        Ok(())
    }
}

/// What kind of error or warning a [`Fault`] is. New codes may be added: a reader treats an unknown one as [`Code::Other`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The text is not YAML, JSON or TOML.
    Syntax,
    /// A field that the API does not know; the API server would ignore it.
    UnknownField,
    /// A field of the wrong type.
    WrongType,
    /// A required field is missing.
    Missing,
    /// A value outside what is allowed.
    Invalid,
    /// Two objects claim one thing; both are named.
    Conflict,
    /// The object is of a kind that Towpath does not use.
    SkippedKind,
    /// Accepted, but the field has no effect here.
    Ignored,
    /// The object to be deleted or described does not exist.
    NotFound,
    /// The expected generation is not the one in force.
    Generation,
    /// A limit of the control socket was exceeded: line length, staging budget, clients.
    Limit,
    /// The peer may not do this.
    Forbidden,
    /// Client and daemon do not speak one version of the protocol.
    Version,
    /// The request makes no sense now, such as a commit without a begin.
    Request,
    /// The change could not be kept on disk.
    Storage,
    /// A code that is newer than this program.
    #[serde(other)]
    Other,
}

/// An error or a warning. Everything but `code` and `message` may be absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What kind of fault.
    pub code: Code,
    /// Where the object was read from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Box<Source>>,
    /// Kind and name of the object, such as `Service default/my-nginx`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<Box<str>>,
    /// Path of the field, such as `spec.ports[0].port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<Box<str>>,
    /// The value found there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<Box<str>>,
    /// What is wrong, without the words of the other fields.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<Box<str>>,
}

impl Fault {
    /// A fault with nothing but its code and message.
    pub fn new(code: Code, message: impl Into<String>) -> Fault {
        Fault {
            code,
            source: None,
            object: None,
            field: None,
            value: None,
            message: message.into(),
            remedy: None,
        }
    }

    /// Names the object, such as `Service default/my-nginx`.
    pub fn object(mut self, object: impl fmt::Display) -> Fault {
        self.object = Some(object.to_string().into());
        self
    }

    /// Names the field by its path.
    pub fn field(mut self, field: impl fmt::Display) -> Fault {
        self.field = Some(field.to_string().into());
        self
    }

    /// Quotes the value.
    pub fn value(mut self, value: impl fmt::Display) -> Fault {
        self.value = Some(value.to_string().into());
        self
    }

    /// Says what to do.
    pub fn remedy(mut self, remedy: impl fmt::Display) -> Fault {
        self.remedy = Some(remedy.to_string().into());
        self
    }

    /// Says where the object was read from.
    pub fn source(mut self, source: &Source) -> Fault {
        self.source = Some(Box::new(source.clone()));
        self
    }
}

impl fmt::Display for Fault {
    /// One line: `web.yaml:7 (document 2): Service default/web: spec.ports[0].port: 70000: not a port; use 1 to 65535`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{source}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        if let Some(value) = &self.value {
            write!(f, "{value}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(remedy) = &self.remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_one_line() {
        let fault = Fault::new(Code::Invalid, "not a port")
            .source(&Source { file: "web.yaml".into(), document: 2, line: Some(7) })
            .object("Service default/web")
            .field("spec.ports[0].port")
            .value(70000)
            .remedy("use 1 to 65535");
        assert_eq!(
            fault.to_string(),
            "web.yaml:7 (document 2): Service default/web: spec.ports[0].port: 70000: not a port; use 1 to 65535"
        );
    }

    #[test]
    fn a_newer_code_is_read_as_other() {
        let fault: Fault = serde_json::from_str(r#"{"code":"from_the_future","message":"m"}"#).unwrap();
        assert_eq!(fault.code, Code::Other);
    }
}
