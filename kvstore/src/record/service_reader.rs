//! Reads a service again that has changed a little.
//!
//! A service of 5,000 backends is half a megabyte of JSON, written as a whole when one pod comes or goes.
//! What was read last is kept; of a new value only the backends in and around the changed bytes are
//! decoded. That gives exactly what decoding the whole would give: the bytes before and after are the same
//! and begin and end between two members of the same object, so a parser comes to them in the same state
//! and reads the same from them. Whenever something is not as expected, the whole is decoded.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use super::port::{self, WirePortMap};
use super::{MAX_VALUE, PortMap, Record, RecordError, Service, net};

/// Shorter values are decoded as a whole.
const LARGE: usize = 64 << 10;
/// Longest stretch that is decoded by itself.
const STRETCH: usize = 16 << 10;
/// Values that are kept, in bytes. What is more is decoded as a whole each time.
const KEPT: usize = 16 << 20;
/// Bytes that are compared at once.
const BLOCK: usize = 4096;

/// Reads the services of one cluster.
#[derive(Debug)]
pub struct ServiceReader {
    large: usize,
    known: HashMap<String, Known>,
    bytes: usize,
}

/// A large value and what it says.
#[derive(Debug)]
struct Known {
    value: Vec<u8>,
    /// Where its backends stand, in order.
    members: Vec<Member>,
    service: Service,
}

/// A name and its value within an object: first byte, and the first one behind.
#[derive(Clone, Copy, Debug)]
struct Member {
    start: usize,
    end: usize,
}

impl Default for ServiceReader {
    fn default() -> Self {
        Self::keeping_from(LARGE)
    }
}

impl ServiceReader {
    /// One that decodes values of less than `large` bytes as a whole.
    pub fn keeping_from(large: usize) -> Self {
        Self { large, known: HashMap::new(), bytes: 0 }
    }

    /// As [`Service::decode`].
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn read(&mut self, suffix: &str, value: &[u8]) -> Result<Cow<'_, Service>, RecordError> {
        if value.len() < self.large || value.len() > MAX_VALUE {
            self.forget(suffix);
            return Service::decode(suffix, value).map(Cow::Owned);
        }
        let edit = self.known.get(suffix).and_then(|known| known.compare(value));
        if let (Some(edit), Some(known)) = (edit, self.known.get_mut(suffix)) {
            self.bytes = self.bytes - known.value.len() + value.len();
            known.apply(edit);
        } else {
            let service = Service::decode(suffix, value)?;
            self.forget(suffix);
            let members = backends(value).filter(|members| members.len() == service.backends.len());
            let Some(members) = members.filter(|_| self.bytes + value.len() <= KEPT) else {
                return Ok(Cow::Owned(service));
            };
            self.bytes += value.len();
            self.known.insert(suffix.to_owned(), Known { value: value.to_vec(), members, service });
        }
        // In both cases it is known by now.
        self.known
            .get(suffix)
            .map(|known| Cow::Borrowed(&known.service))
            .map_or_else(|| Service::decode(suffix, value).map(Cow::Owned), Ok)
    }

    /// The service is gone.
    pub fn forget(&mut self, suffix: &str) {
        if let Some(known) = self.known.remove(suffix) {
            self.bytes -= known.value.len();
        }
    }
}

/// A stretch of whole members that is to be replaced.
struct Edit {
    /// Indices of the members.
    first: usize,
    last: usize,
    /// Their bytes.
    old: Member,
    new: Vec<u8>,
    members: Vec<Member>,
    removed: Vec<IpAddr>,
    added: Vec<(IpAddr, PortMap)>,
}

