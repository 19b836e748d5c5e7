//! The users of other clusters, as a file lists them.
//!
//! ```yaml
//! users:
//! - name: remote-beta
//!   role: remote
//! ```
//!
//! The file is Cilium's: a ConfigMap in its charts, an ordinary file elsewhere. It is read again twice a
//! second, so that neither a symlink that is swapped nor a lost notification matters. Users whose name
//! begins with `remote-` are the file's: one that it does not list (any more) is removed, also if it was
//! added by an earlier run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::{Session, SessionError};
use clustermesh_kvstore::reflector::Connection;
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::{ROOT, Rights, Step, apply, found};

/// What users of other clusters are called.
const PREFIX: &str = "remote-";
/// How often the file is read.
const LOOK: Duration = Duration::from_millis(500);
/// How often etcd is compared with the file although neither seems to have changed.
const COMPARE: Duration = Duration::from_secs(60);
/// More is a mistake: a mesh has at most 511 clusters.
const MAX_USERS: usize = 4096;

#[derive(Deserialize)]
struct UsersFile {
    #[serde(default)]
    users: Vec<User>,
}

#[derive(Deserialize)]
struct User {
    name: String,
    role: String,
}

/// Reads the text of a users file: each user with its role.
///
/// # Errors
/// [`UsersError`] says what the operator has to correct.
pub fn parse(text: &str, cluster: &ClusterName) -> Result<BTreeMap<String, String>, UsersError> {
    // An empty ConfigMap key is an empty list.
    let file = match text.trim().is_empty() {
        true => UsersFile { users: Vec::new() },
        false => serde_saphyr::from_str(text)
            .map_err(|error| UsersError::Unreadable(error.without_snippet().to_string()))?,
    };
    if file.users.len() > MAX_USERS {
        return Err(UsersError::TooMany(file.users.len()));
    }
    let own = Rights::of(cluster).users;
    let mut users = BTreeMap::new();
    for User { name, role } in file.users {
        if name.is_empty() || role.is_empty() {
            return Err(UsersError::Empty);
        }
        if role == ROOT {
            return Err(UsersError::Root(name));
        }
        match own.get(&name) {
            Some(roles) if roles.contains(&role) => {}
            Some(_) => return Err(UsersError::Own(name)),
            None => match users.insert(name.clone(), role.clone()) {
                Some(before) if before != role => return Err(UsersError::Twice(name, before, role)),
                _ => {}
            },
        }
    }
    Ok(users)
}

/// What has to change in an etcd with the rights `found`, so that its users of other clusters are `wanted`.
pub fn steps(wanted: &BTreeMap<String, String>, found: &Rights) -> Vec<Step> {
    let users = wanted.iter().map(|(user, role)| (user.clone(), BTreeSet::from([role.clone()]))).collect();
    let mut steps = Rights { users, roles: BTreeMap::new() }.steps(found);
    let gone = found.users.keys().filter(|user| user.starts_with(PREFIX) && !wanted.contains_key(*user));
    steps.extend(gone.cloned().map(Step::DeleteUser));
    steps
}

/// A users file that cannot be used. The operator's; the users stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsersError {
    /// It cannot be read, or is not of this form.
    #[error("{0}")]
    Unreadable(String),
    /// An entry lacks a name or a role.
    #[error("a user has an empty name or role")]
    Empty,
    /// Another cluster would own this etcd.
    #[error("user {0} is given the role root, which may write everything: give it the role remote")]
    Root(String),
    /// It would change who this cluster's own parts are.
    #[error("user {0} belongs to the cluster itself and cannot be given another role")]
    Own(String),
    /// Two entries contradict each other.
    #[error("user {0} is listed with role {1} and with role {2}")]
    Twice(String, String, String),
    /// Implausibly many.
    #[error("{0} users are listed; at most {MAX_USERS} make sense")]
    TooMany(usize),
}

/// Makes the users in etcd follow the file at `path`, for good.
pub async fn follow(connection: Connection, path: PathBuf, cluster: ClusterName) {
    let mut file = File::new(path, cluster);
    // What was done last: the users, the etcd, and when.
    let mut done: Option<(BTreeMap<String, String>, u64, Instant)> = None;
    let mut told = String::new();
    loop {
        file.read();
        if let Some(wanted) = &file.users {
            let session = connection.session().await;
            let fresh = done.as_ref().is_some_and(|(users, etcd, at)| {
                users == wanted && *etcd == session.cluster_id() && at.elapsed() < COMPARE
            });
            if !fresh {
                match reconcile(&session, wanted).await {
                    Ok(()) => {
                        done = Some((wanted.clone(), session.cluster_id(), Instant::now()));
                        told.clear();
                    }
                    Err(error) => {
                        let error = error.to_string();
                        if told != error {
                            tracing::warn!(
                                error,
                                "cannot bring the users of other clusters up to date, trying again"
                            );
                            told = error;
                        }
                    }
                }
            }
        }
        sleep(LOOK).await;
    }
}

