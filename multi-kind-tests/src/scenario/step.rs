//! What a scenario can do and expect.

use super::Span;
use crate::evidence::Expect;
use serde::Deserialize;
use std::path::PathBuf;

/// One step; in YAML a map with one key.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Tell the reader what comes next.
    Say(String),

    /// `clustermesh connect`.
    Connect(Connect),
    /// `clustermesh disconnect`.
    Disconnect(Pair),
    /// Wait until every agent says that it is ready and synced with all its peers.
    Ready(Ready),

    /// `lab apply`.
    Apply(Apply),
    /// `lab annotate`.
    Annotate(Annotate),
    /// `clustermesh lab delete`.
    Delete(Delete),
    /// `lab scale`.
    Scale(Scale),

    /// `lab kill`: SIGKILL.
    Kill(ProcessRef),
    /// `lab stop`: SIGTERM, and wait for the end.
    Stop(ProcessRef),
    /// `lab start`.
    Start(ProcessRef),
    /// `lab restart`.
    Restart(ProcessRef),
    /// `lab kill --signal STOP`: it hangs, and whoever talks to it waits.
    Freeze(ProcessRef),
    /// `lab kill --signal CONT`: it goes on.
    Thaw(ProcessRef),
    /// `lab cut`: a node, or a whole cluster, is cut off.
    Cut(NodeRef),
    /// `lab heal`.
    Heal(NodeRef),

    /// Make calls and look at who answered; repeated until it is as expected or time is up.
    Call(Call),
    /// Begin calls that go on in the background.
    Load(Load),
    /// Within a time after the last change, the load is answered as expected, and stays so.
    Shift(Shift),
    /// For a while, the load goes on being answered as before, with no failure.
    Unchanged(Unchanged),
    /// End a load and look at all of its calls.
    LoadStop(LoadStop),
    /// Begin a long TCP connection in the background.
    Stream(Stream),
    /// Wait for the end of a stream: nothing lost, nothing corrupted.
    StreamEnd(StreamEnd),

    /// Faults and changes at random, and calls meanwhile; at the end everything is as it should be.
    Chaos(Chaos),

    /// `lab encrypt`: the agents of a cluster encrypt, or do not any more.
    Encrypt(Encrypt),
    /// `lab agent-flags`: the agents of a cluster get other flags.
    AgentFlags(AgentFlags),
    /// Look at the packets between nodes.
    Underlay(Underlay),

    /// A command of the `clustermesh` CLI prints JSON that holds a value.
    Check(Check),
    /// A command fails as it should: with this status and one clear message.
    Fails(Fails),
    /// Decapsulated traffic carries the identity that the other cluster allocated for a pod.
    IdentitySeen(IdentitySeen),
    /// Agents have timed changes of another cluster, and hold what its exporter states.
    Propagated(Propagated),
    /// A step of the replacement of the authority that has issued all certificates of the lab.
    Rotate(Rotation),
    /// After the last one: everything uses the new authority, and nobody noticed.
    Rotated(Rotated),
    /// Entries of a node's kernel table change beside its agent, which notices and puts them right.
    Tamper(Tamper),
}

/// Two clusters to be connected.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Connect {
    /// `--context`.
    pub from: String,
    /// `--destination-context`.
    pub to: String,
    /// `--virtual-pod-cidrs`.
    #[serde(default)]
    pub virtual_pod_cidrs: bool,
}

/// Two clusters.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Pair {
    /// `--context`.
    pub from: String,
    /// `--destination-context`.
    pub to: String,
}

/// Wait until ready.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Ready {
    /// Only these clusters; default: all of the topology that the scenario's connections name.
    #[serde(default)]
    pub clusters: Vec<String>,
    /// Deadline.
    #[serde(default = "ten_seconds")]
    pub within: Span,
}

/// Apply a manifest.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Apply {
    /// Where.
    pub cluster: String,
    /// A manifest file, relative to the scenario.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Or the manifest itself.
    #[serde(default)]
    pub manifest: Option<String>,
}

/// Change annotations.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Annotate {
    /// Where.
    pub cluster: String,
    /// `service/NAMESPACE/NAME`.
    pub object: String,
    /// `key=value` or `key-`.
    pub set: Vec<String>,
}

/// Delete an object.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Delete {
    /// Where.
    pub cluster: String,
    /// `KIND/NAMESPACE/NAME`.
    pub object: String,
}

