//! Desired state: the accepted Kubernetes objects. The one source of truth; tables are made from it.
//!
//! A change is [`State::stage`]d as a whole: applied, judged, and either refused with every fault, leaving the state as it
//! was, or handed out as [`Staged`], to be committed once it is on disk. Dropping a `Staged` takes the change back.
//! One thread, that of control, owns the state.

mod claims;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config::control::{Change, Kind, ObjectRef, Outcome};
use config::fault::{Code, Fault, Source};
use config::object::{Manifest, Object};
use ipnet::IpNet;

use super::facts::{Facts, NodeFacts, PodFacts, ServiceFacts, SliceFacts};
use super::validate::{self, Rules};
use crate::addr::Addr;

pub use claims::{Claim, Claims};

/// Most faults of one change that are told one by one.
const MAX_FAULTS: usize = 20;

/// An accepted object.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// What names it.
    pub reference: Arc<ObjectRef>,
    /// The object as it was applied.
    pub object: Object,
    /// What Towpath reads from it.
    pub facts: Facts,
}

impl Entry {
    /// `metadata.resourceVersion`, may be empty.
    pub fn resource_version(&self) -> &str {
        self.object.metadata().resource_version.as_deref().unwrap_or_default()
    }
}

/// One operation of a change.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Adds or replaces an object.
    Apply {
        /// The object.
        object: Object,
        /// Where it was read, for faults.
        source: Source,
    },
    /// Removes an object.
    Delete {
        /// Which object.
        object: ObjectRef,
        /// Where it was named, for faults.
        source: Source,
        /// An object that does not exist is no fault.
        ignore_not_found: bool,
    },
}

/// A change that was not accepted; the state is as it was.
#[derive(Clone, Debug, Default)]
pub struct Refusal {
    /// What is wrong, at most 20 of them.
    pub faults: Vec<Fault>,
    /// How many more there are.
    pub more: u32,
    /// What else was noticed.
    pub warnings: Vec<Fault>,
}

impl Refusal {
    /// Adds a fault, or counts it when enough are told.
    pub fn fault(&mut self, fault: Fault) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        } else {
            self.more += 1;
        }
    }
}

/// One object before and after a change.
#[derive(Clone, Debug)]
pub struct Touch {
    /// The object.
    pub reference: Arc<ObjectRef>,
    /// As it was; `None`: it did not exist.
    pub old: Option<Arc<Entry>>,
    /// As it is; `None`: it is gone.
    pub new: Option<Arc<Entry>>,
}

/// What a committed change did.
#[derive(Clone, Debug, Default)]
pub struct Accepted {
    /// What became of each object, in the order of the operations; pruned ones last.
    pub changes: Vec<Change>,
    /// What deserves a look.
    pub warnings: Vec<Fault>,
    /// Objects that differ now, for [`Compiler::compile`](super::compile::Compiler::compile).
    pub touched: Vec<Touch>,
}

/// The accepted objects.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Ordered by kind, namespace and name: the order in which they can be applied again.
    entries: BTreeMap<Arc<ObjectRef>, Arc<Entry>>,
    /// Slices by the Service that they belong to, whether that exists or not.
    slices: BTreeMap<(String, String), BTreeSet<Arc<ObjectRef>>>,
    claims: Claims,
}

