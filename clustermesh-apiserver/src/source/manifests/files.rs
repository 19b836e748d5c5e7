use std::collections::{BTreeMap, BTreeSet};

use super::parse::{ManifestError, Parsed};
use crate::objects::{Change, Object, ObjectKey};

/// What the files of a directory say, file by file.
///
/// Plain code: file contents come in, changes of objects come out.
#[derive(Default)]
pub struct Files {
    files: BTreeMap<String, File>,
    /// Which files describe an object; the first by name counts.
    described_in: BTreeMap<ObjectKey, BTreeSet<String>>,
}

#[derive(Default)]
struct File {
    /// As of the last time that it could be read.
    objects: BTreeMap<ObjectKey, Object>,
    parsed: Parsed,
    error: Option<ManifestError>,
}

/// What became different about the state of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It cannot be read, for this reason, which is a new one.
    Broken {
        /// The reason.
        error: ManifestError,
        /// How many objects it had when it could be read; they stay.
        kept: usize,
    },
    /// It can be read again.
    Mended,
}

/// An object that several files describe.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{object} is described in {used} and in {ignored}: the first counts, remove it from one of them")]
pub struct Conflict {
    object: ObjectKey,
    used: String,
    ignored: String,
}

impl Files {
    /// Takes the present content of a file, or why it cannot be read. A file that cannot be understood
    /// keeps the objects that it had.
    pub fn update(
        &mut self,
        name: &str,
        content: Result<&str, ManifestError>,
    ) -> (Vec<Change>, Option<Problem>) {
        let file = self.files.entry(name.to_owned()).or_default();
        match content.and_then(|text| Parsed::parse(text, &file.parsed)) {
            Ok(parsed) => {
                file.parsed = parsed;
                let mended = file.error.take().map(|_| Problem::Mended);
                let objects = file.parsed.objects().map(|object| (object.key(), object)).collect();
                (self.replace(name, objects), mended)
            }
            Err(error) => {
                let new = file.error.as_ref() != Some(&error);
                file.error = Some(error.clone());
                (Vec::new(), new.then_some(Problem::Broken { error, kept: file.objects.len() }))
            }
        }
    }

    /// The file is gone, and its objects with it.
    pub fn remove(&mut self, name: &str) -> Vec<Change> {
        let changes = self.replace(name, BTreeMap::new());
        self.files.remove(name);
        changes
    }

    /// How many files stand at an earlier state because they cannot be read.
    pub fn broken_count(&self) -> usize {
        self.files.values().filter(|file| file.error.is_some()).count()
    }

    /// Objects that several files describe.
    pub fn conflicts(&self) -> BTreeSet<Conflict> {
        let mut conflicts = BTreeSet::new();
        for (object, files) in &self.described_in {
            let mut files = files.iter();
            let Some(used) = files.next() else { continue };
            conflicts.extend(files.map(|ignored| Conflict {
                object: object.clone(),
                used: used.clone(),
                ignored: ignored.clone(),
            }));
        }
        conflicts
    }

    fn replace(&mut self, name: &str, objects: BTreeMap<ObjectKey, Object>) -> Vec<Change> {
        let old = self.files.get(name).into_iter().flat_map(|file| file.objects.keys());
        let touched: BTreeSet<ObjectKey> = old.chain(objects.keys()).cloned().collect();
        let before: Vec<Option<Object>> = touched.iter().map(|key| self.effective(key).cloned()).collect();

        for key in &touched {
            let files = self.described_in.entry(key.clone()).or_default();
            if objects.contains_key(key) {
                files.insert(name.to_owned());
            } else {
                files.remove(name);
                if files.is_empty() {
                    self.described_in.remove(key);
                }
            }
        }
        if let Some(file) = self.files.get_mut(name) {
            file.objects = objects;
        }

        let mut changes = Vec::new();
        for (key, before) in touched.into_iter().zip(before) {
            match self.effective(&key) {
                after if after == before.as_ref() => {}
                Some(object) => changes.push(Change::Upsert(object.clone())),
                None => changes.push(Change::Delete(key)),
            }
        }
        changes
    }

    fn effective(&self, key: &ObjectKey) -> Option<&Object> {
        let file = self.described_in.get(key)?.first()?;
        self.files.get(file)?.objects.get(key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::parse::parse;
    use super::*;

    fn namespace(name: &str, label: &str) -> String {
        format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{l: {label}}}}}\n")
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_state_and_complains_once() {
        let mut files = Files::default();
        let (changes, problem) = files.update("a.yaml", Ok(&namespace("shop", "x")));
        assert_eq!((changes.len(), problem), (1, None));
        let (changes, problem) = files.update("a.yaml", Ok("kind: [\n"));
        assert!(changes.is_empty());
        assert!(matches!(problem, Some(Problem::Broken { kept: 1, .. })), "{problem:?}");
        assert_eq!(files.update("a.yaml", Ok("kind: [\n")), (vec![], None));
        assert_eq!(files.broken_count(), 1);
        assert_eq!(files.update("a.yaml", Ok(&namespace("shop", "x"))), (vec![], Some(Problem::Mended)));
        assert_eq!(files.remove("a.yaml").len(), 1);
    }

    #[test]
    fn the_first_file_by_name_counts() {
        let mut files = Files::default();
        files.update("b.yaml", Ok(&namespace("shop", "b")));
        let (changes, _) = files.update("a.yaml", Ok(&namespace("shop", "a")));
        assert_eq!(changes.len(), 1);
        assert_eq!(files.update("b.yaml", Ok(&namespace("shop", "c"))).0, []);
        let conflicts: Vec<String> = files.conflicts().iter().map(ToString::to_string).collect();
        assert_eq!(
            conflicts,
            [
                "Namespace shop is described in a.yaml and in b.yaml: the first counts, remove it from one of them"
            ]
        );
        let changes = files.remove("a.yaml");
        assert!(matches!(&changes[..], [Change::Upsert(Object::Namespace(n))] if n.labels["l"] == "c"));
        assert!(files.conflicts().is_empty());
    }

    proptest! {
        /// Whatever was written to the files in which order: the changes add up to what a fresh look
        /// at the files as they are now gives.
        #[test]
        fn changes_add_up(steps in prop::collection::vec((0..3_u8, 0..4_u8, 0..3_u8, 0..4_u8), 0..40)) {
            let mut files = Files::default();
            let mut good = BTreeMap::<String, String>::new();
            let mut seen = BTreeMap::<ObjectKey, Object>::new();
            for (file, object, label, step) in steps {
                let file = format!("{file}.yaml");
                let changes = match step {
                    0 => {
                        good.remove(&file);
                        files.remove(&file)
                    }
                    1 => files.update(&file, Ok("nonsense")).0,
                    _ => {
                        let text = namespace(&format!("n{object}"), &format!("l{label}"))
                            + &namespace(&format!("n{}", object + 1), "l");
                        good.insert(file.clone(), text.clone());
                        files.update(&file, Ok(&text)).0
                    }
                };
                for change in changes {
                    match change {
                        Change::Upsert(object) => {
                            prop_assert_ne!(seen.insert(object.key(), object.clone()), Some(object));
                        }
                        Change::Delete(key) => prop_assert!(seen.remove(&key).is_some()),
                    }
                }
            }
            let mut fresh = BTreeMap::new();
            for text in good.values().rev() {
                fresh.extend(parse(text).unwrap().into_iter().map(|object| (object.key(), object)));
            }
            prop_assert_eq!(seen, fresh);
        }
    }
}
