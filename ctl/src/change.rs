//! `towpathctl apply` and `towpathctl delete`: one change, all or nothing.

use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use clap::ValueEnum;
use config::control::{Apply, Begin, Committed, Delete, Kind, ObjectRef, Outcome, Reply, Request};
use config::fault::{Fault, Source};

use crate::connection::{Connection, unexpected};
use crate::get::Resource;
use crate::print::{self, Output, Paint, Tint, notice, out, out_value};
use crate::source::{self, SourceArgs};
use crate::{COMMIT_SENT, Ending, Global, Usage};

/// kubectl's values of `--dry-run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DryRun {
    /// Do it.
    None,
    /// Check on the daemon, change nothing.
    #[value(alias = "client")]
    Server,
}

/// What all changes of objects share.
#[derive(clap::Args)]
pub struct ChangeArgs {
    /// Check everything on the daemon, change nothing
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_value = "none", default_missing_value = "server", hide_possible_values = true, value_name = "server")]
    dry_run: DryRun,
    /// Only if this is still the generation: nobody changed anything meanwhile
    #[arg(long, value_name = "GENERATION")]
    if_generation: Option<u64>,
    /// How to print
    #[arg(short, long, value_name = "FORM", value_parser = print::forms_with_name(), default_value = "table", hide_default_value = true)]
    output: Output,
}

impl ChangeArgs {
    /// How the change begins.
    pub fn begin(&self, prune: bool) -> Request {
        Request::Begin(Begin {
            dry_run: self.dry_run != DryRun::None,
            prune,
            expect_generation: self.if_generation,
        })
    }
}

/// Arguments of `apply`.
#[derive(clap::Args)]
pub struct ApplyArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Remove every object of the cluster that is not applied now; PodRoutes stay
    #[arg(long)]
    prune: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

