use crate::publisher::keys::Class;
use crate::publisher::spec::PublisherSpec;

/// What is read of etcd: which stream tells of which keys, of which etcd it speaks, how far it is.
pub(super) struct Streams {
    /// One for each owned prefix, then one for all canaries, then those of the digests' folders.
    streams: Vec<Stream>,
    /// Counts the etcds; the highest that was heard of.
    generation: u64,
    /// The stream of all canaries.
    canaries: usize,
    /// By owned prefix: the stream of its digest's folder.
    digests: Vec<usize>,
}

struct Stream {
    prefix: String,
    generation: u64,
    listed: bool,
    /// Revision of its last list.
    listed_at: i64,
}

impl Streams {
    /// Those that `spec` needs; none has said anything.
    pub(super) fn new(spec: &PublisherSpec) -> Self {
        let canaries = spec.owned.iter().filter_map(|o| o.canary.as_deref());
        let mut folders: Vec<String> =
            spec.owned.iter().map(|o| o.prefix.clone()).chain(common_folder(canaries)).collect();
        let digests = add_digest_folders(spec, &mut folders);
        let stream = |prefix| Stream { prefix, generation: 0, listed: false, listed_at: 0 };
        Self {
            streams: folders.into_iter().map(stream).collect(),
            generation: 0,
            canaries: spec.owned.len(),
            digests,
        }
    }

    /// A stream speaks of this etcd from here on; tells whether nobody did before.
    pub(super) fn enter(&mut self, index: usize, generation: u64) -> bool {
        if let Some(stream) = self.streams.get_mut(index) {
            *stream = Stream {
                prefix: std::mem::take(&mut stream.prefix),
                generation,
                listed: false,
                listed_at: 0,
            };
        }
        let is_new = generation > self.generation;
        self.generation = self.generation.max(generation);
        is_new
    }

    /// A stream has told everything that stood there at `revision`.
    pub(super) fn listed(&mut self, index: usize, revision: i64) {
        if let Some(stream) = self.streams.get_mut(index) {
            stream.listed = true;
            stream.listed_at = revision;
        }
    }

    /// What they follow, by index.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = &str> {
        self.streams.iter().map(|s| s.prefix.as_str())
    }

    /// A stream speaks of the present etcd.
    pub(super) fn is_present(&self, index: usize) -> bool {
        self.streams.get(index).is_some_and(|s| s.generation == self.generation)
    }

    /// A stream has listed the present etcd. That of an owned prefix has the same index.
    pub(super) fn is_listed(&self, index: usize) -> bool {
        self.streams.get(index).is_some_and(|s| s.listed && s.generation == self.generation)
    }

    /// The stream of all canaries has listed the present etcd.
    pub(super) fn are_canaries_listed(&self) -> bool {
        self.is_listed(self.canaries)
    }

    /// The stream of an owned prefix's digest has listed the present etcd.
    pub(super) fn is_digest_listed(&self, prefix: usize) -> bool {
        self.is_listed(self.digests[prefix])
    }

    /// The stream that tells of keys of a class.
    pub(super) fn of(&self, class: Class) -> Option<usize> {
        match class {
            Class::Owned(index) => Some(index),
            Class::Canary(_) => Some(self.canaries),
            Class::Digest(index) => Some(self.digests[index]),
            Class::Heartbeat => None,
        }
    }

    /// Revision at which keys of a class were last listed.
    pub(super) fn listed_at(&self, class: Class) -> i64 {
        self.of(class).and_then(|index| self.streams.get(index)).map_or(0, |stream| stream.listed_at)
    }
}

/// The longest common prefix of `keys` that ends in `/`.
fn common_folder<'a>(mut keys: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut common = keys.next()?.to_string();
    for key in keys {
        let same = common.bytes().zip(key.bytes()).take_while(|(a, b)| a == b).count();
        common.truncate(same);
    }
    common.truncate(common.rfind('/')? + 1);
    Some(common)
}

/// Adds the folders of all digests to `folders`; gives for each owned prefix the index of its digest's.
fn add_digest_folders(spec: &PublisherSpec, folders: &mut Vec<String>) -> Vec<usize> {
    let mut index_of = |key: &str| {
        let folder = &key[..key.rfind('/').map_or(0, |at| at + 1)];
        folders.iter().position(|known| known == folder).unwrap_or_else(|| {
            folders.push(folder.to_owned());
            folders.len() - 1
        })
    };
    // Of a prefix without digest nobody asks.
    spec.owned.iter().map(|owned| owned.digest.as_deref().map_or(0, &mut index_of)).collect()
}
