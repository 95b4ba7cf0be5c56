//! HTTP and JSON over gcd's socket.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /status?sr=` | | [`Status`] |
//! | `POST /kick` | `{sr?}` | `{}`; looks now |
//! | `POST /run` | `{sr?, vdi?, wait?, dry_run?, offline?}` | [`Report`], with `wait` beside its prediction; `{}` with neither |
//! | `POST /pause`, `/resume` | `{sr?}` | `{}` |
//! | `POST /abort` | `{sr?, vdi?}` | `{aborted}`: merges told to stop |
//! | `POST /set` | `{sr?, rate?, parallel?, latency_factor?, receipts?}` | `{}`; also for what runs |
//! | `GET /receipt?sr=&job=` | | `{job, disks}`: the hashes of every block that a job's receipt compared |
//! | `POST /acknowledge` | `{sr?, job?}` | `{acknowledged}`: alarms of receipts put down; their trees are collected again |
//! | `GET /metrics` | | Prometheus text |
//! | `GET /openapi.json` | | all of this, described ([`crate::openapi`]) |

mod metrics;
mod receipts;
mod settings;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::middleware::{from_fn, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use uuid::Uuid;

use self::settings::Settings;
use crate::collector::{Collector, Scope};
use crate::limits;
use crate::progress::{Doing, Done, LookFailed, Totals};
use crate::reason::Reason;
use crate::report::Report;
use crate::service::{Service, Wishes};

/// What the collector does with a node, as the contract says it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct NodeStatus {
    /// `waiting`, `merging` or `blocked`.
    pub state: &'static str,
    /// Why it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same as a stable word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'static str>,
    /// Bytes moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_done: Option<u64>,
    /// Bytes to move in all, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_total: Option<u64>,
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Seconds left, as far as one can tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_s: Option<f64>,
}

impl NodeStatus {
    fn waits(reason: &Reason) -> Self {
        Self {
            state: if reason.is_blocked() { "blocked" } else { "waiting" },
            reason: Some(reason.to_string()),
            code: Some(reason.code()),
            ..Self::default()
        }
    }
}

/// One SR.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SrStatus {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Whether nothing is started.
    pub paused: bool,
    /// Disks whose leaves are left alone.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub off: BTreeSet<Uuid>,
    /// Seconds until merges begin again, where somebody aborted them all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quiet_s: Option<u64>,
    /// Merges under way.
    pub running: usize,
    /// Bytes per second allowed; 0 is no limit.
    pub rate: u64,
    /// Merges allowed at one time.
    pub parallel: usize,
    /// How much slower than calm an attached disk may get before merges step
    /// back; 0 is never.
    pub latency_factor: f64,
    /// Whether the disks on each merge are read before and after it.
    pub receipts: bool,
    /// Disks that are not what they were before a merge; their trees wait for
    /// somebody to say so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alarms: Vec<crate::receipt::Alarm>,
    /// Bytes per second allowed while attached disks are slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_back_to: Option<u64>,
    /// Why the last look failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Nodes that wait or are being merged.
    pub nodes: BTreeMap<Uuid, NodeStatus>,
    /// Sums since gcd began with this SR.
    pub totals: Totals,
}

/// The whole answer.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Attached SRs.
    pub srs: Vec<SrStatus>,
    /// Attached SRs that cannot be collected, and why.
    pub refused: BTreeMap<Uuid, String>,
    /// Jobs that ended, oldest first; a bounded number of them.
    pub done: Vec<Done>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Which {
    sr: Option<Uuid>,
    vdi: Option<Uuid>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RunBody {
    sr: Option<Uuid>,
    vdi: Option<Uuid>,
    wait: bool,
    dry_run: bool,
    /// Where an SR lies that is not attached, for a dry run.
    offline: Option<Offline>,
}

#[derive(Debug, Deserialize)]
struct Offline {
    path: PathBuf,
    name: String,
}

/// An answer that something could not be done.
#[derive(Debug)]
struct Refused {
    status: StatusCode,
    code: &'static str,
    message: String,
    /// What was done all the same.
    report: Option<Box<Report>>,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut error = json!({"code": self.code, "message": self.message});
        if let Some(report) = self.report {
            error["report"] = json!(report);
        }
        (self.status, Json(json!({ "error": error }))).into_response()
    }
}

