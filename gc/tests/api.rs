//! What the collector answers over its socket.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use serde_json::{Value, json};
use support::served::Served;
use support::{Sr, id, run};

#[test]
fn a_collection_that_could_not_look_is_an_error_and_not_nothing_done() {
    let sr = Sr::new();
    sr.image(1, 0, true, 1);
    sr.image(2, 1, true, 1);
    sr.image(3, 2, false, 1);
    let served = Served::new(&sr);
    served.wait("all to be merged", |status| status["nodes"] == json!({}) && status["running"] == 0);

    // A record that a later version may have written.
    let name = format!("{}.job", uuid::Uuid::from_u128(77));
    sr.repo.volumes.put_record(&name, b"{\"kind\": \"to come\"}", "test").unwrap();
    for body in [json!({"wait": true}), json!({"dry_run": true}), json!({"wait": true, "vdi": id(3)})] {
        let answer = served.post("/run", &body);
        assert_eq!(answer.code(), "BAD_JOURNAL", "{body}: {answer:?}");
        let error = &answer.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(&name), "{error}");
        assert!(error["message"].as_str().unwrap().contains(&sr.attached.uuid.to_string()), "{error}");
        assert_eq!(error["report"]["coalesced"], 0, "{error}");
    }
    assert!(served.status()["error"].as_str().unwrap().contains(&name));

    sr.repo.volumes.delete_record(&name, "test").unwrap();
    let answer = served.ok("/run", &json!({"wait": true}));
    assert_eq!(answer["failed"], json!([]));
}

/// Bytes in the chain that [`busy`] makes: some seconds of work at [`RATE`].
const BLOCKS: u64 = 16;
const RATE: u64 = 2 << 20;

/// An SR with one merge that takes its time, and has begun.
fn busy(sr: &Sr) -> Served {
    for (n, parent, hidden) in [(1, 0, true), (2, 1, true), (3, 2, false), (4, 2, false)] {
        sr.image(n, parent, hidden, BLOCKS);
    }
    let writes: Vec<_> = (0..BLOCKS as u32).map(|block| (block, run(0, 2048), 7)).collect();
    sr.write(2, &writes);
    let served = Served::paused(sr);
    served.ok("/set", &json!({"rate": RATE}));
    served.ok("/resume", &json!({}));
    served.wait("bytes to be moved", moves);
    served
}

fn moves(status: &Value) -> bool {
    let node = &status["nodes"][id(2).to_string()];
    node["state"] == "merging" && node["bytes_done"].as_u64() > Some(0)
}

#[test]
fn after_an_abort_the_quiet_time_is_said_and_ended_by_whoever_asks() {
    let sr = Sr::new();
    let served = busy(&sr);
    for (path, body) in [("/resume", json!({})), ("/run", json!({}))] {
        assert_eq!(served.ok("/abort", &json!({}))["aborted"], 1);
        let status = served.wait("the merge to stop and to say why", |status| {
            let reason = status["nodes"][id(2).to_string()]["reason"].as_str();
            status["running"] == 0 && reason.is_some_and(|reason| reason.contains("gc abort"))
        });
        assert_eq!(
            (&status["paused"], &status["nodes"][id(2).to_string()]["state"]),
            (&json!(false), &json!("waiting"))
        );
        let left_s = status["quiet_s"].as_u64().unwrap();
        assert!((1..=31).contains(&left_s), "{status}");
        // Settings are no word to go on, nor is what else happens in the SR.
        served.ok("/set", &json!({"rate": RATE + 1}));
        served.ok("/kick", &json!({}));
        assert!(served.status()["quiet_s"].as_u64().is_some());
        served.ok(path, &body);
        // Nothing was waited for: neither the quiet time nor a retry.
        let status = served.status();
        assert_eq!(status["quiet_s"], Value::Null, "{path}: {status}");
        let status = served.wait("the merge to go on", |status| status["running"] == 1);
        assert_eq!(status["error"], Value::Null);
    }
}

#[test]
fn what_a_pause_stopped_is_no_failure_when_it_goes_on_at_once() {
    let sr = Sr::new();
    let served = busy(&sr);
    served.ok("/pause", &json!({}));
    served.ok("/resume", &json!({}));
    let status = served.wait("the merge to go on, or to wait for another attempt", |status| {
        let node = &status["nodes"][id(2).to_string()];
        moves(status) || node["reason"].as_str().is_some_and(|reason| reason.contains("attempt"))
    });
    assert!(moves(&status), "{status}");
}

