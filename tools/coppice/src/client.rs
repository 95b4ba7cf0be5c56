//! HTTP and JSON to one daemon over its Unix socket.
//!
//! One connection per request: the CLI asks a handful of things and ends, and
//! a daemon that was restarted in between is found again without more ado.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::failure::{Failure, Outcome};

/// Longest answer read. A tree of 10,000 disks is some 6 MiB.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Longest a request may take. Merging a large chain with `--wait` is the
/// slowest by far, and is asked for with [`Daemon::post_slow`].
const REQUEST_S_MAX: u64 = 120;
/// Longest wait for what moves data.
const SLOW_REQUEST_S_MAX: u64 = 7 * 24 * 3600;

/// A daemon and where it listens.
#[derive(Debug, Clone)]
pub struct Daemon {
    name: &'static str,
    socket: PathBuf,
}

impl Daemon {
    /// The storage daemon of this run folder.
    pub fn smd(run: &Path) -> Self {
        Self { name: "smd", socket: run.join("smd.sock") }
    }

    /// The garbage collector of this run folder.
    pub fn gcd(run: &Path) -> Self {
        Self { name: "gcd", socket: run.join("gcd.sock") }
    }

    /// Asks for a document.
    pub fn get(&self, path: &str) -> Outcome<Value> {
        self.ask(Method::GET, path, None, REQUEST_S_MAX)
    }

    /// As [`Daemon::get`], for what reads as much as there is.
    pub fn get_slow(&self, path: &str) -> Outcome<Value> {
        self.ask(Method::GET, path, None, SLOW_REQUEST_S_MAX)
    }

    /// Asks for something to be done.
    pub fn post(&self, path: &str, body: &Value) -> Outcome<Value> {
        self.ask(Method::POST, path, Some(body), REQUEST_S_MAX)
    }

    /// As [`Daemon::post`], for what may take as long as the data is large.
    pub fn post_slow(&self, path: &str, body: &Value) -> Outcome<Value> {
        self.ask(Method::POST, path, Some(body), SLOW_REQUEST_S_MAX)
    }

    /// Asks for something to be deleted.
    pub fn delete(&self, path: &str) -> Outcome<Value> {
        self.ask(Method::DELETE, path, None, REQUEST_S_MAX)
    }

    fn ask(&self, method: Method, path: &str, body: Option<&Value>, limit_s: u64) -> Outcome<Value> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let limit = Duration::from_secs(limit_s);
        runtime.block_on(async {
            match tokio::time::timeout(limit, self.exchange(method, path, body)).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    Err(Failure::new("IO_ERROR", format!("{} gave no answer within {limit_s} s", self.name)))
                }
            }
        })
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> Outcome<Value> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable(&e))?;
        let broken = |e: hyper::Error| {
            Failure::new("IO_ERROR", format!("{} broke off the request {path}: {e}", self.name))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Ends with the sender, that is with this function.
        tokio::spawn(connection);
        let bytes = body.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "coppice")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|e| Failure::new("IO_ERROR", e.to_string()))?;
        let answer = sender.send_request(request).await.map_err(broken)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|e| Failure::new("IO_ERROR", format!("{}: {e}", self.name)))?.to_bytes();
        if !status.is_success() {
            return Err(Failure::from_answer(status.as_u16(), &body));
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body)
            .map_err(|e| Failure::new("IO_ERROR", format!("{} answered {path} with no JSON: {e}", self.name)))
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The failure of not reaching it.
    pub fn unreachable(&self, error: &std::io::Error) -> Failure {
        let socket = self.socket.display();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                Failure::new("NOT_RUNNING", format!("{} does not run: nobody listens on {socket}", self.name))
            }
            _ => Failure::new("IO_ERROR", format!("{} cannot be reached on {socket}: {error}", self.name)),
        }
    }
}

/// `text` as one segment of a path or a value in a query.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_for_paths() {
        assert_eq!(escaped("a b/ü?"), "a%20b%2F%C3%BC%3F");
    }

    #[test]
    fn a_daemon_that_does_not_run_is_said_so() {
        let folder = tempfile::tempdir().unwrap();
        let failure = Daemon::smd(folder.path()).get("/srs").unwrap_err();
        assert_eq!(failure.code, "NOT_RUNNING");
        assert!(failure.message.contains("smd.sock"), "{failure}");
    }
}
