//! `towpathctl get`: lists, in kubectl's columns.

use anyhow::{Result, bail};
use config::control::{Get, Item, Noun, Request};
use serde::Serialize;
use serde_json::{Value, json};

use crate::connection::{Connection, unexpected_item};
use crate::print::{Cell, Output, Paint, Table, notice, now_s, out, out_value};
use crate::{Ending, Global, Usage, dns, flow};

/// What can be listed, with kubectl's short names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A noun of the control protocol.
    Noun(Noun),
    /// Flows, the same as `flows list`.
    Flows,
}

/// Name, kubectl's singular and short names, and what it is.
const RESOURCES: &[(&str, &[&str], Resource)] = &[
    ("services", &["service", "svc"], Resource::Noun(Noun::Services)),
    (
        "endpoints",
        &[
            "endpoint",
            "ep",
            "endpointslices",
            "endpointslice",
            "endpointslices.discovery.k8s.io",
            "endpointslice.discovery.k8s.io",
        ],
        Resource::Noun(Noun::Endpoints),
    ),
    ("nodes", &["node", "no"], Resource::Noun(Noun::Nodes)),
    ("pods", &["pod", "po"], Resource::Noun(Noun::Pods)),
    ("namespaces", &["namespace", "ns"], Resource::Noun(Noun::Namespaces)),
    ("routes", &["route", "r"], Resource::Noun(Noun::Routes)),
    ("neighbors", &["neighbor", "neigh", "n"], Resource::Noun(Noun::Neighbors)),
    ("ports", &["port"], Resource::Noun(Noun::Ports)),
    ("workers", &["worker"], Resource::Noun(Noun::Workers)),
    ("flows", &["flow"], Resource::Flows),
    ("dns", &["names", "hosts"], Resource::Noun(Noun::Dns)),
    ("all", &[], Resource::Noun(Noun::All)),
];

impl Resource {
    /// By its name, singular or short name.
    pub fn parse(text: &str) -> Result<Resource> {
        let lower = text.to_ascii_lowercase();
        let found =
            RESOURCES.iter().find(|(name, short, _)| *name == lower || short.contains(&lower.as_str()));
        match found {
            Some((_, _, resource)) => Ok(*resource),
            None => {
                let names: Vec<_> = RESOURCES.iter().map(|r| r.0).collect();
                bail!(Usage(format!("no resource is called {text:?}; there are {}", names.join(", "))))
            }
        }
    }

    /// The name that lists it.
    pub fn name(self) -> &'static str {
        RESOURCES.iter().find(|r| r.2 == self).map_or("", |r| r.0)
    }

    /// True if its rows have a namespace and `default` is meant when none is given.
    fn is_namespaced(self) -> bool {
        matches!(self, Resource::Noun(Noun::Services | Noun::Endpoints | Noun::Pods))
    }

    /// True if it is a kind of Kubernetes objects, of which `-o json` shows the whole.
    fn is_object(self) -> bool {
        use Noun::{All, Endpoints, Namespaces, Nodes, Pods, Services};
        matches!(self, Resource::Noun(Services | Endpoints | Nodes | Pods | Namespaces | All))
    }
}

/// Completes the names of resources.
#[derive(Clone)]
struct ResourceNames;

impl clap::builder::TypedValueParser for ResourceNames {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        clap::builder::StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = clap::builder::PossibleValue> + '_>> {
        Some(Box::new(
            RESOURCES.iter().map(|(name, short, _)| {
                clap::builder::PossibleValue::new(*name).aliases(short.iter().copied())
            }),
        ))
    }
}

/// Arguments of `get`.
#[derive(clap::Args)]
pub struct Args {
    /// What to list, one or several with commas, or KIND/NAME
    #[arg(value_name = "KIND[/NAME]", value_parser = ResourceNames, hide_possible_values = false)]
    what: String,
    /// Only these names
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Only this namespace
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    namespace: String,
    /// Every namespace
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table", hide_default_value = true)]
    output: Output,
    /// Leave the header out
    #[arg(long)]
    no_headers: bool,
}

