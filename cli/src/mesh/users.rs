//! Who may read a cluster's etcd: the file that its exporter follows.
//!
//! The file has the form of Cilium's charts, `users: [{name: remote-beta, role: remote}]`. A context
//! without one leaves its users to somebody else.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use clustermesh_kvstore::cluster::ClusterName;
use serde::{Deserialize, Serialize};

use super::entry::{Disk as _, FileSystem};
use crate::context::Context;
use crate::error::usage;

const ROLE: &str = "remote";

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UsersFile {
    #[serde(default)]
    users: Vec<User>,
}

#[derive(Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct User {
    name: String,
    role: String,
}

/// Lets `peer` read the etcd of `context`. Says whether that is news: not if it was listed, and not if it
/// is none of our business.
///
/// # Errors
/// If the file cannot be read or written.
pub(crate) fn admit(context: &Context, peer: &ClusterName) -> anyhow::Result<bool> {
    change(context, |users| {
        let user = user(peer);
        if users.contains(&user) {
            return false;
        }
        users.retain(|other| other.name != user.name);
        users.push(user);
        true
    })
}

/// Takes that back.
///
/// # Errors
/// If the file cannot be read or written.
pub(crate) fn dismiss(context: &Context, peer: &ClusterName) -> anyhow::Result<bool> {
    change(context, |users| {
        let before = users.len();
        users.retain(|other| other.name != user(peer).name);
        users.len() != before
    })
}

fn user(cluster: &ClusterName) -> User {
    User { name: format!("remote-{cluster}"), role: ROLE.into() }
}

fn change(context: &Context, change: impl FnOnce(&mut Vec<User>) -> bool) -> anyhow::Result<bool> {
    let Some(path) = &context.users else { return Ok(false) };
    let folder = path.parent().unwrap_or(Path::new("."));
    // Two commands at the same time must not lose each other's users. The file itself is replaced, so a
    // lock on it would be one on nothing.
    let lock = File::open(folder).with_context(|| format!("cannot open {}", folder.display()))?;
    lock.lock().with_context(|| format!("cannot lock {}", folder.display()))?;
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut file: UsersFile = match text.trim().is_empty() {
        true => UsersFile::default(),
        false => serde_saphyr::from_str(&text)
            .map_err(|error| usage(format!("{}: {}", path.display(), error.without_snippet())))?,
    };
    if !change(&mut file.users) {
        return Ok(false);
    }
    let mode = fs::metadata(path).map_or(0o644, |meta| meta.permissions().mode() & 0o7777);
    let text = serde_saphyr::to_string(&file).context("cannot write users as YAML")?;
    FileSystem
        .put(path, text.as_bytes(), mode)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Agent;

    #[test]
    fn users_come_and_go_and_others_stay() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("users.yaml");
        let mut context = Context {
            dir: tmp.path().into(),
            cluster: "alpha".parse().unwrap(),
            id: 1,
            etcd: clustermesh_kvstore::etcd::EtcdConfig::parse("endpoints: [\"http://alpha:2379\"]").unwrap(),
            remote: None,
            users: Some(path.clone()),
            clustermesh_config: tmp.path().into(),
            kvstoremesh: None,
            agents: vec![Agent { node: "n".into(), socket: "s".into() }],
        };
        let beta: ClusterName = "beta".parse().unwrap();
        assert!(!dismiss(&context, &beta).unwrap() && !path.exists());
        assert!(admit(&context, &beta).unwrap());
        assert!(!admit(&context, &beta).unwrap());
        assert!(admit(&context, &"gamma".parse().unwrap()).unwrap());
        fs::write(&path, fs::read_to_string(&path).unwrap().replacen("remote\n", "root\n", 1)).unwrap();
        assert!(admit(&context, &beta).unwrap(), "another role is corrected");
        assert!(dismiss(&context, &beta).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "users:\n- name: remote-gamma\n  role: remote\n");

        fs::write(&path, "users: [{").unwrap();
        let error = admit(&context, &beta).unwrap_err();
        assert!(error.to_string().contains("users.yaml"), "{error}");
        context.users = None;
        assert!(!admit(&context, &beta).unwrap());
    }
}
