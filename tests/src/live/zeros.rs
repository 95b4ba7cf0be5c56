//! Blocks of zeros: what is predicted of them is what becomes of them,
//! whoever merges.

use std::time::Duration;

use coppice::nbd_client::Client;
use serde_json::Value;

use crate::support::host::{Attached, Host, wait_until};

const BLOCK_BYTES: u64 = 2 << 20;
/// Bytes of one write.
const WRITE_BYTES: usize = 256 << 10;

/// Writes a byte all over some blocks.
fn write(at: &Attached, blocks: std::ops::Range<u64>, byte: u8) {
    let mut client = Client::connect(&at.socket, &at.export).unwrap();
    for offset in (blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES).step_by(WRITE_BYTES) {
        client.write(offset, &[byte; WRITE_BYTES], false).unwrap();
        assert_eq!(client.next(Duration::from_secs(60)).unwrap().outcome, Ok(Vec::new()));
    }
    client.flush().unwrap();
    assert_eq!(client.next(Duration::from_secs(60)).unwrap().outcome, Ok(Vec::new()));
    client.close();
}

/// A disk over a hidden node, each with blocks of data and of zeros, and what
/// is predicted of the merge. Collecting is paused.
fn predicted(host: &Host, attached: bool) -> Value {
    host.sr("store");
    let vdi = host.disk("store", "d", "32MiB");
    host.ok(&["gc", "pause", "store"]);
    let at = host.attach(&vdi);
    write(&at, 0..2, 0x11);
    write(&at, 2..4, 0);
    host.ok(&["vdi", "snapshot", "d", "--name", "s"]);
    write(&at, 1..3, 0x22);
    write(&at, 3..8, 0);
    host.ok(&["vdi", "delete", "s"]);
    if !attached {
        host.ok(&["vdi", "detach", "d"]);
    }
    host.ok(&["gc", "run", "store", "--dry-run"])
}

/// The leaf merge once it is done.
fn merged(host: &Host) -> Value {
    host.ok(&["gc", "resume", "store"]);
    let leaf = || {
        let status = host.ok(&["gc", "status", "store"]);
        status["done"].as_array().unwrap().iter().find(|job| job["kind"] == "leaf").cloned()
    };
    wait_until("the merge", || leaf().is_some());
    let job = leaf().unwrap();
    assert_eq!(job["error"], Value::Null, "{job}");
    job
}

#[test]
fn zeros_of_an_attached_leaf_are_predicted_as_they_are_merged() {
    let host = Host::new();
    let predicted = predicted(&host, true);
    let job = merged(&host);
    assert_eq!(job["bytes_freed"], predicted["bytes_freed"], "{predicted} {job}");
    assert_eq!(job["bytes_copied"], predicted["bytes_copied"], "{predicted} {job}");
}

#[test]
fn zeros_of_a_detached_leaf_are_predicted_as_they_are_merged() {
    let host = Host::new();
    let predicted = predicted(&host, false);
    let job = merged(&host);
    assert_eq!(job["bytes_freed"], predicted["bytes_freed"], "{predicted} {job}");
    assert!(job["bytes_copied"].as_u64() <= predicted["bytes_copied"].as_u64(), "{predicted} {job}");
}