/// How rows are shown.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Every column.
    pub wide: bool,
    /// A column with the namespace first.
    pub namespaces: bool,
    /// Seconds since 1970, for ages.
    pub now_s: i64,
}

#[cfg(test)]
impl View {
    /// What most people see, at 2026-11-22T00:00:00Z.
    pub const NARROW: View = View { wide: false, namespaces: false, now_s: 1_795_305_600 };
    /// Every column.
    pub const WIDE: View = View { wide: true, namespaces: true, now_s: 1_795_305_600 };
}

/// A row of a list: how it is taken out of an answer and printed.
pub trait Row: Serialize + Sized {
    /// kubectl's singular name, for `-o name`.
    const SINGULAR: &'static str;

    /// Takes the row out of an item, if it is of this kind.
    fn from_item(item: Item) -> Option<Self>;

    /// `metadata.namespace`, for kinds that live in one.
    fn namespace(&self) -> Option<&str> {
        None
    }

    /// What `get KIND NAME` and `-o name` call it.
    fn name(&self) -> String;

    /// Headers of the columns after NAMESPACE.
    fn header(view: View) -> Vec<&'static str>;

    /// One cell for each header.
    fn cells(&self, view: View) -> Vec<Cell>;
}

/// An empty table for rows of one kind.
pub fn table_of<R: Row>(view: View) -> Table {
    let mut header = R::header(view);
    if view.namespaces {
        header.insert(0, "NAMESPACE");
    }
    Table::new(header)
}

/// Adds a row to its table.
pub fn add_row<R: Row>(table: &mut Table, row: &R, view: View) {
    let mut cells = row.cells(view);
    if view.namespaces {
        cells.insert(0, row.namespace().unwrap_or_default().into());
    }
    table.row(cells);
}

/// The whole table, for tests of the printers.
#[cfg(test)]
pub fn print_rows<R: Row>(rows: &[R], view: View) -> String {
    let mut table = table_of::<R>(view);
    rows.iter().for_each(|row| add_row(&mut table, row, view));
    table.take(Paint::PLAIN, 0)
}

/// One kind with the names asked for.
struct Query {
    resource: Resource,
    names: Vec<String>,
    /// Not a word about it if there is none.
    optional: bool,
}

impl Args {
    /// kubectl's forms: `svc`, `svc,ep`, `svc NAME...`, `svc/NAME svc/OTHER`; for people `all` is each kind of objects.
    fn queries(&self) -> Result<Vec<Query>> {
        if self.what.eq_ignore_ascii_case("all") && !matches!(self.output, Output::Json | Output::Yaml) {
            let kinds = [Noun::Services, Noun::Endpoints, Noun::Pods, Noun::Nodes, Noun::Namespaces];
            let query = |noun| Query { resource: Resource::Noun(noun), names: Vec::new(), optional: true };
            return match self.names.first() {
                None => Ok(kinds.map(query).into()),
                Some(name) => bail!(Usage(format!("`get all` takes no names; which kind is {name:?}?"))),
            };
        }
        if self.what.contains('/') {
            let mut queries = Vec::new();
            for text in std::iter::once(&self.what).chain(&self.names) {
                let Some((kind, name)) = text.split_once('/').filter(|(_, name)| !name.is_empty()) else {
                    bail!(Usage(format!("{text:?} is not KIND/NAME, as the other arguments are")))
                };
                let (resource, name) = (Resource::parse(kind)?, name.to_owned());
                match queries.iter_mut().find(|query: &&mut Query| query.resource == resource) {
                    Some(query) => query.names.push(name),
                    None => queries.push(Query { resource, names: vec![name], optional: false }),
                }
            }
            return Ok(queries);
        }
        let resources: Result<Vec<_>> = self.what.split(',').map(Resource::parse).collect();
        let query = |resource| Query { resource, names: self.names.clone(), optional: false };
        Ok(resources?.into_iter().map(query).collect())
    }
}

