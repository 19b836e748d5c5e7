//! Objects for tests.

use std::sync::Arc;

use crate::objects::{Change, Object, Pod};
use crate::source::manifests::parse;

/// A running pod without an address.
pub(crate) fn pod(namespace: &str, name: &str) -> Pod {
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: {name}}}\n\
         status: {{conditions: [{{type: Ready, status: 'True'}}]}}\n"
    );
    match &objects(&text)[..] {
        [Object::Pod(pod)] => Arc::unwrap_or_clone(Arc::clone(pod)),
        other => panic!("{other:?}"),
    }
}

/// The objects of a manifest that is known to be good.
pub(crate) fn objects(text: &str) -> Vec<Object> {
    parse(text).unwrap()
}

/// All of them as new.
pub(crate) fn upserts(text: &str) -> Vec<Change> {
    objects(text).into_iter().map(Change::Upsert).collect()
}