impl Known {
    /// What differs in `value`; none if the whole has to be decoded.
    fn compare(&self, value: &[u8]) -> Option<Edit> {
        let before = common_prefix(&self.value, value);
        let after = common_suffix(&self.value[before..], &value[before..]);
        let changed = Member { start: before, end: self.value.len() - after };
        // One more on each side, so that commas are inside the stretch, however it has changed.
        let first = self.members.partition_point(|member| member.start <= changed.start).checked_sub(1)?;
        let last = self.members.partition_point(|member| member.end < changed.end);
        let (first, last) = (first.saturating_sub(1), (last + 1).min(self.members.len().checked_sub(1)?));
        let old = Member { start: self.members[first].start, end: self.members[last].end };
        if old.end < changed.end {
            return None;
        }
        let end = value.len() - (self.value.len() - old.end);
        let new = value.get(old.start..end).filter(|new| new.len() <= STRETCH)?;
        let removed =
            decode(&self.value[old.start..old.end])?.into_iter().map(|(ip, _)| ip).collect::<Vec<_>>();
        let added = decode(new)?;
        let is_taken = |ip: IpAddr| self.service.backends.get(ip).is_some() && !removed.contains(&ip);
        let doubled = added
            .iter()
            .enumerate()
            .any(|(at, (ip, _))| is_taken(*ip) || added[..at].iter().any(|(other, _)| other == ip));
        // Ports that were given up stay behind: once they are many, start afresh.
        let worn = self.service.backends.distinct_ports() > 64 + self.service.backends.len() / 8;
        if doubled || worn || added.is_empty() {
            return None;
        }
        let members = Scanner { json: &enclosed(b"{", new, b"}"), at: 0 }.object()?;
        let shift =
            |member: Member| Member { start: member.start - 1 + old.start, end: member.end - 1 + old.start };
        let members = members.into_iter().map(shift).collect();
        Some(Edit { first, last, old, new: new.to_vec(), members, removed, added })
    }

    fn apply(&mut self, edit: Edit) {
        let Edit { first, last, old, new, members, removed, added } = edit;
        for member in &mut self.members[last + 1..] {
            // The new length minus the old one may be negative; the sum is not.
            member.start = member.start + new.len() - (old.end - old.start);
            member.end = member.end + new.len() - (old.end - old.start);
        }
        self.members.splice(first..=last, members);
        self.value.splice(old.start..old.end, new);
        let backends = &mut self.service.backends;
        for ip in removed.iter().filter(|ip| !added.iter().any(|(added, _)| added == *ip)) {
            backends.remove(*ip);
        }
        added.into_iter().for_each(|(ip, ports)| backends.insert(ip, ports));
    }
}

/// Members of the object `backends`, as if they were all of them; none if anything is wrong with them.
fn decode(members: &[u8]) -> Option<Vec<(IpAddr, PortMap)>> {
    /// In the order in which they stand, doubled ones too.
    struct Members(Vec<(String, WirePortMap)>);

    impl<'de> Deserialize<'de> for Members {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Each;
            impl<'de> Visitor<'de> for Each {
                type Value = Members;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a map")
                }
                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                    let mut members = Vec::new();
                    while let Some(member) = map.next_entry()? {
                        members.push(member);
                    }
                    Ok(Members(members))
                }
            }
            deserializer.deserialize_map(Each)
        }
    }

    /// As deep as in the whole record: parsers have a limit. Nothing may follow the object, or the stretch
    /// would have closed it and opened another one: `},"other":{` in place of a comma.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wire {
        backends: Members,
    }

    let wire: Wire = serde_json::from_slice(&enclosed(br#"{"backends":{"#, members, b"}}")).ok()?;
    let decode = |(ip, ports): (String, WirePortMap)| {
        Some((net::address("backends", &ip).ok()?, port::decode(ports).ok()?))
    };
    wire.backends.0.into_iter().map(decode).collect()
}

fn enclosed(before: &[u8], inner: &[u8], after: &[u8]) -> Vec<u8> {
    [before, inner, after].concat()
}

/// Where the backends stand in a record that has been decoded without an error.
fn backends(value: &[u8]) -> Option<Vec<Member>> {
    let mut scanner = Scanner { json: value, at: 0 };
    scanner.space();
    for field in scanner.object()? {
        let field_text = &value[field.start..field.end];
        let name = &field_text[..Scanner { json: field_text, at: 0 }.string()?];
        if name.contains(&b'\\') {
            // It could be any name.
            return None;
        }
        if name == br#""backends""# {
            let mut scanner = Scanner { json: value, at: field.start + name.len() };
            scanner.space();
            scanner.expect(b':')?;
            scanner.space();
            return scanner.object();
        }
    }
    None
}

