//! The steps that a schedule is made of.

use rand::Rng as _;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;

/// What a step does. Each draws what else it needs from numbers of its own, so that a schedule means
/// the same when steps are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// Where its random choices come from.
    pub salt: u64,
}

macro_rules! actions {
    ($($name:ident = $weight:literal,)*) => {
        /// What a step can do.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Action { $(#[allow(missing_docs, reason = "the name says it")] $name,)* }

        impl Action {
            const WEIGHTS: &[(Self, u32)] = &[$((Self::$name, $weight),)*];
        }
    };
}

actions! {
    ChangeObjects = 24,
    Run = 30,
    RunAll = 18,
    PassTime = 10,
    LoseRequests = 3,
    CutConnection = 3,
    StopEtcd = 2,
    SilenceEtcd = 2,
    HealEtcd = 4,
    CompactEtcd = 4,
    ReplaceEtcd = 2,
    WipeEtcd = 2,
    RestoreEtcd = 2,
    RevokeLease = 2,
    KillExporter = 3,
    KillAgent = 3,
    Disconnect = 2,
    Connect = 3,
    RewriteConfig = 1,
    Judge = 4,
    ChangeId = 2,
    TakeOverId = 1,
    JumpClock = 1,
    SetWallBack = 1,
    BreakTables = 2,
    FillTables = 1,
    MendTables = 2,
    WriteHostile = 4,
    WriteForeign = 3,
    DeleteCanary = 1,
}

impl Step {
    /// A random one.
    pub fn random(rng: &mut SmallRng) -> Self {
        let weights = Action::WEIGHTS;
        let action =
            weights.choose_weighted(rng, |(_, weight)| *weight).map_or(Action::Run, |(action, _)| *action);
        Self { action, salt: rng.random() }
    }
}
