use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

/// Objects, their history, and what is wrong with the server. Clones are the same cluster.
#[derive(Clone)]
pub struct Cluster {
    state: Arc<Mutex<State>>,
    /// Counts changes, of objects and of faults: watches look again.
    changed: watch::Sender<u64>,
}

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Watches cannot begin with what there is: an older server.
    pub no_streams: bool,
    /// How an expired place of a watch is answered.
    pub gone: Gone,
    /// Resources that are not answered for, by plural: requests wait.
    pub held: BTreeSet<String>,
    /// Resources that nobody may read, by plural.
    pub forbidden: BTreeSet<String>,
    /// Everything is answered with this status.
    pub broken: Option<u16>,
}

/// Both happen, depending on which part of a server notices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// The request is answered with 410.
    #[default]
    Status,
    /// It is answered with 200, and an event says 410.
    Event,
}

pub(crate) struct State {
    pub(crate) revision: u64,
    /// Changes up to here are forgotten.
    pub(crate) forgotten: u64,
    pub(crate) resources: BTreeMap<String, Served>,
    pub(crate) history: VecDeque<Event>,
    pub(crate) faults: Faults,
    /// Connections of an older generation are cut.
    pub(crate) generation: u64,
    /// Counts requests for a bookmark.
    pub(crate) bookmarks: u64,
    /// The rest of lists that are read in pages.
    pub(crate) pages: BTreeMap<u64, Page>,
    pub(crate) requests: Vec<String>,
}

/// A resource that is served.
pub(crate) struct Served {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) kind: String,
    pub(crate) objects: BTreeMap<(String, String), Object>,
}

#[derive(Clone)]
pub(crate) struct Object {
    /// As it stands in a list.
    pub(crate) item: Arc<str>,
    /// As it stands in an event.
    pub(crate) whole: Arc<str>,
}

pub(crate) struct Event {
    pub(crate) revision: u64,
    pub(crate) plural: String,
    pub(crate) line: Arc<str>,
}

pub(crate) struct Page {
    pub(crate) revision: u64,
    pub(crate) rest: VecDeque<Arc<str>>,
}

/// Group, version, plural and kind of what is there from the beginning.
const BUILT_IN: [(&str, &str, &str, &str); 6] = [
    ("", "v1", "namespaces", "Namespace"),
    ("", "v1", "nodes", "Node"),
    ("", "v1", "pods", "Pod"),
    ("", "v1", "services", "Service"),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
];

const CILIUM: [(&str, &str, &str, &str); 4] = [
    ("cilium.io", "v2", "ciliumidentities", "CiliumIdentity"),
    ("cilium.io", "v2", "ciliumendpoints", "CiliumEndpoint"),
    ("cilium.io", "v2alpha1", "ciliumendpointslices", "CiliumEndpointSlice"),
    ("cilium.io", "v2", "ciliumnodes", "CiliumNode"),
];

const CILIUM_POLICIES: [(&str, &str, &str, &str); 2] = [
    ("cilium.io", "v2", "ciliumnetworkpolicies", "CiliumNetworkPolicy"),
    ("cilium.io", "v2", "ciliumclusterwidenetworkpolicies", "CiliumClusterwideNetworkPolicy"),
];

impl Default for Cluster {
    fn default() -> Self {
        Self::new()
    }
}

impl Cluster {
    /// An empty cluster, without Cilium's kinds.
    pub fn new() -> Self {
        let cluster = Self {
            state: Arc::new(Mutex::new(State {
                revision: 100,
                forgotten: 0,
                resources: BTreeMap::new(),
                history: VecDeque::new(),
                faults: Faults::default(),
                generation: 0,
                bookmarks: 0,
                pages: BTreeMap::new(),
                requests: Vec::new(),
            })),
            changed: watch::Sender::new(0),
        };
        cluster.serve(&BUILT_IN);
        cluster
    }

    /// Makes Cilium's kinds known.
    pub fn install_cilium(&self) {
        self.serve(&CILIUM);
        self.install_cilium_policies();
    }

    /// Makes only the kinds of its policies known.
    pub fn install_cilium_policies(&self) {
        self.serve(&CILIUM_POLICIES);
    }