async fn reconcile(session: &Session, wanted: &BTreeMap<String, String>) -> Result<(), SessionError> {
    let found = found(session, &Rights::default()).await?;
    for step in steps(wanted, &found) {
        apply(session, &step).await?;
        match step {
            Step::AddUser(user) => tracing::info!(user, "another cluster may read this etcd"),
            Step::DeleteUser(user) => tracing::info!(user, "another cluster may no longer read this etcd"),
            _ => {}
        }
    }
    Ok(())
}

/// The file, with what it said when it last made sense.
struct File {
    path: PathBuf,
    cluster: ClusterName,
    users: Option<BTreeMap<String, String>>,
    told: Option<UsersError>,
}

impl File {
    const fn new(path: PathBuf, cluster: ClusterName) -> Self {
        Self { path, cluster, users: None, told: None }
    }

    fn read(&mut self) {
        match read(&self.path, &self.cluster) {
            Ok(users) => {
                self.users = Some(users);
                self.told = None;
            }
            Err(error) => {
                if self.told.as_ref() != Some(&error) {
                    tracing::error!(path = %self.path.display(), %error, "users file cannot be used; users stay as they are");
                }
                self.told = Some(error);
            }
        }
    }
}

/// Reads the users file at `path`.
///
/// # Errors
/// See [`parse`].
pub fn read(path: &Path, cluster: &ClusterName) -> Result<BTreeMap<String, String>, UsersError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| UsersError::Unreadable(format!("cannot be read: {error}")))?;
    parse(&text, cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alpha() -> ClusterName {
        "alpha".parse().unwrap()
    }

    fn users(text: &str) -> BTreeMap<String, String> {
        parse(text, &alpha()).unwrap()
    }

    fn found(users: &[(&str, &[&str])]) -> Rights {
        let roles = |roles: &[&str]| roles.iter().map(|role| (*role).to_owned()).collect();
        let users = users.iter().map(|(user, of)| ((*user).to_owned(), roles(of))).collect();
        Rights { users, roles: BTreeMap::new() }
    }

    #[test]
    fn reads_what_cilium_s_charts_write() {
        let text = "users:\n- name: remote-beta\n  role: remote\n- name: remote-gamma\n  role: remote\n";
        assert_eq!(users(text).into_keys().collect::<Vec<_>>(), ["remote-beta", "remote-gamma"]);
        assert!(users("").is_empty() && users("users: []\n").is_empty());
        // The charts also list the cluster's own users.
        assert!(users("users:\n- name: remote\n  role: remote\n").is_empty());
    }

    #[test]
    fn refuses_what_would_hand_the_etcd_over() {
        let entry = |name: &str, role: &str| format!("- {{name: {name}, role: {role}}}\n");
        for (entries, expected) in [
            (entry("remote-beta", "root"), "role root"),
            (entry("local-alpha", "remote"), "belongs to the cluster itself"),
            (entry("remote-beta", "''"), "empty"),
            (entry("remote-beta", "remote") + &entry("remote-beta", "local"), "remote and with role local"),
            ("- {name: remote-beta}\n".to_owned(), "role"),
        ] {
            let error = parse(&format!("users:\n{entries}"), &alpha()).unwrap_err().to_string();
            assert!(error.contains(expected), "{entries}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn users_come_go_and_change_roles() {
        let wanted = users("users: [{name: remote-beta, role: remote}, {name: remote-delta, role: remote}]");
        let etcd = found(&[
            ("root", &["root"]),
            ("admin-alpha", &["root"]),
            ("remote", &["remote"]),
            ("remote-beta", &["remote", "root"]),
            ("remote-gamma", &["remote"]),
            ("somebody", &["remote"]),
        ]);
        let expected = [
            Step::Revoke("remote-beta".into(), "root".into()),
            Step::AddUser("remote-delta".into()),
            Step::Grant("remote-delta".into(), "remote".into()),
            Step::DeleteUser("remote-gamma".into()),
        ];
        assert_eq!(steps(&wanted, &etcd), expected);
        let etcd = found(&[("remote-beta", &["remote"]), ("remote-delta", &["remote"])]);
        assert!(steps(&wanted, &etcd).is_empty());
    }

    #[test]
    fn a_broken_file_leaves_the_users_that_were_listed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("users.yaml");
        let mut file = File::new(path.clone(), alpha());
        file.read();
        assert_eq!(file.users, None);
        std::fs::write(&path, "users: [{name: remote-beta, role: remote}]").unwrap();
        file.read();
        std::fs::write(&path, "users: [{").unwrap();
        file.read();
        assert!(file.users.unwrap().contains_key("remote-beta"));
    }
}
