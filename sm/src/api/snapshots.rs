//! Requests that make siblings: snapshots, of several VDIs at one instant, and
//! clones.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{Path, State};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::answer::{Failure, Outcome, document};
use super::routes::{BUSY_POLL, read, run, turn};
use super::{App, jobs};
use crate::error::{Error, Result};
use crate::jobs::About;
use crate::journal::SiblingKind;
use crate::limits::{BUSY_RETRY_MS_MAX, HOLD_MS_MAX};
use crate::manager::Manager;
use crate::ops::{self, Wanted};
use crate::progress::Progress;
use crate::repo::Repo;
use crate::views::Look;

#[derive(Debug, Deserialize)]
struct Group {
    vdis: Vec<String>,
    name: Option<String>,
    /// As a job that, once nothing else is before it, holds until it is told
    /// to proceed: the caller freezes the guests meanwhile.
    #[serde(default)]
    hold: bool,
}

/// Siblings of some VDIs, which must be of one SR: one record makes them all
/// or none.
fn siblings(
    manager: &Manager,
    kind: SiblingKind,
    group: &Group,
    progress: &Progress,
) -> Result<(Repo, Vec<Uuid>)> {
    let mut repo: Option<Repo> = None;
    let mut wanted = Vec::new();
    for text in &group.vdis {
        let (of, vdi) = manager.find_vdi(text)?;
        if repo.get_or_insert_with(|| of.clone()).uuid != of.uuid {
            let what = "one snapshot of VDIs in several SRs".into();
            return Err(Error::Unsupported { what });
        }
        let name = match &group.name {
            Some(name) => name.clone(),
            None => default_name(&of, kind, vdi)?,
        };
        wanted.push(Wanted { vdi, name });
    }
    let nothing = || Error::BadRequest { reason: "no VDI is named".into() };
    let repo = repo.ok_or_else(nothing)?;
    let vdis = wanted.iter().map(|w| w.vdi.to_string()).collect::<Vec<_>>().join(",");
    let span = tracing::info_span!("operation", sr = %repo.uuid, vdi = vdis, ?kind);
    let made = span.in_scope(|| {
        let mut outcome = ops::snapshot_watched(&repo, kind, &wanted, progress);
        if outcome.as_ref().is_err_and(Error::is_busy) {
            for one in &wanted {
                manager.make_way(repo.uuid, Some(one.vdi));
                if let Err(stuck @ Error::Stuck { .. }) = ops::unstick(&repo, one.vdi) {
                    outcome = Err(stuck);
                }
            }
        }
        match &outcome {
            Ok(made) => tracing::info!(?made, "done"),
            Err(error) => tracing::warn!(code = error.code(), %error, "refused"),
        }
        outcome
    })?;
    Ok((repo, made))
}

fn default_name(repo: &Repo, kind: SiblingKind, vdi: Uuid) -> Result<String> {
    let of = repo.labels.get(vdi)?.map(|label| label.name).unwrap_or_default();
    Ok(match kind {
        SiblingKind::Snapshot => format!("{of} snapshot"),
        SiblingKind::Clone => format!("{of} clone"),
    })
}

/// The members of a group.
async fn members(app: &App, group: &Group) -> Result<Vec<Uuid>, Failure> {
    let vdis = group.vdis.clone();
    run(app, move |manager| vdis.iter().map(|vdi| Ok(manager.find_vdi(vdi)?.1)).collect::<Result<Vec<_>>>())
        .await
}

pub(super) async fn snapshot(State(app): State<App>, body: Bytes) -> Outcome {
    let group: Group = read(&body)?;
    let members = members(&app, &group).await?;
    if group.hold {
        return snapshot_job(&app, group, members);
    }
    let turn = turn(&app, "snapshot", &members).await?;
    let made = run(&app, move |manager| {
        let _turn = &turn;
        snapshots(manager, &group, &Progress::default())
    });
    document(made.await?)
}

fn snapshots(manager: &Manager, group: &Group, progress: &Progress) -> Result<Value> {
    let (repo, made) = siblings(manager, SiblingKind::Snapshot, group, progress)?;
    let look = Look::at(&repo)?;
    let shown = made.into_iter().map(|vdi| look.one(vdi)).collect::<Result<Vec<_>>>()?;
    Ok(json!({ "vdis": shown }))
}

fn snapshot_job(app: &App, group: Group, members: Vec<Uuid>) -> Outcome {
    let about = About { operation: "snapshot", sr: None, vdi: members.first().copied() };
    jobs::start(app, about, members, move |manager, progress, turn| {
        let _turn = turn;
        progress.hold("ready", Duration::from_millis(HOLD_MS_MAX))?;
        let deadline = Instant::now() + Duration::from_millis(BUSY_RETRY_MS_MAX);
        loop {
            match snapshots(manager, &group, progress) {
                Err(error) if error.is_busy() && Instant::now() < deadline => std::thread::sleep(BUSY_POLL),
                outcome => return outcome,
            }
        }
    })
}

#[derive(Debug, Deserialize)]
struct Called {
    name: Option<String>,
}

pub(super) async fn clone(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let Called { name } = read(&body)?;
    let group = Group { vdis: vec![vdi], name, hold: false };
    let turn = turn(&app, "clone", &members(&app, &group).await?).await?;
    let made = run(&app, move |manager| {
        let _turn = &turn;
        let (repo, made) = siblings(manager, SiblingKind::Clone, &group, &Progress::default())?;
        let vdi = made.first().ok_or_else(|| Error::NotFound { what: "clone".into() })?;
        Look::of(&repo, *vdi)?.one(*vdi)
    });
    document(made.await?)
}
