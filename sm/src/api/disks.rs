//! What is done to whole disks, and asked about their bytes.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use uuid::Uuid;

use super::answer::{Outcome, document};
use super::routes::{BUSY_POLL, on_vdi, read, run, run_on, turn};
use super::{App, jobs};
use crate::error::{Error, Result};
use crate::jobs::About;
use crate::limits::BUSY_RETRY_MS_MAX;
use crate::manager::Manager;
use crate::ops;
use crate::repo::Repo;
use crate::views::Look;

#[derive(Debug, Deserialize)]
struct NewSize {
    virtual_size: u64,
}

pub(super) async fn resize(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let size: NewSize = read(&body)?;
    let resized = run_on(&app, "resize", vdi, move |_, repo, vdi| {
        ops::resize(repo, vdi, size.virtual_size)?;
        Look::at(repo)?.one(vdi)
    });
    document(resized.await?)
}

#[derive(Debug, Deserialize)]
struct Snapshot {
    to: String,
}

pub(super) async fn revert(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let Snapshot { to } = read(&body)?;
    let (vdi, to) = run(&app, move |manager| {
        let (_, disk, other) = two(manager, &vdi, &to)?;
        Ok((disk, other))
    })
    .await?;
    let turn = turn(&app, "revert", &[vdi, to]).await?;
    let reverted = run(&app, move |manager| {
        let _turn = &turn;
        on_vdi(manager, "revert", &vdi.to_string(), |repo, vdi| {
            ops::revert(repo, vdi, to)?;
            // Its former image is garbage now.
            manager.kick(repo.uuid);
            Look::at(repo)?.one(vdi)
        })
    });
    document(reverted.await?)
}

/// Two nodes of one SR.
fn two(manager: &Manager, one: &str, other: &str) -> Result<(Repo, Uuid, Uuid)> {
    let ((repo, one), (other_repo, other)) = (manager.find_vdi(one)?, manager.find_vdi(other)?);
    if repo.uuid != other_repo.uuid {
        return Err(Error::Unsupported { what: format!("{one} and {other}: they are in two SRs") });
    }
    Ok((repo, one, other))
}

#[derive(Debug, Deserialize)]
struct Target {
    sr: String,
    name: Option<String>,
}

pub(super) async fn copy(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let Target { sr, name } = read(&body)?;
    let (from, vdi, to) = run(&app, move |manager| {
        let (repo, vdi) = manager.find_vdi(&vdi)?;
        Ok((repo, vdi, manager.open_sr(manager.sr_uuid(&sr)?)?.repo))
    })
    .await?;
    let about = About { operation: "copy", sr: Some(to.uuid), vdi: Some(vdi) };
    jobs::start(&app, about, vec![vdi], move |manager, progress, turn| {
        let name = match name {
            Some(name) => name,
            None => {
                let of = from.labels.get(vdi)?.map(|label| label.name).unwrap_or_default();
                format!("{of} copy")
            }
        };
        tracing::info!(sr = %from.uuid, %vdi, to = %to.uuid, "copying");
        let deadline = Instant::now() + Duration::from_millis(BUSY_RETRY_MS_MAX);
        let mut turn = Some(turn);
        let made = loop {
            match ops::copy(&from, vdi, &to, &name, progress, || drop(turn.take())) {
                // Before it has begun, as any request.
                Err(error) if error.is_busy() && turn.is_some() && Instant::now() < deadline => {
                    manager.make_way(from.uuid, Some(vdi));
                    std::thread::sleep(BUSY_POLL);
                }
                outcome => break outcome?,
            }
        };
        let shown = Look::at(&to)?.one(made)?;
        serde_json::to_value(shown).map_err(|e| Error::BadRequest { reason: e.to_string() })
    })
}

#[derive(Debug, Deserialize)]
pub(super) struct Range {
    #[serde(default)]
    offset: u64,
    length: Option<u64>,
}

pub(super) async fn map(
    State(app): State<App>,
    Path(vdi): Path<String>,
    Query(range): Query<Range>,
) -> Outcome {
    let map = run(&app, move |manager| {
        let (repo, vdi) = manager.find_vdi(&vdi)?;
        ops::map(&repo, vdi, range.offset, range.length)
    });
    document(map.await?)
}

#[derive(Debug, Deserialize)]
pub(super) struct Since {
    since: String,
    #[serde(default)]
    offset: u64,
}

pub(super) async fn changed(
    State(app): State<App>,
    Path(vdi): Path<String>,
    Query(since): Query<Since>,
) -> Outcome {
    let changed = run(&app, move |manager| {
        let (repo, vdi, other) = two(manager, &vdi, &since.since)?;
        ops::changed(&repo, vdi, other, since.offset)
    });
    document(changed.await?)
}
