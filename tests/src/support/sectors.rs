//! What a disk holds, sector by sector: what was acknowledged last, and what
//! else a sector may hold because a request was in flight when the disk went
//! away, or because it was only trimmed.

use std::collections::HashMap;
use std::ops::Range;

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;

/// Which write a sector's bytes are of; zero: zeros.
pub type Value = u32;

/// See the module.
#[derive(Debug, Clone)]
pub struct Sectors {
    held: Vec<Value>,
    maybe: HashMap<u32, Vec<Value>>,
}

/// Which sector holds what it must not, and what it might hold.
#[derive(Debug)]
pub struct Wrong(pub String);

impl Sectors {
    /// An empty disk.
    pub fn new(bytes: u64) -> Self {
        Self { held: vec![0; bytes as usize / SECTOR_BYTES], maybe: HashMap::new() }
    }

    /// Number of sectors.
    pub fn len(&self) -> u32 {
        self.held.len() as u32
    }

    /// A write was acknowledged: what was uncertain is overwritten.
    pub fn acknowledge(&mut self, sectors: Range<u32>, value: Value) {
        for sector in sectors {
            self.held[sector as usize] = value;
            self.maybe.remove(&sector);
        }
    }

    /// These sectors may hold `value`, too.
    pub fn may_hold(&mut self, sectors: Range<u32>, value: Value) {
        for sector in sectors {
            self.maybe.entry(sector).or_default().push(value);
        }
    }

    /// Holds what was read against what may be there; from now on each sector
    /// holds just what was found: a disk does not change its mind.
    pub fn check(&mut self, first: u32, bytes: &[u8]) -> Result<(), Wrong> {
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            let acknowledged = self.held[sector as usize];
            let maybe = self.maybe.remove(&sector).unwrap_or_default();
            let found = read(bytes, sector);
            match found {
                Some(value) if value == acknowledged || maybe.contains(&value) => {
                    self.held[sector as usize] = value;
                }
                _ => {
                    let found = found.map_or("bytes never written there".into(), |v| format!("write {v}"));
                    return Err(Wrong(format!(
                        "sector {sector} holds {found}; acknowledged: {acknowledged}, else perhaps: {maybe:?}"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Fills a run of sectors from `first` on with `value`.
pub fn fill(bytes: &mut [u8], first: u32, value: Value) {
    for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
        let mut state = u64::from(sector) << 32 | u64::from(value);
        for (n, word) in bytes.chunks_exact_mut(8).enumerate() {
            if n > 0 {
                state = next(state);
            }
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
}

/// What a sector holds, going by all of its bytes.
pub fn read(bytes: &[u8], sector: u32) -> Option<Value> {
    let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let mut state = words.next()?;
    if state == 0 {
        return words.all(|word| word == 0).then_some(0);
    }
    let value = state as u32;
    if (state >> 32) as u32 != sector || value == 0 {
        return None;
    }
    let whole = words.all(|word| {
        state = next(state);
        word == state
    });
    whole.then_some(value)
}

fn next(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ (z >> 27)
}

#[test]
fn the_model_tells_lost_torn_and_misplaced_writes() {
    let mut bytes = vec![0; 3 * SECTOR_BYTES];
    fill(&mut bytes, 7, 5);
    let wrong = |model: &Sectors, first, bytes: &[u8]| model.clone().check(first, bytes).is_err();
    let mut model = Sectors::new(64 << 10);
    assert!(wrong(&model, 7, &bytes), "never written");
    model.acknowledge(7..10, 5);
    assert!(!wrong(&model, 7, &bytes));
    assert!(wrong(&model, 6, &bytes), "in another place");
    let zeros = vec![0; SECTOR_BYTES];
    assert!(wrong(&model, 8, &zeros), "lost");
    bytes[SECTOR_BYTES + 100] ^= 1;
    assert!(wrong(&model, 7, &bytes), "torn");
    model.may_hold(8..9, 0);
    assert!(!wrong(&model, 8, &zeros));
    // Seen once, it stays.
    model.check(8, &zeros).unwrap();
    fill(&mut bytes, 7, 5);
    assert!(wrong(&model, 7, &bytes));
}
