use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::{core::v1, discovery, networking};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::objects::{
    ClusterwideResource, EndpointSlice, Namespace, NamespacedResource, Node, Object, ObjectError, Pod,
    Policy, Service,
};

/// The objects of a YAML stream or JSON document, in the form that `kubectl` reads and prints: one
/// object, a `List`, or several of both, divided by `---`. Objects of other kinds are passed over.
///
/// # Errors
/// The first thing that is wrong. Nothing of such a text counts: half of a change may be worse than none.
pub fn parse(text: &str) -> Result<Vec<Object>, ManifestError> {
    Ok(Parsed::parse(text, &Parsed::default())?.objects().collect())
}

/// A text that was understood, document by document, so that the next version of it costs no more than
/// what is different about it.
#[derive(Default)]
pub(super) struct Parsed(BTreeMap<Box<str>, Vec<Object>>);

impl Parsed {
    /// Parses `text`, an earlier version of which gave `earlier`.
    pub(super) fn parse(text: &str, earlier: &Self) -> Result<Self, ManifestError> {
        let mut parsed = BTreeMap::new();
        let mut keys = BTreeSet::new();
        for document in documents(text) {
            let objects = match earlier.0.get(document.text) {
                Some(objects) => objects.clone(),
                None => document.read()?,
            };
            if let Some(twice) = objects.iter().map(Object::key).find(|key| !keys.insert(key.clone())) {
                return Err(document.error(format_args!("{twice} is described twice: remove one of them")));
            }
            parsed.insert(document.text.into(), objects);
        }
        Ok(Self(parsed))
    }

    /// All objects of the text.
    pub(super) fn objects(&self) -> impl Iterator<Item = Object> {
        self.0.values().flatten().cloned()
    }
}

/// What is wrong with a manifest, and where as far as known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    line: Option<usize>,
    column: Option<usize>,
    what: String,
}

impl ManifestError {
    /// An error of the whole file.
    pub fn of_file(what: impl fmt::Display) -> Self {
        Self { line: None, column: None, what: what.to_string() }
    }
}

impl std::error::Error for ManifestError {}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.line, self.column) {
            (Some(line), Some(column)) => write!(f, "line {line}, column {column}: {}", self.what),
            (Some(line), None) => write!(f, "line {line}: {}", self.what),
            _ => f.write_str(&self.what),
        }
    }
}

/// A part of a text that holds one document.
struct Document<'a> {
    text: &'a str,
    syntax: Syntax,
    /// Lines before it.
    offset: usize,
}

#[derive(Clone, Copy)]
enum Syntax {
    Yaml,
    Json,
}

/// Divides a stream at its `---` lines. At the start of a line these are markers wherever they stand
/// in YAML, also in block scalars. Divided, each document can be read as the type that its kind asks for.
fn documents(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim_start().starts_with(['{', '['])
        && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
    {
        return vec![Document { text, syntax: Syntax::Json, offset: 0 }];
    }
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut position) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line) && position > start {
            documents.push(Document {
                text: &text[start..position],
                syntax: Syntax::Yaml,
                offset: start_line,
            });
            (start, start_line) = (position, number);
        }
        position += line.len();
    }
    documents.push(Document { text: &text[start..], syntax: Syntax::Yaml, offset: start_line });
    documents.retain(|document| !document.is_blank());
    documents
}

