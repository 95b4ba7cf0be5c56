//! Paths inside a repository: never absolute, never out of it.

use std::io;

/// Splits a folder path, `""` being the root; refuses anything that could
/// lead out of it.
pub(super) fn parts(folder: &str) -> io::Result<Vec<&str>> {
    if folder.is_empty() {
        return Ok(Vec::new());
    }
    folder.split('/').map(|part| check(part).map(|()| part)).collect()
}

/// The folder of a path to a file, and the last name in it.
pub(super) fn split(path: &str) -> io::Result<(&str, &str)> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    check(name)?;
    if path.starts_with('/') {
        return Err(outside());
    }
    Ok((folder, name))
}

fn check(part: &str) -> io::Result<()> {
    let leaves = part.is_empty() || part == "." || part == "..";
    if leaves || part.contains(['/', '\0']) { Err(outside()) } else { Ok(()) }
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a path inside the folder")
}
