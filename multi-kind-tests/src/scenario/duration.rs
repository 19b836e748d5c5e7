//! Durations as people write them: `500ms`, `2s`, `1.5m`.

use crate::pace;
use serde::Deserialize;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A length of time in a scenario file, as long as that is on this machine ([`pace`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(pub Duration);

impl Span {
    /// So many milliseconds, on this machine ([`pace`]).
    pub fn millis(millis: u64) -> Self {
        Self(pace::slowed(Duration::from_millis(millis)))
    }

    /// So many seconds, on this machine ([`pace`]).
    pub fn seconds(seconds: u64) -> Self {
        Self(pace::slowed(Duration::from_secs(seconds)))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a length of time; write for example 500ms, 2s or 1m");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let seconds = match &text[digits.len()..] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            _ => return Err(wrong()),
        };
        let number: f64 = digits.parse().map_err(|_| wrong())?;
        Duration::try_from_secs_f64(number * seconds)
            .map(|span| Self(pace::slowed(span)))
            .map_err(|_| wrong())
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!("500ms".parse(), Ok(Span::millis(500)));
        assert_eq!("2s".parse(), Ok(Span::seconds(2)));
        assert_eq!("1.5m".parse(), Ok(Span::seconds(90)));
        for wrong in ["", "5", "s", "-1s", "5 parsecs", "1e400s"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong}");
        }
    }
}
