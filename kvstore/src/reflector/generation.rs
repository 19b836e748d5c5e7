/// Counts the etcds behind a connection: a re-created, wiped or restored one is another etcd, although
/// it may answer at the same address and even under the same cluster ID.
#[derive(Debug, Default)]
pub struct Generations {
    number: u64,
    cluster_id: u64,
    highest: i64,
}

impl Generations {
    /// The number of the etcd that a new session is with.
    pub fn of(&mut self, cluster_id: u64, revision: i64) -> u64 {
        self.since(self.highest, cluster_id, revision)
    }

    /// The highest revision that was seen so far.
    pub(super) const fn highest(&self) -> i64 {
        self.highest
    }

    /// [`Self::of`] for a session that was asked for its revision when `before` was the highest: the one that
    /// it takes over from may have heard of newer ones since.
    pub(super) fn since(&mut self, before: i64, cluster_id: u64, revision: i64) -> u64 {
        // History only grows: an etcd that has less of it than was seen has lost some.
        if self.number == 0 || cluster_id != self.cluster_id || revision < before {
            *self = Self { number: self.number + 1, cluster_id, highest: 0 };
        }
        self.saw(revision);
        self.number
    }

    /// A reply had this revision.
    pub fn saw(&mut self, revision: i64) {
        self.highest = self.highest.max(revision);
    }
}
