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
use crate::limits::{CHAIN_WARN_LEFT, HEALTH_ROWS_MAX};
use crate::manager::Manager;
use crate::repo::Repo;
use crate::scan;
use crate::tree::Node;
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
    /// One per attached SR.
    health: Vec<Health>,
}

/// How the chains of an SR are.
#[derive(Debug, Serialize)]
struct Health {
    sr: Uuid,
    name: String,
    size: u64,
    free: u64,
    vdis: usize,
    hidden: usize,
    /// Images that cannot be used, the first [`HEALTH_ROWS_MAX`].
    broken: Vec<Ailing>,
    broken_count: usize,
    /// VDIs whose next snapshots will be refused, likewise.
    near_limit: Vec<Ailing>,
    near_limit_count: usize,
    depth_longest: u32,
    depth_max: u32,
    /// Set when the SR could not be looked at.
    error: Option<String>,
}

/// A VDI or image that needs somebody.
#[derive(Debug, Serialize)]
struct Ailing {
    vdi: Uuid,
    name: String,
    depth: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Looks at the images of an SR: as many reads as have changed.
fn health(repo: &Repo) -> Result<Health> {
    let tree = scan::scan(repo)?.tree;
    let space = repo.volumes.space().during(|| format!("room of SR {}", repo.name))?;
    let depth_max = repo.limits.chain_max;
    let visible = || tree.nodes.iter().filter(|node| !node.is_hidden());
    let ailing = |node: &Node| -> Result<Ailing> {
        let name = repo.labels.get(node.uuid)?.unwrap_or_default().name;
        let reason = node.broken().map(ToString::to_string);
        Ok(Ailing { vdi: node.uuid, name, depth: node.depth, reason })
    };
    let rows =
        |nodes: &[&Node]| nodes.iter().take(HEALTH_ROWS_MAX).map(|n| ailing(n)).collect::<Result<Vec<_>>>();
    let broken: Vec<&Node> = tree.nodes.iter().filter(|node| node.broken().is_some()).collect();
    let mut near: Vec<&Node> =
        visible().filter(|node| node.depth.saturating_add(CHAIN_WARN_LEFT) > depth_max).collect();
    near.sort_by_key(|node| std::cmp::Reverse(node.depth));
    Ok(Health {
        sr: repo.uuid,
        name: repo.name.clone(),
        size: space.total,
        free: space.free,
        vdis: visible().count(),
        hidden: tree.nodes.len() - visible().count(),
        broken: rows(&broken)?,
        broken_count: broken.len(),
        near_limit: rows(&near)?,
        near_limit_count: near.len(),
        depth_longest: tree.nodes.iter().map(|node| node.depth).max().unwrap_or(0),
        depth_max,
        error: None,
    })
}

/// An SR that cannot be looked at says so instead of hiding the others.
fn health_or_why(repo: &Repo) -> Health {
    health(repo).unwrap_or_else(|error| Health {
        sr: repo.uuid,
        name: repo.name.clone(),
        size: 0,
        free: 0,
        vdis: 0,
        hidden: 0,
        broken: Vec::new(),
        broken_count: 0,
        near_limit: Vec::new(),
        near_limit_count: 0,
        depth_longest: 0,
        depth_max: repo.limits.chain_max,
        error: Some(error.to_string()),
    })
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

/// What the run folders and the images of all attached SRs show.
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
        health: Vec::new(),
    };
    for sr in known.iter().filter(|sr| sr.attached) {
        let Ok(open) = manager.open_sr(sr.uuid) else {
            continue;
        };
        status.health.push(health_or_why(&open.repo));
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

/// Prometheus text.
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
    let per_sr = |text: &mut String, name: &str, help: &str, value: &dyn Fn(&Health) -> u64| {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        for health in &status.health {
            text.push_str(&format!("{name}{{sr=\"{}\"}} {}\n", health.sr, value(health)));
        }
    };
    let failures = of(&taps.failed);
    metric("counter", "coppice_tapdisk_revive_failures_total", "Attempts that failed.", &[("", failures)]);
    per_sr(&mut text, "coppice_sr_size_bytes", "Size of the filesystem.", &|sr| sr.size);
    per_sr(&mut text, "coppice_sr_free_bytes", "Free there.", &|sr| sr.free);
    per_sr(&mut text, "coppice_sr_vdis", "Disks and snapshots.", &|sr| n(sr.vdis));
    per_sr(&mut text, "coppice_sr_hidden_images", "Base copies.", &|sr| n(sr.hidden));
    per_sr(&mut text, "coppice_sr_broken_images", "Images that cannot be used.", &|sr| n(sr.broken_count));
    per_sr(&mut text, "coppice_sr_longest_chain", "Images in the longest chain.", &|sr| {
        sr.depth_longest.into()
    });
    let near = "Disks whose chain is near its limit.";
    per_sr(&mut text, "coppice_sr_chains_near_limit", near, &|sr| n(sr.near_limit_count));
    text
}