/// Finds its way through JSON that is known to be right.
struct Scanner<'a> {
    json: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    /// Skips an object; gives its members.
    fn object(&mut self) -> Option<Vec<Member>> {
        let mut members = Vec::new();
        self.expect(b'{')?;
        self.space();
        if self.peek()? == b'}' {
            return Some(members);
        }
        loop {
            let start = self.at;
            self.string()?;
            self.space();
            self.expect(b':')?;
            self.space();
            self.value()?;
            members.push(Member { start, end: self.at });
            self.space();
            match self.peek()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Some(members);
                }
                _ => return None,
            }
            self.space();
        }
    }

    fn value(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        loop {
            match self.peek()? {
                b'"' => drop(self.string()?),
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                }
                b'}' | b']' if depth > 0 => {
                    depth -= 1;
                    self.at += 1;
                }
                // Behind a number or a word.
                b'}' | b']' | b',' if depth == 0 => return Some(()),
                _ => {
                    self.at += 1;
                    continue;
                }
            }
            if depth == 0 {
                return Some(());
            }
        }
    }

    /// Skips a string; gives where it ends.
    fn string(&mut self) -> Option<usize> {
        self.expect(b'"')?;
        loop {
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    return Some(self.at);
                }
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
    }

    fn space(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn peek(&self) -> Option<u8> {
        self.json.get(self.at).copied()
    }
}

fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    let blocks = a.chunks_exact(BLOCK).zip(b.chunks_exact(BLOCK)).take_while(|(a, b)| a == b).count();
    let start = blocks * BLOCK;
    start + a[start..].iter().zip(&b[start..]).take_while(|(a, b)| a == b).count()
}

