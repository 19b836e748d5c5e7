//! Command line.

mod etcdinit;
mod export;
mod kvstoremesh;

use std::ffi::OsString;

use clap::{Parser, Subcommand, ValueEnum};

pub use etcdinit::EtcdInitArgs;
pub use export::{ExportArgs, SourceSpec, SourceSpecError};
pub use kvstoremesh::KvstoremeshArgs;

/// The cluster's side of a mesh that has no kernel: what one cluster shows to the others, and takes in from them.
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    after_help = "Flags without a command are those of `clustermesh`; see `clustermesh-apiserver clustermesh --help`."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What a process is to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Export this cluster.
    Clustermesh(ExportArgs),
    /// Prepare this cluster's etcd: set its users and roles, enable authentication.
    Etcdinit(EtcdInitArgs),
    /// Mirror all remote clusters into the local etcd.
    Kvstoremesh(KvstoremeshArgs),
}

impl Cli {
    /// Takes a program's arguments, the first of which is its name. Without a command they are those of
    /// `clustermesh`, the only one there once was.
    ///
    /// # Errors
    /// They are wrong, or ask for help or the version.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut args: Vec<_> = args.into_iter().collect();
        let first = args.get(1).and_then(|first| first.to_str());
        let about_all = ["--help", "-h", "--version", "-V"];
        if first.is_some_and(|first| first.starts_with('-') && !about_all.contains(&first)) {
            args.insert(1, "clustermesh".into());
        }
        Self::try_parse_from(args)
    }

    /// What all commands have.
    pub const fn log_format(&self) -> LogFormat {
        match &self.command {
            Command::Clustermesh(args) => args.log_format,
            Command::Etcdinit(args) => args.log_format,
            Command::Kvstoremesh(args) => args.log_format,
        }
    }
}

/// Form of the logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::from_args(line.split(' ').map(OsString::from))
    }

    #[test]
    fn flags_alone_are_those_of_the_exporter() {
        let flags = "--cluster-name=alpha --cluster-id=1 --source=manifests:/m --etcd-config=e.yaml";
        for line in [format!("apiserver {flags}"), format!("apiserver clustermesh {flags}")] {
            let Command::Clustermesh(args) = parse(&line).unwrap().command else { panic!("{line}") };
            assert_eq!(args.cluster_name.as_str(), "alpha");
        }
    }

    #[test]
    fn help_and_version_are_those_of_the_whole() {
        assert!(parse("apiserver --help").unwrap_err().to_string().contains("Commands:"));
        assert_eq!(parse("apiserver --version").unwrap_err().exit_code(), 0);
        assert_eq!(parse("apiserver").unwrap_err().exit_code(), 2);
        assert_eq!(parse("apiserver nothing").unwrap_err().exit_code(), 2);
    }
}
