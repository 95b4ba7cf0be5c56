//! `GET /status`: how this daemon and what it serves do.

use axum::extract::State;
use serde::Serialize;
use uuid::Uuid;

use super::answer::{Outcome, document};
use super::{App, figures, routes};
use crate::error::{IoContext, Result};
use crate::limits::{CHAIN_WARN_LEFT, HEALTH_ROWS_MAX};
use crate::manager::Manager;
use crate::repo::Repo;
use crate::scan;
use crate::tree::Node;
use crate::wanted::Down;

/// What smd says of itself.
#[derive(Debug, Serialize)]
pub(super) struct Status {
    pub(super) pid: u32,
    pub(super) version: &'static str,
    pub(super) uptime_s: u64,
    pub(super) attached_srs: usize,
    pub(super) detached_srs: usize,
    /// VDIs served by a live tapdisk.
    pub(super) serving: usize,
    /// VDIs that lost theirs.
    pub(super) down: Vec<DownView>,
    /// Served VDIs with which something is wrong.
    pub(super) troubled: Vec<TroubledView>,
    /// One per attached SR.
    pub(super) health: Vec<Health>,
}

/// How the chains of an SR are.
#[derive(Debug, Serialize)]
pub(super) struct Health {
    pub(super) sr: Uuid,
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) free: u64,
    pub(super) vdis: usize,
    pub(super) hidden: usize,
    /// Images that cannot be used, the first [`HEALTH_ROWS_MAX`].
    pub(super) broken: Vec<Ailing>,
    pub(super) broken_count: usize,
    /// VDIs whose next snapshots will be refused, likewise.
    pub(super) near_limit: Vec<Ailing>,
    pub(super) near_limit_count: usize,
    pub(super) depth_longest: u32,
    pub(super) depth_max: u32,
    /// Set when the SR could not be looked at.
    pub(super) error: Option<String>,
}

/// A VDI or image that needs somebody.
#[derive(Debug, Serialize)]
pub(super) struct Ailing {
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
pub(super) struct DownView {
    pub(super) sr: Uuid,
    pub(super) vdi: Uuid,
    pub(super) name: String,
    pub(super) deaths: u32,
    #[serde(flatten)]
    pub(super) down: Down,
}

#[derive(Debug, Serialize)]
pub(super) struct TroubledView {
    sr: Uuid,
    vdi: Uuid,
    name: String,
    /// What is wrong, and what to do.
    trouble: String,
}

/// What the run folders and the images of all attached SRs show.
pub(super) fn look(manager: &Manager, uptime_s: u64) -> Result<Status> {
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
        troubled: Vec::new(),
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
    let looked = routes::run(&app, move |manager| Ok((look(manager, uptime_s)?, figures::disks(manager)?)));
    let (mut status, attached) = looked.await?;
    let asked = figures::ask(&app.figures, attached).await;
    let troubled = asked.into_iter().filter_map(|(asked, figures)| {
        Some(TroubledView { sr: asked.sr, vdi: asked.vdi, name: asked.name, trouble: figures.trouble()? })
    });
    status.troubled = troubled.collect();
    document(status)
}
