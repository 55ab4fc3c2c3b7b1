//! JSON to the types of the Kubernetes API, with the paths of wrong types and of unknown fields.

use k8s_openapi::Resource;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Object;
use crate::fault::{Code, Fault};

/// Reads one object; see [`Object::from_value`].
pub(super) fn read(value: Value) -> Result<(Object, Vec<Fault>), Fault> {
    let Some(fields) = value.as_object() else {
        return Err(
            Fault::new(Code::WrongType, "not an object with apiVersion and kind").value(shorten(&value))
        );
    };
    let word = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (word("apiVersion"), word("kind"));
    for (name, word) in [("apiVersion", &api_version), ("kind", &kind)] {
        if word.is_empty() {
            let remedy = "begin the object with apiVersion and kind, such as v1 and Service";
            return Err(Fault::new(Code::Missing, "missing or no text").field(name).remedy(remedy));
        }
    }
    let name = name_of(&value, &kind);
    let result = match (api_version.as_str(), kind.as_str()) {
        ("v1", "Namespace") => convert(value, |object| Object::Namespace(Box::new(object))),
        ("v1", "Node") => convert(value, |object| Object::Node(Box::new(object))),
        ("v1", "Pod") => convert(value, |object| Object::Pod(Box::new(object))),
        ("v1", "Service") => convert(value, |object| Object::Service(Box::new(object))),
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            convert(value, |object| Object::EndpointSlice(Box::new(object)))
        }
        ("towpath.dev/v1", "PodRoute") => convert(value, |object| Object::PodRoute(Box::new(object))),
        ("v1", "Endpoints") => {
            Err(Fault::new(Code::SkippedKind, "Endpoints are deprecated and not used: skipped")
                .remedy("apply the EndpointSlices of the Service"))
        }
        (_, "EndpointSlice" | "Service" | "Node" | "Pod" | "Namespace" | "PodRoute") => {
            let version = match kind.as_str() {
                "EndpointSlice" => "discovery.k8s.io/v1",
                "PodRoute" => "towpath.dev/v1",
                _ => "v1",
            };
            Err(Fault::new(Code::Invalid, format!("not the apiVersion of a {kind}"))
                .field("apiVersion")
                .value(&api_version)
                .remedy(format!("use {version}")))
        }
        ("v1" | "discovery.k8s.io/v1" | "towpath.dev/v1", _)
            if let Some(meant) = KINDS.iter().find(|known| is_slip(&kind, known)) =>
        {
            Err(Fault::new(Code::Invalid, "no such kind")
                .field("kind")
                .value(&kind)
                .remedy(format!("did you mean {meant}?")))
        }
        _ => Err(Fault::new(
            Code::SkippedKind,
            format!("{api_version} {kind} is not used by Towpath: skipped"),
        )),
    };
    match result {
        Ok((mut object, warnings)) => {
            // Bookkeeping of the API server, as long as the object itself; kubectl hides it too.
            object.metadata_mut().managed_fields = None;
            Ok((object, warnings.into_iter().map(|fault| fault.object(&name)).collect()))
        }
        Err(fault) => Err(fault.object(&name)),
    }
}

/// The kinds that are used.
const KINDS: [&str; 6] = ["Namespace", "Node", "Pod", "Service", "EndpointSlice", "PodRoute"];

/// `Service default/web`, from JSON that may not have the right types.
fn name_of(value: &Value, kind: &str) -> String {
    let word = |name: &str| value.get("metadata").and_then(|m| m.get(name)).and_then(Value::as_str);
    let name = word("name").unwrap_or("(no name)");
    match word("namespace") {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None if ["Node", "Namespace", "PodRoute"].contains(&kind) => format!("{kind} {name}"),
        None => format!("{kind} default/{name}"),
    }
}

fn convert<T: DeserializeOwned + Resource>(
    value: Value,
    wrap: impl FnOnce(T) -> Object,
) -> Result<(Object, Vec<Fault>), Fault> {
    match T::deserialize(&value) {
        Ok(object) => {
            let object = wrap(object);
            let mut unknown = Vec::new();
            left_out(&value, &object.to_value(), &mut String::new(), &mut unknown);
            let warnings = unknown.iter().filter_map(|path| unknown_field(T::KIND, path, &value)).collect();
            Ok((object, warnings))
        }
        Err(error) => {
            let path = culprit(&value, "", &|part| T::deserialize(part).is_err());
            let mut fault = Fault::new(Code::WrongType, error.to_string());
            if !path.is_empty() {
                if let Some(found) = at(&value, &path) {
                    fault = fault.value(shorten(found));
                }
                fault = fault.field(&path);
            }
            Err(fault.remedy(format!("`kubectl explain {}` tells the type", T::KIND.to_lowercase())))
        }
    }
}

