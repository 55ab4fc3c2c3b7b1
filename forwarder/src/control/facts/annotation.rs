//! Annotations `towpath.dev/...`: what can be said of an object that Kubernetes has no field for.
//!
//! A value that is not understood is warned of and passed over, as if the annotation were absent: an annotation must not make a
//! Service unusable.

use std::fmt::Display;
use std::ops::RangeInclusive;

use config::fault::{Code, Fault};
use config::gateway::Mac;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

const PREFIX: &str = "towpath.dev/";

/// The annotations of one object, read one by one.
pub(super) struct Annotations<'o> {
    metadata: &'o ObjectMeta,
    warnings: &'o mut Vec<Fault>,
    known: Vec<&'static str>,
}

impl<'o> Annotations<'o> {
    /// `warnings`: where complaints go.
    pub fn of(metadata: &'o ObjectMeta, warnings: &'o mut Vec<Fault>) -> Annotations<'o> {
        Annotations { metadata, warnings, known: Vec::new() }
    }

    /// One of a few words.
    pub fn word<T: Copy>(&mut self, name: &'static str, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(name)?;
        let known = words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning);
        if known.is_none() {
            let list: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            self.warn(
                name,
                text,
                "not a value of this annotation: ignored",
                format!("use {}", list.join(" or ")),
            );
        }
        known
    }

    /// A whole number.
    pub fn number(&mut self, name: &'static str, range: RangeInclusive<u32>) -> Option<u32> {
        let text = self.text(name)?;
        let number = text.parse().ok().filter(|number| range.contains(number));
        if number.is_none() {
            let remedy = format!("use a whole number from {} to {}, in quotes", range.start(), range.end());
            self.warn(name, text, "not a value of this annotation: ignored", remedy);
        }
        number
    }

    /// A link-layer address.
    pub fn mac(&mut self, name: &'static str) -> Option<Mac> {
        let text = self.text(name)?;
        let mac = text.parse().ok();
        if mac.is_none() {
            let remedy = "use the address of the node's VXLAN device, such as 02:00:00:00:00:01";
            self.warn(name, text, "not a value of this annotation: ignored", remedy);
        }
        mac
    }

    /// Warns of an annotation that another one overrules.
    pub fn has_no_effect(&mut self, name: &'static str, why: &str, remedy: &str) {
        if let Some(text) = self.text(name) {
            self.warn(name, text, &format!("has no effect: {why}"), remedy);
        }
    }

    /// After the last one: annotations of ours that nobody asked for are warned of.
    pub fn finish(self, kind: &str) {
        let all = self.metadata.annotations.iter().flatten();
        for (name, text) in all.filter_map(|(name, text)| Some((name.strip_prefix(PREFIX)?, text))) {
            if !self.known.contains(&name) {
                let list: Vec<_> = self.known.iter().map(|name| format!("{PREFIX}{name}")).collect();
                let fault = Fault::new(Code::Ignored, format!("not an annotation of a {kind}: ignored"));
                let fault = fault.field(field(name)).value(text);
                self.warnings.push(fault.remedy(format!("use {}", list.join(", "))));
            }
        }
    }

    fn text(&mut self, name: &'static str) -> Option<&'o str> {
        self.known.push(name);
        let text = self.metadata.annotations.as_ref()?.get(&format!("{PREFIX}{name}"))?;
        Some(text.trim())
    }

    fn warn(&mut self, name: &str, text: &str, message: &str, remedy: impl Display) {
        self.warnings.push(Fault::new(Code::Ignored, message).field(field(name)).value(text).remedy(remedy));
    }
}

fn field(name: &str) -> String {
    format!("metadata.annotations.{PREFIX}{name}")
}

/// `towpath.dev/weight` of a slice or a Pod: 0 for no new connections.
pub(super) fn weight(annotations: &mut Annotations<'_>) -> Option<u16> {
    annotations.number("weight", 0..=1_000).map(|weight| weight as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(annotations: &[(&str, &str)]) -> ObjectMeta {
        let annotations = annotations.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        ObjectMeta { annotations: Some(annotations.collect()), ..ObjectMeta::default() }
    }

    fn warned(read: impl FnOnce(&mut Annotations<'_>), given: &[(&str, &str)]) -> Vec<String> {
        let mut warnings = Vec::new();
        let metadata = metadata(given);
        let mut annotations = Annotations::of(&metadata, &mut warnings);
        read(&mut annotations);
        annotations.finish("Pod");
        warnings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn good_values_are_read() {
        for (text, expected) in [("0", Some(0)), ("1", Some(1)), (" 1000 ", Some(1_000))] {
            let found = warned(|a| assert_eq!(weight(a), expected), &[("towpath.dev/weight", text)]);
            assert_eq!(found, [""; 0]);
        }
        let words = [("one", 1), ("two", 2)];
        let found = warned(|a| assert_eq!(a.word("w", &words), Some(2)), &[("towpath.dev/w", "two")]);
        assert_eq!(found, [""; 0]);
        let found = warned(|a| assert_eq!(weight(a), None), &[("other.example/weight", "?")]);
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn others_are_warned_of_with_a_remedy() {
        for text in ["", "-1", "1001", "1.5", "many", "99999999999999"] {
            let found = warned(|a| assert_eq!(weight(a), None), &[("towpath.dev/weight", text)]);
            let expected = format!(
                "metadata.annotations.towpath.dev/weight: {text}: not a value of this annotation: ignored; \
                 use a whole number from 0 to 1000, in quotes"
            );
            assert_eq!(found, [expected]);
        }
        let words = [("one", 1), ("two", 2)];
        let found = warned(|a| assert_eq!(a.word("w", &words), None), &[("towpath.dev/w", "three")]);
        assert!(found[0].contains("three") && found[0].contains("use one or two"), "{found:?}");
    }

    #[test]
    fn unknown_names_are_warned_of() {
        let found = warned(|a| assert_eq!(weight(a), None), &[("towpath.dev/wait", "1")]);
        assert_eq!(
            found,
            [
                "metadata.annotations.towpath.dev/wait: 1: not an annotation of a Pod: ignored; use towpath.dev/weight"
            ]
        );
    }
}
