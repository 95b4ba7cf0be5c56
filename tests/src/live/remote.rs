//! A disk served to other hosts: over TCP, with TLS, and again after its
//! tapdisk died.

use std::path::Path;
use std::process::Command;

use crate::support::host::{Attached, Host, wait_until};
use crate::support::programs::{have, output, run};

/// What nbdinfo needs to know beside the URI that was printed.
fn with_key(uri: &str, keys: &Path) -> String {
    let (scheme, rest) = uri.split_once("://").unwrap();
    format!("{scheme}://alice@{rest}?tls-psk-file={}", keys.display())
}

#[test]
fn a_disk_is_served_over_tls_and_again_after_its_tapdisk_died() {
    if !have("nbdinfo") {
        return;
    }
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", "64MiB");
    let keys = host.data().join("keys.psk");
    std::fs::write(&keys, format!("alice:{}\n", "5a".repeat(32))).unwrap();
    let psk = keys.to_str().unwrap();
    let shown = host.ok(&["vdi", "attach", &vdi, "--listen", "127.0.0.1:0", "--tls-psk", psk]);
    let uri = shown["nbd_remote"].as_str().unwrap().to_owned();
    assert!(uri.starts_with("nbds://127.0.0.1:") && !uri.contains(":0/"), "{uri}");
    let size = || output(Command::new("nbdinfo").arg("--size").arg(with_key(&uri, &keys)));
    assert_eq!(String::from_utf8_lossy(&size().stdout).trim(), "67108864");
    let plain = uri.replace("nbds://", "nbd://");
    assert!(!output(Command::new("nbdinfo").arg(&plain)).status.success(), "without TLS");

    // The same again changes nothing; elsewhere is refused.
    let again = host.ok(&["vdi", "attach", &vdi, "--listen", "127.0.0.1:0", "--tls-psk", psk]);
    assert_eq!((&again["nbd_remote"], &again["pid"]), (&shown["nbd_remote"], &shown["pid"]));
    host.refused(&["vdi", "attach", &vdi, "--listen", "127.0.0.2:0", "--tls-psk", psk], "IN_USE");

    let at = Attached::of(&shown);
    at.kill();
    wait_until("the tapdisk to listen again", || size().status.success());
    assert_eq!(host.ok(&["vdi", "show", &vdi])["nbd_remote"].as_str(), Some(uri.as_str()));

    host.ok(&["vdi", "detach", &vdi]);
    assert!(!size().status.success(), "detached and still served");
    let local = host.attach(&vdi);
    assert_eq!(run(Command::new("nbdinfo").arg("--size").arg(&local.uri)).trim(), "67108864");
    assert!(!size().status.success(), "attached for this host, and served to others");
}

#[test]
fn a_disk_is_not_served_to_others_by_mistake() {
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", "8MiB");
    let open = host.refused(&["vdi", "attach", &vdi, "--listen", "0.0.0.0:0"], "BAD_REQUEST");
    assert!(open.json["error"]["message"].as_str().unwrap().contains("insecure"), "{open:?}");
    let missing = ["vdi", "attach", &vdi, "--listen", "127.0.0.1:0", "--tls-psk", "/nowhere/keys"];
    let missing = host.refused(&missing, "NOT_RUNNING");
    assert!(missing.json["error"]["message"].as_str().unwrap().contains("/nowhere/keys"), "{missing:?}");
    assert_eq!(host.cli(&["vdi", "attach", &vdi, "--insecure"]).status, 2);
    assert_eq!(host.ok(&["vdi", "show", &vdi])["attached"], false);
}