/// Adds the paths of what is in `value` and not in `kept`, which was read from it. A null is as good as nothing.
/// `path` is that of `value`, and is the same again afterwards.
fn left_out(value: &Value, kept: &Value, path: &mut String, unknown: &mut Vec<String>) {
    let parent = path.len();
    match (value, kept) {
        (Value::Object(fields), Value::Object(kept)) => {
            for (name, field) in fields.iter().filter(|(_, field)| !field.is_null()) {
                *path += if parent == 0 { "" } else { "." };
                *path += name;
                match kept.get(name) {
                    Some(kept) => left_out(field, kept, path, unknown),
                    None => unknown.push(path.clone()),
                }
                path.truncate(parent);
            }
        }
        (Value::Array(elements), Value::Array(kept)) => {
            for (index, (element, kept)) in elements.iter().zip(kept).enumerate() {
                *path += &format!("[{index}]");
                left_out(element, kept, path, unknown);
                path.truncate(parent);
            }
        }
        _ => {}
    }
}

/// The path of the smallest part of `value` that is refused when it stands there alone; `path` is that of `value`.
fn culprit(value: &Value, path: &str, is_refused: &dyn Fn(&Value) -> bool) -> String {
    match value {
        Value::Object(fields) if !is_refused(&json!({})) => {
            for (name, field) in fields {
                let is_refused = |part: &Value| is_refused(&json!({ name: part }));
                if is_refused(field) {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    return culprit(field, &path, &is_refused);
                }
            }
        }
        Value::Array(elements) if !is_refused(&json!([])) => {
            let is_refused = |part: &Value| is_refused(&json!([part]));
            for (index, element) in elements.iter().enumerate() {
                if is_refused(element) {
                    return culprit(element, &format!("{path}[{index}]"), &is_refused);
                }
            }
        }
        _ => {}
    }
    path.to_owned()
}

/// The value at a path such as `spec.ports[0].port`.
fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    path.split(['.', '[']).filter(|step| !step.is_empty()).try_fold(value, |here, step| {
        match step.strip_suffix(']') {
            Some(index) => here.get(index.parse::<usize>().ok()?),
            None => here.get(step),
        }
    })
}

fn shorten(value: &Value) -> String {
    let mut text = value.to_string();
    if text.len() > 60 {
        let end = (0..=57).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// Fields that Towpath reads; what is nearly one of them is a slip.
const READ_FIELDS: [&str; 52] = [
    "metadata",
    "spec",
    "status",
    "name",
    "namespace",
    "labels",
    "annotations",
    "resourceVersion",
    "type",
    "clusterIP",
    "clusterIPs",
    "externalIPs",
    "ports",
    "port",
    "nodePort",
    "targetPort",
    "protocol",
    "appProtocol",
    "selector",
    "sessionAffinity",
    "sessionAffinityConfig",
    "clientIP",
    "timeoutSeconds",
    "internalTrafficPolicy",
    "externalTrafficPolicy",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "loadBalancerClass",
    "loadBalancer",
    "ingress",
    "ipMode",
    "ipFamilies",
    "ipFamilyPolicy",
    "healthCheckNodePort",
    "trafficDistribution",
    "publishNotReadyAddresses",
    "addressType",
    "endpoints",
    "addresses",
    "conditions",
    "ready",
    "serving",
    "terminating",
    "nodeName",
    "targetRef",
    "zone",
    "hints",
    "forZones",
    "forNodes",
    "podCIDRs",
    "podIPs",
    "hostNetwork",
];

/// A warning of an unknown field. Of Pods, Nodes and Namespaces Towpath reads little, and clusters newer than our API have
/// more fields in them: of those only slips are told.
fn unknown_field(kind: &str, path: &str, object: &Value) -> Option<Fault> {
    let name = path.rsplit(['.', ']']).next().unwrap_or(path);
    let meant = READ_FIELDS.iter().find(|known| is_slip(name, known));
    if meant.is_none() && !["Service", "EndpointSlice", "PodRoute"].contains(&kind) {
        return None;
    }
    let mut fault = Fault::new(Code::UnknownField, "no such field in the API: ignored").field(path);
    if let Some(value) = at(object, path) {
        fault = fault.value(shorten(value));
    }
    Some(match meant {
        Some(meant) => fault.remedy(format!("did you mean {}{meant}?", &path[..path.len() - name.len()])),
        None => fault.remedy(format!("`kubectl explain {}` lists the fields", kind.to_lowercase())),
    })
}

/// True if `word` is `known` with another case, two neighbors swapped, or one letter more, less or different.
fn is_slip(word: &str, known: &str) -> bool {
    let (word, known) = (word.to_ascii_lowercase(), known.to_ascii_lowercase());
    if word == known {
        return true;
    }
    let (a, b) = (word.as_bytes(), known.as_bytes());
    if a.len() < 4 && b.len() < 4 {
        return false;
    }
    let same_start = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let (a, b) = (&a[same_start..], &b[same_start..]);
    let same_end = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count();
    let (a, b) = (&a[..a.len() - same_end], &b[..b.len() - same_end]);
    a.len() <= 1 && b.len() <= 1 || a.len() == 2 && b.len() == 2 && a[0] == b[1] && a[1] == b[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips() {
        for (word, known) in [
            ("prots", "ports"),
            ("port", "ports"),
            ("clusterIp", "clusterIP"),
            ("nodeport", "nodePort"),
            ("tpye", "type"),
        ] {
            assert!(is_slip(word, known), "{word} {known}");
        }
        for (word, known) in [("zone", "ports"), ("prto", "ports"), ("ip", "id"), ("serviceName", "name")] {
            assert!(!is_slip(word, known), "{word} {known}");
        }
    }
}
