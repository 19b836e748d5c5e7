//! JSON as Go's `encoding/json` writes it.

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::ser::{CharEscape, CompactFormatter, Formatter, Serializer};

use super::{MAX_VALUE, RecordError};

pub(super) fn decode<T: DeserializeOwned>(value: &[u8]) -> Result<T, RecordError> {
    if value.len() > MAX_VALUE {
        return Err(RecordError::TooLarge(value.len()));
    }
    serde_json::from_slice(value).map_err(|error| RecordError::BadJson(error.to_string().into()))
}

pub(super) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    value
        .serialize(&mut Serializer::with_formatter(&mut out, GoFormatter))
        // Wire types have string keys only, and a Vec takes every write.
        .expect("wire types serialize into memory");
    out
}

/// For maps and lists: Go writes `null` for one that was never made.
pub(super) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Go escapes `<`, `>`, `&` (so that JSON can stand in HTML) and the two Unicode line separators.
struct GoFormatter;

impl Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, text: &str) -> io::Result<()> {
        let mut rest = text;
        while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            let (plain, special) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut chars = special.chars();
            if let Some(c) = chars.next() {
                write!(writer, "\\u{:04x}", u32::from(c))?;
            }
            rest = chars.as_str();
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        CompactFormatter.write_char_escape(writer, escape)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn escapes_like_go() {
        // Output of Go's json.Marshal for the same string.
        let text = "a<b>&\u{2028}\u{2029}\"\\\n\u{1}\u{8}é";
        let go = r#""a\u003cb\u003e\u0026\u2028\u2029\"\\\n\u0001\bé""#;
        assert_eq!(String::from_utf8(super::encode(&text)).unwrap(), go);
    }
}
