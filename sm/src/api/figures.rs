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

use crate::error::{IoContext, Result, STUCK_NEXT};
use crate::limits::{TAP_FIGURES_AT_ONCE_MAX, TAP_FIGURES_MS_MAX};
use crate::manager::Manager;
use crate::repo::Repo;
use crate::views::VdiView;

/// A disk whose tapdisk is asked.
#[derive(Debug, Clone)]
pub(super) struct Asked {
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

impl Asked {
    /// One that is served, as it was just shown.
    pub(super) fn of(repo: &Repo, shown: &VdiView) -> Self {
        let (vdi, name, read_only) = (shown.uuid, shown.name.clone(), shown.read_only);
        Self { sr: repo.uuid, vdi, name, read_only, control: repo.host.control_socket(vdi) }
    }
}

impl Figures {
    /// What is wrong, and what to do: for a person.
    pub(super) fn trouble(&self) -> Option<String> {
        match self {
            Self::Told(stats) => {
                let (state, reason) = stats.state.split_once(": ")?;
                Some(match state {
                    "stuck" => format!("it stands still in the middle of a snapshot: {reason}; {STUCK_NEXT}"),
                    _ => format!("{reason}: once its storage is mended, detach it and attach it again"),
                })
            }
            Self::Silent => Some(format!(
                "its tapdisk did not answer within {TAP_FIGURES_MS_MAX} ms: it hangs, or the host is very \
                 busy; if that lasts, end its process with SIGKILL: another one takes its place, and no \
                 acknowledged write is lost"
            )),
            // That is said in another place.
            Self::Down => None,
        }
    }
}

/// What is wrong with one disk.
pub(super) async fn trouble(places: &Places, asked: Asked) -> Option<String> {
    ask(places, vec![asked]).await.pop()?.1.trouble()
}

/// The places for questions, of one daemon.
#[derive(Debug, Clone)]
pub(super) struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TAP_FIGURES_AT_ONCE_MAX)))
    }
}

/// The disks of all attached SRs.
pub(super) fn disks(manager: &Manager) -> Result<Vec<Asked>> {
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
            disks.push(Asked { sr, vdi, name, read_only, control });
        }
    }
    Ok(disks)
}

/// Asks them all; in the same order.
pub(super) async fn ask(places: &Places, disks: Vec<Asked>) -> Vec<(Asked, Figures)> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(state: &str) -> Option<String> {
        Figures::Told(Box::new(Stats { state: state.into(), ..Stats::default() })).trouble()
    }

    #[test]
    fn trouble_says_what_happened_to_which_image_and_what_to_do() {
        assert_eq!((trouble("running"), trouble("paused")), (None, None));
        let stuck = trouble("stuck: a.vhd cannot take the name b.vhd: no space").unwrap();
        assert!(stuck.contains("a.vhd cannot take the name b.vhd: no space; make room"), "{stuck}");
        let failed = trouble("failed: a flush of a.vhd failed").unwrap();
        assert!(failed.starts_with("a flush of a.vhd failed: once"), "{failed}");
        assert!(Figures::Silent.trouble().unwrap().contains("SIGKILL"));
        assert_eq!(Figures::Down.trouble(), None);
    }
}
