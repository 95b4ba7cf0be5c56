//! `GET /metrics`: Prometheus text.
//!
//! ```text
//!   repositories   what runs and waits, sums since gcd began; by SR
//!   nodes          each that waits, is blocked or is being merged; by VDI
//!   receipts.rs    sums of content receipts; by SR
//! ```
//!
//! The number of nodes told of is bounded ([`METRIC_NODES_MAX`]).

use std::sync::Arc;

use sm::api::page::{Kind, Page};
use uuid::Uuid;

use super::{NodeStatus, SrStatus, receipts, sr_status};
use crate::collector::Collector;
use crate::limits::METRIC_NODES_MAX;
use crate::progress::Totals;
use crate::service::Service;

/// States of nodes, what one wants to see most first.
const STATES: [&str; 3] = ["merging", "blocked", "waiting"];

/// The page.
pub(super) fn text(service: &Service) -> String {
    let collectors = service.collectors(None);
    let mut page = Page::default();
    repositories(&mut page, &collectors);
    let status: Vec<SrStatus> = collectors.iter().map(|(name, one)| sr_status(name, one)).collect();
    nodes(&mut page, &status, METRIC_NODES_MAX);
    page.text()
}

/// Picks one figure of the sums.
type Sum = fn(&Totals) -> u64;

fn repositories(page: &mut Page, collectors: &[(String, Arc<Collector>)]) {
    let mut per_sr = |name: &str, help: &str, kind: Kind, of: &dyn Fn(&Collector) -> u64| {
        let mut family = page.family(kind, name, help);
        for (_, collector) in collectors {
            family.sample(&[("sr", &collector.repo().uuid.to_string())], of(collector));
        }
    };
    let running = |c: &Collector| c.state().running.len() as u64;
    per_sr("coppice_gc_running", "Merges under way.", Kind::Gauge, &running);
    per_sr("coppice_gc_waiting", "Nodes that wait.", Kind::Gauge, &|c| c.state().waits.len() as u64);
    let rate = "Bytes per second allowed, 0 is no limit.";
    per_sr("coppice_gc_rate_bytes", rate, Kind::Gauge, &|c| c.state().budget.rate());
    let failed = "Whether the last look at the SR failed: nothing is collected then.";
    let look = |c: &Collector| u64::from(c.state().round_error.is_some());
    per_sr("coppice_gc_look_failed", failed, Kind::Gauge, &look);
    let sums: [(&str, &str, Sum); 6] = [
        ("coalesced", "Hidden nodes merged.", |t| t.coalesced),
        ("leaf_coalesced", "Leaves merged.", |t| t.leaf_coalesced),
        ("deleted", "Hidden nodes deleted.", |t| t.deleted),
        ("bytes_copied", "Bytes read and written, by merges under way too.", |t| t.bytes_copied),
        ("bytes_cloned", "Bytes shared, by merges under way too.", |t| t.bytes_cloned),
        ("bytes_freed", "Bytes of blocks given back by merges that ended.", |t| t.bytes_freed),
    ];
    for (name, help, of) in sums {
        let name = format!("coppice_gc_{name}_total");
        per_sr(&name, help, Kind::Counter, &|c| of(&c.state().so_far()));
    }
    let given_back = "Bytes given back that blocks took and nobody wrote.";
    let bytes = |c: &Collector| c.state().unwritten.bytes;
    per_sr("coppice_gc_unwritten_bytes_total", given_back, Kind::Counter, &bytes);
    receipts::metrics(&mut per_sr);
}

/// A node as samples name it.
struct Named<'a> {
    sr: String,
    vdi: String,
    status: &'a NodeStatus,
}

