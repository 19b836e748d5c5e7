use kube::Error;
use kube::runtime::watcher;

use super::Resource;
use crate::objects::ObjectKind;

/// What gives the rights that are missing.
const ROLE: &str = "deploy/kubernetes/rbac.yaml";

/// What the operator should know of a failure, in one line.
pub(super) fn explain(kind: ObjectKind, error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error) => {
            format!("cannot list {kind} objects: {}", reason(kind, error))
        }
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            format!("cannot watch {kind} objects: {}", reason(kind, error))
        }
        watcher::Error::WatchError(status) => {
            format!("the watch of {kind} objects ended: {}", status.message)
        }
        watcher::Error::NoResourceVersion => {
            format!("cannot watch {kind} objects: the server answers without a resourceVersion")
        }
    }
}

/// Why a request about a kind failed.
pub(super) fn reason(kind: ObjectKind, error: &Error) -> String {
    match error {
        Error::Api(status) if status.code == 403 => {
            let of = Resource::of(kind).map_or("objects", |resource| resource.plural);
            format!("the API server does not let us read {of}: apply {ROLE} and run with its service account")
        }
        Error::Api(status) if status.code == 401 => {
            "the API server does not accept our credentials: renew the kubeconfig or service account"
                .to_owned()
        }
        Error::Api(status) => format!("the API server says {} {}", status.code, status.message),
        error => chain(error),
    }
}

/// Connection errors say what is wrong in the last of their causes.
fn chain(error: &Error) -> String {
    let mut text = String::from("the API server does not answer");
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    let mut last = String::new();
    while let Some(error) = cause {
        last = error.to_string();
        cause = error.source();
    }
    text.push_str(": ");
    text.push_str(&last);
    text
}

/// The server cannot begin a watch with what there is: lists have to do.
pub(super) fn is_refused_stream(error: &watcher::Error) -> bool {
    let (watcher::Error::WatchStartFailed(Error::Api(status))
    | watcher::Error::WatchFailed(Error::Api(status))) = error
    else {
        return false;
    };
    matches!(status.code, 400 | 405 | 422 | 501)
}

/// After this the watch cannot go on where it was: its place is too old, or something was lost on the way.
pub(super) fn is_lost(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(Error::Api(status)) => status.code == 410,
        watcher::Error::WatchFailed(error) => matches!(error, Error::SerdeError(_)),
        _ => false,
    }
}
