//! Objects of all kinds by one type, as they came.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{ApiResource, Resource};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::objects::{Object, ObjectKind};
use crate::source::wire::{ReadError, read};

/// An object as the server wrote it, and what a watch has to know of it.
///
/// The client's library lists and watches this instead of each kind's own type: what it takes to follow a kind
/// is in the program once, not once per kind, and an object of another form than ours does not end the watch.
/// Of an event, its type has to stand before the object, as servers write it.
#[derive(Clone, Debug)]
pub(super) struct Raw {
    meta: ObjectMeta,
    json: Box<RawValue>,
}

impl Raw {
    /// Reads all of it.
    pub(super) fn object(&self, kind: ObjectKind) -> Result<Object, ReadError> {
        read(kind, self.json.get())
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Head {
            metadata: Name,
        }

        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Name {
            #[serde(default)]
            name: Option<String>,
            #[serde(default)]
            namespace: Option<String>,
            #[serde(default)]
            resource_version: Option<String>,
        }

        let json = Box::<RawValue>::deserialize(deserializer)?;
        let Head { metadata: Name { name, namespace, resource_version } } =
            serde_json::from_str(json.get()).map_err(D::Error::custom)?;
        let meta = ObjectMeta { name, namespace, resource_version, ..ObjectMeta::default() };
        Ok(Self { meta, json })
    }
}

impl Resource for Raw {
    type DynamicType = ApiResource;
    type Scope = kube::core::DynamicResourceScope;

    fn kind(api: &ApiResource) -> Cow<'_, str> {
        api.kind.as_str().into()
    }

    fn group(api: &ApiResource) -> Cow<'_, str> {
        api.group.as_str().into()
    }

    fn version(api: &ApiResource) -> Cow<'_, str> {
        api.version.as_str().into()
    }

    fn plural(api: &ApiResource) -> Cow<'_, str> {
        api.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
