//! Files that are followed while programs run: the import policy, and what says where a cluster's etcd is.
//! The second comes out of a Secret that the other cluster's operator has handed over.

use clustermesh_apiserver::rights::users;
use clustermesh_kvstore::etcd::EtcdConfig;
use clustermesh_kvstore::import_policy::{Mode, PolicyFile};
use clustermesh_kvstore::key::Kind;

pub(crate) fn policy(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let file = match PolicyFile::parse(text) {
        Ok(file) => file,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert_eq!(PolicyFile::parse(text).as_ref(), Ok(&file));
    for cluster in ["alpha", "beta", "x"] {
        let cluster = cluster.parse().unwrap();
        let (rules, audited) = (file.rules_for(&cluster), file.clone().audited().rules_for(&cluster));
        assert_eq!(audited.mode, Mode::Audit);
        assert!(Kind::ALL.iter().all(|kind| rules.quotas.of(*kind) == audited.quotas.of(*kind)));
        rules.namespaces.admits("kube-system");
        rules.services.admits("shop/orders");
    }
}

pub(crate) fn configurations(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match EtcdConfig::parse(text) {
        Ok(config) => {
            assert!(!config.endpoints.is_empty());
            assert_eq!(EtcdConfig::parse(&config.to_yaml()).as_ref(), Ok(&config), "{}", config.to_yaml());
        }
        Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
    }
    if let Ok(users) = users::parse(text, &"alpha".parse().unwrap()) {
        assert!(users.values().all(|role| role != "root"));
    }
}
