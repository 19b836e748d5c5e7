use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Error as _};

use crate::objects::{Object, ObjectKind};
use crate::source::wire;

/// A parser of any syntax.
type Erased<'a, 'de> = &'a mut dyn erased_serde::Deserializer<'de>;

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
        let kind = match (api_version, kind) {
            ("v1", "Namespace") => ObjectKind::Namespace,
            ("v1", "Node") => ObjectKind::Node,
            ("v1", "Pod") => ObjectKind::Pod,
            ("v1", "Service") => ObjectKind::Service,
            ("discovery.k8s.io/v1", "EndpointSlice") => ObjectKind::EndpointSlice,
            ("networking.k8s.io/v1", "NetworkPolicy") => ObjectKind::NetworkPolicy,
            ("cilium.io/v2", "CiliumNetworkPolicy") => ObjectKind::CiliumNetworkPolicy,
            ("cilium.io/v2", "CiliumClusterwideNetworkPolicy") => ObjectKind::CiliumClusterwideNetworkPolicy,
            _ => {
                tracing::debug!(api_version, kind, "passing over an object of a kind that is not exported");
                return Ok(None);
            }
        };
        let object = self.read_as(|text| wire::deserialize(kind, text))?;
        object.map(Some).map_err(|error| self.error(error))
    }

    fn deserialize<T: DeserializeOwned>(&self) -> Result<T, ManifestError> {
        self.read_as(|text| T::deserialize(text))
    }

    fn read_as<T>(
        &self,
        mut read: impl FnMut(Erased<'_, '_>) -> Result<T, erased_serde::Error>,
    ) -> Result<T, ManifestError> {
        let mut found = None;
        self.parse(&mut |text| {
            found = Some(read(text)?);
            Ok(())
        })?;
        found.ok_or_else(|| self.error("there is nothing"))
    }

    /// Parses the text, for whatever is to be read of it. Erased: a YAML parser for each type that there is in
    /// a manifest would be several megabytes.
    fn parse(
        &self,
        read: &mut dyn FnMut(Erased<'_, '_>) -> Result<(), erased_serde::Error>,
    ) -> Result<(), ManifestError> {
        match self.syntax {
            Syntax::Json => {
                let mut parser = serde_json::Deserializer::from_str(self.text);
                let done = read(&mut <dyn erased_serde::Deserializer<'_>>::erase(&mut parser));
                // This takes the place out of the text of an error.
                done.map_err(serde_json::Error::custom).and_then(|()| parser.end()).map_err(|error| {
                    ManifestError {
                        line: Some(error.line()),
                        column: Some(error.column()),
                        what: plain(&error.to_string()),
                    }
                })
            }
            Syntax::Yaml => {
                serde_saphyr::with_deserializer_from_str_with_options(self.text, yaml_options(), |parser| {
                    read(&mut <dyn erased_serde::Deserializer<'_>>::erase(parser))
                        .map_err(serde_saphyr::Error::custom)
                })
                .map_err(|error| self.place(&error))
            }
        }
    }

    /// An error of the parser, at its place in the file.
    fn place(&self, error: &serde_saphyr::Error) -> ManifestError {
        let text = error.without_snippet().to_string();
        let (line, column) = place_in(&text).unzip();
        ManifestError { line: line.map(|line| line + self.offset), column, what: plain(&text) }
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

/// The first place in a parser's message: what is around the wrong thing adds its own behind that.
fn place_in(message: &str) -> Option<(usize, usize)> {
    let (_, place) = message.split_once(" at line ")?;
    let (line, rest) = place.split_once(", column ")?;
    let column = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((line.parse().ok()?, column.parse().ok()?))
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