#[test]
fn metrics_tell_of_each_node_and_grow_while_a_merge_runs() {
    let sr = Sr::new();
    let served = busy(&sr);
    let value = |page: &str, series: &str| -> Option<f64> {
        let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map(|value| value.parse().unwrap())
    };
    let uuid = sr.attached.uuid;
    let moved = |page: &str| -> f64 {
        let of = |how: &str| value(page, &format!("coppice_gc_bytes_{how}_total{{sr=\"{uuid}\"}}")).unwrap();
        of("copied") + of("cloned")
    };
    let node =
        |name: &str, more: &str| format!("coppice_gc_node_{name}{{sr=\"{uuid}\",vdi=\"{}\",{more}}}", id(2));
    let page = served.get("/metrics").body;
    assert!(moved(&page) > 0.0, "{page}");
    assert_eq!(value(&page, &node("state", "state=\"merging\",reason=\"\"")), Some(1.0), "{page}");
    let done = value(&page, &node("bytes_done", "state=\"merging\"")).unwrap();
    let total = value(&page, &node("bytes_total", "state=\"merging\"")).unwrap();
    assert!(done > 0.0 && done <= total && total >= (BLOCKS << 20) as f64, "{page}");
    for name in ["bytes_per_second", "eta_seconds"] {
        assert!(value(&page, &node(name, "state=\"merging\"")) > Some(0.0), "{name}: {page}");
    }
    served.ok("/pause", &json!({}));
    served.wait("the merge to stop", |status| status["running"] == 0);
    let page = served.get("/metrics").body;
    assert_eq!(value(&page, &node("bytes_done", "state=\"merging\"")), None, "{page}");
    let totals = served.status()["totals"].clone();
    assert!(moved(&page) >= done, "{page}");
    assert!(totals.get("seconds").is_none() && totals.get("failed").is_none(), "{totals}");
    served
        .wait("the pause to be the reason", |status| status["nodes"][id(2).to_string()]["code"] == "PAUSED");
    let page = served.get("/metrics").body;
    assert_eq!(value(&page, &node("state", "state=\"waiting\",reason=\"PAUSED\"")), Some(1.0), "{page}");
}

#[test]
fn every_refusal_is_json_with_a_code() {
    let sr = Sr::new();
    let served = Served::new(&sr);
    let json = "content-type: application/json\r\n";
    // More than a socket holds: its sender is still at it when it is refused.
    let long = format!("{{\"sr\": \"{}\"}}", "x".repeat(gc::limits::BODY_BYTES_MAX + (900 << 10)));
    for (method, path, kind, body, status, code) in [
        ("POST", "/run", json, "{", 400, "BAD_REQUEST"),
        ("POST", "/run", json, "{\"sr\": 7}", 422, "BAD_REQUEST"),
        ("POST", "/run", "", "{}", 415, "BAD_REQUEST"),
        ("POST", "/run", json, long.as_str(), 413, "BAD_REQUEST"),
        ("GET", "/run", "", "", 405, "BAD_REQUEST"),
        ("GET", "/status?sr=7", "", "", 400, "BAD_REQUEST"),
        ("GET", "/nothing", "", "", 404, "NOT_FOUND"),
    ] {
        let answer = served.ask(method, path, kind, body);
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{method} {path}: {answer:?}");
    }
    let other = served.ask("GET", "/run", "", "");
    assert!(other.head.to_lowercase().contains("allow: post"), "{other:?}");
}

#[test]
fn settings_that_cannot_be_kept_are_refused_and_change_nothing() {
    let sr = Sr::new();
    let served = Served::new(&sr);
    let before = served.status();
    for (body, word) in [
        (json!({"parallel": 999}), "parallel"),
        (json!({"rate": 5, "latency_factor": 1e9}), "latency_factor"),
        (json!({"latency_factor": -1}), "latency_factor"),
        (json!({}), "nothing"),
    ] {
        let answer = served.post("/set", &body);
        assert_eq!((answer.status, answer.code().as_str()), (400, "BAD_REQUEST"), "{body}");
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(word), "{answer:?}");
    }
    let after = served.status();
    for setting in ["rate", "parallel", "latency_factor", "receipts"] {
        assert_eq!(after[setting], before[setting]);
    }
    served.ok("/set", &json!({"parallel": 16, "latency_factor": 1000, "rate": 7}));
    let after = served.status();
    assert_eq!((&after["parallel"], &after["rate"]), (&json!(16), &json!(7)));
}

#[test]
fn an_sr_that_is_known_and_detached_is_said_to_be_so() {
    let sr = Sr::new();
    let served = Served::new(&sr);
    let detached = id(0xDE);
    let known = sm::state::KnownSr {
        uuid: detached,
        name: "away".into(),
        kind: sm::state::SrType::File,
        path: sr.path().into(),
        attached: false,
    };
    sm::state::write_json(&sr.run.parent().unwrap().join("srs.json"), &[known]).unwrap();
    for (uuid, code, word) in [(detached, "SR_DETACHED", "away"), (id(0xDF), "NOT_FOUND", "SR")] {
        for (path, more) in [
            ("/pause", json!({})),
            ("/resume", json!({})),
            ("/run", json!({})),
            ("/run", json!({"wait": true})),
            ("/abort", json!({})),
            ("/set", json!({"rate": 1})),
            ("/acknowledge", json!({})),
        ] {
            let mut body = more.clone();
            body["sr"] = json!(uuid);
            let answer = served.post(path, &body);
            assert_eq!(answer.code(), code, "{path}: {answer:?}");
            assert!(answer.json()["error"]["message"].as_str().unwrap().contains(word), "{answer:?}");
        }
        assert_eq!(served.get(&format!("/status?sr={uuid}")).code(), code);
    }
}

#[test]
fn a_misspelt_sr_is_refused_and_not_taken_for_all() {
    let sr = Sr::new();
    let served = Served::new(&sr);
    for path in ["/pause", "/abort", "/run", "/set", "/acknowledge"] {
        let answer = served.post(path, &json!({"srs": sr.attached.uuid, "rate": 1}));
        assert_eq!(answer.code(), "BAD_REQUEST", "{path}: {answer:?}");
    }
    let status = served.status();
    assert_eq!((&status["paused"], &status["rate"]), (&json!(false), &json!(0)));
}
