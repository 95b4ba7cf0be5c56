//! One state folder has one smd, one SR one host, one disk one writer.

use crate::support::host::{Daemon, Host, wait_until};

#[test]
fn a_second_daemon_on_one_state_folder_is_refused() {
    let host = Host::new();
    for daemon in [Daemon::Smd, Daemon::Gcd] {
        let mut second = host.spawn(daemon);
        let mut status = None;
        wait_until("the second daemon to give up", || {
            status = second.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(1), "{daemon:?}: {}", host.log(daemon));
        let log = host.log(daemon);
        let folder = [host.state(), host.run_dir().to_owned()];
        let last = log.lines().last().unwrap_or_default();
        assert!(
            folder.iter().any(|f| last.contains(f.to_str().unwrap())),
            "the reason names the folder: {last}"
        );
    }
    host.ok(&["sr", "list"]);
    host.ok(&["gc", "status"]);
}

#[test]
fn an_sr_in_use_by_another_host_is_refused() {
    let (one, two) = (Host::new(), Host::new());
    let folder = one.sr("store");
    let vdi = one.disk("store", "d", "8MiB");
    let path = folder.to_str().unwrap();
    let introduce = ["sr", "introduce", "theirs", "--type", "file", "--path", path];
    two.refused(&introduce, "SR_IN_USE");
    assert_eq!(two.ok(&["sr", "list"]).as_array().map(Vec::len), Some(0), "nothing is left behind");
    one.attach(&vdi);

    one.ok(&["vdi", "detach", &vdi]);
    one.ok(&["sr", "detach", "store"]);
    two.ok(&introduce);
    assert_eq!(two.ok(&["vdi", "show", "d"])["uuid"], vdi.as_str(), "names travel with the SR");
}

#[test]
fn what_is_attached_is_not_deleted_or_attached_again() {
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", "8MiB");
    let at = host.attach(&vdi);
    host.refused(&["vdi", "delete", &vdi], "IN_USE");
    host.refused(&["vdi", "attach", "--read-only", &vdi], "IN_USE");
    assert_eq!(host.attach(&vdi).pid, at.pid, "attaching again changes nothing");
    host.refused(&["sr", "detach", "store"], "IN_USE");
    host.ok(&["vdi", "detach", &vdi]);
    host.ok(&["vdi", "delete", &vdi]);
    host.refused(&["vdi", "show", &vdi], "NOT_FOUND");
}

#[test]
fn a_name_that_is_not_unique_is_refused() {
    let host = Host::new();
    host.sr("store");
    host.disk("store", "twin", "8MiB");
    host.disk("store", "twin", "8MiB");
    host.refused(&["vdi", "show", "twin"], "AMBIGUOUS");
}
