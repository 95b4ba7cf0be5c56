//! Exports and imports: the one kind of request whose body is no JSON.
//!
//! ```text
//!   export   blocking thread ──Channel──> response body ──> socket
//!   import   socket ──> request body ──ChunkReader──> blocking thread
//! ```
//!
//! smd may run as root and its caller not, so no path is handed over: the
//! bytes go through the socket, with a few pieces in between at most. Each
//! stream is a job too: it is seen, it can be cancelled, and how it ended can
//! be asked for when the stream alone cannot say (the caller may choose the
//! job's id, so that it knows it beforehand).

use std::io;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use http_body_util::channel::{Channel, Sender};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::answer::{Failure, Outcome, document};
use super::{App, jobs, routes};
use crate::error::{Error, Result};
use crate::jobs::About;
use crate::limits::STREAM_PIECES_MAX;
use crate::ops::{self, Format, ImportWanted};
use crate::views::Look;

/// Bytes of progress an export will have; its job.
const BYTES_HEADER: &str = "x-coppice-bytes";
const JOB_HEADER: &str = "x-coppice-job";

/// What the query of a stream says.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct How {
    /// `raw`, `extents` or `vhd`.
    format: Option<String>,
    base: Option<String>,
    name: Option<String>,
    job: Option<Uuid>,
}

impl How {
    fn format(&self) -> Result<Format> {
        match self.format.as_deref() {
            None | Some("vhd") => Ok(Format::Vhd),
            Some("raw") => Ok(Format::Raw),
            Some("extents") => Ok(Format::Extents),
            Some(other) => {
                let reason = format!("format {other:?}; there are raw, extents and vhd");
                Err(Error::BadRequest { reason })
            }
        }
    }
}

pub(super) async fn export(
    State(app): State<App>,
    Path(vdi): Path<String>,
    Query(how): Query<How>,
) -> Outcome {
    let format = how.format()?;
    let base = how.base.clone();
    let found = routes::run(&app, move |manager| {
        let (repo, vdi) = manager.find_vdi(&vdi)?;
        let base = base.as_deref().map(|base| manager.find_vdi(base)).transpose()?;
        if base.as_ref().is_some_and(|(of, _)| of.uuid != repo.uuid) {
            return Err(Error::Unsupported { what: "a delta between VDIs of different SRs".into() });
        }
        Ok((repo, vdi, base.map(|(_, base)| base)))
    });
    let (repo, vdi, base) = found.await?;
    let job = app.jobs.add(About { operation: "export", sr: Some(repo.uuid), vdi: Some(vdi) }, how.job)?;
    let id = job.id();
    let on: Vec<Uuid> = [vdi].into_iter().chain(base).collect();
    let (job, place, turn) = jobs::wait_for_turn(&app, job, &on).await?;
    let (mut sender, body) = Channel::<Bytes, io::Error>::new(STREAM_PIECES_MAX);
    let (begun, begins) = oneshot::channel();
    let runtime = Handle::current();
    let ended = jobs::carry_out(&app, job, turn, place, move |_, progress, turn| {
        let mut sink = |piece: &[u8]| send(&runtime, &mut sender, piece);
        let begin = |total: u64| {
            drop(turn);
            // The caller may be gone; the first piece finds out.
            let _ = begun.send(total);
        };
        let outcome = ops::export(&repo, vdi, base, format, progress, begin, &mut sink);
        match outcome {
            Ok(()) => Ok(json!({ "bytes": progress.done_bytes() })),
            Err(error) => {
                sender.abort(io::Error::other(error.to_string()));
                Err(error)
            }
        }
    });
    match begins.await {
        Ok(total) => Ok(stream(body, total, id)),
        Err(_) => Err(Failure(failed(ended).await)),
    }
}

fn send(runtime: &Handle, sender: &mut Sender<Bytes, io::Error>, piece: &[u8]) -> io::Result<()> {
    let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the reader of the export went away");
    runtime.block_on(sender.send_data(Bytes::copy_from_slice(piece))).map_err(gone)
}

