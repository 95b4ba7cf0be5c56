//! `GET /openapi.json` of gcd: its routes as data.

use serde_json::Value;
use sm::api::openapi::{Route, describe};

const ROUTES: &[Route] = &[
    ("get", "/status", "What runs, what waits and why; of all attached SRs, or of ?sr=", &[]),
    ("get", "/metrics", "Prometheus text", &[]),
    ("get", "/openapi.json", "This document", &[]),
    ("post", "/kick", "Look for work now", &["sr?"]),
    (
        "post",
        "/run",
        "Collect now: all, an SR, or the tree of a VDI; with `wait` or `dry_run` it answers what was, or would be, done, or, if an SR could not be looked at, the error of the first with what was done as `report`; `offline` (path, name) is an SR that is not attached",
        &["sr?", "vdi?", "wait?", "dry_run?", "offline?"],
    ),
    (
        "post",
        "/pause",
        "Stop running merges at the next safe point and start no new work; of a disk, only the merge of its leaf",
        &["sr?", "vdi?"],
    ),
    ("post", "/resume", "Go on at once, after an abort too", &["sr?", "vdi?"]),
    (
        "post",
        "/abort",
        "Stop running merges at the next safe point; after half a minute, or with /resume or /run, they begin again",
        &["sr?", "vdi?"],
    ),
    (
        "post",
        "/set",
        "Limits, also of what runs, at least one of: bytes per second (0: none), merges at one time (up to 16; 0: the default), how slow disks may get (0: any, up to 1000); whether disks are read before and after each merge that begins from now on. Anything else is refused",
        &["sr?", "rate?", "parallel?", "latency_factor?", "receipts?"],
    ),
    ("get", "/receipt", "The hashes of every block that the receipt of ?job= in ?sr= compared", &[]),
    (
        "post",
        "/acknowledge",
        "Put down alarms of receipts, all or that of a job: their trees are collected again",
        &["sr?", "job?"],
    ),
];

/// The document.
#[must_use]
pub fn document() -> Value {
    describe("gcd", "Garbage collector of the storage repositories of one host", ROUTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let mut routed: Vec<(String, String)> = include_str!("api.rs")
            .split(".route(\"")
            .skip(1)
            .map(|line| {
                let (path, methods) = line.split_once("\", ").unwrap();
                (methods.split('(').next().unwrap().to_owned(), path.to_owned())
            })
            .collect();
        assert!(routed.len() > 7, "{routed:?}");
        let mut described: Vec<(String, String)> =
            ROUTES.iter().map(|(method, path, ..)| ((*method).to_owned(), (*path).to_owned())).collect();
        routed.sort();
        described.sort();
        assert_eq!(described, routed);
        let run = &document()["paths"]["/run"]["post"]["requestBody"];
        assert!(run["content"]["application/json"]["schema"]["properties"]["dry_run"].is_object());
        assert_eq!(document()["info"]["title"], "gcd");
    }
}
