//! The states a power cut could leave of an image in memory.

use crate::mem::{Mem, Op, apply};
use crate::mutate::Random;

/// Calls `look` with states a power cut could leave at any point of what was
/// done to `volume`, which held `before` at first: everything flushed is
/// there, of what came later each sector and each length on its own may be.
/// `look` is told after how many operations the power went.
pub fn each_state(before: &[u8], volume: &Mem, mut look: impl FnMut(usize, Vec<u8>)) {
    let ops = volume.ops();
    let mut durable = before.to_vec();
    let mut pending: Vec<Op> = Vec::new();
    let mut random = Random::new(0xC0FFEE);
    look(0, durable.clone());
    for (n, op) in ops.iter().enumerate() {
        if matches!(op, Op::Flush) {
            pending.iter().for_each(|op| apply(&mut durable, op));
            pending.clear();
            look(n + 1, durable.clone());
            continue;
        }
        pending.push(op.clone());
        // The last alone: what had to be there before it is not.
        let mut alone = durable.clone();
        apply(&mut alone, op);
        look(n + 1, alone);
        for keep_of_4 in [4, 2] {
            look(n + 1, torn(&durable, &pending, keep_of_4, &mut random));
        }
    }
}

fn torn(durable: &[u8], pending: &[Op], keep_of_4: u64, random: &mut Random) -> Vec<u8> {
    let mut bytes = durable.to_vec();
    let mut len = bytes.len();
    for op in pending {
        match op {
            Op::Write(offset, data) => {
                for (n, sector) in data.chunks(512).enumerate() {
                    if random.below(4) < keep_of_4 {
                        apply(&mut bytes, &Op::Write(offset + n as u64 * 512, sector.to_vec()));
                    }
                }
            }
            Op::SetLen(to) => {
                if random.below(4) < keep_of_4 {
                    apply(&mut bytes, op);
                }
                len = usize::try_from(*to).unwrap();
            }
            Op::Flush => {}
        }
    }
    // The length may be durable without the data, or the other way round.
    if random.below(2) == 0 && len > bytes.len() {
        bytes.resize(len, 0);
    }
    bytes
}
