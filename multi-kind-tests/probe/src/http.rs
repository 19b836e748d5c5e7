//! The little of HTTP/1.1 that a probe needs: one request and one answer per connection.

use crate::whoami::Answer;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read, Write};

/// Bounds what a peer can make us hold.
const MAX_HEAD: u64 = 16 * 1024;
const MAX_BODY: u64 = 1024 * 1024;

/// Says who answered even if the body is an operator's own text.
const POD_HEADER: &str = "x-mesh-pod";
const CLUSTER_HEADER: &str = "x-mesh-cluster";
const NODE_HEADER: &str = "x-mesh-node";

/// Reads a request head and gives its method and path.
pub(crate) fn read_request(stream: impl Read) -> io::Result<(String, String)> {
    let mut reader = BufReader::new(stream.take(MAX_HEAD));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Err(io::Error::new(ErrorKind::InvalidData, "no HTTP request line"));
    };
    let request = (method.to_owned(), path.to_owned());
    loop {
        let mut header = String::new();
        match reader.read_line(&mut header)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            _ if header.trim_end().is_empty() => return Ok(request),
            _ => {}
        }
    }
}

/// Writes an answer with its headers in one write, so that it leaves in one segment.
pub(crate) fn write_answer(mut stream: impl Write, who: &Answer, body: &str, head: bool) -> io::Result<()> {
    let body_text = if head { "" } else { body };
    let text = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\
         {POD_HEADER}: {}\r\n{CLUSTER_HEADER}: {}\r\n{NODE_HEADER}: {}\r\n\r\n{body_text}",
        body.len(),
        who.pod,
        who.cluster,
        who.node
    );
    stream.write_all(text.as_bytes())
}

/// Writes a GET in one write.
pub(crate) fn write_request(mut stream: impl Write, authority: &str, path: &str) -> io::Result<()> {
    let text = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    stream.write_all(text.as_bytes())
}

/// Reads an answer: who gave it (headers first, else a JSON body) and its text.
pub(crate) fn read_answer(stream: impl Read) -> io::Result<(Option<Answer>, String)> {
    let mut reader = BufReader::new(stream.take(MAX_HEAD + MAX_BODY));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.is_empty() {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    match line.split_whitespace().nth(1) {
        Some("200") => {}
        status => {
            let status = status.unwrap_or("none");
            return Err(io::Error::new(ErrorKind::InvalidData, format!("HTTP status {status}")));
        }
    }
    let (mut pod, mut cluster, mut node, mut length) = (None, None, None, None);
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let header = header.trim_end();
        if header.is_empty() {
            break;
        }
        let Some((name, value)) = header.split_once(':') else { continue };
        let value = value.trim().to_owned();
        match name.to_ascii_lowercase().as_str() {
            POD_HEADER => pod = Some(value),
            CLUSTER_HEADER => cluster = Some(value),
            NODE_HEADER => node = Some(value),
            "content-length" => length = value.parse::<u64>().ok(),
            _ => {}
        }
    }
    let mut body = String::new();
    match length {
        Some(length) => {
            let got = reader.take(length).read_to_string(&mut body)?;
            if u64::try_from(got).is_ok_and(|got| got < length) {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        None => {
            reader.read_to_string(&mut body)?;
        }
    }
    let from_headers = pod.zip(cluster).map(|(pod, cluster)| Answer {
        pod,
        cluster,
        node: node.unwrap_or_default(),
        namespace: String::new(),
        remote_addr: String::new(),
    });
    let answer = serde_json::from_str(&body).ok().or(from_headers);
    Ok((answer, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who() -> Answer {
        Answer {
            pod: "orders-1".into(),
            namespace: "shop".into(),
            node: "n1".into(),
            cluster: "alpha".into(),
            remote_addr: "10.0.0.1:1".into(),
        }
    }

    #[test]
    fn answer_round_trip() {
        let body = serde_json::to_string(&who()).expect("plain struct");
        let mut wire = Vec::new();
        write_answer(&mut wire, &who(), &body, false).expect("memory");
        assert_eq!(read_answer(&wire[..]).expect("own answer"), (Some(who()), body));
    }

    #[test]
    fn own_text_is_attributed_by_headers() {
        let mut wire = Vec::new();
        write_answer(&mut wire, &who(), r#"{"Galaxy": "Alderaan"}"#, false).expect("memory");
        let (answer, body) = read_answer(&wire[..]).expect("own answer");
        assert_eq!(answer.expect("headers").cluster, "alpha");
        assert_eq!(body, r#"{"Galaxy": "Alderaan"}"#);
    }

    #[test]
    fn a_cut_answer_is_an_error() {
        let mut wire = Vec::new();
        write_answer(&mut wire, &who(), "0123456789", false).expect("memory");
        for length in 0..wire.len() {
            assert!(read_answer(&wire[..length]).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn request_round_trip() {
        let mut wire = Vec::new();
        write_request(&mut wire, "10.96.0.10", "/x").expect("memory");
        assert_eq!(read_request(&wire[..]).expect("own request"), ("GET".to_owned(), "/x".to_owned()));
        assert!(read_request(&wire[..wire.len() - 2]).is_err());
    }
}
