//! A quick run of everything: that each measure yields a figure, not which.

use std::process::Command;

/// Groups of measures with the number of rows each has when nothing is missing.
const GROUPS: [(&str, usize); 9] = [
    ("reads", 12),
    ("sequential", 4),
    ("tls", 1),
    ("writes", 8),
    ("swap", 4),
    ("refresh", 3),
    ("copy", 9),
    ("merge-stall", 9),
    ("memory", 2),
];

fn benches() -> Command {
    Command::new(env!("CARGO_BIN_EXE_benches"))
}

#[test]
fn every_measure_yields_a_figure() {
    for (group, rows) in GROUPS {
        let output = benches().args(["--quick", "--json", "--dir", "/var/tmp", "--only", group]).output();
        let output = output.unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        if stderr.contains("takes no O_DIRECT") {
            eprintln!("!! SKIPPED: this test needs a /var/tmp that takes O_DIRECT");
            return;
        }
        assert!(output.status.success(), "{group}: {}\n{stderr}", output.status);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let measured = report["rows"].as_array().unwrap();
        for row in measured {
            assert!(row["figure"].as_f64().is_some_and(|figure| figure >= 0.0), "{row}");
        }
        let missing = report["missing"].as_array().unwrap();
        if missing.is_empty() {
            assert_eq!(measured.len(), rows, "{group}\n{stderr}");
        } else {
            eprintln!("!! SKIPPED in part: {missing:?}");
        }
    }
}

#[test]
fn nothing_is_left_behind_and_a_bad_folder_is_named() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let there = folder.path().join("none");
    let output = benches().args(["--quick", "--only", "memory", "--dir"]).arg(&there).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(there.to_str().unwrap()));
    let run = benches().args(["--quick", "--only", "swap", "--dir"]).arg(folder.path()).output().unwrap();
    assert!(run.status.success() || String::from_utf8_lossy(&run.stderr).contains("O_DIRECT"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn wrong_usage_is_told_apart() {
    assert_eq!(benches().arg("--no-such-flag").output().unwrap().status.code(), Some(2));
    let unknown = benches().args(["--only", "nothing"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("reads"));
}
