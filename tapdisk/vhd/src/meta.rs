//! Everything small about one image: footers, header, parent, layout. Reading
//! it takes a few sectors, never the BAT.

use uuid::Uuid;

use crate::bat::Layout;
use crate::batmap;
use crate::error::{Error, Result};
use crate::footer::{DiskType, Footer, HEADER_OFFSET};
use crate::header::DynHeader;
use crate::locator::volume_of;
use crate::storage::{Volume, VolumeName};
use crate::units::SECTOR_BYTES;

/// Which footers are sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FooterState {
    /// Both (or, of a fixed image, the one it has), in agreement.
    Settled,
    /// The end is bad or missing; the copy at the front serves. So an image
    /// looks that is open, or whose writer died.
    EndMissing,
    /// The copy at the front is bad; the end serves.
    CopyBad,
    /// Both are sound but differ in something harmless; the end serves.
    CopyDiffers,
}

/// A differencing image's parent, as its header and locators say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentRef {
    /// The parent's footer uuid; nil: the parent is raw.
    pub uuid: Uuid,
    /// The name in the header.
    pub name: String,
    /// Decoded paths, in slot order.
    pub paths: Vec<String>,
}

impl ParentRef {
    /// The volumes the locators name, each once, in slot order. All of them
    /// are to be tried: the parent is the first that carries the uuid.
    ///
    /// A path that leads out of the image's folder is left out as long as
    /// another stays inside: Microsoft's images carry an absolute path besides
    /// the relative one.
    ///
    /// # Errors
    /// [`Error::ParentOutside`] if every path leads out of the image's folder,
    /// [`Error::ParentMissing`] if there is no path at all.
    pub fn candidates(&self) -> Result<Vec<VolumeName>> {
        let mut names: Vec<VolumeName> = Vec::new();
        let mut failure = Error::ParentMissing { name: self.name.clone() };
        for path in &self.paths {
            match volume_of(path) {
                Ok(name) if names.contains(&name) => {}
                Ok(name) => names.push(name),
                Err(outside) => failure = outside,
            }
        }
        if names.is_empty() { Err(failure) } else { Ok(names) }
    }

    /// The first of [`Self::candidates`].
    ///
    /// # Errors
    /// As there.
    pub fn parent_volume(&self) -> Result<VolumeName> {
        let missing = || Error::ParentMissing { name: self.name.clone() };
        self.candidates()?.into_iter().next().ok_or_else(missing)
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// The footer in force.
    pub footer: Footer,
    /// The header of a dynamic or differencing image.
    pub header: Option<DynHeader>,
    /// The parent of a differencing image.
    pub parent: Option<ParentRef>,
    /// Where things lie, for a dynamic or differencing image.
    pub layout: Option<Layout>,
    /// Which footers are sound.
    pub footer_state: FooterState,
    /// Length of the file in bytes.
    pub file_len: u64,
}

impl Meta {
    /// Reads and validates.
    ///
    /// # Errors
    /// What is wrong with the image; [`Error::Poisoned`] for one that a
    /// reference resize left disabled (see [`Self::read_poisoned`]).
    pub fn read(volume: &dyn Volume) -> Result<Self> {
        let meta = Self::read_poisoned(volume)?;
        if meta.footer.poisoned { Err(Error::Poisoned) } else { Ok(meta) }
    }

    /// As [`Self::read`], but lets a poisoned image pass, for checks and
    /// reverting.
    ///
    /// # Errors
    /// What is wrong with the image.
    pub fn read_poisoned(volume: &dyn Volume) -> Result<Self> {
        let file_len = volume.len()?;
        let (footer, footer_state) = read_footers(volume, file_len)?;
        if footer.disk_type == DiskType::Fixed {
            // A 511-byte footer counts whole.
            if footer.virtual_bytes > file_len.next_multiple_of(SECTOR_BYTES).saturating_sub(SECTOR_BYTES) {
                return Err(Error::BadFooter { reason: "the file is shorter than its fixed size" });
            }
            return Ok(Self { footer, header: None, parent: None, layout: None, footer_state, file_len });
        }
        let header = read_header(volume, &footer, file_len)?;
        let mut layout = Layout::of(&footer, &header)?;
        batmap::locate(volume, &footer, &mut layout)?;
        let parent = match footer.disk_type {
            DiskType::Differencing => Some(read_parent(volume, &header)?),
            DiskType::Fixed | DiskType::Dynamic => None,
        };
        Ok(Self { footer, header: Some(header), parent, layout: Some(layout), footer_state, file_len })
    }