fn stream(body: Channel<Bytes, io::Error>, total: u64, job: Uuid) -> Response {
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (BYTES_HEADER, total.to_string()),
        (JOB_HEADER, job.to_string()),
    ];
    (headers, Body::new(body)).into_response()
}

/// Why a job failed that said nothing else.
async fn failed(ended: oneshot::Receiver<Result<Value>>) -> Error {
    let lost = |reason: &str| Error::NotRunning { what: "the job".into(), reason: reason.into() };
    match ended.await {
        Ok(Err(error)) => error,
        Ok(Ok(_)) => lost("it ended without a stream"),
        Err(_) => lost("it ended without an answer"),
    }
}

pub(super) async fn import(
    State(app): State<App>,
    Path(sr): Path<String>,
    Query(how): Query<How>,
    body: Body,
) -> Outcome {
    let format = how.format()?;
    let name = how.name.clone().unwrap_or_default();
    let base = how.base.clone();
    let found = routes::run(&app, move |manager| {
        let repo = manager.open_sr(manager.sr_uuid(&sr)?)?.repo;
        let base = base.as_deref().map(|base| manager.find_vdi(base)).transpose()?;
        if base.as_ref().is_some_and(|(of, _)| of.uuid != repo.uuid) {
            let reason = "it lies in another SR: import what it holds there first".into();
            return Err(Error::WrongBase { reason });
        }
        Ok((repo, base.map(|(_, base)| base)))
    });
    let (repo, base) = found.await?;
    let job = app.jobs.add(About { operation: "import", sr: Some(repo.uuid), vdi: None }, how.job)?;
    let id = job.id();
    let on: Vec<Uuid> = base.into_iter().collect();
    let (job, place, turn) = jobs::wait_for_turn(&app, job, &on).await?;
    let (pieces, taken) = mpsc::channel(STREAM_PIECES_MAX);
    let mut ended = jobs::carry_out(&app, job, turn, place, move |manager, progress, turn| {
        let mut stream = ChunkReader { pieces: taken, now: Bytes::new(), ended: false };
        let wanted = ImportWanted { name: &name, format, base };
        let vdi = ops::import(&repo, &wanted, &mut stream, progress, || drop(turn))?;
        manager.kick(repo.uuid);
        let shown = Look::at(&repo)?.one(vdi)?;
        serde_json::to_value(shown).map_err(|e| Error::Catalog(e.to_string()))
    });
    // The job may end before its stream does; and one that is stopped must not
    // wait for a piece that never comes.
    tokio::select! {
        () = pump(body, pieces) => {}
        outcome = &mut ended => return answer(outcome),
        () = app.jobs.cancelled(id) => {}
    }
    answer(ended.await)
}

fn answer(outcome: Result<Result<Value>, oneshot::error::RecvError>) -> Outcome {
    let lost = || Error::NotRunning { what: "the job".into(), reason: "it ended without an answer".into() };
    document(outcome.map_err(|_| lost())??)
}

/// A piece of a request's body.
enum Piece {
    Data(Bytes),
    /// All of it has come. Without this the caller went away.
    End,
}

async fn pump(mut body: Body, pieces: mpsc::Sender<Piece>) {
    loop {
        let piece = match body.frame().await {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => Piece::Data(data),
                Err(_) => continue,
            },
            Some(Err(_)) => return,
            None => Piece::End,
        };
        let last = matches!(piece, Piece::End);
        // Nobody takes it: the job has ended, and says why.
        if pieces.send(piece).await.is_err() || last {
            return;
        }
    }
}

/// A request's body, read by a blocking thread.
struct ChunkReader {
    pieces: mpsc::Receiver<Piece>,
    now: Bytes,
    ended: bool,
}

impl io::Read for ChunkReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(data)) => self.now = data,
                Some(Piece::End) => self.ended = true,
                None => {
                    let text = "the caller went away before the stream's end";
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, text));
                }
            }
        }
        let part = self.now.split_to(buf.len().min(self.now.len()));
        buf.get_mut(..part.len()).unwrap_or_default().copy_from_slice(&part);
        Ok(part.len())
    }
}
