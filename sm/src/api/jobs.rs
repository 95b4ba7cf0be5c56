//! Jobs: starting them, looking at them, stopping them.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::App;
use super::answer::{Outcome, document};
use crate::error::{Error, Result};
use crate::jobs::{About, Job};
use crate::limits::JOB_LOOK_MS_MAX;
use crate::manager::Manager;
use crate::progress::Progress;
use crate::turns::Turn;

/// Carries out `work` as a job, in its turn on the VDIs `on`, and answers with
/// the job at once. `work` drops the turn as soon as a lease or an intent
/// guards what it does, and what it gives back is the job's result.
pub(super) fn start(
    app: &App,
    about: About,
    on: Vec<Uuid>,
    work: impl FnOnce(&Manager, &Progress, Turn) -> Result<Value> + Send + 'static,
) -> Outcome {
    let job = app.jobs.add(about, None)?;
    let shown = app.jobs.show(job.id())?;
    let app = app.clone();
    tokio::spawn(async move {
        // What came of it is in the job.
        if let Ok((job, place, turn)) = wait_for_turn(&app, job, &on).await {
            drop(carry_out(&app, job, turn, place, work));
        }
    });
    Ok((StatusCode::ACCEPTED, Json(shown)).into_response())
}

/// One of the jobs that may work at once.
pub(super) type Place = tokio::sync::OwnedSemaphorePermit;

/// Waits for the job's turn, and then for a free place; a job that is stopped
/// meanwhile has ended.
pub(super) async fn wait_for_turn(app: &App, job: Job, on: &[Uuid]) -> Result<(Job, Place, Turn)> {
    let ready = async {
        let turn = app.turns.take(app.jobs.show(job.id())?.about.operation, on, None).await?;
        let ends = |_| Error::NotRunning { what: "smd".into(), reason: "it ends".into() };
        let place = app.job_places.clone().acquire_owned().await.map_err(ends)?;
        Ok((place, turn))
    };
    let ready = tokio::select! {
        ready = ready => ready,
        () = app.jobs.cancelled(job.id()) => Err(Error::Cancelled),
    };
    match ready {
        Ok((place, turn)) => Ok((job, place, turn)),
        Err(error) => {
            job.end(Err(&error));
            Err(error)
        }
    }
}

/// Runs a job whose turn it is on a thread of its own, and notes its end,
/// which whoever waits for it gets too.
pub(super) fn carry_out(
    app: &App,
    job: Job,
    turn: Turn,
    place: Place,
    work: impl FnOnce(&Manager, &Progress, Turn) -> Result<Value> + Send + 'static,
) -> oneshot::Receiver<Result<Value>> {
    let manager = app.manager.clone();
    let (tell, told) = oneshot::channel();
    job.begin();
    tokio::task::spawn_blocking(move || {
        let _place = place;
        let progress = job.progress().clone();
        let span = tracing::info_span!("job", job = %job.id());
        let outcome = span.in_scope(|| {
            let outcome = work(&manager, &progress, turn);
            match &outcome {
                Ok(_) => tracing::info!("done"),
                Err(error) => tracing::warn!(code = error.code(), %error, "failed"),
            }
            outcome
        });
        job.end(outcome.as_ref().map(Value::clone));
        // Nobody may be waiting.
        let _ = tell.send(outcome);
    });
    told
}

pub(super) async fn list(State(app): State<App>) -> Outcome {
    document(json!({ "jobs": app.jobs.list() }))
}

#[derive(Debug, Deserialize)]
pub(super) struct Look {
    #[serde(default)]
    wait_ms: u64,
}

pub(super) async fn show(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(look): Query<Look>,
) -> Outcome {
    let limit = Duration::from_millis(look.wait_ms.min(JOB_LOOK_MS_MAX));
    document(app.jobs.wait(id_of(&id)?, limit).await?)
}

pub(super) async fn cancel(State(app): State<App>, Path(id): Path<String>) -> Outcome {
    document(app.jobs.cancel(id_of(&id)?)?)
}

pub(super) async fn proceed(State(app): State<App>, Path(id): Path<String>) -> Outcome {
    document(app.jobs.proceed(id_of(&id)?)?)
}

fn id_of(text: &str) -> Result<Uuid> {
    Uuid::try_parse(text).map_err(|_| Error::NotFound { what: format!("job {text:?}") })
}