fn common_suffix(a: &[u8], b: &[u8]) -> usize {
    let blocks = a.rchunks_exact(BLOCK).zip(b.rchunks_exact(BLOCK)).take_while(|(a, b)| a == b).count();
    let end = blocks * BLOCK;
    let (a, b) = (&a[..a.len() - end], &b[..b.len() - end]);
    end + a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{Rng, SeedableRng};

    use super::*;

    const SUFFIX: &str = "shop/orders";

    fn record(backends: &str) -> String {
        format!(
            r#"{{"cluster":"beta","namespace":"shop","name":"orders","frontends":{{"10.0.0.1":{{"http":{{"Protocol":"TCP","Port":80}}}}}},"backends":{{{backends}}},"hostnames":{{}},"labels":{{"backends":"{{"}},"selector":{{}},"includeExternal":true,"shared":true,"clusterID":2}}"#
        )
    }

    fn backend(rng: &mut StdRng) -> String {
        let port = rng.random_range(8080..8082);
        format!(r#""10.1.0.{}":{{"http":{{"Protocol":"TCP","Port":{port}}}}}"#, rng.random_range(0..40))
    }

    /// One of many ways to change a value; some leave JSON, some not.
    fn mutate(rng: &mut StdRng, value: &mut Vec<u8>) {
        const PIECES: [&str; 26] = [
            ",",
            "{",
            "}",
            "\"",
            "\\",
            ":",
            " ",
            "0",
            "1",
            "[",
            "]",
            "null",
            "},",
            "}}",
            ",,",
            r#","::ffff:10.1.0.1":{}"#,
            r#","fd00::1":{}"#,
            r#","fd00:0::1":{}"#,
            r#"}},"backends":{"#,
            r#","10.1.0.1":{}"#,
            r#""10.1.0.1":{},"#,
            r#"},"shared":false,"x":{"#,
            r#"},"x":{"#,
            r#"},"backends":{"#,
            r#"{"a":"#,
            "\u{e9}",
        ];
        let at = rng.random_range(0..=value.len());
        match rng.random_range(0..9) {
            0 => {
                let piece = backend(rng) + ",";
                let text = String::from_utf8_lossy(value).into_owned();
                if let Some(start) = text.find(r#""10.1"#) {
                    value.splice(start..start, piece.bytes());
                }
            }
            1 | 2 => {
                // A whole backend goes, comes or changes its place.
                let text = String::from_utf8_lossy(value).into_owned();
                let starts: Vec<usize> = text.match_indices(r#","10.1"#).map(|(at, _)| at).collect();
                if let (Some(from), Some(to)) = (starts.choose(rng), starts.choose(rng)) {
                    let piece: Vec<u8> = value[*from.min(to)..*from.max(to)].to_vec();
                    match rng.random_range(0..3) {
                        0 => drop(value.drain(*from.min(to)..*from.max(to))),
                        1 => drop(value.splice(*to..*to, piece)),
                        _ => {
                            let piece = format!(",{}", backend(rng));
                            value.splice(*to..*to, piece.bytes());
                        }
                    }
                }
            }
            3 => {
                let end = rng.random_range(at..=value.len().min(at + 60));
                value.drain(at..end);
            }
            4 => {
                if let Some(byte) = value.get_mut(at) {
                    *byte = *b"0123456789\"{},:".choose(rng).unwrap();
                }
            }
            7 => {
                // Something in place of a comma between two backends.
                let text = String::from_utf8_lossy(value).into_owned();
                let commas: Vec<usize> = text.match_indices(r#","10.1"#).map(|(at, _)| at).collect();
                if let Some(comma) = commas.choose(rng) {
                    let piece = *PIECES.choose(rng).unwrap();
                    value.splice(*comma..=*comma, piece.bytes());
                }
            }
            5 => {
                let end = rng.random_range(at..=value.len().min(at + 80));
                let piece: Vec<u8> = value[at..end].to_vec();
                value.splice(at..at, piece);
            }
            _ => {
                let piece = *PIECES.choose(rng).unwrap();
                value.splice(at..at, piece.bytes());
            }
        }
    }

    #[test]
    fn gives_what_decoding_the_whole_gives() {
        let (mut read, mut edited) = (0, 0);
        for seed in 0..1_000 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut reader = ServiceReader::keeping_from(0);
            let count = rng.random_range(0..12);
            let backends: Vec<String> = (0..count).map(|_| backend(&mut rng)).collect();
            let mut good = record(&backends.join(",")).into_bytes();
            for _ in 0..20 {
                let mut value = good.clone();
                for _ in 0..rng.random_range(1..3) {
                    mutate(&mut rng, &mut value);
                }
                let known = reader.known.get(SUFFIX);
                edited += usize::from(known.is_some_and(|known| known.compare(&value).is_some()));
                let whole = Service::decode(SUFFIX, &value);
                let incremental = reader.read(SUFFIX, &value).map(Cow::into_owned);
                assert_eq!(incremental, whole, "seed {seed}: {}", String::from_utf8_lossy(&value));
                if let Some(known) = reader.known.get(SUFFIX).filter(|_| whole.is_ok()) {
                    assert_eq!(known.value, value, "seed {seed}");
                    let fresh = super::backends(&value).unwrap();
                    let spans =
                        |members: &[Member]| -> Vec<_> { members.iter().map(|m| (m.start, m.end)).collect() };
                    assert_eq!(spans(&known.members), spans(&fresh), "seed {seed}");
                    assert_eq!(reader.bytes, value.len());
                }
                read += usize::from(whole.is_ok());
                if whole.is_ok() {
                    good = value;
                }
            }
        }
        assert!(read > 5_000 && edited > 800, "{read} could be read, {edited} in part");
    }

    #[test]
    fn a_stretch_that_leaves_the_backends_is_decoded_as_a_whole() {
        let one = r#""10.1.0.1":{"http":{"Protocol":"TCP","Port":1}}"#;
        let members =
            [one, &one.replace("0.1", "0.2"), &one.replace("0.1", "0.3"), &one.replace("0.1", "0.4")];
        for between in [r#"},"other":{"#, r#"},"shared":false,"other":{"#, r#"},"backends":{"#] {
            let mut reader = ServiceReader::keeping_from(0);
            reader.read(SUFFIX, record(&members.join(",")).as_bytes()).unwrap();
            let value =
                record(&members.join(",").replacen(",\"10.1.0.3", &format!("{between}\"10.1.0.3"), 1));
            assert!(reader.known[SUFFIX].compare(value.as_bytes()).is_none(), "{value}");
            let read = reader.read(SUFFIX, value.as_bytes()).map(Cow::into_owned);
            assert_eq!(read, Service::decode(SUFFIX, value.as_bytes()), "{value}");
        }
    }

    #[test]
    fn small_and_forgotten_values_are_not_kept() {
        let mut reader = ServiceReader::default();
        reader.read(SUFFIX, record("").as_bytes()).unwrap();
        assert!(reader.known.is_empty());
        reader.large = 0;
        reader.read(SUFFIX, record(r#""10.1.0.1":{}"#).as_bytes()).unwrap();
        assert_eq!(reader.known.len(), 1);
        reader.forget(SUFFIX);
        assert_eq!((reader.known.len(), reader.bytes), (0, 0));
    }
}
