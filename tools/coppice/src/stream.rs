//! Streams to and from smd: exports and imports, through the same socket as
//! everything else, with a few pieces in between at most.
//!
//! How a stream that broke off ended is asked for by the id of its job, which
//! we choose.

use std::io::Read;
use std::time::{Duration, Instant};

use http_body_util::channel::{Channel, Sender};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use uuid::Uuid;

use crate::client::Daemon;
use crate::failure::{Failure, Outcome};
use crate::output::say;

/// Bytes read from a file at once.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces on their way to the socket.
const PIECES_MAX: usize = 4;
/// Longest answer read where no stream is expected.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// How long a job that was stopped may take to clean up before we leave.
const CLEANUP: Duration = Duration::from_secs(30);

/// Asks for a stream; `take` gets its pieces, after `expect` was told how many
/// bytes of progress there will be.
///
/// # Errors
/// What the daemon said, what `take` said, `CANCELLED` after Ctrl-C.
pub fn download(
    smd: &Daemon,
    path: &str,
    expect: impl FnOnce(Option<u64>),
    mut take: impl FnMut(&[u8]) -> Outcome<()>,
) -> Outcome<()> {
    let job = Uuid::new_v4();
    let stream = async {
        let request = request(Method::GET, &with_job(path, job), Empty::<Bytes>::new())?;
        let answer = send(smd, request).await?;
        let total = answer.headers().get("x-coppice-bytes");
        expect(total.and_then(|value| value.to_str().ok()?.parse().ok()));
        let mut body = answer.into_body();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| Failure::new("IO_ERROR", format!("the stream broke off: {e}")))?;
            if let Ok(data) = frame.into_data() {
                take(&data)?;
            }
        }
        Ok(())
    };
    attended(smd, job, stream)
}

/// Sends a stream and returns the answer.
///
/// # Errors
/// What the daemon said, what reading `from` said, `CANCELLED` after Ctrl-C.
pub fn upload(
    smd: &Daemon,
    path: &str,
    from: impl Read + Send + 'static,
    passed: impl Fn(usize) + Send + 'static,
) -> Outcome<Value> {
    let job = Uuid::new_v4();
    let (sender, body) = Channel::<Bytes, std::io::Error>::new(PIECES_MAX);
    let reader = async move {
        let runtime = tokio::runtime::Handle::current();
        let fed = tokio::task::spawn_blocking(move || feed(from, sender, &runtime, &passed));
        fed.await.map_err(|e| Failure::new("IO_ERROR", e.to_string()))?
    };
    let exchange = async {
        let answer = send(smd, request(Method::POST, &with_job(path, job), body)?).await?;
        let bytes = collected(answer.into_body()).await?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Failure::new("IO_ERROR", format!("an answer that is no JSON: {e}")))
    };
    attended(smd, job, async {
        let reader = tokio::spawn(reader);
        let answer = exchange.await;
        match answer {
            Ok(answer) => Ok(answer),
            // Our own file is to blame if it could not be read.
            Err(failure) => match reader.await {
                Ok(Err(own)) if own.code == "IO_ERROR" => Err(own),
                _ => Err(failure),
            },
        }
    })
}

fn feed(
    mut from: impl Read,
    mut to: Sender<Bytes, std::io::Error>,
    runtime: &tokio::runtime::Handle,
    passed: &impl Fn(usize),
) -> Outcome<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        let got = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let failure = Failure::new("IO_ERROR", format!("reading: {error}"));
                to.abort(error);
                return Err(failure);
            }
        };
        let piece = Bytes::copy_from_slice(buffer.get(..got).unwrap_or_default());
        // The other side has heard enough; its answer says why.
        if runtime.block_on(to.send_data(piece)).is_err() {
            return Ok(());
        }
        passed(got);
    }
}

/// Runs an exchange until it ends or Ctrl-C stops it.
fn attended<T>(smd: &Daemon, job: Uuid, exchange: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = exchange => Some(outcome),
            _ = tokio::signal::ctrl_c() => None,
        }
    });
    // A thread that waits for standard input would keep us.
    runtime.shutdown_background();
    match outcome {
        Some(Err(failure)) if failure.code == "IO_ERROR" => Err(ended(smd, job).unwrap_or(failure)),
        Some(outcome) => outcome,
        None => {
            say("stopping");
            let _ = smd.post(&format!("/jobs/{job}/cancel"), &Value::Null);
            let begun = Instant::now();
            while begun.elapsed() < CLEANUP {
                match state(smd, job).as_deref() {
                    Some("done") => {
                        return Err(Failure::new("TOO_LATE", "it was done before it could be stopped"));
                    }
                    Some("running" | "queued") => std::thread::sleep(Duration::from_millis(50)),
                    _ => break,
                }
            }
            Err(Failure::new("CANCELLED", "stopped; nothing of it is left"))
        }
    }
}

/// How it stands with the job, in a word.
fn state(smd: &Daemon, job: Uuid) -> Option<String> {
    let shown = smd.get(&format!("/jobs/{job}?wait_ms=1000")).ok()?;
    shown.get("state").and_then(Value::as_str).map(str::to_owned)
}

/// Why the job failed, if it has.
fn ended(smd: &Daemon, job: Uuid) -> Option<Failure> {
    let shown = smd.get(&format!("/jobs/{job}?wait_ms=1000")).ok()?;
    match shown.get("state").and_then(Value::as_str) {
        Some("failed") => {
            let error = serde_json::json!({ "error": shown.get("error") });
            Some(Failure::from_answer(0, error.to_string().as_bytes()))
        }
        Some("cancelled") => Some(Failure::new("CANCELLED", "it was cancelled")),
        _ => None,
    }
}

fn with_job(path: &str, job: Uuid) -> String {
    let sign = if path.contains('?') { '&' } else { '?' };
    format!("{path}{sign}job={job}")
}

fn request<B>(method: Method, path: &str, body: B) -> Outcome<Request<B>> {
    let request = Request::builder().method(method).uri(path).header("host", "coppice").body(body);
    request.map_err(|e| Failure::new("IO_ERROR", e.to_string()))
}

/// Sends a request; an answer that refuses is a failure.
async fn send<B>(smd: &Daemon, request: Request<B>) -> Outcome<Response<Incoming>>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let broken = |e: hyper::Error| Failure::new("IO_ERROR", format!("smd broke off the request: {e}"));
    let stream = UnixStream::connect(smd.socket()).await.map_err(|e| smd.unreachable(&e))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(broken)?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    Err(Failure::from_answer(status.as_u16(), &collected(answer.into_body()).await?))
}

async fn collected(body: Incoming) -> Outcome<Bytes> {
    let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
    Ok(body.map_err(|e| Failure::new("IO_ERROR", format!("smd: {e}")))?.to_bytes())
}
