//! Reading a service in part is reading it. Values of one service, one after another: each after the first is
//! the one before with one stretch replaced, for that is what the reader is made for.

use arbitrary::Unstructured;
use clustermesh_kvstore::record::{Record as _, Service, ServiceReader};

const SUFFIX: &str = "shop/orders";
/// Values in a row.
const MOST: usize = 24;
/// More than that is no better at finding anything.
const LONGEST: usize = 4096;

pub(crate) fn run(input: &[u8]) {
    let mut choices = Unstructured::new(input);
    let mut reader = ServiceReader::keeping_from(0);
    let mut value = first(&mut choices).into_bytes();
    for _ in 0..MOST {
        let whole = Service::decode(SUFFIX, &value);
        let in_part = reader.read(SUFFIX, &value).map(std::borrow::Cow::into_owned);
        assert_eq!(in_part, whole, "{}", String::from_utf8_lossy(&value));
        if choices.is_empty() {
            break;
        }
        let good = whole.is_ok().then(|| value.clone());
        if edit(&mut value, &mut choices).is_none() || value.len() > LONGEST {
            break;
        }
        // What cannot be read changes nothing: the next value is again one edit from the last good one.
        if let Some(good) = good
            && Service::decode(SUFFIX, &value).is_err()
        {
            assert!(reader.read(SUFFIX, &value).is_err());
            value = good;
        }
    }
}

fn first(choices: &mut Unstructured<'_>) -> String {
    let count = choices.int_in_range(0..=12).unwrap_or(0);
    let backends: Vec<String> = (0..count).map(|_| backend(choices)).collect();
    format!(
        r#"{{"cluster":"beta","namespace":"shop","name":"orders","frontends":{{}},"backends":{{{}}},"labels":{{"backends":"{{"}},"shared":true,"clusterID":2}}"#,
        backends.join(",")
    )
}

fn backend(choices: &mut Unstructured<'_>) -> String {
    let (last, port) = (choices.int_in_range(0..=40).unwrap_or(0), choices.int_in_range(0..=2).unwrap_or(0));
    format!(r#""10.1.0.{last}":{{"http":{{"Protocol":"TCP","Port":{}}}}}"#, 8080 + port)
}

/// Puts something in place of a stretch.
fn edit(value: &mut Vec<u8>, choices: &mut Unstructured<'_>) -> Option<()> {
    let start = choices.int_in_range(0..=value.len()).ok()?;
    let length = choices.int_in_range(0..=(value.len() - start).min(90)).ok()?;
    let new: Vec<u8> = match choices.int_in_range(0..=4).ok()? {
        0 => Vec::new(),
        1 => format!(",{}", backend(choices)).into_bytes(),
        2 => format!("{},", backend(choices)).into_bytes(),
        3 => choices.choose(&PIECES).ok()?.as_bytes().to_vec(),
        _ => {
            let length = choices.int_in_range(0..=12).ok()?;
            choices.bytes(length.min(choices.len())).ok()?.to_vec()
        }
    };
    // Often between two backends, where an edit leaves a value that can be read.
    let start = match choices.ratio(3, 4).ok()? {
        true => value[start..].iter().position(|byte| *byte == b',').map_or(start, |at| start + at),
        false => start,
    };
    let length = match choices.ratio(1, 2).ok()? {
        true => 0,
        false => length.min(value.len() - start),
    };
    value.splice(start..start + length, new);
    Some(())
}

const PIECES: [&str; 14] = [
    ",",
    "}",
    "{",
    "\\",
    "\"",
    " ",
    "null",
    r#","::ffff:10.1.0.1":{}"#,
    r#","fd00::1":{}"#,
    r#","fd00:0::1":{}"#,
    r#"}},"backends":{"#,
    r#"},"shared":false,"x":{"#,
    r#"{"a":"#,
    "\u{e9}",
];