    /// Removes Cilium's objects and kinds.
    pub fn remove_cilium(&self) {
        for (_, _, plural, _) in CILIUM.into_iter().chain(CILIUM_POLICIES) {
            let names: Vec<_> = {
                let state = self.state();
                state
                    .resources
                    .get(plural)
                    .into_iter()
                    .flat_map(|served| served.objects.keys().cloned())
                    .collect()
            };
            for (namespace, name) in names {
                self.delete(plural, &namespace, &name);
            }
        }
        self.change(|state| state.resources.retain(|_, served| served.group != "cilium.io"));
    }

    /// Creates or replaces an object, or each of a list of them. Says nothing of kinds that are not served.
    pub fn apply(&self, object: &Value) {
        if let Some(items) = object.get("items").and_then(Value::as_array) {
            let list_kind = object["kind"].as_str().unwrap_or_default();
            for item in items {
                let mut item = item.clone();
                if item.get("kind").is_none() {
                    item["kind"] = list_kind.trim_end_matches("List").into();
                    item["apiVersion"] = object["apiVersion"].clone();
                }
                self.apply(&item);
            }
            return;
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let kind = text(&object["kind"]);
        self.change(|state| {
            let Some((plural, _)) = state.resources.iter().find(|(_, served)| served.kind == kind) else {
                return;
            };
            let plural = plural.clone();
            state.revision += 1;
            let revision = state.revision;
            let mut whole = object.clone();
            whole["metadata"]["resourceVersion"] = revision.to_string().into();
            let key = (text(&whole["metadata"]["namespace"]), text(&whole["metadata"]["name"]));
            let Some(served) = state.resources.get_mut(&plural) else { return };
            // As a real server: items of its own kinds do not repeat what they are.
            let item = match served.group.as_str() {
                "cilium.io" => whole.clone(),
                _ => without_type(whole.clone()),
            };
            let stored = Object { item: item.to_string().into(), whole: whole.to_string().into() };
            let new = served.objects.insert(key, stored).is_none();
            state.log(plural, if new { "ADDED" } else { "MODIFIED" }, &whole);
        });
    }

    /// Deletes an object, if it is there.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        self.change(|state| {
            let key = (namespace.to_owned(), name.to_owned());
            let Some(old) = state.resources.get_mut(plural).and_then(|served| served.objects.remove(&key))
            else {
                return;
            };
            state.revision += 1;
            let mut whole: Value = serde_json::from_str(&old.whole).unwrap_or_default();
            whole["metadata"]["resourceVersion"] = state.revision.to_string().into();
            state.log(plural.to_owned(), "DELETED", &whole);
        });
    }

    /// Forgets the history: watches and pages that are behind have to begin anew.
    pub fn expire(&self) {
        self.change(|state| {
            state.history.clear();
            state.pages.clear();
            // A place right before a gap is lost too.
            state.revision += 1;
            state.forgotten = state.revision;
        });
    }

    /// Cuts all connections that watch.
    pub fn cut(&self) {
        self.change(|state| state.generation += 1);
    }

    /// Sends a bookmark to every watch.
    pub fn bookmark(&self) {
        self.change(|state| state.bookmarks += 1);
    }

    /// Changes what goes wrong.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        self.change(|state| change(&mut state.faults));
    }

    /// All requests so far, path and query.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // Tests that failed elsewhere have said why.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes with every change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.send_modify(|count| *count += 1);
    }

    fn serve(&self, resources: &[(&str, &str, &str, &str)]) {
        self.change(|state| {
            for (group, version, plural, kind) in resources {
                state.resources.entry((*plural).to_owned()).or_insert_with(|| Served {
                    group: (*group).to_owned(),
                    version: (*version).to_owned(),
                    kind: (*kind).to_owned(),
                    objects: BTreeMap::new(),
                });
            }
        });
    }
}

impl State {
    fn log(&mut self, plural: String, event: &str, object: &Value) {
        // The type comes first, as from a real server: a reader then need not keep the object to look at it twice.
        let line = format!("{{\"type\":\"{event}\",\"object\":{object}}}\n").into();
        self.history.push_back(Event { revision: self.revision, plural, line });
    }
}

impl Served {
    /// `group/version`, or only the version.
    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}

fn without_type(mut object: Value) -> Value {
    if let Some(object) = object.as_object_mut() {
        object.remove("kind");
        object.remove("apiVersion");
    }
    object
}
