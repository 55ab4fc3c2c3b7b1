//! `towpathctl diff`: what `apply` of the same files would change, as a unified diff of YAML.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use config::control::{Get, Item, Noun, ObjectRef, Request};
use config::object::Object;
use similar::{ChangeTag, TextDiff};

use crate::connection::unexpected_item;
use crate::print::{Paint, Tint, out};
use crate::source::{self, SourceArgs};
use crate::{Ending, Global};

/// Arguments of `diff`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Show objects that `apply --prune` would remove too
    #[arg(long)]
    prune: bool,
}

/// Runs `diff`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let manifests = source::read(&args.source, global.color)?;
    if manifests.is_empty() {
        bail!("no objects to compare");
    }
    let mut live: BTreeMap<ObjectRef, String> = BTreeMap::new();
    let request = Request::Get(Get { what: Noun::All, namespace: None, name: None, objects: true });
    global.connect()?.list(&request, |item| {
        let Item::Object(value) = item else { return Err(unexpected_item()) };
        let (object, _) = Object::from_value(value)?;
        live.insert(object.reference(), yaml(&object)?);
        Ok(())
    })?;
    let mut text = String::new();
    for manifest in &manifests {
        let reference = manifest.object.reference();
        let before = live.remove(&reference).unwrap_or_default();
        text += &unified(&reference, &before, &yaml(&manifest.object)?, global.paint());
    }
    if args.prune {
        for (reference, before) in &live {
            text += &unified(reference, before, "", global.paint());
        }
    }
    out(&text)?;
    Ok(if text.is_empty() { Ending::Done } else { Ending::Different })
}

/// An object as YAML with sorted fields, without what only the API server cares about.
fn yaml(object: &Object) -> Result<String> {
    let mut value = object.to_value();
    if let Some(metadata) = value.get_mut("metadata").and_then(|m| m.as_object_mut()) {
        metadata.remove("managedFields");
        // Absent and `default` are one namespace.
        let ObjectRef { namespace, .. } = object.reference();
        if !namespace.is_empty() {
            metadata.insert("namespace".into(), namespace.into());
        }
    }
    let mut text = serde_saphyr::to_string(&value)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// The difference in the form of `diff -u`; empty if there is none.
fn unified(reference: &ObjectRef, before: &str, after: &str, paint: Paint) -> String {
    if before == after {
        return String::new();
    }
    let name = |text: &str| if text.is_empty() { "/dev/null".to_owned() } else { reference.to_string() };
    let diff = TextDiff::from_lines(before, after);
    let mut text = String::new();
    text += &paint.paint(Tint::Bold, &format!("--- {} (in force)", name(before)));
    text += "\n";
    text += &paint.paint(Tint::Bold, &format!("+++ {} (applied)", name(after)));
    text += "\n";
    for hunk in diff.unified_diff().context_radius(3).iter_hunks() {
        text += &paint.paint(Tint::Accent, &hunk.header().to_string());
        text += "\n";
        for change in hunk.iter_changes() {
            let (sign, tint) = match change.tag() {
                ChangeTag::Delete => ("-", Tint::Bad),
                ChangeTag::Insert => ("+", Tint::Good),
                ChangeTag::Equal => (" ", Tint::Plain),
            };
            text += &paint.paint(tint, &format!("{sign}{}", change.value().trim_end_matches('\n')));
            text += "\n";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::control::Kind;

    #[test]
    fn a_difference_reads_like_diff_u() {
        let reference = ObjectRef { kind: Kind::Service, namespace: "default".into(), name: "web".into() };
        let before = "spec:\n  ports:\n  - port: 80\n";
        let after = "spec:\n  ports:\n  - port: 81\n";
        assert_eq!(
            unified(&reference, before, after, Paint::PLAIN),
            "--- Service default/web (in force)\n+++ Service default/web (applied)\n@@ -1,3 +1,3 @@\n spec:\n   ports:\n-  - port: 80\n+  - port: 81\n"
        );
        assert_eq!(unified(&reference, before, before, Paint::PLAIN), "");
        assert!(unified(&reference, "", after, Paint::PLAIN).starts_with("--- /dev/null (in force)\n"));
    }

    #[test]
    fn only_what_matters_is_compared() {
        let object = |json: serde_json::Value| Object::from_value(json).unwrap().0;
        let applied = serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "managedFields": [{"manager": "kubectl"}]}
        });
        let kept = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}});
        assert_eq!(yaml(&object(applied)).unwrap(), yaml(&object(kept)).unwrap());
    }
}
