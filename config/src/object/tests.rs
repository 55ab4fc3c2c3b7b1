use super::*;

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
spec:
  clusterIP: 10.96.0.10
  ports:
  - name: http
    port: 80
";

fn only(text: &str) -> Manifests {
    parse(text, "f.yaml")
}

/// Rule 1.1.
#[test]
fn reads_documents_lists_and_typed_lists() {
    let list = format!("apiVersion: v1\nkind: List\nitems:\n- {}", SERVICE.trim_end().replace('\n', "\n  "));
    let typed = "apiVersion: v1\nkind: NodeList\nmetadata: {resourceVersion: '7'}\nitems:\n- metadata: {name: n1}\n- metadata: {name: n2}\n";
    let slices = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSliceList\nitems:\n- metadata: {name: web-1, namespace: shop}\n  addressType: IPv4\n  endpoints: []\n";
    let json = r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop"}}]}"#;
    let text = format!(
        "# a comment\n---\n{SERVICE}---\n{list}\n---\n# nothing\n---\n{typed}---\n{json}\n---\n{slices}"
    );
    let found = only(&text);
    assert_eq!((found.faults, found.warnings), (vec![], vec![]));
    let names: Vec<_> = found.manifests.iter().map(|m| m.object.reference().to_string()).collect();
    assert_eq!(
        names,
        [
            "Service shop/web",
            "Service shop/web",
            "Node n1",
            "Node n2",
            "Namespace shop",
            "EndpointSlice shop/web-1"
        ]
    );
    let documents: Vec<_> = found.manifests.iter().map(|m| m.source.document).collect();
    assert_eq!(documents, [1, 2, 3, 3, 4, 5]);
    assert_eq!(found.manifests[0].object, found.manifests[1].object);
    assert_eq!(found.manifests[3].source.line, Some(35));
}

#[test]
fn an_object_survives_the_round_trip() {
    let object = only(SERVICE).manifests.remove(0).object;
    let (again, warnings) = Object::from_value(object.to_value()).unwrap();
    assert_eq!((again, warnings), (object, vec![]));
}

#[test]
fn managed_fields_are_dropped() {
    let text = SERVICE
        .replace("  name: web", "  name: web\n  managedFields:\n  - {manager: kubectl, operation: Update}");
    let found = only(&text);
    assert_eq!(found.manifests[0].object.metadata().managed_fields, None);
}

#[test]
fn a_slip_in_a_kind_is_no_other_kind() {
    for (kind, meant) in
        [("Servce", "Service"), ("service", "Service"), ("Nod", "Node"), ("Endpointslice", "EndpointSlice")]
    {
        let found = parse(&format!("apiVersion: v1\nkind: {kind}\nmetadata: {{name: web}}\n"), "f.yaml");
        let text = found.faults[0].to_string();
        assert!(text.contains(&format!("kind: {kind}: no such kind; did you mean {meant}?")), "{text}");
    }
    for kind in ["Secret", "Event", "ServiceAccount", "PodTemplate"] {
        let found = parse(&format!("apiVersion: v1\nkind: {kind}\nmetadata: {{name: web}}\n"), "f.yaml");
        assert!(found.faults.is_empty() && found.warnings.len() == 1, "{kind}: {:?}", found.faults);
    }
}

/// Rule 1.1.
#[test]
fn other_kinds_are_skipped_with_a_notice() {
    let found =
        only(&format!("apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web}}\n---\n{SERVICE}"));
    assert_eq!(found.manifests.len(), 1);
    assert_eq!(
        found.warnings[0].to_string(),
        "f.yaml:1 (document 1): Deployment default/web: apps/v1 Deployment is not used by Towpath: skipped"
    );
}

#[test]
fn unknown_fields_are_warned_of_by_path_and_line() {
    let found = only(&SERVICE.replace("port: 80", "prot: 80\n    zebra: 1"));
    let shown: Vec<_> = found.warnings.iter().map(Fault::to_string).collect();
    assert_eq!(
        shown,
        [
            "f.yaml:10 (document 1): Service shop/web: spec.ports[0].prot: 80: no such field in the API: ignored; did you mean spec.ports[0].port?",
            "f.yaml:11 (document 1): Service shop/web: spec.ports[0].zebra: 1: no such field in the API: ignored; `kubectl explain service` lists the fields",
        ]
    );
    let found = only("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  zebra: 1\n  nodename: n\n");
    assert_eq!(found.warnings.len(), 1, "{:?}", found.warnings);
    assert_eq!(found.warnings[0].field.as_deref(), Some("spec.nodename"));
}

