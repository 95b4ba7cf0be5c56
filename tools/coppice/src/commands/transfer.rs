//! `coppice vdi export` and `coppice vdi import`.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use super::Context;
use crate::cli::StreamFormat;
use crate::client::escaped;
use crate::disk_file::{Extents, Sparse, Target};
use crate::failure::{Failure, Outcome};
use crate::progress::Progress;
use crate::render;
use crate::resolve;
use crate::stream;

/// What is to go out.
#[derive(Debug)]
pub struct Export<'a> {
    /// The disk.
    pub vdi: &'a str,
    /// Over what, as a delta.
    pub base: Option<&'a str>,
    /// In which form; by the file's name if not said.
    pub format: Option<StreamFormat>,
    /// Where to, or `-`.
    pub file: &'a Path,
}

/// Exports a disk.
///
/// # Errors
/// As the daemon says; what writing said.
pub fn export(context: &Context, wanted: &Export<'_>) -> Outcome<()> {
    let smd = &context.smd;
    let (vdi, base) = (resolve::vdi(smd, wanted.vdi)?, base(context, wanted.base)?);
    let format = format_of(wanted.format, base.is_some(), wanted.file);
    let target = Target::open(wanted.file).map_err(|e| at(wanted.file, &e))?;
    if target.is_stdout() && context.output.json {
        return Err(Failure::new("USAGE", "standard output takes the disk or a document, not both"));
    }
    if target.is_stdout() && std::io::stdout().is_terminal() {
        return Err(Failure::new("USAGE", "a disk is not for a terminal: name a file, or use a pipe"));
    }
    // A file has its holes left out; a pipe has every byte.
    let sparse = format == StreamFormat::Raw && target.is_sparse();
    let word = if sparse { "extents" } else { format.word() };
    let mut path = format!("/vdis/{vdi}/export?format={word}");
    if let Some(base) = &base {
        path.push_str(&format!("&base={base}"));
    }
    let len = receive(context, &path, sparse, target, wanted.file)?;
    if wanted.file != Path::new("-") {
        let file = std::path::absolute(wanted.file).unwrap_or_else(|_| wanted.file.to_owned());
        let answer = json!({ "vdi": vdi, "base": base, "format": format.word(), "file": file, "size": len });
        context.output.result(&answer, || render::object(&answer));
    }
    Ok(())
}

fn receive(context: &Context, path: &str, sparse: bool, mut target: Target, file: &Path) -> Outcome<u64> {
    let bar = Mutex::new((Progress::new(context.output, "export"), None));
    let locked = || bar.lock().unwrap_or_else(PoisonError::into_inner);
    let mut extents = Extents::default();
    let mut done = 0;
    stream::download(
        &context.smd,
        path,
        |total| locked().1 = total,
        |piece| {
            if sparse {
                done = extents.take(piece, &mut target).map_err(|e| at(file, &e))?;
            } else {
                target.write(piece).map_err(|e| at(file, &e))?;
                done += piece.len() as u64;
            }
            let (bar, total) = &mut *locked();
            bar.show_bytes(done, *total);
            Ok(())
        },
    )?;
    if sparse && !extents.ended() {
        return Err(Failure::new("IO_ERROR", "the stream ends before the disk does"));
    }
    target.finish().map_err(|e| at(file, &e))
}

/// What is to come in.
#[derive(Debug)]
pub struct Import<'a> {
    /// The storage repository.
    pub sr: &'a str,
    /// Name of the new disk.
    pub name: &'a str,
    /// What a delta stands on.
    pub base: Option<&'a str>,
    /// In which form; by the file's name if not said.
    pub format: Option<StreamFormat>,
    /// Where from, or `-`.
    pub file: &'a Path,
}

/// Imports a disk.
///
/// # Errors
/// As the daemon says; what reading said.
pub fn import(context: &Context, wanted: &Import<'_>) -> Outcome<()> {
    let smd = &context.smd;
    let (sr, base) = (resolve::sr(smd, wanted.sr)?, base(context, wanted.base)?);
    let format = format_of(wanted.format, base.is_some(), wanted.file);
    let (from, total, word) = source(wanted.file, format)?;
    let mut path = format!("/srs/{sr}/import?format={word}&name={}", escaped(wanted.name));
    if let Some(base) = &base {
        path.push_str(&format!("&base={base}"));
    }
    let bar = Arc::new(Mutex::new((Progress::new(context.output, "import"), 0)));
    let shown = bar.clone();
    let passed = move |bytes: usize| {
        let (bar, done) = &mut *shown.lock().unwrap_or_else(PoisonError::into_inner);
        *done += bytes as u64;
        bar.show_bytes(*done, total);
    };
    let answer = stream::upload(smd, &path, from, passed)?;
    drop(bar);
    context.output.result(&answer, || render::object(&answer));
    Ok(())
}

/// How long the end of a pipe is not believed.
const PIPE_END_DOUBT: Duration = Duration::from_millis(100);

/// Standard input, as long as its writer lives. Ctrl-C ends that writer too,
/// and a short stream must not pass for a whole one before we hear of it.
struct Piped<R>(R);

impl<R: Read> Read for Piped<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let got = self.0.read(buf)?;
        if got == 0 && !buf.is_empty() {
            std::thread::sleep(PIPE_END_DOUBT);
        }
        Ok(got)
    }
}

type Source = (Box<dyn Read + Send>, Option<u64>, &'static str);

/// What is read, how much of it there is, and how it is said.
fn source(path: &Path, format: StreamFormat) -> Outcome<Source> {
    if path == Path::new("-") {
        return Ok((Box::new(Piped(std::io::stdin())), None, format.word()));
    }
    let open = || {
        let file = File::open(path)?;
        let kind = file.metadata()?;
        Ok((file, kind))
    };
    let (file, kind) = open().map_err(|e: std::io::Error| at(path, &e))?;
    if kind.is_dir() {
        return Err(Failure::new("BAD_REQUEST", format!("{} is a folder", path.display())));
    }
    let total = kind.is_file().then_some(kind.len());
    match (format, total) {
        (StreamFormat::Raw, Some(len)) => Ok((Box::new(Sparse::new(file, len)), total, "extents")),
        _ => Ok((Box::new(file), total, format.word())),
    }
}

fn base(context: &Context, base: Option<&str>) -> Outcome<Option<String>> {
    base.map(|base| resolve::vdi(&context.smd, base)).transpose()
}

/// As said, else by the file's name: a delta is always a VHD.
fn format_of(said: Option<StreamFormat>, delta: bool, file: &Path) -> StreamFormat {
    let ending = file.extension().map(|ending| ending.to_ascii_lowercase());
    match (said, ending) {
        (Some(said), _) => said,
        (None, Some(ending)) if !delta && (ending == "raw" || ending == "img") => StreamFormat::Raw,
        _ => StreamFormat::Vhd,
    }
}

fn at(path: &Path, error: &std::io::Error) -> Failure {
    let path: PathBuf = path.to_owned();
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => "NOT_FOUND",
        std::io::ErrorKind::StorageFull => "NO_SPACE",
        _ => "IO_ERROR",
    };
    Failure::new(code, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_as_said_or_as_the_file_is_called() {
        let of = |said, delta, file: &str| format_of(said, delta, Path::new(file));
        assert_eq!(of(None, false, "a.IMG"), StreamFormat::Raw);
        assert_eq!(of(None, true, "a.raw"), StreamFormat::Vhd);
        assert_eq!(of(None, false, "-"), StreamFormat::Vhd);
        assert_eq!(of(Some(StreamFormat::Raw), false, "a.vhd"), StreamFormat::Raw);
    }
}