impl Refused {
    fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NOT_FOUND", format!("no {what} is attached"))
    }

    fn new(status: StatusCode, code: &'static str, message: String) -> Self {
        Self { status, code, message, report: None }
    }

    /// Why there is no collector of what was asked for.
    fn missing(service: &Service, sr: Uuid, what: &str) -> Self {
        if let Some(why) = service.refused().get(&sr) {
            return Self::io(format!("SR {sr} is attached, but cannot be collected: {why}"));
        }
        match service.known(sr) {
            Ok(Some(name)) => {
                let message = format!("SR {name} ({sr}) is not attached");
                Self::new(StatusCode::CONFLICT, "SR_DETACHED", message)
            }
            Ok(None) => Self::not_found(what),
            Err(error) => Self::io(error.to_string()),
        }
    }

    fn bad_request(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BAD_REQUEST", message)
    }

    fn io(message: String) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "IO_ERROR", message)
    }

    /// An SR that could not be looked at.
    fn look(sr: &str, why: &LookFailed) -> Self {
        let message = format!("SR {sr}: {why}");
        Self { code: why.code, ..Self::io(message) }
    }
}

type Answer<T> = Result<T, Refused>;

#[derive(Clone)]
struct App {
    service: Arc<Service>,
    waiters: Arc<Semaphore>,
}

/// The routes.
pub fn router(service: Arc<Service>) -> Router {
    let app = App { service, waiters: Arc::new(Semaphore::new(limits::WAITERS_MAX)) };
    Router::new()
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(async || Json(crate::openapi::document())))
        .route("/kick", post(kick))
        .route("/run", post(run))
        .route("/pause", post(|app, body| pause(app, body, true)))
        .route("/resume", post(|app, body| pause(app, body, false)))
        .route("/abort", post(abort))
        .route("/set", post(set))
        .route("/receipt", get(receipts::receipt))
        .route("/acknowledge", post(receipts::acknowledge))
        .layer(DefaultBodyLimit::max(limits::BODY_BYTES_MAX))
        .layer(map_response(sm::api::in_json))
        .layer(from_fn(sm::api::read_rest))
        .with_state(app)
}

/// Runs what blocks beside the threads that serve.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Answer<T> + Send + 'static) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(answer) => answer,
        Err(error) => Err(Refused::io(format!("the request broke off: {error}"))),
    }
}

async fn status(State(app): State<App>, Query(which): Query<Which>) -> Answer<Json<Status>> {
    blocking(move || {
        let collectors = named(&app.service, which.sr)?;
        let mut done: Vec<Done> = Vec::new();
        let mut srs = Vec::new();
        for (name, collector) in &collectors {
            srs.push(sr_status(name, collector));
            done.extend(collector.state().done.iter().cloned());
        }
        done.sort_by_key(|done| done.ended_ms);
        Ok(Json(Status { srs, refused: app.service.refused(), done }))
    })
    .await
}

/// Of one SR, which must be there, or of all.
fn named(service: &Service, sr: Option<Uuid>) -> Answer<Vec<(String, Arc<Collector>)>> {
    let found = service.collectors_now(sr).map_err(|error| Refused::io(error.to_string()))?;
    match sr {
        // Its reason is part of the answer.
        Some(sr) if found.is_empty() && !service.refused().contains_key(&sr) => {
            Err(Refused::missing(service, sr, &format!("SR {sr}")))
        }
        _ => Ok(found),
    }
}