/// Runs `get`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let queries = args.queries()?;
    for query in &queries {
        if query.resource == Resource::Flows && !query.names.is_empty() {
            bail!(Usage("flows have no names; `towpathctl flows list` has filters".into()));
        }
        if args.output == Output::Hosts && query.resource != Resource::Noun(Noun::Dns) {
            bail!(Usage(format!(
                "-o hosts is a form of `get dns` only; {} has table, wide, json, yaml, name",
                query.resource.name()
            )));
        }
    }
    let connection = &mut global.connect()?;
    let paint = global.paint();
    if matches!(args.output, Output::Json | Output::Yaml) {
        return values(connection, args, &queries);
    }
    let mut printed = false;
    for query in &queries {
        // Flows are listed as they come, there may be millions.
        let text = match query.resource {
            Resource::Noun(noun) => rows_of(noun, connection, args, query, paint)?,
            Resource::Flows => String::new(),
        };
        if text.is_empty() && query.resource != Resource::Flows {
            continue;
        }
        if queries.len() > 1 && args.output != Output::Name {
            out(&format!("{}{}:\n", if printed { "\n" } else { "" }, query.resource.name()))?;
        }
        printed = true;
        match query.resource {
            Resource::Flows => flow::list(connection, &flow::ListArgs::default(), args.output, paint)?,
            Resource::Noun(_) => out(&text)?,
        }
    }
    if !printed && queries.iter().all(|query| query.optional) {
        notice(&match args.all_namespaces {
            true => "No objects found.".to_owned(),
            false => format!("No objects found in {} namespace.", args.namespace),
        });
    }
    Ok(Ending::Done)
}

/// The rows of one kind as text; empty, after a notice, if there are none.
fn rows_of(
    noun: Noun,
    connection: &mut Connection,
    args: &Args,
    query: &Query,
    paint: Paint,
) -> Result<String> {
    use config::control as c;
    match noun {
        Noun::Services => rows::<c::ServiceRow>(connection, args, query, paint),
        Noun::Endpoints => rows::<c::EndpointRow>(connection, args, query, paint),
        Noun::Nodes => rows::<c::NodeRow>(connection, args, query, paint),
        Noun::Pods => rows::<c::PodRow>(connection, args, query, paint),
        Noun::Namespaces => rows::<c::NamespaceRow>(connection, args, query, paint),
        Noun::Routes => rows::<c::RouteRow>(connection, args, query, paint),
        Noun::Neighbors => rows::<c::NeighborRow>(connection, args, query, paint),
        Noun::Ports => rows::<c::PortRow>(connection, args, query, paint),
        Noun::Workers => rows::<c::WorkerRow>(connection, args, query, paint),
        Noun::Dns if args.output == Output::Hosts => Ok(dns::hosts(&fetch(connection, args, query)?)),
        Noun::Dns => rows::<c::DnsRow>(connection, args, query, paint),
        Noun::All => bail!(Usage("ask for `all` alone, or add -o yaml or -o json".into())),
    }
}

fn request(args: &Args, resource: Resource, name: Option<&str>, objects: bool) -> Request {
    match resource {
        Resource::Flows => Request::Flows { filter: Default::default(), limit: None },
        Resource::Noun(what) => {
            let namespaced = resource.is_namespaced() && !args.all_namespaces;
            Request::Get(Get {
                what,
                namespace: namespaced.then(|| args.namespace.clone()),
                name: name.map(str::to_owned),
                objects,
            })
        }
    }
}

/// Lists what a query asks for, item by item. A name that does not exist is an error, as for kubectl.
fn each(
    connection: &mut Connection,
    args: &Args,
    query: &Query,
    objects: bool,
    mut take: impl FnMut(Item) -> Result<()>,
) -> Result<()> {
    if query.names.is_empty() {
        return connection.list(&request(args, query.resource, None, objects), take);
    }
    for name in &query.names {
        let mut found = false;
        connection.list(&request(args, query.resource, Some(name), objects), |item| {
            if !is_named(&item, name) {
                return Ok(());
            }
            found = true;
            take(item)
        })?;
        if !found {
            let place = if query.resource.is_namespaced() && !args.all_namespaces {
                format!(" in namespace {}", args.namespace)
            } else {
                String::new()
            };
            bail!("{} {name:?} not found{place}", query.resource.name());
        }
    }
    Ok(())
}