fn is_marker(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

/// As much of any object as it takes to know what it is.
#[derive(Deserialize)]
struct Head {
    #[serde(rename = "apiVersion", default)]
    api_version: Option<String>,
    #[serde(default)]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<serde_json::Value>,
}

impl Document<'_> {
    /// Whether there are only comments, directives and markers.
    fn is_blank(&self) -> bool {
        self.text.lines().all(|line| {
            let rest = line.strip_prefix("---").unwrap_or(line).trim_start();
            rest.is_empty() || rest.starts_with('#') || line.starts_with('%') || line.trim_end() == "..."
        })
    }

    fn read(&self) -> Result<Vec<Object>, ManifestError> {
        let Some(head) = self.deserialize::<Option<Head>>()? else { return Ok(Vec::new()) };
        let (Some(api_version), Some(kind)) = (&head.api_version, &head.kind) else {
            return Err(self.error("this is not a Kubernetes object: apiVersion or kind is missing"));
        };
        match kind.strip_suffix("List") {
            Some(item_kind) => self.read_list(api_version, item_kind),
            None => Ok(self.read_object(api_version, kind)?.into_iter().collect()),
        }
    }

    /// A `List` whose items say what they are, or for example a `PodList` whose items need not.
    fn read_list(&self, api_version: &str, item_kind: &str) -> Result<Vec<Object>, ManifestError> {
        let mut objects = Vec::new();
        for (index, item) in self.deserialize::<List>()?.items.into_iter().enumerate() {
            let field = |name: &str| item.get(name).and_then(serde_json::Value::as_str).map(str::to_owned);
            let kind = field("kind").unwrap_or_else(|| item_kind.to_owned());
            let version = field("apiVersion").unwrap_or_else(|| api_version.to_owned());
            if kind.is_empty() {
                return Err(self.error(format_args!("items[{index}]: kind is missing")));
            }
            let text = item.to_string();
            let document = Document { text: &text, syntax: Syntax::Yaml, offset: 0 };
            let object = document.read_object(&version, &kind);
            objects
                .extend(object.map_err(|error| self.error(format_args!("items[{index}]: {}", error.what)))?);
        }
        Ok(objects)
    }

    fn read_object(&self, api_version: &str, kind: &str) -> Result<Option<Object>, ManifestError> {
        let object = match (api_version, kind) {
            ("v1", "Namespace") => self.convert::<v1::Namespace, Namespace>()?.map(Object::Namespace),
            ("v1", "Node") => self.convert::<v1::Node, Node>()?.map(Object::Node),
            ("v1", "Pod") => self.convert::<v1::Pod, Pod>()?.map(Object::Pod),
            ("v1", "Service") => self.convert::<v1::Service, Service>()?.map(Object::Service),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                self.convert::<discovery::v1::EndpointSlice, EndpointSlice>()?.map(Object::EndpointSlice)
            }
            ("networking.k8s.io/v1", "NetworkPolicy") => {
                self.convert::<networking::v1::NetworkPolicy, Policy>()?.map(Object::Policy)
            }
            ("cilium.io/v2", "CiliumNetworkPolicy") => {
                self.convert::<NamespacedResource, Policy>()?.map(Object::Policy)
            }
            ("cilium.io/v2", "CiliumClusterwideNetworkPolicy") => {
                self.convert::<ClusterwideResource, Policy>()?.map(Object::Policy)
            }
            _ => {
                tracing::debug!(api_version, kind, "passing over an object of a kind that is not exported");
                None
            }
        };
        Ok(object)
    }

    fn convert<K, T>(&self) -> Result<Option<std::sync::Arc<T>>, ManifestError>
    where
        K: DeserializeOwned,
        T: TryFrom<K, Error = ObjectError>,
    {
        let object = self.deserialize::<K>()?;
        T::try_from(object).map(|object| Some(object.into())).map_err(|error| self.error(error))
    }

    fn deserialize<T: DeserializeOwned>(&self) -> Result<T, ManifestError> {
        match self.syntax {
            Syntax::Json => serde_json::from_str(self.text).map_err(|error| ManifestError {
                line: Some(error.line()),
                column: Some(error.column()),
                what: plain(&error.to_string()),
            }),
            Syntax::Yaml => serde_saphyr::from_str_with_options(self.text, yaml_options()).map_err(|error| {
                let place = error.location();
                ManifestError {
                    line: place
                        .and_then(|place| usize::try_from(place.line()).ok())
                        .map(|line| line + self.offset),
                    column: place.and_then(|place| usize::try_from(place.column()).ok()),
                    what: plain(&error.without_snippet().to_string()),
                }
            }),
        }
    }

    /// An error of this document as a whole, placed at its first line with content.
    fn error(&self, what: impl fmt::Display) -> ManifestError {
        let is_content = |line: &&str| !line.trim().is_empty() && !line.starts_with('#') && !is_marker(line);
        let skipped = self.text.lines().take_while(|line| !is_content(line)).count();
        ManifestError { line: Some(self.offset + skipped + 1), column: None, what: what.to_string() }
    }
}

/// Files may be large (a whole cluster in one); aliases keep their limits, they multiply.
fn yaml_options() -> serde_saphyr::Options {
    let mut options = serde_saphyr::Options::default();
    if let Some(budget) = &mut options.budget {
        budget.max_documents = usize::MAX;
        budget.max_events = usize::MAX;
        budget.max_nodes = usize::MAX;
        budget.max_total_scalar_bytes = usize::MAX;
        budget.max_total_comment_bytes = usize::MAX;
    }
    options.with_snippet = false;
    options
}

/// A parser's message without what we say ourselves (the place, which would be that in one document)
/// and what only its caller could do.
fn plain(message: &str) -> String {
    let message = message.split(" at line ").next().unwrap_or(message);
    let message = message.split(", set DuplicateKeyPolicy").next().unwrap_or(message);
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
