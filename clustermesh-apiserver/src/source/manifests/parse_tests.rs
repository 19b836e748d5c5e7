use proptest::prelude::*;

use super::*;
use crate::objects::ObjectKind;

fn kinds(text: &str) -> Vec<ObjectKind> {
    parse(text).unwrap().iter().map(|object| object.key().kind).collect()
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
spec:
  containers:
  - name: web
    image: web
    resources: {limits: {cpu: 1, memory: 64Mi}}
    args: ['---']
status:
  podIP: 10.1.0.1
";

#[test]
fn streams_of_several_documents() {
    let text = format!(
        "# a comment\n---\n{POD}--- # another\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop}}\n...\n---\n"
    );
    assert_eq!(kinds(&text), [ObjectKind::Pod, ObjectKind::Namespace]);
    assert_eq!(kinds(&format!("\u{feff}%YAML 1.2\n---\n{POD}")), [ObjectKind::Pod]);
    assert_eq!(kinds(""), []);
    assert_eq!(kinds("# nothing\n---\n---\n"), []);
}

#[test]
fn a_whole_cluster_in_one_file() {
    let text: String =
        (0..3000).map(|n| format!("# {n}\n---\n{}", POD.replace("web", &format!("web-{n}")))).collect();
    assert_eq!(kinds(&text).len(), 3000);
}

#[test]
fn other_kinds_are_passed_over() {
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec: {replicas: 2}\n";
    assert_eq!(kinds(&format!("{deployment}---\n{POD}")), [ObjectKind::Pod]);
}

#[test]
fn lists_with_and_without_kinds_of_items() {
    let list = "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: a}}
- {apiVersion: v1, kind: Service, metadata: {name: a}}
- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {}}
";
    assert_eq!(kinds(list), [ObjectKind::Namespace, ObjectKind::Service]);
    let list = r#"{"apiVersion": "v1", "kind": "NodeList", "items": [{"metadata": {"name": "n1"}}]}"#;
    assert_eq!(kinds(list), [ObjectKind::Node]);
}

#[test]
fn json_may_have_tabs() {
    assert_eq!(
        kinds(
            "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Namespace\",\n\t\"metadata\": {\"name\": \"a\"}\n}"
        ),
        [ObjectKind::Namespace]
    );
}

#[test]
fn errors_say_where_and_what() {
    let second = format!("{POD}---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: [shop]\n");
    assert_eq!(error(&second), "line 18, column 9: expected string scalar");
    assert_eq!(error("a: b\n  c: d"), "line 2, column 4: mapping values are not allowed in this context");
    let twice = POD.replace("kind: Pod", "kind: Pod\nkind: Pod");
    assert_eq!(error(&twice), "line 3, column 1: duplicate mapping key: kind");
    let json = r#"{"kind": "Pod", "apiVersion": "v1", "spec": 3}"#;
    assert_eq!(error(json), "line 1, column 45: invalid type: integer `3`, expected struct PodSpec");

    let address = POD.replace("10.1.0.1", "10.1.0");
    assert_eq!(error(&address), "line 1: Pod shop/web: status.podIPs: \"10.1.0\" is not an IP address");

    let twice = format!("{POD}---\n# again\n{POD}");
    assert_eq!(error(&twice), "line 16: Pod shop/web is described twice: remove one of them");

    assert_eq!(
        error("---\n# x\nfoo: bar\n"),
        "line 3: this is not a Kubernetes object: apiVersion or kind is missing"
    );
    let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {}}\n";
    assert!(
        error(list).starts_with("line 1: items[0]: Service (without a name): metadata.name"),
        "{}",
        error(list)
    );
}

#[test]
fn names_and_labels_that_kubernetes_refuses_are_refused() {
    for (good, bad) in [
        ("name: web\n  ", "name: web/x\n  "),
        ("namespace: shop", "namespace: Shop"),
        (
            "namespace: shop",
            "namespace: shop\n  labels: {a: 'x;k8s:io.kubernetes.pod.namespace=kube-system'}",
        ),
    ] {
        let text = POD.replacen(good, bad, 1);
        assert_ne!(text, POD);
        assert!(error(&text).contains("metadata."), "{}", error(&text));
    }
}

#[test]
fn alias_bombs_are_refused() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let alias = format!("*a{}, ", level - 1).repeat(10);
        text += &format!("a{level}: &a{level} [{alias}]\n");
    }
    assert!(parse(&format!("apiVersion: v1\nkind: Pod\n{text}")).is_err());
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
        let _ = parse(&text);
    }

    /// Good manifests with one piece replaced by something else.
    #[test]
    fn damaged_manifests_never_panic(
        from in 0..POD.len(),
        length in 0..40_usize,
        damage in "[-a-z0-9:{}\\[\\]&*!|>'\"%@` \n]{0,10}",
    ) {
        let mut text = POD.to_owned();
        text.replace_range(from..(from + length).min(POD.len()), &damage);
        let _ = parse(&text);
    }
}
