//! A snapshot that is decided, and whose tapdisk cannot swap its leaf: the
//! folder takes new names and gives up none, as a filesystem in trouble may.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use coppice::nbd_client::Client;
use serde_json::Value;

use crate::support::host::{Daemon, Host, wait_until};
use crate::support::programs::run;
use crate::support::small_fs::Mounted;

/// Longest wait for an answer of a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const PIECE: usize = 4096;

/// `+a`: names may come and none may go; `-a`: as usual.
fn folder_is(how: &str, folder: &Path) {
    run(Command::new("chattr").arg(how).arg(folder));
}

fn trouble(host: &Host) -> Option<String> {
    host.ok(&["vdi", "show", "web"])["trouble"].as_str().map(str::to_owned)
}

fn write(client: &mut Client, byte: u8) {
    client.write(0, &[byte; PIECE], false).unwrap();
    client.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
}

fn first_byte(host: &Host, vdi: &str) -> u8 {
    let to = host.data().join("out.raw");
    host.ok(&["vdi", "export", vdi, "--format", "raw", to.to_str().unwrap()]);
    std::fs::read(&to).unwrap()[0]
}

#[test]
fn a_disk_that_cannot_swap_its_leaf_says_why_and_goes_on_when_it_is_asked() {
    let mut host = Host::new();
    let Some(mounted) = Mounted::ext4(&host, 64) else { return };
    let folder = mounted.folder.clone();
    host.ok(&["sr", "create", "store", "--type", "file", "--path", folder.to_str().unwrap()]);
    let vdi = host.disk("store", "web", "8MiB");
    let at = host.attach(&vdi);
    let mut guest = Client::connect(&at.socket, &at.export).unwrap();
    write(&mut guest, 1);

    folder_is("+a", &folder);
    let refused = host.refused(&["vdi", "snapshot", "web", "--name", "one"], "IO_ERROR");
    let message = refused.json["error"]["message"].as_str().unwrap();
    assert!(message.contains(&vdi) && message.contains("not permitted"), "{refused:?}");
    assert!(refused.json["error"]["next"].as_str().unwrap().contains("mend its filesystem"), "{refused:?}");
    // It is decided: what the guest writes now is no part of it, and waits.
    guest.write(0, &[2; PIECE], false).unwrap();
    assert!(guest.next(Duration::from_millis(300)).is_err(), "a write into what is a snapshot by now");
    assert!(trouble(&host).is_some_and(|text| text.contains("in the middle of a snapshot")));
    let status = host.ok(&["status"]);
    let troubled = &status["smd"]["status"]["troubled"][0];
    assert_eq!(troubled["vdi"], vdi.as_str(), "{status}");
    // Every operation has it tried, and says why that failed.
    host.refused(&["vdi", "snapshot", "web", "--name", "two"], "IO_ERROR");

    // A new smd finds it as it is.
    host.kill(Daemon::Smd);
    host.start(Daemon::Smd);
    assert!(trouble(&host).is_some());
    host.refused(&["vdi", "snapshot", "web", "--name", "two"], "IO_ERROR");

    folder_is("-a", &folder);
    host.ok(&["vdi", "snapshot", "web", "--name", "two"]);
    assert_eq!(trouble(&host), None);
    guest.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
    assert_eq!(host.ok(&["vdi", "show", "web"])["pid"], at.pid, "it was never restarted");
    write(&mut guest, 3);
    guest.close();
    host.ok(&["vdi", "detach", "web"]);
    let bytes = ["one", "two", "web"].map(|name| first_byte(&host, name));
    assert_eq!((bytes[0], bytes[2]), (1, 3));
    // The write that waited is in the second one or not: they were concurrent.
    assert!(matches!(bytes[1], 1 | 2), "{bytes:?}");
    wait_until("nothing half done", || {
        let names = std::fs::read_dir(&folder).unwrap().flatten();
        !names.into_iter().any(|name| name.file_name().to_string_lossy().starts_with("tmp-"))
    });
    assert_eq!(host.ok(&["status"])["smd"]["status"]["troubled"].as_array().map(Vec::len), Some(0));
    assert_eq!(host.ok(&["sr", "check", "store"])["sound"], Value::Bool(true));
}
