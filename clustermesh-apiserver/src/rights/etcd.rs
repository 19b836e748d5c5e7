use std::collections::BTreeMap;

use clustermesh_kvstore::etcd::{Session, SessionError};

use super::{Rights, Step};

/// Reads the rights of an etcd: all of its users and, of the roles, those that `interest` names.
///
/// # Errors
/// See [`SessionError`].
pub async fn found(session: &Session, interest: &Rights) -> Result<Rights, SessionError> {
    let mut users = BTreeMap::new();
    for user in session.users().await? {
        let roles = session.roles_of(&user).await?.into_iter().collect();
        users.insert(user, roles);
    }
    let mut roles = BTreeMap::new();
    for role in session.roles().await?.into_iter().filter(|role| interest.roles.contains_key(role)) {
        let permissions = session.permissions(&role).await?.into_iter().collect();
        roles.insert(role, permissions);
    }
    Ok(Rights { users, roles })
}

/// Does one step.
///
/// # Errors
/// See [`SessionError`].
pub async fn apply(session: &Session, step: &Step) -> Result<(), SessionError> {
    match step {
        Step::AddRole(role) => session.add_role(role).await,
        Step::Permit(role, span, access) => session.permit(role, span, *access).await,
        Step::Forbid(role, span) => session.forbid(role, span).await,
        Step::AddUser(user) => session.add_user(user).await,
        Step::Grant(user, role) => session.grant_role(user, role).await,
        Step::Revoke(user, role) => session.revoke_role(user, role).await,
        Step::DeleteUser(user) => session.delete_user(user).await,
    }
}
