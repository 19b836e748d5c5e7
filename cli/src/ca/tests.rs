use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::*;
use crate::error::exit_status;

fn leaf(role: Role, cluster: &str) -> Leaf {
    let validity = Validity::days(30).unwrap();
    Leaf { role, cluster: cluster.parse().unwrap(), names: Default::default(), shared: false, validity }
}

fn authority(dir: &Path) -> Authority {
    let authority = Authority::init(dir, "Test CA", Validity::days(60).unwrap()).unwrap();
    let names = ["192.0.2.1".to_owned()].into();
    authority.issue(&Leaf { names, ..leaf(Role::Server, "alpha") }, false, false).unwrap();
    authority.issue(&Leaf { shared: true, ..leaf(Role::Remote, "beta") }, false, false).unwrap();
    authority
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        match entry.path().is_dir() {
            true => all.extend(
                files(&entry.path()).into_iter().map(|(file, text)| (format!("{name}/{file}"), text)),
            ),
            false => drop(all.insert(name, fs::read(entry.path()).unwrap())),
        }
    }
    all
}

#[test]
fn keys_are_private_and_never_overwritten_unasked() {
    let tmp = tempfile::tempdir().unwrap();
    let authority = authority(tmp.path());
    let before = files(tmp.path());
    assert_eq!(
        before.keys().map(String::as_str).collect::<Vec<_>>(),
        ["alpha/server.crt", "alpha/server.key", "beta/remote.crt", "beta/remote.key", "ca.crt", "ca.key"]
    );
    for name in before.keys().filter(|name| name.ends_with(".key")) {
        assert_eq!(
            fs::metadata(tmp.path().join(name)).unwrap().permissions().mode() & 0o777,
            0o600,
            "{name}"
        );
    }
    let again = Authority::init(tmp.path(), "Another", Validity::days(60).unwrap()).unwrap_err();
    assert!(again.to_string().contains("holds an authority already"), "{again}");
    let again = authority.issue(&leaf(Role::Server, "alpha"), false, false).unwrap_err();
    assert!(again.to_string().contains("--replace"), "{again}");
    let too_long = Leaf { validity: Validity::days(61).unwrap(), ..leaf(Role::Admin, "alpha") };
    let too_long = authority.issue(&too_long, false, false).unwrap_err();
    assert!(too_long.to_string().contains("longer than the authority"), "{too_long}");
    for error in [again, too_long, Authority::open(&tmp.path().join("alpha")).unwrap_err()] {
        assert_eq!(exit_status(&error), 2, "{error}");
    }
    assert_eq!(files(tmp.path()), before);

    authority.issue(&leaf(Role::Server, "alpha"), true, false).unwrap();
    let after = files(tmp.path());
    assert_eq!(after["alpha/server.key"], before["alpha/server.key"]);
    assert_ne!(after["alpha/server.crt"], before["alpha/server.crt"]);
    authority.issue(&leaf(Role::Server, "alpha"), true, true).unwrap();
    assert_ne!(files(tmp.path())["alpha/server.key"], before["alpha/server.key"]);
}

#[test]
fn days_that_make_no_sense_are_refused() {
    for days in [0, -1, i32::MAX] {
        assert_eq!(exit_status(&Validity::days(days).unwrap_err()), 2, "{days}");
    }
}

#[test]
fn an_interrupted_init_is_completed() {
    let tmp = tempfile::tempdir().unwrap();
    let trusted = fs::read(authority(tmp.path()).bundle()).unwrap();
    fs::remove_file(tmp.path().join("ca.crt")).unwrap();
    assert_eq!(fs::read(Authority::open(tmp.path()).unwrap().bundle()).unwrap(), trusted);
}

/// At every moment of a rotation all certificates are signed by an authority that is trusted, and each
/// step can be run again.
#[test]
fn a_rotation_never_breaks_the_chain_of_trust() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    authority(dir);
    let open = || Authority::open(dir).unwrap();
    let check = |authorities: usize, of_the_signer: usize| {
        let trusted = open().trusted().unwrap();
        assert_eq!(trusted.len(), authorities);
        let issued = open().issued().unwrap();
        assert!(issued.iter().all(|one| trusted.iter().any(|ca| one.seen.is_signed_by(ca))));
        assert_eq!(issued.iter().filter(|one| open().has_signed(&one.seen)).count(), of_the_signer);
    };
    check(1, 2);
    let refused = open().reissue(30, false).unwrap_err();
    assert!(refused.to_string().contains("no rotation"), "{refused}");

    let begin = || open().begin_rotation("Test CA", Validity::days(60).unwrap());
    begin().unwrap();
    check(2, 2);
    let next = fs::read(dir.join("next.key")).unwrap();
    begin().unwrap();
    assert_eq!(fs::read(dir.join("next.key")).unwrap(), next, "a repeated step makes no third authority");
    let early = open().finish_rotation().unwrap_err();
    assert!(early.to_string().contains("does not sign yet"), "{early}");

    // Interrupted after one of the two: that one is of the new authority, the other follows.
    let old = fs::read(dir.join("alpha/server.crt")).unwrap();
    let before = open().issued().unwrap();
    open().reissue(30, false).unwrap();
    check(2, 2);
    fs::write(dir.join("alpha/server.crt"), old).unwrap();
    check(2, 1);
    let early = open().finish_rotation().unwrap_err();
    assert!(early.to_string().contains("alpha/server.crt"), "{early}");
    let began = begin().unwrap_err();
    assert!(began.to_string().contains("under way"), "{began}");
    open().reissue(30, false).unwrap();
    check(2, 2);
    for (old, new) in before.iter().zip(open().issued().unwrap()) {
        assert_eq!((&old.seen.common_name, &old.seen.names), (&new.seen.common_name, &new.seen.names));
    }
    open().finish_rotation().unwrap();
    check(1, 2);
    open().finish_rotation().unwrap();
}