/// Change the number of replicas.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scale {
    /// Where.
    pub cluster: String,
    /// `deployment/NAMESPACE/NAME`.
    pub object: String,
    /// How many.
    pub replicas: u32,
}

/// A process of a cluster.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ProcessRef {
    /// Where.
    pub cluster: String,
    /// `etcd`, `apiserver`, `kvstoremesh` or `agent:NODE`.
    pub process: String,
    /// For `start` of an etcd: lose all data first, and get a new cluster ID.
    #[serde(default)]
    pub empty: bool,
}

/// A node, or all nodes of a cluster.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NodeRef {
    /// `CLUSTER/NODE` or `CLUSTER`.
    pub node: String,
}

/// Calls with an end.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Call {
    /// `CLUSTER/NAMESPACE/POD`.
    pub from: String,
    /// `http://...` or `udp://...`.
    pub to: String,
    /// How many.
    #[serde(default = "two_hundred")]
    pub calls: u32,
    /// UDP with a socket that is not connected.
    #[serde(default)]
    pub unconnected: bool,
    /// Keep trying for so long; default: the first attempt counts.
    #[serde(default)]
    pub within: Option<Span>,
    /// What the answers must show.
    #[serde(default)]
    pub expect: Expect,
}

/// Calls in the background.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Load {
    /// Later steps name it.
    pub name: String,
    /// `CLUSTER/NAMESPACE/POD`.
    pub from: String,
    /// `http://...` or `udp://...`.
    pub to: String,
    /// From one call to the next.
    #[serde(default = "two_millis")]
    pub interval: Span,
}

/// A change arrives.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Shift {
    /// The load.
    pub load: String,
    /// Exactly these clusters answer from then on.
    pub to: Vec<String>,
    /// Time from the change of the manifest to the last call that was answered otherwise.
    #[serde(default = "one_second")]
    pub within: Span,
    /// Failed calls that are allowed meanwhile (a chosen backend may really be gone).
    #[serde(default)]
    pub max_failed: u32,
}

/// Nothing changes.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Unchanged {
    /// The load.
    pub load: String,
    /// Exactly these clusters answer.
    pub to: Vec<String>,
    /// How long to look.
    #[serde(rename = "for", default = "one_second")]
    pub span: Span,
}

/// End of a load.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LoadStop {
    /// The load.
    pub load: String,
    /// Failed calls allowed over the whole of it.
    #[serde(default)]
    pub max_failed: u32,
}

/// A long connection.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Stream {
    /// Later steps name it.
    pub name: String,
    /// `CLUSTER/NAMESPACE/POD`.
    pub from: String,
    /// `ADDRESS:PORT`.
    pub to: String,
    /// How long.
    #[serde(default = "ten_seconds", rename = "for")]
    pub span: Span,
}

/// End of a stream.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StreamEnd {
    /// The stream.
    pub stream: String,
    /// Longest time allowed between two frames that came back.
    #[serde(default = "one_second")]
    pub max_gap: Span,
}

/// Random faults.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Chaos {
    /// The same seed gives the same faults; default: from the clock.
    #[serde(default)]
    pub seed: Option<u64>,
    /// How long.
    #[serde(rename = "for")]
    pub span: Span,
}

/// Encryption of a cluster.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Encrypt {
    /// Where.
    pub cluster: String,
    /// `off`, `clusters` or `nodes`.
    pub between: String,
    /// `wireguard`, `ipsec` or, with a comma, both.
    #[serde(default = "wireguard")]
    pub with: String,
    /// Clear text is dropped.
    #[serde(default)]
    pub strict: bool,
}

/// Flags of a cluster's agents.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AgentFlags {
    /// Where.
    pub cluster: String,
    /// In place of those that were given before.
    #[serde(default)]
    pub flags: Vec<String>,
}

/// What is on the wire.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Underlay {
    /// How long to look.
    #[serde(rename = "for", default = "one_second")]
    pub span: Span,
    /// Part of what is called meanwhile.
    pub marker: String,
    /// By what the rest is encrypted.
    #[serde(default)]
    pub with: Sealed,
    /// What goes in clear.
    pub clear: Clear,
}

/// By what packets between nodes are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sealed {
    /// WireGuard.
    #[default]
    Wireguard,
    /// IPsec.
    Ipsec,
}

/// What goes in clear between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clear {
    /// Nothing.
    None,
    /// Only what stays within a cluster.
    Within,
    /// Everything.
    All,
    /// Between clusters nothing goes at all.
    Silence,
}

