//! Deliberately broken variants: a real core of which one thing that it hears or says is changed, just
//! as if it had that bug. They show that the simulator would find it.

use std::cell::Cell;

macro_rules! broken {
    ($($name:ident = $text:literal,)*) => {
        /// A bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Broken { $(#[doc = $text] $name,)* }

        impl Broken {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// In words.
            pub fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

broken! {
    IgnoresCanary = "a reader does not wait for the canary",
    ResumesAnywhere = "a watch is resumed on whatever etcd is there",
    IgnoresCompaction = "a watch goes on behind a compaction",
    ListsUnpinned = "the pages of a list are of different revisions",
    WatchesTooLate = "a watch begins one revision too late",
    LosesDeletes = "a reader misses a delete now and then",
    LosesPuts = "a reader misses a put now and then",
    SwapsEvents = "two events of a reader change places",
    FlushesOnRelist = "a reader deletes all before it lists again",
    SyncedTooEarly = "a list counts as complete when it begins",
    KeepsStale = "what a new list lacks is kept",
    DrainsTooLate = "a cluster is drained after it was accepted under another ID",
    DrainsNever = "a cluster that is removed is not drained",
    SharesIds = "two clusters may have one ID",
    ForgetsStrangersEarly = "what was installed of a cluster goes before all are configured",
    FlushesOnStart = "an agent starts with empty tables",
    DeathStays = "a cluster that is alive again stays out of load-balancing",
    DeathIgnored = "a dead cluster stays in load-balancing",
    TakesFailureForSuccess = "a write that failed is not tried again",
    CountsBeforeSlots = "a service's value is written before its slots",
    FreesWithoutGrace = "slots go while programs may still follow them",
    TrustsIdentities = "identities are installed as a hostile cluster says",
    CanaryTooEarly = "an exporter declares itself complete when it starts",
    IgnoresLostLeases = "a publisher takes a lost lease for alive",
    IgnoresForeignWrites = "a publisher does not look at what others do to its keys",
    TakesTimeoutForSuccess = "a publisher takes a write without answer for made",
    IgnoresNewEtcd = "a publisher does not notice that its etcd is another one",
    KeepsPolicies = "an agent does not hear that a policy is gone",
    KeepsVirtualCidrs = "an agent does not hear by which addresses it is to know a cluster",
    ForgetsToWithdraw = "an exporter does not withdraw what is gone",
}

thread_local! {
    static ACTIVE: Cell<Option<Broken>> = const { Cell::new(None) };
}

/// Breaks what this thread runs from now on, or mends it.
pub fn activate(broken: Option<Broken>) {
    ACTIVE.set(broken);
}

/// Whether this is what is broken.
pub fn is(broken: Broken) -> bool {
    ACTIVE.get() == Some(broken)
}