impl State {
    /// All objects, in the order in which they can be applied again.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.values()
    }

    /// All objects of a kind, by namespace and name.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Arc<Entry>> {
        let first = ObjectRef { kind, namespace: String::new(), name: String::new() };
        self.entries
            .range(Arc::new(first)..)
            .map(|(_, entry)| entry)
            .take_while(move |entry| entry.reference.kind == kind)
    }

    /// One object.
    pub fn get(&self, reference: &ObjectRef) -> Option<&Arc<Entry>> {
        self.entries.get(reference)
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A Service and what it says.
    pub fn service(&self, namespace: &str, name: &str) -> Option<(&Arc<Entry>, &ServiceFacts)> {
        let reference =
            ObjectRef { kind: Kind::Service, namespace: namespace.to_owned(), name: name.to_owned() };
        let entry = self.entries.get(&reference)?;
        match &entry.facts {
            Facts::Service(facts) => Some((entry, facts)),
            _ => None,
        }
    }

    /// All Services and what they say.
    pub fn services(&self) -> impl Iterator<Item = (&Arc<Entry>, &ServiceFacts)> {
        self.of_kind(Kind::Service).filter_map(|entry| match &entry.facts {
            Facts::Service(facts) => Some((entry, facts)),
            _ => None,
        })
    }

    /// All slices and what they say.
    pub fn slices(&self) -> impl Iterator<Item = (&Arc<Entry>, &SliceFacts)> {
        self.of_kind(Kind::EndpointSlice).filter_map(|entry| match &entry.facts {
            Facts::Slice(facts) => Some((entry, facts)),
            _ => None,
        })
    }

    /// The slices of a Service, by name, whether the Service exists or not.
    pub fn slices_of(
        &self,
        namespace: &str,
        service: &str,
    ) -> impl Iterator<Item = (&Arc<Entry>, &SliceFacts)> {
        let slices = self.slices.get(&(namespace.to_owned(), service.to_owned()));
        slices.into_iter().flatten().filter_map(|reference| {
            let entry = self.entries.get(reference)?;
            match &entry.facts {
                Facts::Slice(facts) => Some((entry, facts)),
                _ => None,
            }
        })
    }

    /// All Nodes and what they say.
    pub fn nodes(&self) -> impl Iterator<Item = (&Arc<Entry>, &NodeFacts)> {
        self.of_kind(Kind::Node).filter_map(|entry| match &entry.facts {
            Facts::Node(facts) => Some((entry, facts)),
            _ => None,
        })
    }

    /// The Node of a name and what it says.
    pub fn node(&self, name: &str) -> Option<&NodeFacts> {
        let reference = ObjectRef { kind: Kind::Node, namespace: String::new(), name: name.to_owned() };
        match &self.entries.get(&reference)?.facts {
            Facts::Node(facts) => Some(facts),
            _ => None,
        }
    }

    /// A Pod by its reference.
    pub fn pod(&self, reference: &ObjectRef) -> Option<&PodFacts> {
        match &self.entries.get(reference)?.facts {
            Facts::Pod(facts) => Some(facts),
            _ => None,
        }
    }

    /// All Pods and what they say.
    pub fn pods(&self) -> impl Iterator<Item = (&Arc<Entry>, &PodFacts)> {
        self.of_kind(Kind::Pod).filter_map(|entry| match &entry.facts {
            Facts::Pod(facts) => Some((entry, facts)),
            _ => None,
        })
    }

    /// All PodRoutes: prefix and next hop.
    pub fn pod_routes(&self) -> impl Iterator<Item = (IpNet, Addr)> {
        self.of_kind(Kind::PodRoute).filter_map(|entry| match &entry.facts {
            Facts::PodRoute(facts) => facts.route,
            _ => None,
        })
    }

    /// What the objects claim: addresses, frontends, podCIDRs.
    pub fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Makes a change, to be committed or taken back.
    ///
    /// `prune`: objects that the change does not apply are removed.
    ///
    /// # Errors
    /// Everything that is wrong with any object of the change; the state is as it was.
    pub fn stage(
        &mut self,
        rules: &Rules<'_>,
        operations: Vec<Operation>,
        prune: bool,
    ) -> Result<Staged<'_>, Refusal> {
        self.stage_with(rules, operations, prune, false)
    }

    /// As [`State::stage`]; `leniently`: addresses that may not be served are a warning.
    fn stage_with(
        &mut self,
        rules: &Rules<'_>,
        operations: Vec<Operation>,
        prune: bool,
        leniently: bool,
    ) -> Result<Staged<'_>, Refusal> {
        let mut staged =
            Staged { state: self, undo: Vec::new(), accepted: Accepted::default(), is_committed: false };
        let mut faults = Vec::new();
        let mut sources = BTreeMap::new();
        let mut applied = BTreeSet::new();
        for operation in operations {
            match operation {
                Operation::Apply { object, source } => {
                    let reference = staged.apply(object, &source, &mut faults);
                    sources.insert(reference.clone(), source);
                    applied.insert(reference);
                }
                Operation::Delete { object, source, ignore_not_found } => {
                    staged.delete(object, &source, ignore_not_found, &mut faults);
                }
            }
        }
        if prune {
            staged.prune(&applied, &mut faults);
        }
        let warnings = &mut staged.accepted.warnings;
        for touch in net_touches(&staged.undo, staged.state) {
            if let Some(entry) = &touch.new {
                let at = |fault: Fault| {
                    let fault = fault.object(&touch.reference);
                    match sources.get(&touch.reference) {
                        Some(source) if !source.file.is_empty() => fault.source(source),
                        _ => fault,
                    }
                };
                let found = validate::judge(staged.state, rules, entry);
                let barred = found.barred.into_iter().map(at);
                if leniently {
                    warnings.extend(barred);
                } else {
                    faults.extend(barred);
                }
                faults.extend(found.faults.into_iter().map(at));
                warnings.extend(found.warnings.into_iter().map(at));
            }
            staged.accepted.touched.push(touch);
        }
        if faults.is_empty() {
            return Ok(staged);
        }
        let more = faults.len().saturating_sub(MAX_FAULTS) as u32;
        faults.truncate(MAX_FAULTS);
        let warnings = std::mem::take(&mut staged.accepted.warnings);
        Err(Refusal { faults, more, warnings })
    }

    /// Takes what can be taken, each object by itself: for `explain`, and for objects kept by an earlier version. Objects at
    /// fault are left out, and addresses that may not be served are not; what was found is returned.
    pub fn load(rules: &Rules<'_>, manifests: impl IntoIterator<Item = Manifest>) -> (State, Vec<Fault>) {
        let mut state = State::default();
        let mut notes = Vec::new();
        let mut manifests: Vec<_> = manifests.into_iter().collect();
        // Services before their slices, so that no slice is said to wait for a Service that comes later.
        manifests.sort_by_key(|manifest| manifest.object.kind());
        for Manifest { object, source } in manifests {
            match state.stage_with(rules, vec![Operation::Apply { object, source }], false, true) {
                Ok(staged) => notes.extend(staged.commit().warnings),
                Err(refusal) => notes.extend(refusal.faults.into_iter().chain(refusal.warnings)),
            }
        }
        (state, notes)
    }

    /// Puts an object in, or takes it out, with everything that is kept beside it. Returns what was there before.
    fn set(&mut self, reference: &Arc<ObjectRef>, entry: Option<Arc<Entry>>) -> Option<Arc<Entry>> {
        let old = match entry.clone() {
            Some(entry) => self.entries.insert(reference.clone(), entry),
            None => self.entries.remove(reference),
        };
        let service_of = |entry: &Entry| match &entry.facts {
            Facts::Slice(SliceFacts { service: Some(service), .. }) => {
                Some((reference.namespace.clone(), service.clone()))
            }
            _ => None,
        };
        if let Some(old) = &old {
            self.claims.remove(old);
            if let Some(service) = service_of(old)
                && let Some(slices) = self.slices.get_mut(&service)
            {
                slices.remove(reference);
                if slices.is_empty() {
                    self.slices.remove(&service);
                }
            }
        }
        if let Some(entry) = &entry {
            self.claims.add(entry);
            if let Some(service) = service_of(entry) {
                self.slices.entry(service).or_default().insert(reference.clone());
            }
        }
        old
    }
}

