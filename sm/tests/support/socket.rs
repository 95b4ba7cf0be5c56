//! One request over smd's socket, in bytes: no client of ours is in between.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Status and body of the answer.
pub fn ask(socket: &Path, method: &str, path: &str, body: &Value) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let len = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: smd\r\nconnection: close\r\n\
         content-length: {len}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}
