//! Clusters for tests, from YAML with as little ceremony as possible.

use std::net::IpAddr;
use std::sync::Arc;

use config::control::{Kind, ObjectRef};
use config::fault::{Fault, Source};
use config::gateway::Gateway;
use config::object::{self, Object};

use super::{Compiler, compile};
use crate::addr::Addr;
use crate::control::facts::Facts;
use crate::control::state::{Accepted, Entry, Operation, State};
use crate::control::validate::Rules;

/// A gateway with one outside and one inside port. `head`: everything before the ports.
pub(crate) fn gateway(head: &str) -> Arc<Gateway> {
    let text = format!(
        "{head}\n[[port]]\nname='up'\ninterface='g0'\nrole='outside'\n[[port]]\nname='in'\ninterface='g1'\nrole='inside'\n"
    );
    Arc::new(Gateway::parse(&text, "gateway.toml").unwrap_or_else(|faults| panic!("{faults:?}")))
}

/// Objects from YAML; `apiVersion` is filled in.
pub(crate) fn objects(yaml: &str) -> Vec<Object> {
    let text: Vec<String> = yaml
        .split("---\n")
        .map(|document| {
            let version = match document {
                slice if slice.contains("kind: EndpointSlice") => "discovery.k8s.io/v1",
                route if route.contains("kind: PodRoute") => "towpath.dev/v1",
                _ => "v1",
            };
            format!("apiVersion: {version}\n{}", document.trim_start())
        })
        .collect();
    let found = object::parse(&text.join("---\n"), "test.yaml");
    assert!(found.faults.is_empty() && found.warnings.is_empty(), "{:?} {:?}", found.faults, found.warnings);
    found.manifests.into_iter().map(|manifest| manifest.object).collect()
}

/// A slice from the YAML after its metadata; IPv4 unless it says otherwise.
pub(crate) fn slice(yaml: &str) -> Entry {
    let family = if yaml.contains("addressType") { "" } else { "addressType: IPv4\n" };
    let head = "kind: EndpointSlice\nmetadata: {name: s, labels: {kubernetes.io/service-name: web}}\n";
    let object = objects(&format!("{head}{family}{yaml}\n")).remove(0);
    let (mut faults, mut warnings) = (Vec::new(), Vec::new());
    let facts = Facts::read(&object, &mut faults, &mut warnings);
    assert!(faults.is_empty(), "{faults:?}");
    Entry { reference: Arc::new(object.reference()), object, facts }
}

/// A state and the gateway that it is for.
pub(crate) struct Cluster {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) state: State,
}

impl Cluster {
    /// A cluster of objects that are all good.
    pub(crate) fn new(head: &str, yaml: &str) -> Cluster {
        let mut cluster = Cluster { gateway: gateway(head), state: State::default() };
        if !yaml.trim().is_empty() {
            cluster.apply(yaml);
        }
        cluster
    }

    /// Applies objects that are all good.
    pub(crate) fn apply(&mut self, yaml: &str) -> Accepted {
        self.try_apply(yaml).unwrap_or_else(|faults| panic!("{faults:?}"))
    }

    /// Applies objects. Errors: the faults.
    pub(crate) fn try_apply(&mut self, yaml: &str) -> Result<Accepted, Vec<Fault>> {
        let source = |index| Source { file: "test.yaml".into(), document: index as u32 + 1, line: None };
        let operations = objects(yaml).into_iter().enumerate();
        let operations =
            operations.map(|(index, object)| Operation::Apply { object, source: source(index) }).collect();
        let rules = Rules { gateway: &self.gateway, own: &[] };
        let staged = self.state.stage(&rules, operations, false).map_err(|refusal| refusal.faults)?;
        Ok(staged.commit())
    }

    /// Deletes an object that is there.
    pub(crate) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> Accepted {
        let object = ObjectRef { kind, namespace: namespace.into(), name: name.into() };
        let delete = Operation::Delete { object, source: Source::default(), ignore_not_found: false };
        let rules = Rules { gateway: &self.gateway, own: &[] };
        self.state.stage(&rules, vec![delete], false).unwrap_or_else(|refusal| panic!("{refusal:?}")).commit()
    }

    /// Compiles everything, with the given addresses on the ports.
    pub(crate) fn compiler(&self, own: &[&str]) -> Compiler {
        let own: Vec<Addr> = own.iter().map(|text| text.parse::<IpAddr>().unwrap().into()).collect();
        compile(&self.state, &self.gateway, &own)
    }
}
