//! What the demo writes: every 4 KiB says where it belongs and which write it
//! was, and the rest of it follows from that, so any mix-up shows.

/// The grain of the demo: one stamp, in bytes.
pub const UNIT_BYTES: usize = 4096;

/// What a unit holds: zeros, or the stamp of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Value(pub u32);

impl Value {
    /// Never written, or written as zeros.
    pub const ZERO: Value = Value(0);
}

/// Fills `buf`, one unit, with `value` as it looks in unit number `unit`.
pub fn fill(buf: &mut [u8], unit: u32, value: Value) {
    if value == Value::ZERO {
        buf.fill(0);
        return;
    }
    let seed = u64::from(unit) << 32 | u64::from(value.0);
    let (head, body) = buf.split_at_mut(8);
    head.copy_from_slice(&seed.to_le_bytes());
    let mut state = seed;
    for word in body.chunks_exact_mut(8) {
        word.copy_from_slice(&next(&mut state).to_le_bytes());
    }
}

/// What unit number `unit` holds, going by `buf`; `None` when these bytes
/// were never written there.
pub fn read(buf: &[u8], unit: u32) -> Option<Value> {
    let (head, body) = buf.split_first_chunk::<8>()?;
    let seed = u64::from_le_bytes(*head);
    if seed == 0 {
        return body.iter().all(|byte| *byte == 0).then_some(Value::ZERO);
    }
    if (seed >> 32) as u32 != unit {
        return None;
    }
    let mut state = seed;
    let whole = body.chunks_exact(8).all(|word| word == next(&mut state).to_le_bytes());
    whole.then_some(Value(seed as u32))
}

/// SplitMix64: fast, and every word differs from its neighbours.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_reads_back_only_whole_and_in_its_place() {
        let mut buf = vec![1; UNIT_BYTES];
        fill(&mut buf, 7, Value(3));
        assert_eq!(read(&buf, 7), Some(Value(3)));
        assert_eq!(read(&buf, 8), None);
        buf[4095] ^= 1;
        assert_eq!(read(&buf, 7), None);
        fill(&mut buf, 7, Value::ZERO);
        assert_eq!(read(&buf, 7), Some(Value::ZERO));
        buf[9] = 1;
        assert_eq!(read(&buf, 7), None);
    }
}
