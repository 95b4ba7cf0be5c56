//! Orders from the control side.

use uuid::Uuid;
use vhd::chain::Node;
use vhd::placed::Placed;
use vhd::rw::RwImage;
use vhd::storage::VolumeName;

use super::merge::MergeBounds;
use super::quiesce::Then;
use super::{Barrier, CleanWaiter, Engine, FileId, Image, Lower, Second, SettlePlan};

/// Names a command until it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// A prepared child that becomes the leaf.
#[derive(Debug)]
pub struct NewLeaf {
    /// Open for writing, empty; its name is still the temporary one.
    pub image: Image,
    /// The name it takes.
    pub name: VolumeName,
    /// What the former leaf is called then.
    pub aside: VolumeName,
}

/// An order. Everything in it was opened before: no order reads an image.
#[derive(Debug)]
pub enum Command {
    /// Drain and hold: answered with [`CommandReply::Paused`].
    Pause,
    /// Go on, as before or, after the rename, on a new leaf.
    Resume {
        /// The leaf to swap in.
        swap: Option<Box<NewLeaf>>,
    },
    /// Tries a decided swap once more, now. Answered with how that ended.
    SwapNow,
    /// Answered once nothing waits for write-back, in all images or just in
    /// the second one of the stack, with what settling takes.
    Clean {
        /// Only the image under the leaf.
        second_only: bool,
    },
    /// Make durable what was acknowledged so far, metadata included. Answered
    /// after two write-backs of each image at most, whatever guests write
    /// meanwhile.
    WriteBack,
    /// The frozen second image was settled: it becomes the top of the lower
    /// part, read through `file`.
    Fold {
        /// The image as a level of the chain.
        node: Box<Node>,
        /// Open for reading.
        file: FileId,
    },
    /// A new lower part; answered once nothing uses the old one.
    Refresh {
        /// The new map and files.
        lower: Box<Lower>,
    },
    /// Starts merging the leaf into `parent`.
    MergeStart {
        /// The parent, open for writing.
        parent: Box<Image>,
        /// Everything below it.
        below: Box<Lower>,
        /// How fast, and with how much room.
        bounds: MergeBounds,
    },
    /// Changes the rate of the merge from now on.
    MergeRate {
        /// Most bytes copied per second; 0 is no limit.
        rate_bytes_per_s: u64,
    },
    /// Ends the merge; afterwards the parent is the frozen second image.
    MergeStop,
    /// The emptied leaf goes, the parent takes its name.
    MergeCommit {
        /// The parent's footer without the hidden flag.
        footer: Box<[u8; 512]>,
        /// What the leaf is called until somebody deletes it, where the
        /// parent cannot replace it.
        aside: VolumeName,
    },
    /// Drain, hold, and tell what settling everything takes. Also before the
    /// leaf's tables change.
    Close,
    /// The held leaf was changed behind the engine's back: this is what it is
    /// now. Requests go on.
    Changed {
        /// Blocks and space of the leaf; `None`: nobody knows, and every
        /// request fails from here on.
        rw: Option<Box<RwImage>>,
        /// The size of leaf and disk in bytes.
        virtual_bytes: u64,
    },
    /// Begins a list of the blocks that guests change.
    Track {
        /// Names it.
        id: Uuid,
    },
    /// Ends a list; answered with [`CommandReply::Blocks`].
    Tracked {
        /// Which.
        id: Uuid,
        /// First block of interest.
        from: u32,
    },
    /// Drops a list.
    TrackEnd {
        /// Which.
        id: Uuid,
    },
    /// Where a range lies; answered with [`CommandReply::Placed`].
    Lookup {
        /// First byte, a multiple of 512.
        offset: u64,
        /// Bytes, a multiple of 512, inside the disk.
        len: u32,
    },
}

/// How a command was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandReply {
    /// Done.
    Done,
    /// Nothing is in flight.
    Paused {
        /// Whether the leaf has no block at all.
        leaf_is_empty: bool,
    },
    /// Nothing waits for write-back.
    Clean(Vec<SettlePlan>),
    /// Where a range lies, in order, without gaps.
    Placed(Vec<Placed>),
    /// First block and number of blocks of each run, and where to ask on.
    Blocks {
        /// In order.
        runs: Vec<(u32, u32)>,
        /// `None`: that was all.
        next: Option<u32>,
    },
}

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Something else is under way.
    #[error("{0}")]
    Busy(&'static str),
    /// The process cannot end yet without leaving what only it knows; the disk
    /// goes on as before.
    #[error("{0}")]
    Unsettled(String),
    /// It names what this process does not know.
    #[error("no such list of changed blocks")]
    Unknown,
    /// It went wrong; the disk goes on as before.
    #[error("{0}")]
    Failed(String),
}

impl Engine {
    /// Takes an order; it is answered by [`super::Output::Answer`].
    pub fn command(&mut self, now_us: u64, token: Token, command: Command) {
        self.now_us = now_us;
        if let Err(error) = self.carry_out(token, command) {
            self.answer(token, Err(error));
        }
        self.progress();
    }

