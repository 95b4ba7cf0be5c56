//! Which request calls what, and how every one is run: on a thread of its own,
//! in its turn, again while it finds another at work. The functions called
//! are a few lines each: resolve names, call the operation, show the result.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, map_response};
use axum::routing::{get, post};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::answer::{Failure, document, in_json};
use super::unread::read_rest;
use super::{App, disks, jobs, metrics, snapshots, srs, status, streams, vdis};
use crate::error::{Error, Result};
use crate::limits::{BODY_BYTES_MAX, BUSY_RETRY_MS_MAX, TURN_WAIT_MS_MAX};
use crate::manager::Manager;
use crate::ops;
use crate::repo::Repo;
use crate::turns::Turn;

/// How often an operation that found another process at work (the collector,
/// say) is tried again. Operations of this process queue instead.
pub(super) const BUSY_POLL: Duration = Duration::from_millis(50);

/// All routes.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/srs", get(srs::list_srs).post(srs::add_sr))
        .route("/srs/probe", post(srs::probe_sr))
        .route("/srs/{sr}", get(srs::show_sr))
        .route("/srs/{sr}/check", get(srs::check_sr))
        .route("/srs/{sr}/tree", get(srs::tree))
        .route("/srs/{sr}/history", get(srs::history))
        .route("/srs/{sr}/import", post(streams::import))
        .route("/srs/{sr}/{verb}", post(srs::sr_verb))
        .route("/vdis", get(vdis::list_vdis).post(vdis::create_vdi))
        .route("/vdis/snapshot", post(snapshots::snapshot))
        .route("/vdis/{vdi}", get(vdis::show_vdi).delete(vdis::delete_vdi))
        .route("/vdis/{vdi}/stat", get(vdis::stat))
        .route("/vdis/{vdi}/export", get(streams::export))
        .route("/vdis/{vdi}/clone", post(snapshots::clone))
        .route("/vdis/{vdi}/rename", post(vdis::rename))
        .route("/vdis/{vdi}/attach", post(vdis::attach))
        .route("/vdis/{vdi}/detach", post(vdis::detach))
        .route("/vdis/{vdi}/resize", post(disks::resize))
        .route("/vdis/{vdi}/revert", post(disks::revert))
        .route("/vdis/{vdi}/copy", post(disks::copy))
        .route("/vdis/{vdi}/map", get(disks::map))
        .route("/vdis/{vdi}/changed", get(disks::changed))
        .route("/jobs", get(jobs::list))
        .route("/jobs/{job}", get(jobs::show))
        .route("/jobs/{job}/proceed", post(jobs::proceed))
        .route("/jobs/{job}/cancel", post(jobs::cancel))
        .route("/openapi.json", get(async || document(super::openapi::document())))
        .route("/status", get(status::status))
        .route("/metrics", get(metrics::metrics))
        .fallback(async || Failure(Error::NotFound { what: "such request; see /openapi.json".into() }))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(map_response(in_json))
        .layer(from_fn(read_rest))
        .with_state(app)
}

/// Runs blocking work on a thread of its own, as soon as a slot is free.
pub(super) async fn run<T: Send + 'static>(
    app: &App,
    mut work: impl FnMut(&Manager) -> Result<T> + Send + 'static,
) -> Result<T, Failure> {
    app.counters.requests.fetch_add(1, Ordering::Relaxed);
    let ended = |_| Failure(Error::NotRunning { what: "smd".into(), reason: "it ends".into() });
    let slot = app.slots.clone().acquire_owned().await.map_err(|e| ended(e.to_string()))?;
    let manager = app.manager.clone();
    let task = tokio::task::spawn_blocking(move || {
        let _slot = slot;
        let deadline = Instant::now() + Duration::from_millis(BUSY_RETRY_MS_MAX);
        loop {
            match work(&manager) {
                Err(error) if error.is_busy() && Instant::now() < deadline => {
                    std::thread::sleep(BUSY_POLL);
                }
                outcome => return outcome,
            }
        }
    });
    let outcome = task.await.map_err(|e| ended(e.to_string()))?;
    outcome.map_err(|error| {
        app.counters.refused.fetch_add(1, Ordering::Relaxed);
        Failure(error)
    })
}

/// As [`run`], for an operation on one VDI: in its turn, and with its words in
/// every log line.
pub(super) async fn run_on<T: Send + 'static>(
    app: &App,
    operation: &'static str,
    vdi: String,
    mut work: impl FnMut(&Manager, &Repo, Uuid) -> Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let found = run(app, move |manager| Ok(manager.find_vdi(&vdi)?.1)).await?;
    let turn = turn(app, operation, &[found]).await?;
    run(app, move |manager| {
        let _turn = &turn;
        on_vdi(manager, operation, &found.to_string(), |repo, vdi| work(manager, repo, vdi))
    })
    .await
}

/// The turn of a request on some VDIs.
pub(super) async fn turn(app: &App, operation: &'static str, on: &[Uuid]) -> Result<Turn, Failure> {
    let limit = Duration::from_millis(TURN_WAIT_MS_MAX);
    app.turns.take(operation, on, Some(limit)).await.map_err(|error| {
        app.counters.refused.fetch_add(1, Ordering::Relaxed);
        Failure(error)
    })
}

/// Runs an operation on one VDI, with its words in every log line. Whoever
/// calls it has its turn.
pub(super) fn on_vdi<T>(
    manager: &Manager,
    operation: &'static str,
    vdi: &str,
    work: impl FnOnce(&Repo, Uuid) -> Result<T>,
) -> Result<T> {
    let (repo, vdi) = manager.find_vdi(vdi)?;
    let _span = tracing::info_span!("operation", sr = %repo.uuid, %vdi, operation).entered();
    let mut outcome = work(&repo, vdi);
    if outcome.as_ref().is_err_and(Error::is_busy) {
        manager.make_way(repo.uuid, Some(vdi));
        if let Err(stuck @ Error::Stuck { .. }) = ops::unstick(&repo, vdi) {
            outcome = Err(stuck);
        }
    }
    match &outcome {
        Ok(_) => tracing::info!("done"),
        Err(error) => tracing::warn!(code = error.code(), %error, "refused"),
    }
    outcome
}

/// The body as JSON; an empty one counts as `{}`.
pub(super) fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T> {
    let bytes: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(bytes).map_err(|e| Error::BadRequest { reason: e.to_string() })
}