fn nodes(page: &mut Page, srs: &[SrStatus], nodes_max: usize) {
    let mut counts =
        page.family(Kind::Gauge, "coppice_gc_nodes", "Nodes that are being merged, blocked or waiting.");
    for sr in srs {
        for state in STATES {
            let count = sr.nodes.values().filter(|node| node.state == state).count();
            counts.sample(&[("sr", &sr.uuid.to_string()), ("state", state)], count);
        }
    }
    let of_sr = |sr: &SrStatus, state: &'static str| {
        let here = sr.nodes.iter().filter(move |(_, node)| node.state == state);
        here.map(|(vdi, _)| (sr.uuid, *vdi)).collect::<Vec<(Uuid, Uuid)>>()
    };
    let ranked = STATES.iter().flat_map(|state| srs.iter().flat_map(|sr| of_sr(sr, state)));
    let ranked: Vec<(Uuid, Uuid)> = ranked.collect();
    let help = "Nodes about which there is nothing below, as there are too many.";
    page.single(Kind::Gauge, "coppice_gc_nodes_left_out", help, ranked.len().saturating_sub(nodes_max));
    let status = |sr: Uuid, vdi: Uuid| srs.iter().find(|one| one.uuid == sr)?.nodes.get(&vdi);
    let told = ranked.iter().take(nodes_max).filter_map(|(sr, vdi)| {
        Some(Named { sr: sr.to_string(), vdi: vdi.to_string(), status: status(*sr, *vdi)? })
    });
    let told: Vec<Named<'_>> = told.collect();
    let help = "What the collector does with a node: 1, and the reason why it does not go on.";
    let mut states = page.family(Kind::Gauge, "coppice_gc_node_state", help);
    for Named { sr, vdi, status } in &told {
        let why = status.code.unwrap_or_default();
        states.sample(&[("sr", sr), ("vdi", vdi), ("state", status.state), ("reason", why)], 1);
    }
    progress(page, &told);
}

/// Nodes of one pass show the figures of the pass, each of them.
fn progress(page: &mut Page, told: &[Named<'_>]) {
    let mut merging = |name: &str, help: &str, of: &dyn Fn(&NodeStatus) -> Option<f64>| {
        let mut family = page.family(Kind::Gauge, name, help);
        for Named { sr, vdi, status } in told {
            if let Some(value) = of(status) {
                family.sample(&[("sr", sr), ("vdi", vdi), ("state", status.state)], value);
            }
        }
    };
    let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
    let help = "Bytes moved by the pass that merges the node.";
    merging("coppice_gc_node_bytes_done", help, &|node| bytes(node.bytes_done));
    let help = "Bytes the pass that merges the node moves in all, at most.";
    merging("coppice_gc_node_bytes_total", help, &|node| bytes(node.bytes_total));
    merging("coppice_gc_node_bytes_per_second", "Rate of that pass.", &|node| node.rate);
    let help = "Seconds until that pass has moved all, as far as one can tell.";
    merging("coppice_gc_node_eta_seconds", help, &|node| node.eta_s);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::Reason;

    fn sr(n: u128, nodes: impl Iterator<Item = (u128, NodeStatus)>) -> SrStatus {
        SrStatus {
            uuid: Uuid::from_u128(n),
            nodes: nodes.map(|(node, status)| (Uuid::from_u128(node), status)).collect(),
            ..SrStatus::default()
        }
    }

    #[test]
    fn more_nodes_than_may_be_told_are_counted_and_those_at_work_stay() {
        let waits = |n| (n, NodeStatus::waits(&Reason::TreeBusy));
        let merges = NodeStatus { state: "merging", bytes_done: Some(3), ..NodeStatus::default() };
        let blocked = NodeStatus::waits(&Reason::NoSpace { needed: 2, free: 1 });
        let srs = [sr(1, (0..50).map(waits)), sr(2, [(7, merges), (8, blocked)].into_iter())];
        let mut page = Page::default();
        nodes(&mut page, &srs, 10);
        let text = page.text();
        let lines = |part: &str| text.lines().filter(|line| line.starts_with(part)).count();
        assert_eq!(lines("coppice_gc_node_state{"), 10, "{text}");
        assert!(text.contains("\ncoppice_gc_nodes_left_out 42\n"), "{text}");
        let at = |n: u128| Uuid::from_u128(n);
        let done = format!("node_bytes_done{{sr=\"{}\",vdi=\"{}\",state=\"merging\"}} 3\n", at(2), at(7));
        assert!(text.contains(&done), "{text}");
        let why = format!("vdi=\"{}\",state=\"blocked\",reason=\"NO_SPACE\"}} 1\n", at(8));
        assert!(text.contains(&why), "{text}");
        assert!(text.contains("state=\"waiting\",reason=\"TREE_BUSY\"} 1"), "{text}");
    }
}
