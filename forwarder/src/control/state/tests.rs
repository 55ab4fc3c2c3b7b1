use super::*;
use crate::control::compile::fixture::{Cluster, gateway, objects};

const WEB: &str = "
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.244.0.1]}]
";

fn outcomes(accepted: &Accepted) -> Vec<Outcome> {
    accepted.changes.iter().map(|change| change.outcome).collect()
}

#[test]
fn created_configured_unchanged_deleted() {
    let mut cluster = Cluster::new("[gateway]\nname='gw'", "");
    let accepted = cluster.apply(WEB);
    assert_eq!(outcomes(&accepted), [Outcome::Created, Outcome::Created]);
    assert_eq!(accepted.touched.len(), 2);
    assert!(accepted.warnings.is_empty(), "{:?}", accepted.warnings);
    let accepted = cluster.apply(&WEB.replace("port: 80}", "port: 81}"));
    assert_eq!(outcomes(&accepted), [Outcome::Configured, Outcome::Unchanged]);
    assert_eq!(accepted.touched.len(), 1);
    assert!(accepted.touched[0].old.is_some() && accepted.touched[0].new.is_some());
    let accepted = cluster.delete(Kind::Service, "default", "web");
    assert_eq!(outcomes(&accepted), [Outcome::Deleted]);
    assert_eq!(cluster.state.len(), 1);
    // The slice waits for its Service to come again.
    assert_eq!(cluster.state.slices_of("default", "web").count(), 1);
}

/// Rule 1.6.
#[test]
fn a_slice_may_come_before_its_service_and_waits() {
    let (service, slice) = WEB.split_once("---\n").unwrap();
    let mut cluster = Cluster::new("[gateway]\nname='gw'", "");
    let accepted = cluster.apply(slice);
    assert_eq!(accepted.warnings.len(), 1);
    assert!(accepted.warnings[0].message.contains("waits"), "{}", accepted.warnings[0]);
    cluster.apply(service);
    assert_eq!(cluster.state.slices_of("default", "web").count(), 1);
    // Within one change the order does not matter.
    let mut cluster = Cluster::new("[gateway]\nname='gw'", "");
    assert_eq!(cluster.apply(&format!("{slice}---\n{service}")).warnings, []);
}

#[test]
fn a_refused_change_changes_nothing() {
    let mut cluster = Cluster::new("[gateway]\nname='gw'", WEB);
    let before = cluster.state.clone();
    let bad = "
kind: Service
metadata: {name: other}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
---
kind: Service
metadata: {name: bad}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
kind: Pod
metadata: {name: p}
status: {podIP: 127.0.0.1}
";
    let faults = cluster.try_apply(bad).unwrap_err();
    let objects: Vec<_> = faults.iter().map(|fault| fault.object.as_deref().unwrap()).collect();
    // Both Services are new: each is named with the other.
    assert_eq!(objects, ["Pod default/p", "Service default/other", "Service default/bad"]);
    assert_eq!(faults[2].source.as_ref().unwrap().document, 3);
    assert_eq!(cluster.state.entries, before.entries);
    assert_eq!(format!("{:?}", cluster.state.claims), format!("{:?}", before.claims));
    assert_eq!(cluster.state.slices, before.slices);
}

#[test]
fn a_staged_change_that_is_dropped_changes_nothing() {
    let mut cluster = Cluster::new("[gateway]\nname='gw'", WEB);
    let before = cluster.state.clone();
    let gateway = cluster.gateway.clone();
    let rules = Rules { gateway: &gateway, own: &[] };
    let apply = |object| Operation::Apply { object, source: Source::default() };
    let change = objects("kind: Namespace\nmetadata: {name: shop}\n").into_iter().map(apply).collect();
    let staged = cluster.state.stage(&rules, change, true).unwrap();
    assert_eq!(outcomes(staged.accepted()), [Outcome::Created, Outcome::Pruned, Outcome::Pruned]);
    drop(staged);
    assert_eq!(cluster.state.entries, before.entries);
    assert_eq!(format!("{:?}", cluster.state.claims), format!("{:?}", before.claims));
}

