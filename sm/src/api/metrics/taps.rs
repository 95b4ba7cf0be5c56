//! What attached disks count: asked of all their tapdisks at the same time.
//!
//! One that hangs costs its own limit and nobody else's: it takes one of the
//! places for that long, and what it would have said is missing. The answers
//! to operations may take far longer; these are only figures.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tapdisk_control::{Answer, Call, LINE_BYTES_MAX, Reply, Request, Stats};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::error::{IoContext, Result};
use crate::limits::{TAP_FIGURES_AT_ONCE_MAX, TAP_FIGURES_MS_MAX};
use crate::manager::Manager;

/// A disk that is to be served.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) sr: Uuid,
    pub(super) vdi: Uuid,
    pub(super) name: String,
    pub(super) read_only: bool,
    /// Its tapdisk's control socket; `None`: it has lost its tapdisk.
    control: Option<PathBuf>,
}

/// What came of asking.
#[derive(Debug)]
pub(super) enum Figures {
    /// It answered.
    Told(Box<Stats>),
    /// It is there and did not answer in time, or not sensibly.
    Silent,
    /// There is no tapdisk; the caretaker sees to it.
    Down,
}

/// The places for questions, of one daemon.
#[derive(Debug, Clone)]
pub(in crate::api) struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TAP_FIGURES_AT_ONCE_MAX)))
    }
}

/// The disks of all attached SRs.
pub(super) fn disks(manager: &Manager) -> Result<Vec<Disk>> {
    let mut disks = Vec::new();
    for sr in manager.known().iter().filter(|sr| sr.attached) {
        // Detached this moment.
        let Ok(open) = manager.open_sr(sr.uuid) else {
            continue;
        };
        for wanted in open.repo.host.wanted().during(|| "run folder".into())? {
            let (sr, vdi, read_only) = (wanted.sr, wanted.vdi, wanted.read_only);
            let name = open.repo.labels.get(vdi)?.unwrap_or_default().name;
            let control = wanted.down.is_none().then(|| open.repo.host.control_socket(vdi)).flatten();
            disks.push(Disk { sr, vdi, name, read_only, control });
        }
    }
    Ok(disks)
}

/// Asks them all; in the same order.
pub(super) async fn ask(places: &Places, disks: Vec<Disk>) -> Vec<(Disk, Figures)> {
    let asking: Vec<_> = disks
        .into_iter()
        .map(|disk| {
            let (places, control) = (places.0.clone(), disk.control.clone());
            let answer = tokio::spawn(async move {
                let Some(control) = control else { return Figures::Down };
                // It is never closed.
                let _place = places.acquire_owned().await;
                let limit = Duration::from_millis(TAP_FIGURES_MS_MAX);
                match tokio::time::timeout(limit, stats(&control)).await {
                    Ok(Ok(stats)) => Figures::Told(stats),
                    Ok(Err(error)) => {
                        tracing::debug!(control = %control.display(), %error, "no figures");
                        Figures::Silent
                    }
                    Err(_) => Figures::Silent,
                }
            });
            (disk, answer)
        })
        .collect();
    let mut asked = Vec::with_capacity(asking.len());
    for (disk, answer) in asking {
        asked.push((disk, answer.await.unwrap_or(Figures::Silent)));
    }
    asked
}

/// One question and its answer. A tapdisk that hung for long has a full queue
/// of callers; connecting then fails instead of waiting.
async fn stats(control: &Path) -> io::Result<Box<Stats>> {
    let mut stream = UnixStream::connect(control).await?;
    let mut line = serde_json::to_vec(&Call { id: 1, request: Request::Stats })?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    line.clear();
    BufReader::new(stream.take(LINE_BYTES_MAX as u64)).read_until(b'\n', &mut line).await?;
    let answer: Answer = serde_json::from_slice(&line)?;
    match answer.outcome {
        Ok(Reply::Stats(stats)) => Ok(stats),
        Ok(other) => Err(io::Error::other(format!("an answer to something else: {other:?}"))),
        Err(refusal) => Err(io::Error::other(refusal)),
    }
}
