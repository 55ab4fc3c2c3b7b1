//! Kubernetes manifests: what users apply, as `kubectl get -o yaml` prints it and as they write it themselves.
//!
//! [`parse`] takes YAML with any number of documents (JSON is YAML too), single objects, v1 `List`s and typed lists.
//! Every complaint names file, line, document, object, field, value and remedy. Fields that the API does not know are
//! warned of by their path, since the API server would drop them silently; kinds that Towpath does not use are skipped
//! with a notice.

mod files;
mod located;
mod plain;
mod pod_route;
mod typed;

use std::ops::ControlFlow;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::control::{Kind, ObjectRef};
use crate::fault::{Code, Fault, Source};
use located::Located;

pub use files::folder;
pub use pod_route::{PodRoute, PodRouteSpec};

/// An object of a kind that Towpath keeps. The large ones are boxed.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// v1 Namespace.
    Namespace(Box<Namespace>),
    /// v1 Node.
    Node(Box<Node>),
    /// v1 Pod.
    Pod(Box<Pod>),
    /// v1 Service.
    Service(Box<Service>),
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice(Box<EndpointSlice>),
    /// towpath.dev/v1 PodRoute.
    PodRoute(Box<PodRoute>),
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Object::Namespace(object) => object.serialize(serializer),
            Object::Node(object) => object.serialize(serializer),
            Object::Pod(object) => object.serialize(serializer),
            Object::Service(object) => object.serialize(serializer),
            Object::EndpointSlice(object) => object.serialize(serializer),
            Object::PodRoute(object) => object.serialize(serializer),
        }
    }
}

impl Object {
    /// Reads one object from JSON. The second value: warnings, such as fields that the API does not know.
    /// Errors name object, field, value and remedy; a kind that Towpath does not use has the code `skipped_kind`.
    pub fn from_value(value: Value) -> Result<(Object, Vec<Fault>), Fault> {
        typed::read(value)
    }

    /// The object as JSON, `apiVersion` and `kind` first.
    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).expect("a Kubernetes object is always JSON")
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Namespace(_) => Kind::Namespace,
            Object::Node(_) => Kind::Node,
            Object::Pod(_) => Kind::Pod,
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::PodRoute(_) => Kind::PodRoute,
        }
    }

    /// Its `metadata`.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Object::Namespace(object) => &object.metadata,
            Object::Node(object) => &object.metadata,
            Object::Pod(object) => &object.metadata,
            Object::Service(object) => &object.metadata,
            Object::EndpointSlice(object) => &object.metadata,
            Object::PodRoute(object) => &object.metadata,
        }
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Object::Namespace(object) => &mut object.metadata,
            Object::Node(object) => &mut object.metadata,
            Object::Pod(object) => &mut object.metadata,
            Object::Service(object) => &mut object.metadata,
            Object::EndpointSlice(object) => &mut object.metadata,
            Object::PodRoute(object) => &mut object.metadata,
        }
    }

    /// What names it. A namespaced object without a namespace is in `default`, as for kubectl.
    pub fn reference(&self) -> ObjectRef {
        let kind = self.kind();
        let metadata = self.metadata();
        let namespace = match (kind.is_namespaced(), &metadata.namespace) {
            (false, _) => String::new(),
            (true, Some(namespace)) if !namespace.is_empty() => namespace.clone(),
            (true, _) => "default".to_owned(),
        };
        ObjectRef { kind, namespace, name: metadata.name.clone().unwrap_or_default() }
    }
}

/// An object and where it was read from.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// The object.
    pub object: Object,
    /// File, document and line.
    pub source: Source,
}

/// What a text contains.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifests {
    /// The objects, in order.
    pub manifests: Vec<Manifest>,
    /// What cannot be read; if there is anything, nothing of the text should be applied.
    pub faults: Vec<Fault>,
    /// What can be read but deserves a look: unknown fields, skipped kinds.
    pub warnings: Vec<Fault>,
}

