//! Which request calls what. One function per request, each a few lines:
//! resolve names, call the operation, show the result.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::routing::{get, post};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use super::answer::{Failure, Outcome, document};
use super::figures::{self, Asked};
use super::{App, disks, jobs, metrics, status, streams};
use crate::error::{Error, Result};
use crate::jobs::About;
use crate::journal::SiblingKind;
use crate::limits::{BODY_BYTES_MAX, BUSY_RETRY_MS_MAX, HOLD_MS_MAX, TURN_WAIT_MS_MAX};
use crate::manager::{Manager, NewSr};
use crate::ops::{self, Wanted};
use crate::progress::Progress;
use crate::remote::Remote;
use crate::repo::Repo;
use crate::turns::Turn;
use crate::views::Look;

/// How often an operation that found another process at work (the collector,
/// say) is tried again. Operations of this process queue instead.
pub(super) const BUSY_POLL: Duration = Duration::from_millis(50);

/// All routes.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/srs", get(list_srs).post(add_sr))
        .route("/srs/probe", post(probe_sr))
        .route("/srs/{sr}", get(show_sr))
        .route("/srs/{sr}/check", get(check_sr))
        .route("/srs/{sr}/tree", get(tree))
        .route("/srs/{sr}/history", get(history))
        .route("/srs/{sr}/import", post(streams::import))
        .route("/srs/{sr}/{verb}", post(sr_verb))
        .route("/vdis", get(list_vdis).post(create_vdi))
        .route("/vdis/snapshot", post(snapshot))
        .route("/vdis/{vdi}", get(show_vdi).delete(delete_vdi))
        .route("/vdis/{vdi}/stat", get(stat))
        .route("/vdis/{vdi}/export", get(streams::export))
        .route("/vdis/{vdi}/clone", post(clone))
        .route("/vdis/{vdi}/rename", post(rename))
        .route("/vdis/{vdi}/attach", post(attach))
        .route("/vdis/{vdi}/detach", post(detach))
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

#[derive(Debug, Deserialize)]
struct SrListing {
    /// Only those of this name, and no more than is known without reading.
    name: Option<String>,
}

