//! What operations do, cut into pieces that a crash can keep or lose.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::sector::{Content, Slot, hash_bytes, hash_slot, mix};

/// Names a file, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Ino(pub(super) u64);

/// Path to file.
pub(super) type Names = BTreeMap<Arc<str>, Ino>;

/// One indivisible change of the names.
#[derive(Debug, Clone)]
pub(super) enum NameOp {
    /// `to` leads to the file from now on (create, link).
    Add { to: Arc<str>, ino: Ino, from: Option<Arc<str>> },
    /// `to` leads to the file, `from` nowhere.
    Rename { from: Arc<str>, to: Arc<str>, ino: Ino },
    /// The name leads nowhere.
    Remove { name: Arc<str> },
}

impl NameOp {
    /// The names whose earlier changes this builds on.
    pub(super) fn touches(&self) -> impl Iterator<Item = &Arc<str>> {
        let (a, b) = match self {
            Self::Add { to, from, .. } => (to, from.as_ref()),
            Self::Rename { from, to, .. } => (to, Some(from)),
            Self::Remove { name } => (name, None),
        };
        std::iter::once(a).chain(b)
    }

    pub(super) fn apply(&self, names: &mut Names) {
        match self {
            Self::Add { to, ino, .. } => {
                names.insert(to.clone(), *ino);
            }
            Self::Rename { from, to, ino } => {
                names.remove(from);
                names.insert(to.clone(), *ino);
            }
            Self::Remove { name } => {
                names.remove(name);
            }
        }
    }
}

/// One change by a volume manager: indivisible, and durable once it shows.
#[derive(Debug, Clone)]
pub(super) enum Lasting {
    /// A device comes to be.
    Make { path: Arc<str>, ino: Ino, len: u64 },
    /// A device has this length in bytes from now on.
    Resize { ino: Ino, len: u64 },
    /// A device gets a free name.
    Rename { from: Arc<str>, to: Arc<str> },
    /// A device goes.
    Remove { path: Arc<str> },
    /// A record is written, whole.
    PutRecord { name: Arc<str>, bytes: Arc<[u8]> },
    /// A record gets another name.
    RenameRecord { from: Arc<str>, to: Arc<str> },
    /// A record goes.
    RemoveRecord { name: Arc<str> },
}

impl fmt::Display for Lasting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Make { path, ino, len } => write!(f, "make device {path} #{} of {len}", ino.0),
            Self::Resize { ino, len } => write!(f, "resize device #{} {len}", ino.0),
            Self::Rename { from, to } => write!(f, "rename device {from} {to}"),
            Self::Remove { path } => write!(f, "remove device {path}"),
            Self::PutRecord { name, bytes } => write!(f, "put record {name}+{}", bytes.len()),
            Self::RenameRecord { from, to } => write!(f, "rename record {from} {to}"),
            Self::RemoveRecord { name } => write!(f, "remove record {name}"),
        }
    }
}

/// One change of a file's bytes that can be kept or lost on its own.
#[derive(Clone)]
pub(super) enum Change {
    /// Sectors get these values.
    Data(Arc<[(u64, Slot)]>),
    /// Sectors `first .. end` become zeros.
    Zero { first: u64, end: u64, keep: bool },
    /// The length is set.
    Len(u64),
    /// A write reached past the end. Of two in flight the longer wins,
    /// whichever comes last.
    Grow(u64),
}

impl Change {
    pub(super) fn apply(&self, content: &mut Content) {
        match self {
            Self::Data(values) => {
                for (sector_no, slot) in values.iter() {
                    content.set(*sector_no, slot.clone());
                }
            }
            Self::Zero { first, end, keep } => content.zero(*first, *end, *keep),
            Self::Len(len) => content.set_len(*len),
            Self::Grow(len) => content.set_len(content.len.max(*len)),
        }
    }
}

/// What a completed operation left to be made durable.
#[derive(Clone)]
pub(super) enum Effect {
    Name(NameOp),
    Bytes(Ino, Change),
    /// Never waits for anything to be made durable.
    Lasting(Lasting),
}

impl Effect {
    pub(super) fn hash(&self) -> u128 {
        match self {
            Self::Name(op) => hash_bytes(format!("{op:?}").as_bytes()),
            Self::Lasting(change) => hash_bytes(format!("{change:?}").as_bytes()),
            Self::Bytes(ino, change) => {
                let hash = match change {
                    Change::Data(values) => values.iter().fold(1, |hash, (sector_no, slot)| {
                        mix(mix(hash, u128::from(*sector_no)), hash_slot(slot))
                    }),
                    Change::Zero { first, end, keep } => {
                        mix(2 + u128::from(*keep), mix((*first).into(), (*end).into()))
                    }
                    Change::Len(len) => mix(4, u128::from(*len)),
                    Change::Grow(len) => mix(5, u128::from(*len)),
                };
                mix(hash, u128::from(ino.0))
            }
        }
    }
}

/// Names, which of them lead to one file, and the files.
pub(super) fn hash_names(names: &Names, file: impl Fn(Ino) -> u128) -> u128 {
    let mut first_name: BTreeMap<Ino, &Arc<str>> = BTreeMap::new();
    let mut hash = 0;
    for (name, ino) in names {
        let first = *first_name.entry(*ino).or_insert(name);
        hash = mix(hash, hash_bytes(name.as_bytes()));
        hash = mix(hash, hash_bytes(first.as_bytes()));
        hash = mix(hash, file(*ino));
    }
    hash
}

/// The folder part of a path, `""` for the root.
pub(super) fn folder_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}
