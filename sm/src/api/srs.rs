//! Requests about storage repositories.

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use serde_json::json;

use super::App;
use super::answer::{Outcome, document};
use super::routes::{read, run};
use crate::error::{Error, Result};
use crate::manager::NewSr;

#[derive(Debug, Deserialize)]
pub(super) struct SrListing {
    /// Only those of this name, and no more than is known without reading.
    name: Option<String>,
}

pub(super) async fn list_srs(State(app): State<App>, Query(listing): Query<SrListing>) -> Outcome {
    let srs = run(&app, move |manager| {
        let known = manager.known();
        match &listing.name {
            Some(name) => {
                Ok(known.iter().filter(|sr| sr.name == *name).map(crate::views::known_sr).collect())
            }
            None => known.iter().map(|sr| manager.view_sr(sr.uuid)).collect::<Result<Vec<_>>>(),
        }
    });
    document(json!({ "srs": srs.await? }))
}

pub(super) async fn add_sr(State(app): State<App>, body: Bytes) -> Outcome {
    let new: NewSr = read(&body)?;
    document(run(&app, move |manager| manager.view_sr(manager.add_sr(&new)?)).await?)
}

#[derive(Debug, Deserialize)]
struct ProbeWhat {
    #[serde(rename = "type")]
    kind: crate::state::SrType,
    path: Option<std::path::PathBuf>,
}

pub(super) async fn probe_sr(State(app): State<App>, body: Bytes) -> Outcome {
    let what: ProbeWhat = read(&body)?;
    document(run(&app, move |manager| manager.probe_sr(what.kind, what.path.as_deref())).await?)
}

pub(super) async fn check_sr(State(app): State<App>, Path(sr): Path<String>) -> Outcome {
    document(run(&app, move |manager| manager.check_sr(manager.sr_uuid(&sr)?)).await?)
}

pub(super) async fn show_sr(State(app): State<App>, Path(sr): Path<String>) -> Outcome {
    document(run(&app, move |manager| manager.view_sr(manager.sr_uuid(&sr)?)).await?)
}

pub(super) async fn tree(State(app): State<App>, Path(sr): Path<String>) -> Outcome {
    document(run(&app, move |manager| manager.view_tree(manager.sr_uuid(&sr)?)).await?)
}

/// Lines of history shown when nobody says how many.
const HISTORY_ROWS: u32 = 100;

#[derive(Debug, Deserialize)]
pub(super) struct Rows {
    rows: Option<u32>,
}

pub(super) async fn history(
    State(app): State<App>,
    Path(sr): Path<String>,
    Query(rows): Query<Rows>,
) -> Outcome {
    let rows_max = rows.rows.unwrap_or(HISTORY_ROWS);
    let lines = run(&app, move |manager| manager.open_sr(manager.sr_uuid(&sr)?)?.labels.history(rows_max));
    let lines = lines.await?.into_iter().map(|(at, operation, vdi, detail)| {
        json!({ "at": at, "operation": operation, "vdi": vdi, "detail": detail })
    });
    document(json!({ "history": lines.collect::<Vec<_>>() }))
}

pub(super) async fn sr_verb(
    State(app): State<App>,
    Path((sr, verb)): Path<(String, String)>,
    _body: Bytes,
) -> Outcome {
    let done = run(&app, move |manager| {
        let uuid = manager.sr_uuid(&sr)?;
        let before = manager.view_sr(uuid)?;
        match verb.as_str() {
            "scan" => manager.scan_sr(uuid)?,
            "attach" => manager.attach_sr(uuid)?,
            "detach" => manager.detach_sr(uuid)?,
            "forget" => manager.forget_sr(uuid)?,
            "destroy" => manager.destroy_sr(uuid)?,
            _ => {
                return Err(Error::NotFound { what: format!("request {verb:?} on an SR") });
            }
        }
        // One that is gone is shown as it was.
        match manager.view_sr(uuid) {
            Err(Error::NotFound { .. }) => Ok(crate::views::SrView { attached: false, ..before }),
            view => view,
        }
    });
    document(done.await?)
}
