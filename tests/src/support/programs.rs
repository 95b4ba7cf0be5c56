//! Programs that tests start: ours, built once, and those of others, found or
//! skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The `coppice` program, built from this tree on first use: cargo builds
/// programs only for tests of their own package. It is the release build,
/// which is what people run. `COPPICE_PROGRAM` names another to test.
pub fn coppice() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(program) = std::env::var_os("COPPICE_PROGRAM") {
            return program.into();
        }
        let target = target_dir();
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "coppice", "--release", "--target-dir"])
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(status.success(), "coppice cannot be built");
        target.join("release/coppice")
    })
}

/// Where this very binary was built: `target/debug/deps/all-…`.
fn target_dir() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    me.ancestors().nth(3).unwrap().to_owned()
}

/// Whether `program` can be started. A test that lacks one returns early and
/// says so; in CI everything must be there.
pub fn have(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()));
    found || skipped(program)
}

/// Whether the system's Python has `module`.
pub fn have_python(module: &str) -> bool {
    let import = format!("import {module}");
    let found = Command::new("/usr/bin/python3").args(["-c", &import]).output();
    found.is_ok_and(|output| output.status.success()) || skipped(&format!("Python's {module}"))
}

/// Whether we are root; some faults can only be made so.
pub fn am_root() -> bool {
    nix::unistd::geteuid().is_root() || skipped("root")
}

/// Says loudly that something is missing; `false`. In CI a failure.
pub fn skipped(what: &str) -> bool {
    eprintln!("!! SKIPPED: this test needs {what}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "in CI nothing is skipped: {what}");
    false
}

/// Runs a program that must succeed; its standard output.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program to its end.
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}
