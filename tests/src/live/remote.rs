//! A disk served to other hosts: over TCP, with TLS, and again after its
//! tapdisk died.

use std::io::BufRead;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::host::{Attached, Host, wait_until};
use crate::support::programs::{coppice, have, output, run};

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
    let missing = host.refused(&missing, "BAD_REQUEST");
    let said = missing.json["error"]["message"].as_str().unwrap();
    assert!(said.contains("/nowhere/keys") && !said.contains("log"), "{said}");
    let keys = host.data().join("keys.psk");
    std::fs::write(&keys, "alice:5a5a\n").unwrap();
    let psk = keys.to_str().unwrap();
    let short =
        host.refused(&["vdi", "attach", &vdi, "--listen", "127.0.0.1:0", "--tls-psk", psk], "BAD_REQUEST");
    assert!(short.json["error"]["message"].as_str().unwrap().contains(&format!("{psk} line 1")), "{short:?}");
    let foreign = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = foreign.local_addr().unwrap().to_string();
    let taken = host.refused(&["vdi", "attach", &vdi, "--listen", &taken], "BAD_REQUEST");
    assert!(taken.json["error"]["message"].as_str().unwrap().contains("cannot listen on"), "{taken:?}");
    assert_eq!(host.cli(&["vdi", "attach", &vdi, "--insecure"]).status, 2);
    assert_eq!(host.ok(&["vdi", "show", &vdi])["attached"], false);
}

/// `coppice up`; asked to end, and waited for, when dropped.
struct Up(Child);

impl Up {
    fn start(host: &Host, more: &[&str]) -> Self {
        let mut command = Command::new(coppice());
        command.arg("up").args(more).arg("--state").arg(host.state()).arg("--run").arg(host.run_dir());
        let log = std::fs::File::create(host.data().join("up.log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let up = Self(command.spawn().unwrap());
        wait_until("`up` to answer", || host.cli(&["gc", "status"]).status == 0);
        up
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

#[test]
fn up_offers_each_disk_on_a_port_of_its_own() {
    if !have("nbdinfo") {
        return;
    }
    let host = Host::without_daemons();
    let first = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let up = Up::start(&host, &["--listen", &first.to_string()]);
    host.sr("store");
    let disks = ["one", "two"].map(|name| host.disk("store", name, "8MiB"));
    let port = |uri: &str| uri.split(['/', ':']).nth(4).unwrap().parse::<u16>().unwrap();
    let size = |uri: &str| output(Command::new("nbdinfo").arg("--size").arg(uri));
    let mut ports = Vec::new();
    for vdi in &disks {
        let shown = host.ok(&["vdi", "attach", vdi]);
        let uri = shown["nbd_remote"].as_str().unwrap();
        assert!(uri.starts_with("nbd://127.0.0.1:") && uri.ends_with(vdi), "{uri}");
        assert_eq!(run(Command::new("nbdinfo").arg("--size").arg(uri)).trim(), "8388608");
        ports.push(port(uri));
        // Attaching again changes nothing.
        assert_eq!(host.ok(&["vdi", "attach", vdi])["nbd_remote"].as_str(), Some(uri));
    }
    assert!(ports[0] >= first.port() && ports[1] > ports[0], "{ports:?}, from {first} on");
    // One that says where is served there.
    host.ok(&["vdi", "detach", &disks[0]]);
    let elsewhere = host.ok(&["vdi", "attach", &disks[0], "--listen", "127.0.0.2:0"]);
    assert!(elsewhere["nbd_remote"].as_str().unwrap().starts_with("nbd://127.0.0.2:"), "{elsewhere}");
    // A tapdisk that died comes back where it was.
    let shown = host.ok(&["vdi", "show", &disks[1]]);
    Attached::of(&shown).kill();
    let uri = shown["nbd_remote"].as_str().unwrap();
    wait_until("the tapdisk to listen again", || size(uri).status.success());
    drop(up);
    assert!(!size(uri).status.success(), "served after the end");
}

#[test]
fn up_offers_nothing_to_everybody_by_mistake() {
    let host = Host::without_daemons();
    let refused = host.refused(&["up", "--listen", "0.0.0.0"], "BAD_REQUEST");
    assert!(refused.json["error"]["message"].as_str().unwrap().contains("--insecure"), "{refused:?}");
    assert_eq!(host.cli(&["up", "--tls-psk", "/x"]).status, 2);
    assert_eq!(host.cli(&["up", "--listen", "somewhere"]).status, 2);
}

#[test]
fn up_in_a_folder_stays_in_it_whatever_the_environment_says() {
    let (host, own) = (Host::without_daemons(), Host::without_daemons());
    let mut command = Command::new(coppice());
    command.args(["up", "--json", "--dir"]).arg(own.data());
    command.env("COPPICE_STATE", host.state()).env("COPPICE_RUN", host.run_dir());
    let mut up = Up(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
    let mut said = String::new();
    std::io::BufReader::new(up.0.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    for folder in ["state", "run"] {
        assert_eq!(said[folder], own.data().join(folder).to_str().unwrap(), "{said}");
    }
}
