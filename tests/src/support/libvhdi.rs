//! A second reader of VHD chains: libvhdi, by the system's Python.

use std::path::Path;
use std::process::Command;

use super::programs::run;

/// Hashes the content of each chain: one line of paths in, one hash out.
/// The first path is the top, each next one its parent.
const HASHES: &str = r#"
import hashlib, sys, pyvhdi
for line in sys.stdin:
    images = []
    for path in line.rstrip("\n").split("\t"):
        image = pyvhdi.file()
        image.open(path)
        if images:
            images[-1].set_parent(image)
        images.append(image)
    hash, top = hashlib.sha256(), images[0]
    left = top.get_media_size()
    while left:
        data = top.read(min(left, 1 << 20))
        hash.update(data)
        left -= len(data)
    print(hash.hexdigest())
"#;

/// The SHA-256 of what each chain reads, in hex; a chain is given topmost image
/// first. To be asked for only where Python has `pyvhdi`.
pub fn hashes<P: AsRef<Path>>(chains: &[Vec<P>]) -> Vec<String> {
    let line = |chain: &Vec<P>| {
        let paths: Vec<&str> = chain.iter().map(|path| path.as_ref().to_str().unwrap()).collect();
        paths.join("\t") + "\n"
    };
    let list = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(list.path(), chains.iter().map(line).collect::<String>()).unwrap();
    let mut python = Command::new("/usr/bin/python3");
    let said = run(python.args(["-c", HASHES]).stdin(list.reopen().unwrap()));
    let hashes: Vec<String> = said.lines().map(str::to_owned).collect();
    assert_eq!(hashes.len(), chains.len());
    hashes
}