/// Reads every object of `text`. `file` is its name in faults and warnings, `-` for standard input.
pub fn parse(text: &str, file: &str) -> Manifests {
    let mut found = Manifests::default();
    for document in located::documents(text) {
        let source = |line| Source { file: file.to_owned(), document: document.number, line: Some(line) };
        // JSON is read by its own, faster parser; when anything is wrong the YAML parser reads it again for the lines.
        if let Some(objects) = read_json(document.text, &source(document.first_line)) {
            found.manifests.extend(objects);
            continue;
        }
        match located::read(&document) {
            Ok(root) => {
                let mut reader = Reader { found: &mut found, source: &source };
                reader.document(&root);
            }
            Err((line, fault)) => found.faults.push(fault.source(&source(line))),
        }
    }
    found
}

/// The objects of a JSON document, if it is one and nothing about it deserves a word.
fn read_json(text: &str, source: &Source) -> Option<Vec<Manifest>> {
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let root: Value = serde_json::from_str(text).ok()?;
    let mut manifests = Vec::new();
    let flow = each_object(root, &mut |value| match typed::read(value) {
        Ok((object, warnings)) if warnings.is_empty() => {
            manifests.push(Manifest { object, source: source.clone() });
            ControlFlow::Continue(())
        }
        _ => ControlFlow::Break(()),
    });
    flow.is_continue().then_some(manifests)
}

/// Calls `found` with each object of `root`: itself, or the items of a list, which inherit the list's kind if it has one.
fn each_object(mut root: Value, found: &mut impl FnMut(Value) -> ControlFlow<()>) -> ControlFlow<()> {
    let word = |name: &str| root.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (word("apiVersion"), word("kind"));
    let items = root.get_mut("items").and_then(Value::as_array_mut);
    let Some((item_kind, items)) = kind.strip_suffix("List").zip(items) else { return found(root) };
    for mut item in items.drain(..) {
        match item.as_object_mut() {
            Some(fields) if !item_kind.is_empty() && !fields.contains_key("kind") => {
                fields.insert("apiVersion".into(), api_version.as_str().into());
                fields.insert("kind".into(), item_kind.into());
                found(item)?;
            }
            _ => each_object(item, found)?,
        }
    }
    ControlFlow::Continue(())
}

/// Walks a document whose fields know their lines.
struct Reader<'a> {
    found: &'a mut Manifests,
    source: &'a dyn Fn(u32) -> Source,
}

impl Reader<'_> {
    fn document(&mut self, root: &Located) {
        if root.is_null() {
            return;
        }
        self.value(root, None);
    }

    /// Reads one object or list. `inherited`: apiVersion and kind of the items of a typed list.
    fn value(&mut self, located: &Located, inherited: Option<(&str, &str)>) {
        let kind = located.text("kind");
        let items = located.field("items");
        if let (Some(item_kind), Some(items)) = (kind.and_then(|kind| kind.strip_suffix("List")), items) {
            let inherited =
                (!item_kind.is_empty()).then(|| (located.text("apiVersion").unwrap_or("v1"), item_kind));
            match items.elements() {
                Some(elements) => elements.iter().for_each(|element| self.value(element, inherited)),
                None => {
                    let fault = Fault::new(Code::WrongType, "not a list")
                        .field("items")
                        .source(&(self.source)(items.line));
                    self.found.faults.push(fault);
                }
            }
            return;
        }
        let mut value = located.to_value();
        if let (Some((api_version, kind)), Some(fields), None) = (inherited, value.as_object_mut(), kind) {
            fields.insert("apiVersion".into(), api_version.into());
            fields.insert("kind".into(), kind.into());
        }
        let place = |mut fault: Fault| {
            let line =
                fault.field.as_deref().and_then(|field| located.line_of(field)).unwrap_or(located.line);
            fault.source = Some(Box::new((self.source)(line)));
            fault
        };
        match Object::from_value(value) {
            Ok((object, warnings)) => {
                self.found.warnings.extend(warnings.into_iter().map(place));
                self.found.manifests.push(Manifest { object, source: (self.source)(located.line) });
            }
            Err(fault) if fault.code == Code::SkippedKind => self.found.warnings.push(place(fault)),
            Err(fault) => self.found.faults.push(place(fault)),
        }
    }
}

#[cfg(test)]
mod tests;