fn sr_status(name: &str, collector: &Collector) -> SrStatus {
    let now = collector.now();
    let state = collector.state();
    let mut nodes: BTreeMap<Uuid, NodeStatus> = BTreeMap::new();
    for (node, reason) in &state.waits {
        nodes.insert(*node, NodeStatus::waits(reason));
    }
    for doing in state.running.values() {
        let (_, sources) = doing.nodes.split_last().map_or((None, &[][..]), |(p, s)| (Some(p), s));
        for node in sources {
            nodes.insert(*node, merging(doing, now));
        }
    }
    SrStatus {
        uuid: collector.repo().uuid,
        name: name.to_owned(),
        paused: state.paused,
        off: state.off.clone(),
        quiet_s: Some(state.quiet_left(now)).filter(|left| !left.is_zero()).map(|left| left.as_secs() + 1),
        running: state.running.len(),
        rate: state.rate,
        parallel: state.settings.parallel,
        latency_factor: state.latency_factor,
        receipts: state.settings.receipts,
        alarms: state.alarms.values().cloned().collect(),
        held_back_to: state.backoff.limit(),
        error: state.round_error.as_ref().map(ToString::to_string),
        nodes,
        totals: state.so_far(),
    }
}

fn merging(doing: &Doing, now: std::time::Duration) -> NodeStatus {
    let rate = doing.rate(now);
    let left = doing.ledger.total.saturating_sub(doing.ledger.done);
    NodeStatus {
        state: "merging",
        reason: doing.reading.map(|reading| {
            format!("content receipt: {}, disk {} of {}", reading.what, reading.disk, reading.disks)
        }),
        code: doing.reading.map(|_| "CONTENT_RECEIPT"),
        bytes_done: Some(doing.ledger.done),
        bytes_total: Some(doing.ledger.total),
        rate: Some(rate),
        eta_s: (rate >= 1.0).then(|| left as f64 / rate),
    }
}

async fn kick(State(app): State<App>, Json(which): Json<Which>) -> Answer<Json<Value>> {
    blocking(move || {
        app.service.kick(which.sr);
        Ok(Json(json!({})))
    })
    .await
}

async fn run(State(app): State<App>, Json(body): Json<RunBody>) -> Answer<Response> {
    let many = || {
        let message = format!("{} requests wait already", limits::WAITERS_MAX);
        Refused::new(StatusCode::SERVICE_UNAVAILABLE, "BUSY", message)
    };
    let permit = app.waiters.clone().try_acquire_owned().map_err(|_| many())?;
    blocking(move || {
        let _permit = permit;
        if let (Some(sr), true, Some(at)) = (body.sr, body.dry_run, &body.offline) {
            let said = crate::offline::predict(&at.path, sr, &at.name);
            let report = said.map_err(|stop| Refused::io(stop.to_string()))?;
            return Ok(Json(report).into_response());
        }
        let chosen = choose(&app.service, body.sr, body.vdi)?;
        if !body.wait && !body.dry_run {
            chosen.iter().for_each(|(collector, _)| collector.again());
            return Ok(Json(json!({})).into_response());
        }
        collect(chosen, body.dry_run).map(|report| Json(report).into_response())
    })
    .await
}

/// Collects, or predicts, one SR after the other. One that cannot be looked at
/// does not hold up the others; the answer then is its error, with what came
/// of the rest.
fn collect(chosen: Chosen, dry_run: bool) -> Answer<Report> {
    let mut sum: Option<Report> = None;
    let mut refused: Option<Refused> = None;
    for (collector, scope) in chosen {
        let done = if dry_run {
            let predicted = collector.predict(scope);
            predicted.map_err(|stop| (LookFailed::from(&stop), Report::default()))
        } else {
            collector.collect_as_predicted(scope).map_err(|broken| (broken.why, broken.report))
        };
        let report = done.unwrap_or_else(|(why, report)| {
            let sr = collector.repo().uuid.to_string();
            refused.get_or_insert_with(|| Refused::look(&sr, &why));
            report
        });
        match &mut sum {
            Some(sum) => sum.add(report),
            None => sum = Some(report),
        }
    }
    match refused {
        Some(refused) => Err(Refused { report: sum.map(Box::new), ..refused }),
        None => Ok(sum.unwrap_or_default()),
    }
}

type Chosen = Vec<(Arc<Collector>, Scope)>;

