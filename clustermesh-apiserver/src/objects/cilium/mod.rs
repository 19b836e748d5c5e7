//! Cilium's own objects: what its agents and operator say of identities, endpoints and nodes.
//!
//! They are taken as Cilium's exporter takes them: what it passes over is passed over here, so that the
//! same objects give the same keys and values.

mod endpoint;
mod identity;
mod node;

pub use endpoint::{CiliumEndpoint, CiliumEndpointSlice};
pub(crate) use endpoint::{EndpointResource, SliceResource};
pub use identity::CiliumIdentity;
pub(crate) use identity::IdentityResource;
pub use node::CiliumNode;
pub(crate) use node::NodeResource;
