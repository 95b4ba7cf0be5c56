//! `GET /metrics`: Prometheus text.
//!
//! ```text
//!   page.rs    the format
//!   here       smd's own figures, and those of each SR
//!   disks.rs   what the tapdisks of attached disks count
//! ```

mod disks;
pub mod page;

use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use self::page::{Kind, Page};
use super::answer::Failure;
use super::status::{Health, Status, look};
use super::{App, figures, routes};

pub async fn metrics(State(app): State<App>) -> Response {
    match text(&app).await {
        Ok(text) => {
            let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
            (StatusCode::OK, kind, text).into_response()
        }
        Err(failure) => failure.into_response(),
    }
}

async fn text(app: &App) -> Result<String, Failure> {
    let uptime_s = app.began.elapsed().as_secs();
    let looked = routes::run(app, move |manager| Ok((look(manager, uptime_s)?, figures::disks(manager)?)));
    let (status, attached) = looked.await?;
    let asked = figures::ask(&app.figures, attached).await;
    let mut page = Page::default();
    daemon(&mut page, app, &status);
    repositories(&mut page, &status);
    let name_of = |sr| {
        let found = status.health.iter().find(|health| health.sr == sr);
        found.map(|health| health.name.clone()).unwrap_or_default()
    };
    disks::write(&mut page, &name_of, asked);
    Ok(page.text())
}

fn daemon(page: &mut Page, app: &App, status: &Status) {
    let taps = &app.manager.tap_counters;
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    page.single(Kind::Gauge, "coppice_smd_uptime_seconds", "Since smd started.", status.uptime_s);
    let mut counter = |name: &str, help: &str, value: u64| page.single(Kind::Counter, name, help, value);
    counter("coppice_smd_requests_total", "API requests.", of(&app.counters.requests));
    let refused = of(&app.counters.refused);
    counter("coppice_smd_requests_refused_total", "Requests refused or failed.", refused);
    counter("coppice_tapdisk_deaths_total", "Tapdisks that died.", of(&taps.deaths));
    counter("coppice_tapdisk_revived_total", "Tapdisks brought back.", of(&taps.revived));
    counter("coppice_tapdisk_revive_failures_total", "Attempts that failed.", of(&taps.failed));
    let mut srs = page.family(Kind::Gauge, "coppice_srs", "Storage repositories.");
    srs.sample(&[("state", "attached")], status.attached_srs);
    srs.sample(&[("state", "detached")], status.detached_srs);
    let given_up = status.down.iter().filter(|down| down.down.given_up).count();
    let mut tapdisks = page.family(Kind::Gauge, "coppice_tapdisks", "Attached disks.");
    tapdisks.sample(&[("state", "serving")], status.serving);
    tapdisks.sample(&[("state", "down")], status.down.len() - given_up);
    tapdisks.sample(&[("state", "given_up")], given_up);
}

fn repositories(page: &mut Page, status: &Status) {
    let mut info = page.family(Kind::Gauge, "coppice_sr_info", "Attached SRs and what they are called.");
    for health in &status.health {
        info.sample(&[("sr", &health.sr.to_string()), ("name", &health.name)], 1);
    }
    let mut per_sr = |name: &str, help: &str, value: &dyn Fn(&Health) -> u64| {
        let mut family = page.family(Kind::Gauge, name, help);
        for health in &status.health {
            family.sample(&[("sr", &health.sr.to_string())], value(health));
        }
    };
    let n = |count: usize| count as u64;
    per_sr("coppice_sr_size_bytes", "Size of the filesystem.", &|sr| sr.size);
    per_sr("coppice_sr_free_bytes", "Free there.", &|sr| sr.free);
    per_sr("coppice_sr_vdis", "Disks and snapshots.", &|sr| n(sr.vdis));
    per_sr("coppice_sr_hidden_images", "Base copies.", &|sr| n(sr.hidden));
    per_sr("coppice_sr_broken_images", "Images that cannot be used.", &|sr| n(sr.broken_count));
    per_sr("coppice_sr_longest_chain", "Images in the longest chain.", &|sr| sr.depth_longest.into());
    let near = "Disks whose chain is near its limit.";
    per_sr("coppice_sr_chains_near_limit", near, &|sr| n(sr.near_limit_count));
}