    fn carry_out(&mut self, token: Token, command: Command) -> Result<(), CommandError> {
        match command {
            Command::Pause => {
                self.single_image()?;
                self.drain_then(Then::Pause(token))?;
            }
            Command::Resume { swap } => {
                if !self.state.is_held() {
                    return Err(CommandError::Busy("not paused"));
                }
                match swap {
                    None => {
                        self.release();
                        self.answer(token, Ok(CommandReply::Done));
                    }
                    Some(leaf) => self.swap(token, *leaf)?,
                }
            }
            Command::SwapNow => self.swap_now(token)?,
            Command::Clean { second_only } => {
                let file = if second_only { Some(self.frozen()?) } else { None };
                self.clean.push(CleanWaiter { token, file, quiet: false, since_us: self.now_us });
            }
            Command::WriteBack => self.write_back_for(token),
            Command::Fold { node, file } => self.fold(token, *node, file)?,
            Command::Refresh { lower } => {
                self.single_image()?;
                let old = self.replace_lower(*lower);
                self.after_all_so_far(Barrier::Close(old.files().to_vec()));
                self.after_all_so_far(Barrier::Answer(token, CommandReply::Done));
            }
            Command::MergeStart { parent, below, bounds } => {
                self.single_image()?;
                if self.stack.is_empty() {
                    return Err(CommandError::Busy("the disk is read-only"));
                }
                self.drain_then(Then::MergeStart { token, parent, below, bounds })?;
            }
            Command::MergeRate { rate_bytes_per_s } => {
                self.merge_rate(rate_bytes_per_s)?;
                self.answer(token, Ok(CommandReply::Done));
            }
            Command::MergeStop => self.merge_stop(token)?,
            Command::MergeCommit { footer, aside } => self.merge_commit(token, &footer, aside)?,
            Command::Close => self.drain_then(Then::Close(token))?,
            Command::Changed { rw, virtual_bytes } => self.leaf_changed(token, rw, virtual_bytes)?,
            Command::Lookup { offset, len } => self.look_up(token, offset, len),
            Command::Track { id } => {
                self.track(id);
                self.answer(token, Ok(CommandReply::Done));
            }
            Command::Tracked { id, from } => {
                let blocks = self.tracked(id, from)?;
                self.answer(token, Ok(blocks));
            }
            Command::TrackEnd { id } => {
                self.track_end(id);
                self.answer(token, Ok(CommandReply::Done));
            }
        }
        Ok(())
    }

    pub(super) fn single_image(&self) -> Result<(), CommandError> {
        match (self.stack.len(), self.second) {
            (2, Second::Parent) => Err(CommandError::Busy("a leaf merge is running: stop it first")),
            (2, Second::Frozen) => Err(CommandError::Busy("the former leaf is not settled yet")),
            _ => Ok(()),
        }
    }

    fn frozen(&self) -> Result<FileId, CommandError> {
        match (self.stack.get(1), self.second) {
            (Some(image), Second::Frozen) => Ok(image.file),
            _ => Err(CommandError::Busy("no image waits to be settled")),
        }
    }

    fn fold(&mut self, token: Token, node: Node, file: FileId) -> Result<(), CommandError> {
        self.frozen()?;
        if !self.stack[1].is_clean() {
            return Err(CommandError::Busy("the image has metadata to write back"));
        }
        let image = self.stack.remove(1);
        self.fold_into_lower(&image.rw, node, file);
        self.after_all_so_far(Barrier::Close(vec![image.file]));
        self.wake_bitmaps(image.file);
        self.answer(token, Ok(CommandReply::Done));
        Ok(())
    }

    /// What the leaf is: name and footer uuid.
    #[must_use]
    pub fn leaf(&self) -> Option<(&VolumeName, Uuid)> {
        self.stack.first().map(|image| (&image.name, image.footer))
    }

    /// Every image, topmost first: name and footer uuid.
    #[must_use]
    pub fn images(&self) -> Vec<(VolumeName, Uuid)> {
        let lower = self.lower.map().nodes().map(|node| (node.name.clone(), node.uuid));
        self.stack.iter().map(|image| (image.name.clone(), image.footer)).chain(lower).collect()
    }

    /// Blocks the leaf has.
    #[must_use]
    pub fn leaf_blocks(&self) -> u32 {
        self.stack.first().map_or(0, |image| image.rw.allocated_blocks())
    }

    /// Entries in the pending records.
    #[must_use]
    pub fn record_entries(&self) -> usize {
        self.stack.iter().map(|image| image.record.len()).sum()
    }

    /// Whether an image under the leaf waits to be settled.
    #[must_use]
    pub fn has_frozen(&self) -> bool {
        self.frozen().is_ok()
    }

    /// The images open for writing, topmost first.
    #[must_use]
    pub fn stack(&self) -> &[Image] {
        &self.stack
    }

    /// The lower part.
    #[must_use]
    pub fn lower(&self) -> &Lower {
        &self.lower
    }

    /// `running`, `draining`, `paused`, or what failed.
    #[must_use]
    pub fn state_word(&self) -> String {
        if let Some(image) = self.stack.iter().find(|image| image.unmapped) {
            return format!("failed: the tables of {} cannot be read", image.name);
        }
        match self.stack.iter().find(|image| image.poisoned) {
            Some(image) => format!("failed: a flush of {} failed", image.name),
            None => self.state.word(),
        }
    }

    /// Requests in flight or queued.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.active.len() + self.queue.len()
    }

    /// Requests that wait for the end of a pause or a drain.
    #[must_use]
    pub fn held(&self) -> usize {
        self.queue.len()
    }

    /// Operations in flight.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.ops.len()
    }
}