async fn list_srs(State(app): State<App>, Query(listing): Query<SrListing>) -> Outcome {
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

async fn add_sr(State(app): State<App>, body: Bytes) -> Outcome {
    let new: NewSr = read(&body)?;
    document(run(&app, move |manager| manager.view_sr(manager.add_sr(&new)?)).await?)
}

#[derive(Debug, Deserialize)]
struct ProbeWhat {
    #[serde(rename = "type")]
    kind: crate::state::SrType,
    path: Option<std::path::PathBuf>,
}

async fn probe_sr(State(app): State<App>, body: Bytes) -> Outcome {
    let what: ProbeWhat = read(&body)?;
    document(run(&app, move |manager| manager.probe_sr(what.kind, what.path.as_deref())).await?)
}

async fn check_sr(State(app): State<App>, Path(sr): Path<String>) -> Outcome {
    document(run(&app, move |manager| manager.check_sr(manager.sr_uuid(&sr)?)).await?)
}

async fn show_sr(State(app): State<App>, Path(sr): Path<String>) -> Outcome {
    document(run(&app, move |manager| manager.view_sr(manager.sr_uuid(&sr)?)).await?)
}

async fn tree(State(app): State<App>, Path(sr): Path<String>) -> Outcome {
    document(run(&app, move |manager| manager.view_tree(manager.sr_uuid(&sr)?)).await?)
}

/// Lines of history shown when nobody says how many.
const HISTORY_ROWS: u32 = 100;

#[derive(Debug, Deserialize)]
struct Rows {
    rows: Option<u32>,
}

async fn history(State(app): State<App>, Path(sr): Path<String>, Query(rows): Query<Rows>) -> Outcome {
    let rows_max = rows.rows.unwrap_or(HISTORY_ROWS);
    let lines = run(&app, move |manager| manager.open_sr(manager.sr_uuid(&sr)?)?.labels.history(rows_max));
    let lines = lines.await?.into_iter().map(|(at, operation, vdi, detail)| {
        json!({ "at": at, "operation": operation, "vdi": vdi, "detail": detail })
    });
    document(json!({ "history": lines.collect::<Vec<_>>() }))
}

async fn sr_verb(State(app): State<App>, Path((sr, verb)): Path<(String, String)>, _body: Bytes) -> Outcome {
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

#[derive(Debug, Deserialize)]
struct Listing {
    sr: Option<String>,
    /// Only visible ones of this name.
    name: Option<String>,
    #[serde(default)]
    hidden: bool,
}

async fn list_vdis(State(app): State<App>, Query(listing): Query<Listing>) -> Outcome {
    let vdis = run(&app, move |manager| {
        let srs = match &listing.sr {
            Some(sr) => vec![manager.sr_uuid(sr)?],
            None => manager.known().iter().map(|sr| sr.uuid).collect(),
        };
        let mut vdis = Vec::new();
        for sr in srs {
            match manager.open_sr(sr) {
                Ok(open) => vdis.extend(listed(&open.repo, &listing)?),
                Err(Error::SrDetached { .. }) if listing.sr.is_none() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(vdis)
    });
    document(json!({ "vdis": vdis.await? }))
}

fn listed(repo: &Repo, listing: &Listing) -> Result<Vec<crate::views::VdiView>> {
    let Some(name) = &listing.name else {
        return Ok(Look::at(repo)?.vdis(listing.hidden));
    };
    let mut views = Vec::new();
    for vdi in repo.labels.named(name)? {
        match Look::of(repo, vdi)?.one(vdi) {
            Ok(view) if listing.hidden || view.kind != crate::views::Kind::Hidden => views.push(view),
            // A label of what is gone; the next scan drops it.
            Ok(_) | Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(views)
}

#[derive(Debug, Deserialize)]
struct NewVdi {
    sr: String,
    name: String,
    virtual_size: u64,
}

async fn create_vdi(State(app): State<App>, body: Bytes) -> Outcome {
    let new: NewVdi = read(&body)?;
    let made = run(&app, move |manager| {
        let open = manager.open_sr(manager.sr_uuid(&new.sr)?)?;
        let vdi = ops::create(&open.repo, &new.name, new.virtual_size)?;
        tracing::info!(sr = %open.repo.uuid, %vdi, operation = "create", "done");
        Look::of(&open.repo, vdi)?.one(vdi)
    });
    document(made.await?)
}

async fn show_vdi(State(app): State<App>, Path(vdi): Path<String>) -> Outcome {
    let shown = run(&app, move |manager| {
        let (repo, vdi) = manager.find_vdi(&vdi)?;
        let shown = Look::of(&repo, vdi)?.one(vdi)?;
        let asked = shown.served.is_some().then(|| Asked::of(&repo, &shown));
        Ok((shown, asked))
    });
    let (mut shown, asked) = shown.await?;
    if let Some(asked) = asked {
        shown.trouble = figures::trouble(&app.figures, asked).await;
    }
    document(shown)
}

async fn delete_vdi(State(app): State<App>, Path(vdi): Path<String>) -> Outcome {
    let gone = run_on(&app, "delete", vdi, |manager, repo, vdi| {
        let before = Look::of(repo, vdi)?.one(vdi)?;
        ops::delete(repo, vdi)?;
        manager.kick(repo.uuid);
        Ok(before)
    });
    document(gone.await?)
}

async fn stat(State(app): State<App>, Path(vdi): Path<String>) -> Outcome {
    let stat = run(&app, move |manager| {
        let (repo, vdi) = manager.find_vdi(&vdi)?;
        ops::stat(&repo, vdi)
    });
    document(stat.await?)
}

#[derive(Debug, Deserialize)]
pub(super) struct Group {
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

async fn snapshot(State(app): State<App>, body: Bytes) -> Outcome {
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
struct Words {
    name: Option<String>,
    description: Option<String>,
}

async fn clone(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let words: Words = read(&body)?;
    let group = Group { vdis: vec![vdi], name: words.name, hold: false };
    let turn = turn(&app, "clone", &members(&app, &group).await?).await?;
    let made = run(&app, move |manager| {
        let _turn = &turn;
        let (repo, made) = siblings(manager, SiblingKind::Clone, &group, &Progress::default())?;
        let vdi = made.first().ok_or_else(|| Error::NotFound { what: "clone".into() })?;
        Look::of(&repo, *vdi)?.one(*vdi)
    });
    document(made.await?)
}

async fn rename(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let words: Words = read(&body)?;
    let renamed = run_on(&app, "rename", vdi, move |_, repo, vdi| {
        ops::rename(repo, vdi, words.name.as_deref(), words.description.as_deref())?;
        Look::of(repo, vdi)?.one(vdi)
    });
    document(renamed.await?)
}

#[derive(Debug, Deserialize)]
struct AttachHow {
    #[serde(default)]
    read_only: bool,
    listen: Option<SocketAddr>,
    tls_certificates: Option<PathBuf>,
    #[serde(default)]
    tls_verify_peer: bool,
    tls_psk: Option<PathBuf>,
    #[serde(default)]
    insecure: bool,
}

impl AttachHow {
    fn how(self) -> Result<ops::How> {
        let Self { read_only, listen, tls_certificates, tls_verify_peer, tls_psk, insecure } = self;
        let Some(listen) = listen else {
            if tls_certificates.is_some() || tls_psk.is_some() || tls_verify_peer || insecure {
                return Err(Error::BadRequest { reason: "`tls_…` and `insecure` need `listen`".into() });
            }
            return Ok(ops::How { read_only, ..ops::How::default() });
        };
        let remote = Remote { listen, tls_certificates, tls_verify_peer, tls_psk, insecure };
        remote.refuse_open_by_mistake()?;
        Ok(ops::How { read_only, remote: Some(remote), offer: None })
    }
}

async fn attach(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let how = read::<AttachHow>(&body)?.how()?;
    let attached = run_on(&app, "attach", vdi, move |manager, repo, vdi| {
        let claim = if how.remote.is_none() { manager.claim_offer()? } else { None };
        let offer = claim.as_ref().map(|claim| claim.remote().clone());
        ops::attach_as(repo, vdi, &ops::How { offer, ..how.clone() })?;
        Look::of(repo, vdi)?.one(vdi)
    });
    document(attached.await?)
}

#[derive(Debug, Deserialize)]
struct DetachHow {
    #[serde(default)]
    force: bool,
}

async fn detach(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let how: DetachHow = read(&body)?;
    let detached = run_on(&app, "detach", vdi, move |manager, repo, vdi| {
        if ops::detach(repo, vdi, how.force)? {
            manager.kick(repo.uuid);
        }
        let look = Look::of(repo, vdi)?;
        look.one(vdi).or_else(|_| Ok(look.missing(vdi)))
    });
    document(detached.await?)
}
