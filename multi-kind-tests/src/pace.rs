//! How fast the machine is that scenarios run on.
//!
//! Scenarios say how soon something has to happen on a machine of today. On an interpreted processor, as in
//! `cargo xtask vm`, all that takes several times as long. `CLUSTERMESH_TEST_SLOWNESS` says how many times: each
//! length of time in a scenario and each deadline of the runner is so many times longer, those in which nothing may
//! change as well. What has to happen stays what it is.

use std::sync::OnceLock;
use std::time::Duration;

/// The environment variable, a number from 1 to 100.
pub const VARIABLE: &str = "CLUSTERMESH_TEST_SLOWNESS";
const MOST: u32 = 100;

/// Reads the variable once; 1 if it is not set.
///
/// # Errors
/// If it is set to anything but a number from 1 to 100.
pub fn factor() -> Result<u32, String> {
    static FACTOR: OnceLock<Result<u32, String>> = OnceLock::new();
    FACTOR.get_or_init(|| std::env::var(VARIABLE).map_or(Ok(1), |text| parse(&text))).clone()
}

/// So long on this machine. A wrong factor counts as 1; who runs scenarios has asked for [`factor`] before.
pub fn slowed(duration: Duration) -> Duration {
    duration.saturating_mul(factor().unwrap_or(1))
}

fn parse(text: &str) -> Result<u32, String> {
    let number = text.trim().parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("{VARIABLE} is {text:?}; it has to be a number from 1 to {MOST}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_is_a_small_number() {
        assert_eq!(parse("4"), Ok(4));
        assert_eq!(parse(" 100 "), Ok(100));
        for wrong in ["", "0", "101", "-1", "2.5", "fast"] {
            assert!(parse(wrong).unwrap_err().contains("from 1 to 100"), "{wrong}");
        }
    }
}
