//! The leaf becomes larger while its guests wait.
//!
//! A larger table can need the room of blocks, and every write-back writes
//! whole sectors of the table. So the engine does not take part: it drains,
//! writes back what waits and holds, as for closing; the leaf is changed on
//! the volume by [`vhd::resize`], whose crash argument holds for it as for
//! any image; and what was read from it afterwards takes the place of what
//! the engine knew.

use vhd::rw::RwImage;

use super::Engine;
use super::command::{CommandError, CommandReply, Token};

impl Engine {
    pub(super) fn leaf_changed(
        &mut self,
        token: Token,
        rw: Option<Box<RwImage>>,
        virtual_bytes: u64,
    ) -> Result<(), CommandError> {
        if !self.state.is_held() {
            return Err(CommandError::Busy("not held"));
        }
        self.single_image()?;
        let Some(leaf) = self.stack.first_mut() else {
            return Err(CommandError::Busy("the disk is read-only"));
        };
        debug_assert!(leaf.is_clean() && self.ops.is_empty() && leaf.record.is_empty());
        match rw {
            Some(rw) => {
                debug_assert!(virtual_bytes >= self.virtual_bytes, "an attached disk never shrinks");
                leaf.rw = *rw;
                leaf.virtual_bytes = virtual_bytes;
                self.virtual_bytes = virtual_bytes;
            }
            None => {
                leaf.poisoned = true;
                leaf.unmapped = true;
                leaf.record.poison();
            }
        }
        self.release();
        self.answer(token, Ok(CommandReply::Done));
        Ok(())
    }
}