    /// The footer's uuid.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.footer.uuid
    }

    /// Virtual size in bytes.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.footer.virtual_bytes
    }

    /// The hidden flag.
    #[must_use]
    pub fn hidden(&self) -> bool {
        self.footer.hidden
    }

    /// Kind of image.
    #[must_use]
    pub fn disk_type(&self) -> DiskType {
        self.footer.disk_type
    }
}

/// The footer at the end, else a 511-byte one, else the copy at the front.
fn read_footers(volume: &dyn Volume, file_len: u64) -> Result<(Footer, FooterState)> {
    let end = read_end(volume, file_len);
    let mut bytes = [0; 512];
    let copy = volume.read_at(&mut bytes, 0).map_err(Error::from).and_then(|()| Footer::parse(&bytes));
    match (end, copy) {
        (Ok(end), Ok(copy)) if end.disk_type == DiskType::Fixed => {
            // What a fixed image has at its front is the guest's, and looks
            // like a footer only by design. But with a header behind it, it
            // may as well be a dynamic image at whose end a guest's data came
            // to stand: nobody can tell, so neither is believed.
            if copy.disk_type != DiskType::Fixed && read_header(volume, &copy, file_len).is_ok() {
                return Err(Error::FootersDisagree { what: "type" });
            }
            Ok((end, FooterState::Settled))
        }
        (Ok(end), Err(_)) if end.disk_type == DiskType::Fixed => Ok((end, FooterState::Settled)),
        (Ok(end), Ok(copy)) => {
            if end.uuid != copy.uuid {
                return Err(Error::FootersDisagree { what: "uuid" });
            }
            if end.disk_type != copy.disk_type {
                return Err(Error::FootersDisagree { what: "type" });
            }
            if end.data_offset != copy.data_offset {
                return Err(Error::FootersDisagree { what: "the place of the header" });
            }
            let state = if end == copy { FooterState::Settled } else { FooterState::CopyDiffers };
            Ok((end, state))
        }
        (Ok(end), Err(_)) => Ok((end, FooterState::CopyBad)),
        (Err(_), Ok(copy)) if copy.disk_type != DiskType::Fixed => Ok((copy, FooterState::EndMissing)),
        (Err(end), _) => Err(end),
    }
}

fn read_end(volume: &dyn Volume, file_len: u64) -> Result<Footer> {
    let mut bytes = [0; 512];
    if let Some(at) = file_len.checked_sub(SECTOR_BYTES) {
        volume.read_at(&mut bytes, at)?;
        match Footer::parse(&bytes) {
            Err(Error::NotVhd) => {}
            found => return found,
        }
    }
    if file_len % SECTOR_BYTES == 511 {
        // Early Microsoft images: the footer's last byte (a reserved 0) is cut.
        bytes[511] = 0;
        volume.read_at(&mut bytes[..511], file_len - 511)?;
        return Footer::parse(&bytes);
    }
    Err(Error::NotVhd)
}

fn read_header(volume: &dyn Volume, footer: &Footer, file_len: u64) -> Result<DynHeader> {
    if footer.data_offset < HEADER_OFFSET || !footer.data_offset.is_multiple_of(512) {
        return Err(Error::BadFooter { reason: "the dynamic header lies inside the footer" });
    }
    if footer.data_offset.checked_add(1024).is_none_or(|end| end > file_len) {
        return Err(Error::BadFooter { reason: "the dynamic header lies past the end of the file" });
    }
    let mut bytes = [0; 1024];
    volume.read_at(&mut bytes, footer.data_offset)?;
    DynHeader::parse(&bytes)
}

/// A locator that cannot be decoded is left out as long as another can be.
fn read_parent(volume: &dyn Volume, header: &DynHeader) -> Result<ParentRef> {
    let mut paths = Vec::new();
    let mut failure = None;
    for locator in &header.locators {
        match locator.read(volume) {
            Ok(path) => paths.extend(path),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) if paths.is_empty() => Err(error),
        _ => Ok(ParentRef { uuid: header.parent_uuid, name: header.parent_name.clone(), paths }),
    }
}
