//! What is asked of content receipts.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use sm::api::page::Kind;
use uuid::Uuid;

use super::{Answer, App, Refused, blocking};
use crate::collector::Collector;
use crate::progress::ReceiptTotals;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Which {
    sr: Option<Uuid>,
    job: Option<String>,
}

fn no_job(job: &str) -> Refused {
    let message = format!("no receipt of job {job} is kept: it had none, compared nothing, or is too old");
    Refused::new(StatusCode::NOT_FOUND, "NOT_FOUND", message)
}

/// The hashes of a job's disks, from the SR's catalog.
pub(super) async fn receipt(State(app): State<App>, Query(which): Query<Which>) -> Answer<Json<Value>> {
    blocking(move || {
        let job = which.job.unwrap_or_default();
        for (_, collector) in app.service.collectors(which.sr) {
            let papers = collector.repo().labels.papers(&job);
            let papers = papers.map_err(|error| Refused::io(error.to_string()))?;
            let disks: Result<Vec<Value>, _> = papers.iter().map(|text| serde_json::from_str(text)).collect();
            let disks = disks.map_err(|error| Refused::io(format!("receipt of {job}: {error}")))?;
            if !disks.is_empty() {
                return Ok(Json(json!({"job": job, "disks": disks})));
            }
        }
        Err(no_job(&job))
    })
    .await
}

/// Puts alarms down.
pub(super) async fn acknowledge(State(app): State<App>, Json(which): Json<Which>) -> Answer<Json<Value>> {
    blocking(move || {
        let srs = app.service.collectors_now(which.sr).map_err(|error| Refused::io(error.to_string()))?;
        if let (Some(sr), true) = (which.sr, srs.is_empty()) {
            return Err(Refused::missing(&app.service, sr, &format!("SR {sr}")));
        }
        let mut down = Vec::new();
        for (_, collector) in srs {
            let said = collector.acknowledge(which.job.as_deref());
            down.extend(said.map_err(|error| Refused::io(error.to_string()))?);
        }
        match which.job {
            Some(job) if down.is_empty() => {
                let message = format!("no alarm of job {job} stands");
                Err(Refused::new(StatusCode::NOT_FOUND, "NOT_FOUND", message))
            }
            _ => Ok(Json(json!({"acknowledged": down}))),
        }
    })
    .await
}

/// Writes one metric of every SR: name, help, type, value.
pub(super) type Counter<'a> = &'a mut dyn FnMut(&str, &str, Kind, &dyn Fn(&Collector) -> u64);

/// Adds the metrics of receipts.
pub(super) fn metrics(counter: Counter<'_>) {
    let alarms = "Merges after which a disk is not what it was, and nobody has said anything yet.";
    counter("coppice_gc_receipt_alarms", alarms, Kind::Gauge, &|c| c.state().alarms.len() as u64);
    type Sum = fn(&ReceiptTotals) -> u64;
    let sums: [(&str, &str, Sum); 5] = [
        ("blocks_matched", "Blocks that read the same before and after a merge.", |t| t.matched),
        ("blocks_written", "Blocks that guests wrote during a merge.", |t| t.written),
        ("blocks_different", "Blocks that a merge changed.", |t| t.different),
        ("disks_unreadable", "Disks that cannot be read any more after a merge.", |t| t.unreadable),
        ("disks_void", "Disks whose receipt says nothing.", |t| t.void),
    ];
    for (name, help, of) in sums {
        let name = format!("coppice_gc_receipt_{name}_total");
        counter(&name, help, Kind::Counter, &|c| of(&c.state().receipt_totals));
    }
}
