//! Names by pattern.

use std::fmt;
use std::str::FromStr;

/// A name in which `*` stands for any number of characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pattern(String);

impl Pattern {
    /// Whether the whole of `name` fits.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        let Some(mut part) = parts.next() else { return rest.is_empty() };
        // The leftmost place of each part leaves the most for those behind it.
        for next in parts {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
            part = next;
        }
        rest.ends_with(part)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._/*".contains(c);
        if text.is_empty() || text.len() > 512 || !text.chars().all(fits) {
            return Err(format!(
                "{text:?} is not a pattern of names: use lower-case letters, digits, '-', '.', and '*' for any text"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which names are let in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameFilter {
    /// Only these; none: all.
    pub allow: Option<Vec<Pattern>>,
    /// And of those, not these.
    pub deny: Vec<Pattern>,
}

impl NameFilter {
    /// Whether `name` is let in.
    pub fn admits(&self, name: &str) -> bool {
        let fits = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(name));
        self.allow.as_deref().is_none_or(fits) && !fits(&self.deny)
    }

    /// Everything is let in.
    pub fn is_open(&self) -> bool {
        self.allow.is_none() && self.deny.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(name)
    }

    #[test]
    fn a_star_is_any_text() {
        for (pattern, name) in
            [("*", ""), ("*", "a"), ("a*", "a"), ("web-*", "web-1"), ("*-db", "a-db-db"), ("a*b*c", "aXbXbc")]
        {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("a", "ab"), ("a", ""), ("web-*", "web"), ("a*a", "a"), ("a*b*c", "acb"), ("*-db", "db")]
        {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_the_definition(pattern in "[ab*]{1,6}", name in "[ab]{0,6}") {
            fn definition(pattern: &[u8], name: &[u8]) -> bool {
                match (pattern.split_first(), name.split_first()) {
                    (None, None) => true,
                    (Some((b'*', rest)), _) => {
                        definition(rest, name) || name.split_first().is_some_and(|(_, n)| definition(pattern, n))
                    }
                    (Some((p, rest)), Some((n, others))) => p == n && definition(rest, others),
                    _ => false,
                }
            }
            prop_assert_eq!(matches(&pattern, &name), definition(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
