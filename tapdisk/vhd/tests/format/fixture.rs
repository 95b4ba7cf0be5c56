//! The golden images and what is recorded of them in their `MANIFEST.md`.

use std::fmt::Write;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// What the manifest says of one fixture.
#[derive(Debug)]
pub struct Fixture {
    /// Its path below the fixture folder, like `sub/child.vhd`.
    pub path: String,
    /// SHA-256 of the file.
    pub file_sha256: String,
    /// Bytes of the virtual disk and their SHA-256, read through the chain.
    pub logical: Option<(u64, String)>,
    /// Whether the reference's check passed.
    pub check_passes: Option<bool>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vhd")
}

/// Everything the manifest lists, in its order.
pub fn manifest() -> Vec<Fixture> {
    let text = std::fs::read_to_string(folder().join("MANIFEST.md")).unwrap();
    let mut all: Vec<Fixture> = Vec::new();
    for line in text.lines() {
        if let Some(path) = line.strip_prefix("## ") {
            let path = path.to_owned();
            all.push(Fixture { path, file_sha256: String::new(), logical: None, check_passes: None });
        }
        let Some(fixture) = all.last_mut() else {
            continue;
        };
        let hash = || line.split('`').nth(1).unwrap_or_default().to_owned();
        if line.starts_with("* file:") {
            fixture.file_sha256 = hash();
        } else if let Some(rest) = line.strip_prefix("* logical: ") {
            fixture.logical = Some((rest.split(' ').next().unwrap().parse().unwrap(), hash()));
        } else if let Some(rest) = line.strip_prefix("* check: exit ") {
            fixture.check_passes = Some(rest.starts_with("0:"));
        }
    }
    assert!(all.len() > 30, "the manifest lists {} fixtures", all.len());
    all
}

/// The content of a fixture.
pub fn bytes(path: &str) -> Vec<u8> {
    let packed = std::fs::File::open(folder().join(format!("{path}.xz"))).unwrap();
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    bytes
}

/// All fixtures unpacked into a folder, in the same relative places.
pub fn unpack() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for fixture in manifest() {
        let to = root.path().join(&fixture.path);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::write(to, bytes(&fixture.path)).unwrap();
    }
    root
}

/// Lower-case hex of a hash.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}
