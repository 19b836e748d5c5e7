//! The fuzzer's corpus, without the fuzzer: what was found once stays found, on every machine.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test it is an assertion")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clustermesh_fuzz_properties::TARGETS;

/// Targets whose inputs are choices.
const STORIES: [&str; 4] = ["service_reader", "reflector", "agent", "mirror"];
/// Inputs of each.
const RANDOM: u64 = 300;
/// All of it.
const MOST_BYTES: u64 = 1 << 20;

#[test]
fn everything_in_the_corpus_holds() {
    let mut bytes = 0;
    for target in TARGETS {
        let inputs = inputs(target.name);
        assert!(inputs.len() >= 10, "{}: only {} inputs", target.name, inputs.len());
        for path in inputs {
            let input = fs::read(&path).unwrap();
            bytes += u64::try_from(input.len()).unwrap();
            let held = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(held.is_ok(), "does not hold for {}", path.display());
        }
    }
    assert!(bytes < MOST_BYTES, "the corpus has {bytes} bytes: minimise it");
}

/// Where the bytes are choices, any bytes make a story. The seeds are always the same.
#[test]
fn random_stories_hold() {
    for target in TARGETS.iter().filter(|target| STORIES.contains(&target.name)) {
        for seed in 1..=RANDOM {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut input = Vec::new();
            while input.len() < 1000 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                input.extend(random.to_le_bytes());
            }
            let held = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(held.is_ok(), "{} does not hold for seed {seed}", target.name);
        }
    }
}

/// `cargo fuzz` and this test know the same targets.
#[test]
fn every_target_has_its_program_and_its_corpus() {
    let names: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let programs = entries(&fuzz().join("fuzz_targets"));
    let programs: BTreeSet<String> =
        programs.iter().map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(programs, names);
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    let corpora = entries(&fuzz().join("corpus"));
    let corpora: BTreeSet<String> =
        corpora.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(corpora, names);
    for name in names {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml lacks {name}");
        let program = fs::read_to_string(fuzz().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(program.contains(&format!("run(\"{name}\",")), "{program}");
    }
}

fn inputs(target: &str) -> Vec<PathBuf> {
    entries(&fuzz().join("corpus").join(target))
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}
