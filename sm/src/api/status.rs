//! `GET /status` and `GET /metrics`: how this daemon and what it serves do.

use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use uuid::Uuid;

use super::answer::{Outcome, document};
use super::{App, routes};
use crate::error::{IoContext, Result};
use crate::manager::Manager;
use crate::wanted::Down;

/// What smd says of itself.
#[derive(Debug, Serialize)]
struct Status {
    pid: u32,
    version: &'static str,
    uptime_s: u64,
    attached_srs: usize,
    detached_srs: usize,
    /// VDIs served by a live tapdisk.
    serving: usize,
    /// VDIs that lost theirs.
    down: Vec<DownView>,
}

#[derive(Debug, Serialize)]
struct DownView {
    sr: Uuid,
    vdi: Uuid,
    name: String,
    deaths: u32,
    #[serde(flatten)]
    down: Down,
}

/// Counts what a look at the run folder shows; no image is read.
fn look(manager: &Manager, uptime_s: u64) -> Result<Status> {
    let known = manager.known();
    let attached_srs = known.iter().filter(|sr| sr.attached).count();
    let mut status = Status {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION"),
        uptime_s,
        attached_srs,
        detached_srs: known.len() - attached_srs,
        serving: 0,
        down: Vec::new(),
    };
    for sr in known.iter().filter(|sr| sr.attached) {
        let Ok(open) = manager.open_sr(sr.uuid) else {
            continue;
        };
        let host = &open.repo.host;
        for wanted in host.wanted().during(|| "run folder".into())? {
            match wanted.down {
                None => status.serving += 1,
                Some(down) => {
                    let label = open.repo.labels.get(wanted.vdi)?.unwrap_or_default();
                    let (sr, vdi, deaths) = (wanted.sr, wanted.vdi, wanted.deaths);
                    status.down.push(DownView { sr, vdi, name: label.name, deaths, down });
                }
            }
        }
    }
    Ok(status)
}

pub async fn status(State(app): State<App>) -> Outcome {
    let uptime_s = app.began.elapsed().as_secs();
    document(routes::run(&app, move |manager| look(manager, uptime_s)).await?)
}

/// Prometheus text. Nothing in it needs an image to be read.
pub async fn metrics(State(app): State<App>) -> Response {
    let uptime_s = app.began.elapsed().as_secs();
    let text = match routes::run(&app, move |manager| look(manager, uptime_s)).await {
        Ok(status) => text(&app, &status),
        Err(failure) => return failure.into_response(),
    };
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (StatusCode::OK, kind, text).into_response()
}

fn text(app: &App, status: &Status) -> String {
    let taps = &app.manager.tap_counters;
    let given_up = status.down.iter().filter(|down| down.down.given_up).count();
    let mut text = String::new();
    let mut metric = |kind: &str, name: &str, help: &str, values: &[(&str, u64)]| {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        for (labels, value) in values {
            text.push_str(&format!("{name}{labels} {value}\n"));
        }
    };
    let n = |count: usize| count as u64;
    let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    metric("gauge", "coppice_smd_uptime_seconds", "Since smd started.", &[("", status.uptime_s)]);
    metric("counter", "coppice_smd_requests_total", "API requests.", &[("", of(&app.counters.requests))]);
    let refused = of(&app.counters.refused);
    metric("counter", "coppice_smd_requests_refused_total", "Requests refused or failed.", &[("", refused)]);
    let srs =
        [("{state=\"attached\"}", n(status.attached_srs)), ("{state=\"detached\"}", n(status.detached_srs))];
    metric("gauge", "coppice_srs", "Storage repositories.", &srs);
    let states = [
        ("{state=\"serving\"}", n(status.serving)),
        ("{state=\"down\"}", n(status.down.len() - given_up)),
        ("{state=\"given_up\"}", n(given_up)),
    ];
    metric("gauge", "coppice_tapdisks", "Attached disks.", &states);
    metric("counter", "coppice_tapdisk_deaths_total", "Tapdisks that died.", &[("", of(&taps.deaths))]);
    metric("counter", "coppice_tapdisk_revived_total", "Tapdisks brought back.", &[("", of(&taps.revived))]);
    let failures = of(&taps.failed);
    metric("counter", "coppice_tapdisk_revive_failures_total", "Attempts that failed.", &[("", failures)]);
    text
}
