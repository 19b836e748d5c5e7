//! What test programs print, counted.

/// What became of one suite.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Suite {
    pub(crate) name: String,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) ignored: usize,
    /// Names of what failed, as far as they are known.
    pub(crate) failures: Vec<String>,
}

impl Suite {
    /// Takes another one's counts, whose failures are to be told from ours.
    pub(crate) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        let named = other.failures.iter().map(|failure| match other.name.as_str() {
            "" => failure.clone(),
            name => format!("{name}: {failure}"),
        });
        self.failures.extend(named);
    }

    /// Counts something that failed.
    pub(crate) fn fail(&mut self, what: impl Into<String>) {
        self.failed += 1;
        self.failures.push(what.into());
    }
}

/// Whether a line of a test program is of no interest: nothing, or a test that passed.
pub(crate) fn is_noise(line: &str) -> bool {
    let line = line.trim();
    (line.starts_with("test ") && line.ends_with("... ok")) || line.is_empty()
}

/// A test, and what was said of it.
#[derive(Debug, PartialEq)]
pub(crate) struct Named {
    /// Name of the test program.
    pub(crate) program: String,
    pub(crate) test: String,
    /// `ok`, `FAILED`, or `ignored` and why.
    pub(crate) result: String,
}

/// Counts what test programs print, one after the other.
#[derive(Default)]
pub(crate) struct Tally {
    current: String,
    pub(crate) suites: Vec<Suite>,
    pub(crate) tests: Vec<Named>,
    /// How many of the tests are in a suite already.
    counted: usize,
}

impl Tally {
    /// Takes one line of what `cargo test` prints.
    pub(crate) fn line(&mut self, line: &str) {
        let trimmed = line.trim();
        if let Some(rest) = trimmed.strip_prefix("Running ") {
            self.current = program(rest);
        } else if let Some(name) = trimmed.strip_prefix("Doc-tests ") {
            self.current = format!("{name} (documentation)");
        } else if let Some((test, result)) =
            trimmed.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        {
            let program = self.current.split(' ').next().unwrap_or_default().to_owned();
            self.tests.push(Named { program, test: test.to_owned(), result: result.to_owned() });
        } else if let Some(rest) = trimmed.strip_prefix("test result: ") {
            let count = |what: &str| {
                rest.split([';', '.'])
                    .filter_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
                    .next()
                    .unwrap_or(0)
            };
            let failed = self.tests[self.counted..].iter().filter(|test| test.result == "FAILED");
            let suite = Suite {
                name: self.current.clone(),
                passed: count("passed"),
                failed: count("failed"),
                ignored: count("ignored"),
                failures: failed.map(|test| test.test.clone()).collect(),
            };
            self.counted = self.tests.len();
            // Programs without tests are not worth a line.
            if suite.passed + suite.failed + suite.ignored > 0 {
                self.suites.push(suite);
            }
        }
    }
}

/// `unittests src/lib.rs (target/debug/deps/kvstore-0123)` is `kvstore src/lib.rs`.
fn program(running: &str) -> String {
    let (source, path) = running.split_once(" (").unwrap_or((running, ""));
    let source = source.trim_start_matches("unittests ");
    let file = path.trim_end_matches(')').rsplit('/').next().unwrap_or_default();
    let name = file.rsplit_once('-').map_or(file, |(name, _hash)| name);
    format!("{name} {source}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_cargo_test_prints() {
        let mut tally = Tally::default();
        for line in [
            "     Running unittests src/lib.rs (target/debug/deps/clustermesh_kvstore-0c8beae3d5)",
            "test result: ok. 41 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.10s",
            "     Running tests/wire.rs (target/debug/deps/wire-0c8beae3d5)",
            "test keys::two_are_one ... FAILED",
            "test keys::one_is_two ... ok",
            "test slow has been running for over 60 seconds",
            "test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s",
            "   Doc-tests xtask",
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            tally.line(line);
        }
        let suite = |name: &str, passed, failed, ignored, failures: &[&str]| Suite {
            name: name.into(),
            passed,
            failed,
            ignored,
            failures: failures.iter().map(|&failure| failure.to_owned()).collect(),
        };
        let expected = [
            suite("clustermesh_kvstore src/lib.rs", 41, 0, 2, &[]),
            suite("wire tests/wire.rs", 3, 1, 0, &["keys::two_are_one"]),
        ];
        assert_eq!(tally.suites, expected);
        let named = |test: &str, result: &str| Named {
            program: "wire".into(),
            test: test.into(),
            result: result.into(),
        };
        assert_eq!(tally.tests, [named("keys::two_are_one", "FAILED"), named("keys::one_is_two", "ok")]);

        let mut sum = Suite { name: "all".into(), ..Suite::default() };
        tally.suites.iter().for_each(|suite| sum.add(suite));
        sum.fail("the end");
        assert_eq!((sum.passed, sum.failed, sum.ignored), (44, 2, 2));
        assert_eq!(sum.failures, ["wire tests/wire.rs: keys::two_are_one", "the end"]);
    }
}