/// Names of what is no Kubernetes object are matched here; the daemon matches those of objects.
fn is_named(item: &Item, name: &str) -> bool {
    match item {
        Item::Route(row) => row.prefix == name,
        Item::Neighbor(row) => row.address == name,
        Item::Port(row) => row.name == name || row.interface == name,
        Item::Worker(row) => row.index.to_string() == name,
        Item::Dns(row) => row.name == name,
        _ => true,
    }
}

fn fetch<R: Row>(connection: &mut Connection, args: &Args, query: &Query) -> Result<Vec<R>> {
    let mut rows = Vec::new();
    each(connection, args, query, false, |item| {
        rows.push(R::from_item(item).ok_or_else(unexpected_item)?);
        Ok(())
    })?;
    Ok(rows)
}

fn rows<R: Row>(connection: &mut Connection, args: &Args, query: &Query, paint: Paint) -> Result<String> {
    let rows: Vec<R> = fetch(connection, args, query)?;
    if args.output == Output::Name {
        let mut names: Vec<_> = rows.iter().map(|row| format!("{}/{}\n", R::SINGULAR, row.name())).collect();
        // A slice has a row for each of its endpoints, a name one for each of its addresses.
        names.dedup();
        return Ok(names.concat());
    }
    if rows.is_empty() {
        match query.resource.is_namespaced() && !args.all_namespaces {
            _ if query.optional => {}
            true => notice(&format!("No {} found in {} namespace.", query.resource.name(), args.namespace)),
            false => notice(&format!("No {} found.", query.resource.name())),
        }
        return Ok(String::new());
    }
    let view = View {
        wide: args.output == Output::Wide,
        namespaces: args.all_namespaces && query.resource.is_namespaced(),
        now_s: now_s(),
    };
    let mut table = table_of::<R>(view);
    rows.iter().for_each(|row| add_row(&mut table, row, view));
    let text = table.take(paint, 0);
    match text.split_once('\n') {
        Some((_, body)) if args.no_headers => Ok(body.to_owned()),
        _ => Ok(text),
    }
}

/// `-o json` and `-o yaml`: whole objects for Kubernetes kinds, else the rows; a list, or the one that was named.
fn values(connection: &mut Connection, args: &Args, queries: &[Query]) -> Result<Ending> {
    let mut items = Vec::new();
    for query in queries {
        each(connection, args, query, query.resource.is_object(), |item| {
            items.push(value(item)?);
            Ok(())
        })?;
    }
    let one_name = queries.len() == 1 && queries[0].names.len() == 1;
    if one_name && items.len() == 1 {
        out_value(args.output, &items[0])?;
    } else {
        out_value(args.output, &json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
    }
    Ok(Ending::Done)
}

/// The row or object of an item without the word that says what it is.
fn value(item: Item) -> Result<Value> {
    match serde_json::to_value(item)? {
        Value::Object(map) => map.into_iter().next().map(|(_, value)| value).ok_or_else(unexpected_item),
        _ => Err(unexpected_item()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_have_kubectl_s_short_names() {
        for (text, name) in [
            ("svc", "services"),
            ("SVC", "services"),
            ("service", "services"),
            ("ep", "endpoints"),
            ("endpointslices", "endpoints"),
            ("no", "nodes"),
            ("po", "pods"),
            ("ns", "namespaces"),
            ("flows", "flows"),
        ] {
            assert_eq!(Resource::parse(text).unwrap().name(), name);
        }
        let error = Resource::parse("deployments").unwrap_err().to_string();
        assert!(error.contains("\"deployments\"") && error.contains("services, endpoints"), "{error}");
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> =
            RESOURCES.iter().flat_map(|r| std::iter::once(r.0).chain(r.1.iter().copied())).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn an_item_is_shown_without_its_tag() {
        let item = Item::Dns(config::control::DnsRow { name: "a".into(), address: "10.0.0.1".into() });
        assert_eq!(value(item).unwrap(), json!({"name": "a", "address": "10.0.0.1"}));
        assert_eq!(value(Item::Object(json!({"kind": "Service"}))).unwrap(), json!({"kind": "Service"}));
    }
}
