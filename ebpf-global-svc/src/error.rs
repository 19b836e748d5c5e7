//! What can go wrong between the agent and the kernel, and what to do about it.

use std::{io, path::PathBuf};

/// An operation on the kernel's datapath failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatapathError {
    /// We lack privileges.
    #[error("not permitted to {action}: run as root, or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    NotPermitted {
        /// What was attempted.
        action: String,
    },

    /// The kernel has no usable eBPF.
    #[error(
        "this kernel cannot run the eBPF datapath: {reason}; Linux 6.1 or later with CONFIG_BPF_SYSCALL is needed"
    )]
    NoBpf {
        /// What is missing.
        reason: String,
    },

    /// Another agent has the folder.
    #[error("the datapath under {root} is in use by another agent: stop that one, or choose another folder")]
    InUse {
        /// Folder of the pins.
        root: PathBuf,
    },

    /// The folder is not, or not only, an agent's.
    #[error("{root} is not a datapath of ClusterMesh alone: {what}; nothing was removed, correct --bpf-root")]
    Foreign {
        /// Folder of the pins.
        root: PathBuf,
        /// What is wrong with it.
        what: String,
    },

    /// The operator's limit is reached; entries that did not fit are not installed.
    #[error(
        "map {map} is full at {capacity} entries: raise --{flag}-max-entries of the agent and start it \
         again, which interrupts nothing",
        flag = map.trim_start_matches("cm_")
    )]
    MapFull {
        /// Map name.
        map: String,
        /// Its limit.
        capacity: u64,
    },

    /// The operator's limit is below what is installed; nothing was changed.
    #[error(
        "map {map} holds more entries than the {capacity} that it is to have: raise --{flag}-max-entries of the agent",
        flag = map.trim_start_matches("cm_")
    )]
    TooSmall {
        /// Map name.
        map: String,
        /// The new limit.
        capacity: u64,
    },

    /// A pinned map of another version is in the way.
    #[error(
        "pinned map {path} does not fit: {reason}; start with the same version as before, \
         or remove the datapath with `clustermesh-agent cleanup --bpf-root {root}` first (this interrupts mesh \
         traffic until the agent has synced again)",
        root = path.ancestors().nth(2).unwrap_or(path).display()
    )]
    PinMismatch {
        /// Map name.
        map: String,
        /// Where it is pinned.
        path: PathBuf,
        /// Which property differs.
        reason: String,
    },

    /// The kernel's verifier refused a program: a bug of ours, or a kernel that we do not know.
    #[error(
        "the kernel refused program {program}; please report this with the kernel version and the log:\n{log}"
    )]
    Verifier {
        /// Program name.
        program: String,
        /// Tail of the verifier's log.
        log: String,
    },

    /// A program did not get onto its hook.
    #[error("cannot attach {program} to {target}: {reason}")]
    Attach {
        /// Program name.
        program: String,
        /// Cgroup path or interface.
        target: String,
        /// The kernel's reason.
        reason: String,
    },

    /// A map operation failed in the kernel.
    #[error("cannot {operation} map {map}: {source}")]
    Map {
        /// Map name.
        map: String,
        /// Verb, e.g. `update`.
        operation: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },

    /// The BPF file system or the cgroup file system failed.
    #[error("cannot {operation} {path}: {source}")]
    File {
        /// Verb, e.g. `mount bpffs on`.
        operation: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}