/// What a request is about. An SR that is none may be a VDI: `gc run` takes
/// either.
fn choose(service: &Service, sr: Option<Uuid>, vdi: Option<Uuid>) -> Answer<Chosen> {
    let read = |error: std::io::Error| Refused::io(error.to_string());
    let srs = service.collectors_now(sr).map_err(read)?;
    let vdi = match (sr, vdi) {
        (Some(sr), None) if srs.is_empty() => Some(sr),
        (_, vdi) => vdi,
    };
    let Some(vdi) = vdi else {
        return Ok(srs.into_iter().map(|(_, collector)| (collector, Scope::Sr)).collect());
    };
    let all = if srs.is_empty() { service.collectors(None) } else { srs };
    match all.into_iter().find(|(_, collector)| has(collector, vdi)) {
        Some((_, collector)) => Ok(vec![(collector, Scope::Vdi(vdi))]),
        // It may have been meant as the SR's uuid.
        None => Err(Refused::missing(service, sr.unwrap_or(vdi), &format!("SR or VDI {vdi}"))),
    }
}

/// A disk that was chosen.
struct Disk {
    sr: Uuid,
    vdi: Uuid,
    /// Others of its SR that are switched off and not there any more.
    gone: BTreeSet<Uuid>,
}

fn disk_of(chosen: &Chosen) -> Option<Disk> {
    let [(collector, Scope::Vdi(vdi))] = chosen.as_slice() else { return None };
    let mut gone = collector.state().off.clone();
    gone.retain(|vdi| !has(collector, *vdi));
    Some(Disk { sr: collector.repo().uuid, vdi: *vdi, gone })
}

/// Whether a disk is there; one that is getting another image this moment is,
/// and busy.
fn has(collector: &Collector, vdi: Uuid) -> bool {
    matches!(sm::chain::leaf_volume(collector.repo(), vdi), Ok(_) | Err(sm::Error::Busy { .. }))
}

/// Of an SR all merges, of a disk that of its leaf.
async fn pause(State(app): State<App>, Json(which): Json<Which>, paused: bool) -> Answer<Json<Value>> {
    let (service, named) = (app.service.clone(), which.sr.or(which.vdi));
    let disk = blocking(move || match named {
        None => Ok(None),
        Some(_) => Ok(disk_of(&choose(&service, which.sr, which.vdi)?)),
    });
    let Some(Disk { sr, vdi, gone }) = disk.await? else {
        return steer(app, which.sr, move |service, sr| service.pause(sr, paused)).await;
    };
    let switch = move |wishes: &mut Wishes| {
        wishes.off.retain(|vdi| !gone.contains(vdi));
        if paused {
            wishes.off.insert(vdi)
        } else {
            wishes.off.remove(&vdi)
        };
    };
    steer(app, Some(sr), move |service, sr| service.wish(sr, switch)).await
}

async fn set(State(app): State<App>, Json(body): Json<Settings>) -> Answer<Json<Value>> {
    body.check()?;
    steer(app, body.sr, move |service, sr| service.wish(sr, |wishes| body.change(wishes))).await
}

/// Changes what is wished for an SR, or all.
async fn steer(
    app: App,
    sr: Option<Uuid>,
    change: impl FnOnce(&Service, Option<Uuid>) -> std::io::Result<()> + Send + 'static,
) -> Answer<Json<Value>> {
    blocking(move || {
        let found = app.service.collectors_now(sr).map_err(|error| Refused::io(error.to_string()))?;
        if let (Some(sr), true) = (sr, found.is_empty()) {
            return Err(Refused::missing(&app.service, sr, &format!("SR {sr}")));
        }
        change(&app.service, sr).map_err(|error| Refused::io(error.to_string()))?;
        Ok(Json(json!({})))
    })
    .await
}

async fn abort(State(app): State<App>, Json(which): Json<Which>) -> Answer<Json<Value>> {
    blocking(move || {
        let chosen = choose(&app.service, which.sr, which.vdi)?;
        let aborted: usize = chosen.iter().map(|(collector, scope)| collector.abort(*scope)).sum();
        Ok(Json(json!({"aborted": aborted})))
    })
    .await
}

async fn metrics(State(app): State<App>) -> Answer<Response> {
    blocking(move || {
        let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
        Ok((kind, metrics::text(&app.service)).into_response())
    })
    .await
}