/// Objects that differ from what they were before the first operation on them, in the order of the operations.
fn net_touches(undo: &[(Arc<ObjectRef>, Option<Arc<Entry>>)], state: &State) -> Vec<Touch> {
    let mut seen = BTreeSet::new();
    let mut touches = Vec::new();
    for (reference, old) in undo {
        if seen.insert(reference) {
            let new = state.entries.get(reference).cloned();
            touches.push(Touch { reference: reference.clone(), old: old.clone(), new });
        }
    }
    touches
}

/// A change that is accepted but not committed. Dropping it takes the change back.
#[derive(Debug)]
pub struct Staged<'s> {
    state: &'s mut State,
    /// What each operation replaced, oldest first.
    undo: Vec<(Arc<ObjectRef>, Option<Arc<Entry>>)>,
    accepted: Accepted,
    is_committed: bool,
}

impl Staged<'_> {
    /// What the change does.
    pub fn accepted(&self) -> &Accepted {
        &self.accepted
    }

    /// Keeps the change.
    pub fn commit(mut self) -> Accepted {
        self.is_committed = true;
        std::mem::take(&mut self.accepted)
    }

    fn apply(&mut self, object: Object, source: &Source, faults: &mut Vec<Fault>) -> Arc<ObjectRef> {
        let mut reference = Arc::new(object.reference());
        let at = |fault: Fault, reference: &ObjectRef| {
            let fault = fault.object(reference);
            if source.file.is_empty() { fault } else { fault.source(source) }
        };
        let old = self.state.entries.get_key_value(&reference);
        if let Some((known, old)) = old {
            reference = known.clone();
            if old.object == object {
                self.outcome(&reference, Outcome::Unchanged);
                return reference;
            }
        }
        let is_new = old.is_none();
        let (mut wrong, mut odd) = (Vec::new(), Vec::new());
        let facts = Facts::read(&object, &mut wrong, &mut odd);
        self.accepted.warnings.extend(odd.into_iter().map(|fault| at(fault, &reference)));
        if !wrong.is_empty() {
            faults.extend(wrong.into_iter().map(|fault| at(fault, &reference)));
            return reference;
        }
        let entry = Arc::new(Entry { reference: reference.clone(), object, facts });
        let old = self.state.set(&reference, Some(entry));
        self.undo.push((reference.clone(), old));
        self.outcome(&reference, if is_new { Outcome::Created } else { Outcome::Configured });
        reference
    }

    fn delete(
        &mut self,
        object: ObjectRef,
        source: &Source,
        ignore_not_found: bool,
        faults: &mut Vec<Fault>,
    ) {
        let reference = Arc::new(object);
        if let Some(old) = self.state.set(&reference, None) {
            self.outcome(&old.reference, Outcome::Deleted);
            self.undo.push((old.reference.clone(), Some(old)));
        } else if ignore_not_found {
            self.outcome(&reference, Outcome::NotFound);
        } else {
            let fault = Fault::new(Code::NotFound, "not found").object(&reference);
            let fault = fault.remedy("see `towpathctl get` for what there is, or use --ignore-not-found");
            faults.push(if source.file.is_empty() { fault } else { fault.source(source) });
        }
    }

    fn prune(&mut self, applied: &BTreeSet<Arc<ObjectRef>>, faults: &mut Vec<Fault>) {
        if applied.is_empty() {
            let remedy = "apply at least one object, or delete the objects by name";
            faults.push(
                Fault::new(Code::Request, "nothing applied: pruning would remove every object")
                    .remedy(remedy),
            );
            return;
        }
        // PodRoutes are the operator's, not the cluster's.
        let is_gone = |key: &&Arc<ObjectRef>| key.kind != Kind::PodRoute && !applied.contains(*key);
        let gone: Vec<_> = self.state.entries.keys().filter(is_gone).cloned().collect();
        for reference in gone {
            let old = self.state.set(&reference, None);
            self.undo.push((reference.clone(), old));
            self.outcome(&reference, Outcome::Pruned);
        }
    }

    fn outcome(&mut self, reference: &ObjectRef, outcome: Outcome) {
        self.accepted.changes.push(Change { object: reference.clone(), outcome });
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if !self.is_committed {
            for (reference, old) in std::mem::take(&mut self.undo).into_iter().rev() {
                self.state.set(&reference, old);
            }
        }
    }
}

#[cfg(test)]
mod tests;
