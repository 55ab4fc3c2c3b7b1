//! Objects to lines of the state directory, and back.

use std::collections::BTreeMap;

use config::control::ObjectRef;
use config::fault::{Code, Fault, Source};
use config::object::{Manifest, Object};
use serde::{Deserialize, Serialize};

use super::state::{Entry, Operation, Touch};

/// One line: what happened to an object.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line<O, R> {
    Put(O),
    Delete(R),
}

fn line(line: &Line<&Object, &ObjectRef>) -> String {
    serde_json::to_string(line).expect("objects and names are always JSON")
}

/// The line that puts an object as it is.
pub fn put(entry: &Entry) -> String {
    line(&Line::Put(&entry.object))
}

/// The lines of a change.
pub fn lines(touched: &[Touch]) -> Vec<String> {
    let change = |touch: &Touch| match &touch.new {
        Some(entry) => put(entry),
        None => line(&Line::Delete(&touch.reference)),
    };
    touched.iter().map(change).collect()
}

/// The objects that lines lead to, and what could not be read among them.
pub fn objects(lines: &[String]) -> (Vec<Manifest>, Vec<Fault>) {
    let mut objects = BTreeMap::new();
    let mut faults = Vec::new();
    for text in lines {
        match serde_json::from_str::<Line<serde_json::Value, ObjectRef>>(text) {
            Ok(Line::Put(value)) => match Object::from_value(value) {
                Ok((object, _)) => {
                    objects.insert(object.reference(), object);
                }
                Err(fault) => faults.push(fault.remedy("apply the object again")),
            },
            Ok(Line::Delete(reference)) => {
                objects.remove(&reference);
            }
            Err(error) => {
                let fault = Fault::new(Code::Storage, format!("a kept line cannot be read: {error}"));
                faults.push(fault.remedy("apply the objects again"));
            }
        }
    }
    let manifest = |object| Manifest { object, source: Source::default() };
    (objects.into_values().map(manifest).collect(), faults)
}

/// The operations that take a change back.
pub fn inverse(touched: &[Touch]) -> Vec<Operation> {
    let undo = |touch: &Touch| match &touch.old {
        Some(old) => Operation::Apply { object: old.object.clone(), source: Source::default() },
        None => Operation::Delete {
            object: ObjectRef::clone(&touch.reference),
            source: Source::default(),
            ignore_not_found: true,
        },
    };
    touched.iter().rev().map(undo).collect()
}