#[test]
fn routes_to_pods_are_objects_of_our_own() {
    const ROUTE: &str = "apiVersion: towpath.dev/v1\nkind: PodRoute\nmetadata: {name: far}\n\
                         spec: {prefix: 10.244.7.0/24, via: 10.2.0.17}\n";
    let found = only(ROUTE);
    assert_eq!((found.faults.len(), found.warnings.len()), (0, 0), "{found:?}");
    let object = &found.manifests[0].object;
    assert_eq!(object.reference().to_string(), "PodRoute far");
    let spec = PodRouteSpec { prefix: "10.244.7.0/24".into(), via: "10.2.0.17".into() };
    assert_eq!(*object, Object::PodRoute(Box::new(PodRoute::new("far".into(), spec))));
    let again = serde_json::to_string(object).unwrap();
    assert_eq!(only(&again).manifests[0].object, *object, "{again}");
    let fault = |text: &str| only(text).faults[0].to_string();
    assert!(fault(&ROUTE.replace("towpath.dev/v1", "v1")).contains("use towpath.dev/v1"));
    assert!(fault(&ROUTE.replace("10.2.0.17", "[1]")).contains("spec.via"));
    let found = only(&ROUTE.replace("via", "gateway"));
    assert_eq!(found.warnings[0].field.as_deref(), Some("spec.gateway"));
}

#[test]
fn wrong_types_are_refused_by_path_and_line() {
    for (from, to, line, field, value) in [
        ("port: 80", "port: http", 10, "spec.ports[0].port", "\"http\""),
        ("port: 80", "port: 99999999999", 10, "spec.ports[0].port", "99999999999"),
        ("10.96.0.10", "10", 7, "spec.clusterIP", "10"),
        ("name: web", "name: [web]", 4, "metadata.name", "[\"web\"]"),
        ("name: web", "name: {web: x}", 4, "metadata.name", "{\"web\":\"x\"}"),
        ("name: web", "name: web\n  labels: {a: b, app: 1}", 5, "metadata.labels.app", "1"),
        ("  ports:\n  - name: http\n    port: 80", "  ports: 80", 8, "spec.ports", "80"),
    ] {
        let found = only(&SERVICE.replace(from, to));
        assert_eq!((found.manifests.len(), found.faults.len()), (0, 1), "{to}");
        let fault = &found.faults[0];
        assert_eq!(fault.field.as_deref(), Some(field), "{fault}");
        assert_eq!(fault.value.as_deref(), Some(value), "{fault}");
        assert_eq!(fault.source.as_ref().unwrap().line, Some(line), "{fault}");
    }
}

#[test]
fn broken_documents_do_not_hide_the_others() {
    let found =
        only(&format!("a: [1\n---\n{SERVICE}---\n\tb: 1\n---\nkind: Service\n---\n- 1\n---\nplain\n"));
    assert_eq!(found.manifests.len(), 1);
    let documents: Vec<_> = found.faults.iter().map(|f| f.source.as_ref().unwrap().document).collect();
    assert_eq!(documents, [1, 3, 4, 5, 6], "{:#?}", found.faults);
    assert_eq!(found.faults[2].field.as_deref(), Some("apiVersion"));
}

#[test]
fn versions_and_duplicate_keys_are_checked() {
    let found = only(&SERVICE.replace("apiVersion: v1", "apiVersion: v2"));
    assert!(found.faults[0].to_string().contains("use v1"), "{}", found.faults[0]);
    let found = only(&SERVICE.replace("  name: web", "  name: web\n  name: shop"));
    assert_eq!(found.faults[0].code, Code::Syntax);
    assert_eq!(found.faults[0].source.as_ref().unwrap().line, Some(5), "{}", found.faults[0]);
}

#[test]
fn hostile_text_is_refused_not_followed() {
    let deep = "[".repeat(100_000);
    let deep_json = format!("{}{}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n\
                g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n";
    for text in [deep.as_str(), &deep_json, bomb, "\0", "!!binary x", "? [a]\n: b"] {
        let found = only(text);
        assert_eq!((found.manifests.len(), found.faults.len()), (0, 1), "{:?}", &text[..text.len().min(40)]);
    }
    assert_eq!(only(""), Manifests::default());
    assert_eq!(only("---\n# nothing\n...\n"), Manifests::default());
}

#[test]
fn what_yaml_allows_and_a_manifest_must_not_is_told_in_plain_words() {
    let found = only("kind: Service\nspec: {}\nspec: {}\n");
    let words = "f.yaml:3 (document 1): spec stands there twice; remove one of them";
    assert_eq!(found.faults[0].to_string(), words);
    let doubling: String =
        (b'b'..=b'p').map(|c| format!("{0}: &{0} [*{1},*{1}]\n", c as char, (c - 1) as char)).collect();
    let found = only(&format!("a: &a [x,x]\n{doubling}"));
    assert!(found.faults[0].message.contains("too many aliases"), "{:?}", found.faults);
}