#[test]
fn pruning_leaves_what_was_applied() {
    let mut cluster = Cluster::new("[gateway]\nname='gw'", WEB);
    let gateway = cluster.gateway.clone();
    let rules = Rules { gateway: &gateway, own: &[] };
    let apply = |object| Operation::Apply { object, source: Source::default() };
    let change = objects(WEB).into_iter().take(1).map(apply).collect();
    let accepted = cluster.state.stage(&rules, change, true).unwrap().commit();
    assert_eq!(outcomes(&accepted), [Outcome::Unchanged, Outcome::Pruned]);
    assert_eq!(cluster.state.len(), 1);
    // Pruning with nothing applied would remove everything: surely a slip.
    let refusal = cluster.state.stage(&rules, vec![], true).unwrap_err();
    assert_eq!(refusal.faults[0].code, Code::Request);
    assert_eq!(cluster.state.len(), 1);
}

#[test]
fn deleting_what_is_not_there() {
    let mut cluster = Cluster::new("[gateway]\nname='gw'", WEB);
    let gateway = cluster.gateway.clone();
    let rules = Rules { gateway: &gateway, own: &[] };
    let delete = |ignore_not_found| Operation::Delete {
        object: ObjectRef { kind: Kind::Pod, namespace: "default".into(), name: "p".into() },
        source: Source::default(),
        ignore_not_found,
    };
    let refusal = cluster.state.stage(&rules, vec![delete(false)], false).unwrap_err();
    assert_eq!(
        refusal.faults[0].to_string(),
        "Pod default/p: not found; see `towpathctl get` for what there is, or use --ignore-not-found"
    );
    let accepted = cluster.state.stage(&rules, vec![delete(true)], false).unwrap().commit();
    assert_eq!(outcomes(&accepted), [Outcome::NotFound]);
}

#[test]
fn an_address_may_move_within_one_change() {
    let mut cluster = Cluster::new("[gateway]\nname='gw'", WEB);
    let moved = "
kind: Service
metadata: {name: new}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
";
    cluster.apply(moved);
    assert_eq!(
        cluster
            .state
            .claims()
            .of(Claim::Frontend("10.96.0.1".parse::<std::net::IpAddr>().unwrap().into(), 80, 6))
            .count(),
        1
    );
}

#[test]
fn loading_takes_what_can_be_taken() {
    let gateway = gateway("[gateway]\nname='gw'");
    let rules = Rules { gateway: &gateway, own: &[] };
    let yaml = format!(
        "{WEB}---\nkind: Service\nmetadata: {{name: thief}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: 80}}]}}\n"
    );
    let manifests = objects(&yaml).into_iter().map(|object| Manifest { object, source: Source::default() });
    let (state, notes) = State::load(&rules, manifests);
    assert_eq!(state.len(), 2);
    assert_eq!(notes.len(), 1);
    assert!(
        notes[0].to_string().contains("is the ClusterIP of Service default/thief")
            || notes[0].to_string().contains("is the ClusterIP of Service default/web")
    );
}

#[test]
fn loading_keeps_a_service_whose_address_is_a_nodes() {
    // As the load balancer of k3s gives them: to be told, but `explain` has to work on such clusters.
    let gateway = gateway("[gateway]\nname='gw'");
    let rules = Rules { gateway: &gateway, own: &[] };
    let yaml = "
kind: Service
metadata: {name: web}
spec: {type: LoadBalancer, clusterIP: 10.96.0.1, ports: [{port: 80}]}
status: {loadBalancer: {ingress: [{ip: 192.168.0.1}]}}
---
kind: Node
metadata: {name: n1}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
";
    let manifests = objects(yaml).into_iter().map(|object| Manifest { object, source: Source::default() });
    let (state, notes) = State::load(&rules, manifests);
    assert_eq!((state.len(), notes.len()), (2, 1));
    let compiler = crate::control::compile::compile(&state, &gateway, &[]);
    assert_eq!(compiler.tables().frontends.len(), 1);
    let described = compiler.describe_service(&state, "default", "web").unwrap();
    assert!(described.warnings[0].message.contains("is an address of Node n1"), "{}", described.warnings[0]);
}

#[test]
fn many_faults_are_cut_and_counted() {
    let mut cluster = Cluster::new("[gateway]\nname='gw'", "");
    let gateway = cluster.gateway.clone();
    let rules = Rules { gateway: &gateway, own: &[] };
    let apply = |index: usize| {
        let object =
            objects(&format!("kind: Pod\nmetadata: {{name: p{index}}}\nstatus: {{podIP: 127.0.0.1}}\n"))
                .remove(0);
        Operation::Apply { object, source: Source::default() }
    };
    let refusal = cluster.state.stage(&rules, (0..25).map(apply).collect(), false).unwrap_err();
    assert_eq!((refusal.faults.len(), refusal.more), (20, 5));
    assert!(cluster.state.is_empty());
}
