//! The units of the daemons, as far as that can be told without a systemd that
//! runs: they are understood, and leave the daemons little to do harm with.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::programs::{coppice, output};

/// What `systemd-analyze security` may say, in tenths; 100 is no sandbox at
/// all. The daemons work on files of root that lie anywhere, so not less.
const EXPOSURE_MAX: u32 = 40;

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/systemd")
}

/// The first one that looks at a unit in a file.
const SYSTEMD_MIN: u32 = 250;

/// Not asked of CI: the daemons do not need systemd.
fn has_systemd() -> bool {
    let said = Command::new("systemd-analyze").arg("--version").output();
    let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
    // "systemd 252 (252.38)"
    let version = said.split_whitespace().nth(1).and_then(|version| version.parse::<u32>().ok());
    let fits = version.is_some_and(|version| version >= SYSTEMD_MIN);
    if !fits {
        eprintln!("!! SKIPPED: no systemd-analyze of {SYSTEMD_MIN} or later");
    }
    fits
}

#[test]
fn systemd_understands_the_units_and_finds_them_confined() {
    if !has_systemd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for name in ["coppice-smd.service", "coppice-gcd.service"] {
        let text = std::fs::read_to_string(units().join(name)).unwrap();
        // Programs that are here, in place of those that a package installs.
        let program = coppice().to_str().unwrap();
        let text = text.replace("/usr/bin/smd", program).replace("/usr/bin/gcd", program);
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        paths.push(path);
    }
    let mut verify = Command::new("systemd-analyze");
    let said = output(verify.args(["verify", "--man=no"]).args(&paths));
    let words = String::from_utf8_lossy(&said.stderr);
    let ours: Vec<&str> = words.lines().filter(|line| line.contains("coppice")).collect();
    assert!(ours.is_empty(), "{ours:#?}");
    for path in &paths {
        let mut rate = Command::new("systemd-analyze");
        rate.args(["security", "--offline=true", &format!("--threshold={EXPOSURE_MAX}")]);
        let said = output(rate.arg(path));
        let table = String::from_utf8_lossy(&said.stdout);
        assert!(said.status.success(), "{table}");
        assert!(table.contains("Overall exposure level"), "{table}");
    }
}
