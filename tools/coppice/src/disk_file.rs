//! Exported disks as files: holes stay holes, and a file has its name only
//! when all of it is there.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Whence, lseek};
use vhd::stream::extents::{self, EXTENT_BYTES_MAX, HEAD_BYTES, Piece, not_zero};

/// Where an export goes.
#[derive(Debug)]
pub struct Target {
    to: To,
    at: u64,
}

#[derive(Debug)]
enum To {
    /// A new file under a name of its own until it is whole.
    New {
        file: File,
        part: PathBuf,
        path: PathBuf,
    },
    /// A pipe or a device: written from front to end.
    Stream(File),
    Stdout,
}

impl Target {
    /// Opens `path`, or with `-` standard output.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(path: &Path) -> io::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self { to: To::Stdout, at: 0 });
        }
        if path.metadata().is_ok_and(|there| !there.is_file()) {
            return Ok(Self { to: To::Stream(OpenOptions::new().write(true).open(path)?), at: 0 });
        }
        let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        name.push(format!(".{}.part", uuid::Uuid::new_v4()));
        let part = path.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&part)?;
        Ok(Self { to: To::New { file, part, path: path.to_owned() }, at: 0 })
    }

    /// Whether it can have holes.
    #[must_use]
    pub fn is_sparse(&self) -> bool {
        matches!(self.to, To::New { .. })
    }

    /// Whether it is standard output.
    #[must_use]
    pub fn is_stdout(&self) -> bool {
        matches!(self.to, To::Stdout)
    }

    /// Appends.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match &mut self.to {
            To::New { file, .. } => {
                for (from, to) in not_zero(data) {
                    file.write_all_at(data.get(from..to).unwrap_or_default(), self.at + from as u64)?;
                }
            }
            To::Stream(file) => file.write_all(data)?,
            To::Stdout => io::stdout().lock().write_all(data)?,
        }
        self.at += data.len() as u64;
        Ok(())
    }

    /// Goes on at an offset, past a hole. Only where [`Self::is_sparse`].
    pub fn seek(&mut self, offset: u64) {
        self.at = offset;
    }

    /// All of it has come: it is made durable and gets its name. Returns its
    /// length.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(mut self) -> io::Result<u64> {
        match &mut self.to {
            To::New { file, part, path } => {
                file.set_len(self.at)?;
                file.sync_all()?;
                std::fs::rename(part, path)?;
            }
            To::Stream(file) => file.flush()?,
            To::Stdout => io::stdout().lock().flush()?,
        }
        Ok(self.at)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let To::New { part, .. } = &self.to {
            // After a finish there is none.
            let _ = std::fs::remove_file(part);
        }
    }
}

/// Takes a stream of extents apart, whatever pieces it comes in.
#[derive(Debug, Default)]
pub struct Extents {
    head: Vec<u8>,
    left: u32,
    at: u64,
    ended: bool,
}

impl Extents {
    /// Takes the next piece. Returns how much of the disk is behind.
    ///
    /// # Errors
    /// What is no such stream, what writing said.
    pub fn take(&mut self, mut piece: &[u8], target: &mut Target) -> io::Result<u64> {
        while !piece.is_empty() {
            if self.left > 0 {
                let (data, rest) = piece.split_at(piece.len().min(self.left as usize));
                target.write(data)?;
                self.left -= data.len() as u32;
                self.at += data.len() as u64;
                piece = rest;
                continue;
            }
            let (part, rest) = piece.split_at(piece.len().min(HEAD_BYTES - self.head.len()));
            self.head.extend_from_slice(part);
            piece = rest;
            if self.head.len() == HEAD_BYTES {
                let head = std::mem::take(&mut self.head);
                match extents::next(&mut &head[..], self.at)? {
                    _ if self.ended => return Err(io::ErrorKind::InvalidData.into()),
                    Piece::Data { offset, len } => (self.at, self.left) = (offset, len),
                    Piece::End { virtual_bytes } => (self.at, self.ended) = (virtual_bytes, true),
                }
                target.seek(self.at);
            }
        }
        Ok(self.at)
    }

    /// Whether the end has come.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.ended
    }
}

/// A file as a stream of extents, its holes left out.
#[derive(Debug)]
pub struct Sparse {
    file: File,
    len: u64,
    at: u64,
    /// Data of the current extent that is still to be read.
    left: u64,
    head: Vec<u8>,
    ended: bool,
}

impl Sparse {
    /// For a file of this length.
    #[must_use]
    pub fn new(file: File, len: u64) -> Self {
        Self { file, len, at: 0, left: 0, head: Vec::new(), ended: false }
    }

    /// Finds the next extent.
    fn advance(&mut self) -> io::Result<()> {
        let data = i64::try_from(self.at).map_err(io::Error::other)?;
        let found = match lseek(&self.file, data, Whence::SeekData) {
            Ok(found) => u64::try_from(found).unwrap_or(self.len).min(self.len),
            Err(nix::errno::Errno::ENXIO) => self.len,
            // No way to ask: all of it is data.
            Err(_) => self.at,
        };
        if found >= self.len {
            self.ended = true;
            self.head = extents::head(self.len, 0).to_vec();
            return Ok(());
        }
        let from = i64::try_from(found).map_err(io::Error::other)?;
        let hole = lseek(&self.file, from, Whence::SeekHole).ok();
        let hole = hole.and_then(|hole| u64::try_from(hole).ok()).unwrap_or(self.len).min(self.len);
        let len = (hole - found).min(u64::from(EXTENT_BYTES_MAX));
        self.at = found;
        self.left = len;
        self.head = extents::head(found, u32::try_from(len).map_err(io::Error::other)?).to_vec();
        Ok(())
    }
}

impl Read for Sparse {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.head.is_empty() && self.left == 0 && !self.ended {
            self.advance()?;
        }
        if !self.head.is_empty() {
            let n = buf.len().min(self.head.len());
            for (to, byte) in buf.iter_mut().zip(self.head.drain(..n)) {
                *to = byte;
            }
            return Ok(n);
        }
        let want = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.file.read_at(buf.get_mut(..want).unwrap_or_default(), self.at)?;
        if got == 0 && want > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
        }
        self.at += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_file_comes_back_with_its_holes_in_any_pieces() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let file = File::create(&from).unwrap();
        file.write_all_at(&[1; 5000], 0).unwrap();
        file.write_all_at(&[2; 3 << 20], 8 << 20).unwrap();
        file.set_len((16 << 20) + 7).unwrap();
        let mut stream = Vec::new();
        Sparse::new(File::open(&from).unwrap(), (16 << 20) + 7).read_to_end(&mut stream).unwrap();
        assert!(stream.len() < 4 << 20, "{} bytes", stream.len());
        for size in [7, 4096, stream.len()] {
            let mut target = Target::open(&to).unwrap();
            let mut extents = Extents::default();
            for piece in stream.chunks(size) {
                extents.take(piece, &mut target).unwrap();
            }
            assert!(extents.ended());
            assert_eq!(target.finish().unwrap(), (16 << 20) + 7);
            assert!(std::fs::read(&to).unwrap() == std::fs::read(&from).unwrap());
            assert!(to.metadata().unwrap().blocks() * 512 < 5 << 20);
        }
    }

    #[test]
    fn a_file_that_was_not_finished_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("to");
        let mut target = Target::open(&to).unwrap();
        target.write(&[1; 100]).unwrap();
        drop(target);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
