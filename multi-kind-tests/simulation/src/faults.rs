//! What can go wrong, and how often it did.

use rand::Rng as _;
use rand::rngs::SmallRng;

macro_rules! faults {
    ($($name:ident = $text:literal,)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault { $(#[doc = $text] $name,)* }

        impl Fault {
            /// All kinds.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// In words.
            pub fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

faults! {
    Delayed = "reply delayed",
    Reordered = "reply overtaken by a later one",
    Repeated = "reply twice",
    RequestLost = "request without answer",
    WatchCanceled = "watch canceled by etcd",
    WatchCompacted = "watch from a compacted revision",
    ListCompacted = "list at a compacted revision",
    ConnectionCut = "connection cut",
    EtcdDown = "etcd down",
    EtcdStalled = "etcd silent",
    EtcdCompacted = "etcd compacted",
    EtcdNew = "etcd re-created empty under another ID",
    EtcdWiped = "etcd re-created empty under its own ID",
    EtcdRestored = "etcd restored from an old snapshot",
    LeaseLost = "lease revoked",
    LeaseExpired = "lease expired",
    WriteLost = "transaction lost before it was made",
    AnswerLost = "transaction made, answer lost",
    ExporterKilled = "exporter killed",
    AgentKilled = "agent killed",
    Disconnected = "remote cluster disconnected",
    Connected = "remote cluster connected",
    ConfigRewritten = "remote cluster's file rewritten",
    JudgedDead = "remote cluster judged dead",
    IdChanged = "cluster ID changed",
    IdReused = "cluster ID taken over by another cluster",
    ClockJumped = "clock jumped forward",
    ClockWentBack = "wall clock went back",
    TableFails = "kernel write failed, and had no effect",
    TableFailsLate = "kernel write failed, and had its effect",
    TableFull = "kernel map full",
    HostileRecord = "hostile or broken record",
    ForeignWrite = "record deleted or changed by a foreign hand",
    CanaryDeleted = "canary deleted by a foreign hand",
}

/// Counts of faults, and whether there are to be any.
#[derive(Clone, Debug)]
pub struct Faults {
    /// By [`Fault`].
    pub counts: Vec<u64>,
    /// No random ones any more.
    pub calm: bool,
}

impl Default for Faults {
    fn default() -> Self {
        Self { counts: vec![0; Fault::ALL.len()], calm: false }
    }
}

impl Faults {
    /// It happened.
    pub fn note(&mut self, fault: Fault) {
        self.counts[fault as usize] += 1;
    }

    /// Whether something random goes wrong now.
    pub fn chance(&self, rng: &mut SmallRng, probability: f64) -> bool {
        !self.calm && rng.random_bool(probability)
    }

    /// Adds those of another run.
    pub fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
    }
}
