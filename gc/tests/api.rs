//! What the collector answers over its socket.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use serde_json::json;
use support::Sr;
use support::served::Served;

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
    for body in
        [json!({"wait": true}), json!({"dry_run": true}), json!({"wait": true, "vdi": support::id(3)})]
    {
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