/// Look at what the CLI prints.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Check {
    /// Arguments of `clustermesh`; `{lab}` is the lab's name, `{scenario}` the scenario's folder.
    pub run: Vec<String>,
    /// JSON pointer (RFC 6901) into the output; `` is all of it.
    #[serde(default)]
    pub at: String,
    /// If the value is an array: only the elements that have these fields with these values.
    #[serde(default, rename = "where")]
    pub filter: std::collections::BTreeMap<String, serde_json::Value>,
    /// Each of these is in the output, which need not be JSON then.
    #[serde(default)]
    pub says: Vec<String>,
    /// The value is this.
    #[serde(default)]
    pub equals: Option<serde_json::Value>,
    /// The array, after `where`, has so many elements.
    #[serde(default)]
    pub count: Option<usize>,
    /// The array, after `where`, has at least so many elements.
    #[serde(default)]
    pub at_least: Option<usize>,
    /// Keep trying for so long.
    #[serde(default = "one_second")]
    pub within: Span,
}

/// A command that must fail.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Fails {
    /// Program (`clustermesh`, `clustermesh-agent`, `clustermesh-apiserver`) and arguments;
    /// `{lab}`, `{dir}` (a fresh folder), `{scenario}` (the scenario's folder) are filled in.
    pub run: Vec<String>,
    /// Files to write into `{dir}` first; names may lead into folders.
    #[serde(default)]
    pub files: std::collections::BTreeMap<String, String>,
    /// Run as the user nobody.
    #[serde(default)]
    pub unprivileged: bool,
    /// Run in the network namespace of this node: `CLUSTER/NODE`.
    #[serde(default)]
    pub on: Option<String>,
    /// Exit status.
    pub exit: i32,
    /// Every one of these is in the message.
    pub says: Vec<String>,
    /// The command ends by itself within this.
    #[serde(default = "ten_seconds")]
    pub within: Span,
}

/// Who the far end thinks is calling.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct IdentitySeen {
    /// `CLUSTER/NAMESPACE/POD` that calls.
    pub pod: String,
    /// What it calls.
    pub to: String,
    /// Cluster whose nodes look at the decapsulated traffic.
    pub at: String,
}

/// Times of changes.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Propagated {
    /// Cluster whose agents are asked.
    pub at: String,
    /// Cluster whose changes they have seen.
    pub of: String,
    /// Kinds of records, and how many changes of each have been timed at least since the agents started.
    #[serde(default)]
    pub at_least: std::collections::BTreeMap<String, u64>,
    /// Kinds of which nothing has been timed.
    #[serde(default)]
    pub nothing_of: Vec<String>,
    /// All but one in a hundred took no longer.
    #[serde(default = "ten_seconds")]
    pub no_longer_than: Span,
    /// Keep trying for so long.
    #[serde(default = "ten_seconds")]
    pub within: Span,
}

/// `clustermesh ca rotate`; before and after `etcd` is started again where it has to be, and all files are
/// handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rotation {
    /// Both authorities are trusted.
    Begin,
    /// The new one has signed everything.
    Reissue,
    /// The old one is forgotten.
    Finish,
}

/// The end of a rotation.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rotated {
    /// Keys with one of these in them have been changed meanwhile; all others are as they were.
    pub but_for: Vec<String>,
    /// Keep trying for so long.
    #[serde(default = "half_a_minute")]
    pub within: Span,
}

/// A hand in a kernel table.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Tamper {
    /// `CLUSTER/NODE`.
    pub node: String,
    /// Which table.
    pub table: TamperedTable,
    /// What is done to each of its entries.
    pub how: Tampering,
    /// The agent has put all of them right by then.
    #[serde(default = "half_a_minute")]
    pub within: Span,
}

/// Tables that can be tampered with, as `clustermesh status` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TamperedTable {
    /// Identities and nodes of addresses.
    CmIpcache,
    /// Backends of services.
    CmSlot,
    /// Addresses of backends.
    CmBackend,
}

/// What is done to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tampering {
    /// It is deleted.
    Delete,
    /// All bytes of its value become zero.
    Zero,
}

fn two_hundred() -> u32 {
    200
}

fn two_millis() -> Span {
    Span::millis(2)
}

fn wireguard() -> String {
    "wireguard".to_owned()
}

fn one_second() -> Span {
    Span::seconds(1)
}

fn ten_seconds() -> Span {
    Span::seconds(10)
}

fn half_a_minute() -> Span {
    Span::seconds(30)
}
