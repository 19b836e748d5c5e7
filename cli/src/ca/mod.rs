//! `clustermesh ca`: certificates for meshes that have nobody else to issue them.
//!
//! [`leaf`] knows what certificates say, [`seen`] reads those that exist, [`authority`] keeps them in a
//! directory. The lab uses the same.

pub(crate) mod authority;
pub(crate) mod leaf;
mod seen;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use clustermesh_kvstore::cluster::ClusterName;
use jiff::Timestamp;
use serde::Serialize;

use self::authority::{Authority, Issued, date};
use self::leaf::{Leaf, Role, Validity};
use self::seen::Seen;
use crate::mesh::Output;
use crate::output::{print_json, print_line, print_table};

/// As Cilium's charts have it: three years.
const LEAF_DAYS: i32 = 1095;
/// A rotation should not be needed more often than leaves are renewed.
const AUTHORITY_DAYS: i32 = 3650;

/// Certificates of a mesh: an authority in a directory, and what it issues
///
/// One authority for all clusters lets each of them come to the others as itself. Keep its directory off
/// the clusters: they need `ca.crt` and their own folder, nobody but you needs `ca.key`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh ca init --dir ca
  clustermesh ca issue server --dir ca --cluster alpha --name etcd.alpha.example --name 192.0.2.7
  clustermesh ca issue remote --dir ca --cluster alpha
  clustermesh ca rotate --dir ca; clustermesh ca rotate --dir ca --reissue; clustermesh ca rotate --dir ca --finish
  clustermesh ca show --dir ca -o json")]
pub(crate) struct CaArgs {
    /// Directory of the authority
    #[arg(long, global = true, default_value = "clustermesh-ca")]
    dir: PathBuf,
    #[command(subcommand)]
    command: CaCommand,
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Make a new authority
    Init {
        /// Its common name
        #[arg(long, default_value = "ClusterMesh CA")]
        name: String,
        /// How long it is valid
        #[arg(long, default_value_t = AUTHORITY_DAYS)]
        days: i32,
    },
    /// Issue a certificate: DIR/CLUSTER/ROLE.crt and .key
    Issue(IssueArgs),
    /// Replace the authority in three steps; between them, give every cluster its files
    ///
    /// Without a flag: makes the new authority, and lets ca.crt hold both. With --reissue: the new one signs
    /// everything again. With --finish: ca.crt holds the new one only. A step that was interrupted is run
    /// again.
    Rotate(RotateArgs),
    /// Show the authorities that are trusted and all certificates
    Show {
        /// How to print them
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
}

#[derive(Debug, Args)]
struct IssueArgs {
    /// Who it is for
    #[arg(value_enum)]
    role: Role,
    /// Whose it is
    #[arg(long)]
    cluster: ClusterName,
    /// A DNS name or address by which clients reach the server; may be repeated
    #[arg(long = "name", value_name = "NAME|IP")]
    names: Vec<String>,
    /// remote only: the user of all clusters that have none of their own
    #[arg(long)]
    shared: bool,
    /// How long it is valid
    #[arg(long, default_value_t = LEAF_DAYS)]
    days: i32,
    /// Replace the certificate that exists, with the same key
    #[arg(long)]
    replace: bool,
    /// Replace certificate and key that exist
    #[arg(long)]
    new_key: bool,
}

#[derive(Debug, Args)]
struct RotateArgs {
    /// Second step: the new authority signs, and has issued everything again
    #[arg(long, conflicts_with = "finish")]
    reissue: bool,
    /// Last step: forget the old authority
    #[arg(long)]
    finish: bool,
    /// With --reissue: new keys, too; a server between its two new files refuses clients for a moment
    #[arg(long, requires = "reissue")]
    new_keys: bool,
    /// First step: common name of the new authority
    #[arg(long, default_value = "ClusterMesh CA", conflicts_with_all = ["reissue", "finish"])]
    name: String,
    /// How long the new authority, or with --reissue each certificate, is valid
    #[arg(long, conflicts_with = "finish")]
    days: Option<i32>,
}

impl CaArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// What failed.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let dir = &self.dir;
        match &self.command {
            CaCommand::Init { name, days } => {
                let authority = Authority::init(dir, name, Validity::days(*days)?)?;
                print_line(format!(
                    "Made {}; keep {} to yourself",
                    authority.bundle().display(),
                    dir.join("ca.key").display()
                ));
            }
            CaCommand::Issue(args) => {
                let leaf = Leaf {
                    role: args.role,
                    cluster: args.cluster.clone(),
                    names: args.names.iter().cloned().collect(),
                    shared: args.shared,
                    validity: Validity::days(args.days)?,
                };
                let files = Authority::open(dir)?.issue(&leaf, args.replace || args.new_key, args.new_key)?;
                print_line(format!("Issued {} ({})", files.cert.display(), leaf.common_name()));
            }
            CaCommand::Rotate(args) => args.run(Authority::open(dir)?)?,
            CaCommand::Show { output } => show(&Authority::open(dir)?, *output)?,
        }
        Ok(())
    }
}

impl RotateArgs {
    fn run(&self, authority: Authority) -> anyhow::Result<()> {
        if self.finish {
            authority.finish_rotation()?;
            print_line("The old authority is forgotten: give every cluster the new ca.crt");
        } else if self.reissue {
            let issued = authority.reissue(self.days.unwrap_or(LEAF_DAYS), self.new_keys)?;
            print_line(format!(
                "The new authority has signed {} certificates: give every cluster its folder, then run `ca rotate --finish`",
                issued.len()
            ));
        } else {
            let validity = Validity::days(self.days.unwrap_or(AUTHORITY_DAYS))?;
            authority.begin_rotation(&self.name, validity)?;
            print_line(
                "ca.crt holds the old authority and the new one: give it to every cluster, then run `ca rotate --reissue`",
            );
        }
        Ok(())
    }
}

/// A certificate for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    role: &'static str,
    common_name: String,
    names: Vec<String>,
    issuer: String,
    not_before: Timestamp,
    not_after: Timestamp,
    /// Whether the authority that signs now has signed it.
    current: bool,
}

impl Row {
    fn new(cluster: Option<String>, role: &'static str, seen: Seen, current: bool) -> Self {
        Self {
            cluster,
            role,
            common_name: seen.common_name,
            names: seen.names.into_iter().collect(),
            issuer: seen.issuer,
            not_before: seen.from,
            not_after: seen.to,
            current,
        }
    }
}

fn show(authority: &Authority, output: Output) -> anyhow::Result<()> {
    let authorities = authority.trusted()?.into_iter().map(|seen| {
        let current = authority.has_signed(&seen);
        Row::new(None, "authority", seen, current)
    });
    let leaves = authority.issued()?.into_iter().map(|Issued { cluster, role, seen, .. }| {
        let current = authority.has_signed(&seen);
        Row::new(Some(cluster.to_string()), role.as_str(), seen, current)
    });
    let rows: Vec<Row> = authorities.chain(leaves).collect();
    if output == Output::Json {
        return print_json(&rows);
    }
    let cells = rows.iter().map(|row| {
        let old = if row.current { "" } else { " (another authority)" };
        vec![
            row.cluster.clone().unwrap_or_else(|| "-".into()),
            row.role.to_owned(),
            row.common_name.clone(),
            row.names.join(" "),
            format!("{}{old}", row.issuer),
            date(row.not_after),
        ]
    });
    print_table(&["cluster", "role", "common name", "names", "issuer", "expires"], cells.collect());
    Ok(())
}

#[cfg(test)]
mod tests;
