//! Answers that are said at once.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode, header};
use serde_json::{Value, json};

use crate::cluster::{Page, State};

/// What went wrong, as Kubernetes says it.
pub(crate) fn failure(code: u16, reason: &str, message: &str) -> Response<Body> {
    let status = status(code, reason, message);
    let mut response = json_text(status.to_string());
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

pub(crate) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {},
        "status": "Failure", "message": message, "reason": reason, "code": code,
    })
}

pub(crate) fn json_text(text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// A group's versions.
pub(crate) fn group(state: &State, name: &str) -> Option<Value> {
    let mut versions: Vec<&str> = Vec::new();
    for served in state.resources.values().filter(|served| served.group == name) {
        if !versions.contains(&served.version.as_str()) {
            versions.push(&served.version);
        }
    }
    versions.sort_unstable();
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| json!({ "groupVersion": format!("{name}/{version}"), "version": version }))
        .collect();
    let preferred = versions.first()?.clone();
    Some(json!({
        "kind": "APIGroup", "apiVersion": "v1", "name": name,
        "versions": versions, "preferredVersion": preferred,
    }))
}

/// The resources of a version of a group.
pub(crate) fn resources(state: &State, api_version: &str) -> Option<Value> {
    let resources: Vec<Value> = state
        .resources
        .iter()
        .filter(|(_, served)| served.api_version() == api_version)
        .map(|(plural, served)| {
            json!({
                "name": plural, "singularName": "", "namespaced": true, "kind": served.kind,
                "verbs": ["get", "list", "watch"],
            })
        })
        .collect();
    (!resources.is_empty()).then(|| {
        json!({
            "kind": "APIResourceList", "apiVersion": "v1",
            "groupVersion": api_version, "resources": resources,
        })
    })
}

/// A list, or a page of one.
pub(crate) fn list(state: &mut State, plural: &str, query: &BTreeMap<String, String>) -> Response<Body> {
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).filter(|limit| *limit > 0);
    let limit = limit.unwrap_or(usize::MAX);
    let (revision, mut rest) = match query.get("continue") {
        Some(token) => match token.parse().ok().and_then(|token: u64| state.pages.remove(&token)) {
            Some(page) => (page.revision, page.rest),
            None => return failure(410, "Expired", "The provided continue parameter is too old"),
        },
        None => {
            let objects = state.resources.get(plural).map(|served| &served.objects);
            let items = objects.into_iter().flatten().map(|(_, object)| Arc::clone(&object.item));
            (state.revision, items.collect::<VecDeque<_>>())
        }
    };
    let page: Vec<_> = rest.drain(..limit.min(rest.len())).collect();
    let mut metadata = json!({ "resourceVersion": revision.to_string() });
    if !rest.is_empty() {
        let token = state.pages.last_key_value().map_or(1, |(last, _)| last + 1);
        metadata["continue"] = token.to_string().into();
        metadata["remainingItemCount"] = rest.len().into();
        state.pages.insert(token, Page { revision, rest });
    }
    let Some(served) = state.resources.get(plural) else {
        return failure(404, "NotFound", "the server could not find the requested resource");
    };
    let mut text = String::new();
    let _ = write!(
        text,
        r#"{{"kind":"{}List","apiVersion":"{}","metadata":{metadata},"items":["#,
        served.kind,
        served.api_version()
    );
    for (index, item) in page.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        text.push_str(item);
    }
    text.push_str("]}");
    json_text(text)
}
