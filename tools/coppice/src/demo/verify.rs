//! Reading everything back and comparing it with the model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::oracle::{Instant, Window};
use super::stamp::{self, UNIT_BYTES, Value};
use crate::nbd_client::{Client, Ticket};

/// Bytes of one read of a sweep.
const READ_BYTES: u32 = 256 * 1024;
/// Reads of a sweep in flight.
const READS: usize = 16;
/// Longest wait for one of them.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// Two hashes of one disk that should be equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashes {
    /// Of what was read.
    pub disk: String,
    /// Of what the model says.
    pub model: String,
    /// Bytes read.
    pub bytes: u64,
}

/// Reads the whole disk; every unit must hold what `content` says.
///
/// # Errors
/// The first unit that differs, or a read that failed.
pub fn disk(socket: &Path, export: &str, content: &[Value]) -> Result<Hashes, String> {
    let mut from_disk = Sha256::new();
    let mut from_model = Sha256::new();
    let mut unit = 0u32;
    let mut expected = vec![0; UNIT_BYTES];
    let bytes = sweep(socket, export, |data| {
        from_disk.update(data);
        for buf in data.chunks_exact(UNIT_BYTES) {
            let want = *content.get(unit as usize).ok_or("the disk is longer than the model")?;
            stamp::fill(&mut expected, unit, want);
            from_model.update(&expected);
            if buf != expected {
                let found = stamp::read(buf, unit);
                return Err(format!("unit {unit} holds {found:?}, acknowledged was {want:?}"));
            }
            unit += 1;
        }
        Ok(())
    })?;
    if unit as usize != content.len() {
        return Err(format!("the disk ends at unit {unit} of {}", content.len()));
    }
    Ok(Hashes { disk: hex(from_disk), model: hex(from_model), bytes })
}

/// Reads a whole snapshot; every unit must hold what its window allows, and
/// all of them together one instant. Says how many bytes were compared.
///
/// # Errors
/// The first unit that differs, or a read that failed.
pub fn snapshot(socket: &Path, export: &str, window: &Window) -> Result<u64, String> {
    let mut unit = 0u32;
    let mut instant = Instant::default();
    let bytes = sweep(socket, export, |data| {
        for buf in data.chunks_exact(UNIT_BYTES) {
            let found = stamp::read(buf, unit)
                .ok_or_else(|| format!("unit {unit} holds bytes never written there"))?;
            window
                .judge(unit, found, &mut instant)
                .ok_or_else(|| format!("unit {unit} holds {found:?}, which this snapshot cannot"))?;
            unit += 1;
        }
        Ok(())
    })?;
    if unit != window.units() {
        return Err(format!("the snapshot ends at unit {unit} of {}", window.units()));
    }
    match instant.torn() {
        Some(unit) => Err(format!("unit {unit} lacks a write older than another that is there")),
        None => Ok(bytes),
    }
}

/// Reads an export from start to end, many reads at once, and shows the data
/// in order.
fn sweep(
    socket: &Path,
    export: &str,
    mut each: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<u64, String> {
    let broken = |e: std::io::Error| format!("reading {}: {e}", socket.display());
    let mut client = Client::connect(socket, export).map_err(broken)?;
    let size = client.size_bytes();
    let mut asked: HashMap<Ticket, u64> = HashMap::new();
    // Came early; never more than are in flight.
    let mut early: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let (mut next_ask, mut next_show) = (0, 0);
    while next_show < size {
        while next_ask < size && asked.len() + early.len() < READS {
            let len = READ_BYTES.min(u32::try_from(size - next_ask).unwrap_or(READ_BYTES));
            asked.insert(client.read(next_ask, len).map_err(broken)?, next_ask);
            next_ask += u64::from(len);
        }
        let reply = client.next(READ_LIMIT).map_err(broken)?;
        let offset = asked.remove(&reply.ticket).ok_or("an answer to nothing asked")?;
        let data = reply.outcome.map_err(|e| format!("reading at {offset}: error {e}"))?;
        early.insert(offset, data);
        while let Some(data) = early.remove(&next_show) {
            each(&data)?;
            next_show += data.len() as u64;
        }
    }
    client.close();
    Ok(size)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
