//! Users, roles and permissions of an etcd. Changing them takes the role `root`, once authentication is
//! enabled.

use etcd_client::{AuthClient, PermissionType, ResponseHeader, RoleRevokePermissionOptions, UserAddOptions};

use super::{Session, SessionError};

/// The keys that a permission is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeySpan {
    /// The first key.
    pub start: Vec<u8>,
    /// The first key behind the span. Empty: `start` is the only key; `\0`: there is no end.
    pub end: Vec<u8>,
}

/// What may be done with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Get, list and watch.
    Read,
    /// Put and delete.
    Write,
    /// Both.
    ReadWrite,
}

/// Authentication. All calls fail with [`SessionError::Unavailable`] where etcd says that a user or role
/// is there already, or is not there.
impl Session {
    /// Names of all users.
    ///
    /// # Errors
    /// See [`SessionError`]; so in all calls below.
    pub async fn users(&self) -> Result<Vec<String>, SessionError> {
        let mut auth = self.auth();
        let reply = self.call("its users", auth.user_list(), |reply| reply.header().cloned()).await?;
        Ok(reply.users().to_vec())
    }

    /// The roles of a user.
    pub async fn roles_of(&self, user: &str) -> Result<Vec<String>, SessionError> {
        let mut auth = self.auth();
        let what = format!("the roles of user {user}");
        let reply = self.call(&what, auth.user_get(user), |reply| reply.header().cloned()).await?;
        Ok(reply.roles().to_vec())
    }

    /// Adds a user that has no password: only a client certificate with this name as its CN makes one it.
    pub async fn add_user(&self, user: &str) -> Result<(), SessionError> {
        let options = UserAddOptions::new().with_no_pwd();
        let mut auth = self.auth();
        let add = auth.user_add(user, "", Some(options));
        self.call(&format!("to add user {user}"), add, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Removes a user.
    pub async fn delete_user(&self, user: &str) -> Result<(), SessionError> {
        let mut auth = self.auth();
        let delete = auth.user_delete(user);
        self.call(&format!("to delete user {user}"), delete, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Gives a user a role.
    pub async fn grant_role(&self, user: &str, role: &str) -> Result<(), SessionError> {
        let mut auth = self.auth();
        let grant = auth.user_grant_role(user, role);
        let what = format!("to grant role {role} to user {user}");
        self.call(&what, grant, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Takes a role from a user.
    pub async fn revoke_role(&self, user: &str, role: &str) -> Result<(), SessionError> {
        let mut auth = self.auth();
        let revoke = auth.user_revoke_role(user, role);
        let what = format!("to revoke role {role} of user {user}");
        self.call(&what, revoke, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Names of all roles but `root`, which is always there.
    pub async fn roles(&self) -> Result<Vec<String>, SessionError> {
        let mut auth = self.auth();
        let reply = self.call("its roles", auth.role_list(), |reply| reply.header().cloned()).await?;
        Ok(reply.roles().to_vec())
    }

    /// What a role permits; each span at most once.
    pub async fn permissions(&self, role: &str) -> Result<Vec<(KeySpan, Access)>, SessionError> {
        let mut auth = self.auth();
        let what = format!("the permissions of role {role}");
        let reply = self.call(&what, auth.role_get(role), |reply| reply.header().cloned()).await?;
        let permissions = reply.permissions().into_iter().map(|permission| {
            let span = KeySpan { start: permission.key().to_vec(), end: permission.range_end().to_vec() };
            let access = match permission.get_type() {
                read if read == PermissionType::Read as i32 => Access::Read,
                write if write == PermissionType::Write as i32 => Access::Write,
                _ => Access::ReadWrite,
            };
            (span, access)
        });
        Ok(permissions.collect())
    }

    /// Adds a role that permits nothing.
    pub async fn add_role(&self, role: &str) -> Result<(), SessionError> {
        let mut auth = self.auth();
        let add = auth.role_add(role);
        self.call(&format!("to add role {role}"), add, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Lets a role access a span, in place of what it permitted for the same span before.
    pub async fn permit(&self, role: &str, span: &KeySpan, access: Access) -> Result<(), SessionError> {
        let kind = match access {
            Access::Read => PermissionType::Read,
            Access::Write => PermissionType::Write,
            Access::ReadWrite => PermissionType::Readwrite,
        };
        let permission =
            etcd_client::Permission::new(kind, span.start.clone()).with_range_end(span.end.clone());
        let mut auth = self.auth();
        let grant = auth.role_grant_permission(role, permission);
        let what = format!("to grant a permission to role {role}");
        self.call(&what, grant, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Takes a permission from a role.
    pub async fn forbid(&self, role: &str, span: &KeySpan) -> Result<(), SessionError> {
        let options = RoleRevokePermissionOptions::new().with_range_end(span.end.clone());
        let mut auth = self.auth();
        let revoke = auth.role_revoke_permission(role, span.start.clone(), Some(options));
        let what = format!("to revoke a permission of role {role}");
        self.call(&what, revoke, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Enables authentication; nothing happens if it is enabled. From then on a client is who its
    /// certificate says, and may do what the roles of that user permit.
    pub async fn enable_auth(&self) -> Result<(), SessionError> {
        let mut auth = self.auth();
        let header =
            |reply: &etcd_client::AuthEnableResponse| -> Option<ResponseHeader> { reply.header().cloned() };
        self.call("to enable authentication", auth.auth_enable(), header).await.map(drop)
    }

    fn auth(&self) -> AuthClient {
        self.client.auth_client()
    }
}