/// Arguments of `delete`.
#[derive(clap::Args)]
pub struct DeleteArgs {
    /// The kind, or KIND/NAME
    #[arg(value_name = "KIND[/NAME]", conflicts_with = "files", required_unless_present = "files")]
    what: Option<String>,
    /// Names of the objects
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The namespace of the names
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    namespace: String,
    #[command(flatten)]
    source: SourceArgs,
    /// An object that does not exist is no error
    #[arg(long)]
    ignore_not_found: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

/// Runs `apply`.
pub fn apply(global: &Global, args: &ApplyArgs) -> Result<Ending> {
    let manifests = source::read(&args.source, global.color)?;
    if manifests.is_empty() {
        bail!("no objects to apply: nothing was done");
    }
    let connection = &mut global.connect()?;
    connection.send(&args.change.begin(args.prune))?;
    for manifest in manifests {
        let object = manifest.object.to_value();
        connection.send(&Request::Apply(Apply { source: manifest.source, object }))?;
    }
    commit(global, connection, &args.change)
}

/// Runs `delete`.
pub fn delete(global: &Global, args: &DeleteArgs) -> Result<Ending> {
    let objects: Vec<(ObjectRef, Source)> = match &args.what {
        Some(what) => named(what, &args.names, &args.namespace)?
            .into_iter()
            .map(|object| (object, Source::default()))
            .collect(),
        None => source::read(&args.source, global.color)?
            .into_iter()
            .map(|manifest| (manifest.object.reference(), manifest.source))
            .collect(),
    };
    if objects.is_empty() {
        bail!("no objects to delete: nothing was done");
    }
    let connection = &mut global.connect()?;
    connection.send(&args.change.begin(false))?;
    for (object, source) in objects {
        let ignore_not_found = args.ignore_not_found;
        connection.send(&Request::Delete(Delete { source, object, ignore_not_found }))?;
    }
    commit(global, connection, &args.change)
}

/// kubectl's forms: `service NAME...`, `service/NAME service/OTHER`.
fn named(what: &str, names: &[String], namespace: &str) -> Result<Vec<ObjectRef>> {
    let reference = |kind: &str, name: &str| -> Result<ObjectRef> {
        let kind = kind_of(kind)?;
        let namespace = if kind.is_namespaced() { namespace.to_owned() } else { String::new() };
        Ok(ObjectRef { kind, namespace, name: name.to_owned() })
    };
    if what.contains('/') {
        let all = std::iter::once(what).chain(names.iter().map(String::as_str));
        return all
            .map(|text| match text.split_once('/') {
                Some((kind, name)) if !name.is_empty() => reference(kind, name),
                _ => bail!(Usage(format!("{text:?} is not KIND/NAME, as the other arguments are"))),
            })
            .collect();
    }
    if names.is_empty() {
        bail!(Usage(format!("which {what}? name it, or say -f FILE")));
    }
    names.iter().map(|name| reference(what, name)).collect()
}

fn kind_of(text: &str) -> Result<Kind> {
    use config::control::Noun;
    Ok(match Resource::parse(text)? {
        Resource::Noun(Noun::Services) => Kind::Service,
        Resource::Noun(Noun::Endpoints) => Kind::EndpointSlice,
        Resource::Noun(Noun::Nodes) => Kind::Node,
        Resource::Noun(Noun::Pods) => Kind::Pod,
        Resource::Noun(Noun::Namespaces) => Kind::Namespace,
        other => bail!(Usage(format!(
            "{} are not objects: they follow from the objects and from the kernel",
            other.name()
        ))),
    })
}

/// Ends the change and tells what became of it.
pub fn commit(global: &Global, connection: &mut Connection, args: &ChangeArgs) -> Result<Ending> {
    if args.dry_run == DryRun::None {
        COMMIT_SENT.store(true, Ordering::SeqCst);
    }
    let paint = Paint::for_stderr(global.color);
    let answer = connection.ask(&Request::Commit).map_err(|error| {
        // A fault says that nothing was done; silence does not.
        if error.is::<Fault>() {
            return error;
        }
        error.context("the change was sent and may be in force, see `towpathctl status`")
    })?;
    let committed = match answer {
        Reply::Committed(committed) => committed,
        Reply::Refused { faults, more, warnings } => {
            COMMIT_SENT.store(false, Ordering::SeqCst);
            return refused(&faults, more, &warnings, paint);
        }
        other => return Err(unexpected(&other)),
    };
    for warning in &committed.warnings {
        notice(&print::fault(paint, Tint::Warn, "warning:", warning));
    }
    match args.output {
        Output::Json | Output::Yaml => out_value(args.output, &committed)?,
        output => out(&lines(&committed, output == Output::Name, global.paint()))?,
    }
    if !committed.dry_run && committed.workers_in_force < committed.workers {
        notice(&format!(
            "{} accepted as generation {}, in force on {} of {} workers: see `towpathctl get workers`",
            paint.paint(Tint::Warn, "warning:"),
            committed.generation,
            committed.workers_in_force,
            committed.workers
        ));
        return Ok(Ending::NotInForce);
    }
    Ok(Ending::Done)
}

fn refused(faults: &[Fault], more: u32, warnings: &[Fault], paint: Paint) -> Result<Ending> {
    for warning in warnings {
        notice(&print::fault(paint, Tint::Warn, "warning:", warning));
    }
    for fault in faults {
        notice(&print::fault(paint, Tint::Bad, "error:", fault));
    }
    match faults.len() + more as usize {
        1 => bail!("the change was refused: nothing was changed"),
        n => bail!("the change was refused for {n} reasons: nothing was changed"),
    }
}

/// kubectl's lines: `service/my-nginx created`.
fn lines(committed: &Committed, names_only: bool, paint: Paint) -> String {
    let mut text = String::new();
    for change in &committed.changes {
        let ObjectRef { kind, name, .. } = &change.object;
        let object = format!("{}/{name}", kind.resource());
        let (word, tint) = match change.outcome {
            Outcome::Created => ("created", Tint::Good),
            Outcome::Configured => ("configured", Tint::Accent),
            Outcome::Unchanged => ("unchanged", Tint::Dim),
            Outcome::Deleted => ("deleted", Tint::Bad),
            Outcome::Pruned => ("pruned", Tint::Bad),
            Outcome::NotFound => continue,
        };
        text += &object;
        if !names_only {
            text += " ";
            text += &paint.paint(tint, word);
            if committed.dry_run {
                text += " (dry run)";
            }
        }
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::control::Change;

    #[test]
    fn lines_are_kubectl_s() {
        let change = |kind, name: &str, outcome| Change {
            object: ObjectRef { kind, namespace: "default".into(), name: name.into() },
            outcome,
        };
        let committed = Committed {
            changes: vec![
                change(Kind::Service, "my-nginx", Outcome::Created),
                change(Kind::EndpointSlice, "my-nginx-4kv7d", Outcome::Configured),
                change(Kind::Node, "node-1", Outcome::Unchanged),
                change(Kind::Pod, "gone", Outcome::NotFound),
                change(Kind::Namespace, "old", Outcome::Pruned),
            ],
            ..Default::default()
        };
        assert_eq!(
            lines(&committed, false, Paint::PLAIN),
            "service/my-nginx created\n\
             endpointslice.discovery.k8s.io/my-nginx-4kv7d configured\n\
             node/node-1 unchanged\n\
             namespace/old pruned\n"
        );
        let dry = Committed { dry_run: true, ..committed };
        assert!(lines(&dry, false, Paint::PLAIN).starts_with("service/my-nginx created (dry run)\n"));
        assert!(lines(&dry, true, Paint::PLAIN).starts_with("service/my-nginx\n"));
    }

    #[test]
    fn every_form_of_naming_an_object() {
        let text = |what: &str, names: &[&str]| -> Result<Vec<String>> {
            let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
            Ok(named(what, &names, "shop")?.iter().map(ToString::to_string).collect())
        };
        assert_eq!(text("svc", &["a", "b"]).unwrap(), ["Service shop/a", "Service shop/b"]);
        assert_eq!(text("svc/a", &["node/n"]).unwrap(), ["Service shop/a", "Node n"]);
        assert!(text("svc", &[]).unwrap_err().to_string().contains("which svc"));
        assert!(text("svc/a", &["b"]).unwrap_err().to_string().contains("\"b\" is not KIND/NAME"));
        assert!(text("routes", &["x"]).unwrap_err().to_string().contains("are not objects"));
    }
}
