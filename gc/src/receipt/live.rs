//! Reading a disk through its tapdisk, which alone may read what is attached
//! for writing (invariant 8), and knowing what its guests change meanwhile.

use std::io::ErrorKind;

use sm::Repo;
use sm::host::Tap;
use tapdisk_control::nbd::{Client, OBSERVER_SUFFIX, REQUEST_BYTES_MAX};
use tapdisk_control::{ClientError, Extent, Refusal, Reply, Request};
use uuid::Uuid;
use vhd::units::{BLOCK_BYTES, BlockNo};

use super::compare::Digest;
use super::read::{Found, Trouble};
use crate::limits;
use crate::watch::Watch;

fn gone() -> Trouble {
    Trouble::Void("its tapdisk is gone, and with it what guests wrote since the first reading".into())
}

fn lost(error: &ClientError) -> Trouble {
    match error {
        ClientError::Refused(Refusal::Stale { .. }) => gone(),
        other => Trouble::Void(format!("its tapdisk does not answer: {other}")),
    }
}

fn unexpected(reply: &Reply) -> Trouble {
    Trouble::Void(format!("its tapdisk gave an answer to another question: {reply:?}"))
}

fn tap(repo: &Repo, vdi: Uuid) -> Result<Box<dyn Tap>, Trouble> {
    repo.host.tap(vdi)?.ok_or_else(gone)
}

/// Whether a VDI is attached for writing now.
pub(super) fn is_attached(repo: &Repo, vdi: Uuid) -> Result<bool, Trouble> {
    let _sr = repo.host.lock_sr()?;
    Ok(repo.host.leases()?.iter().any(|lease| lease.serves(vdi) && !lease.read_only))
}

/// Has the tapdisk list what guests change from here on.
pub(super) fn track(repo: &Repo, vdi: Uuid, list: Uuid) -> Result<(), Trouble> {
    tap(repo, vdi)?.call(Request::Track { list }).map(drop).map_err(|error| lost(&error))
}

/// Ends a list: first block and number of blocks of each run, in order.
pub(super) fn tracked(repo: &Repo, vdi: Uuid, list: Uuid) -> Result<Vec<(u32, u32)>, Trouble> {
    let mut tap = tap(repo, vdi)?;
    let mut all = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        match tap.call(Request::Tracked { list, from: at }).map_err(|error| lost(&error))? {
            Reply::Blocks { runs, next } => {
                all.extend(runs);
                // It only ever goes forward, so this ends.
                from = next.filter(|next| *next > at);
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(all)
}

/// Has the tapdisk forget a list. One that is not told forgets it with the
/// next one, or with its end.
pub(super) fn track_end(repo: &Repo, vdi: Uuid, list: Uuid) {
    if let Ok(Some(mut tap)) = repo.host.tap(vdi)
        && let Err(error) = tap.call(Request::TrackEnd { list })
    {
        tracing::debug!(sr = %repo.uuid, %vdi, %error, "a list of changed blocks is left");
    }
}

/// A disk, open for reading through its tapdisk.
pub(super) struct Live {
    tap: Box<dyn Tap>,
    client: Client,
}

impl Live {
    /// Connects as somebody who only looks on.
    pub fn open(repo: &Repo, vdi: Uuid) -> Result<Self, Trouble> {
        let endpoint = {
            let _sr = repo.host.lock_sr()?;
            let leases = repo.host.leases()?;
            let lease = leases.iter().find(|lease| lease.serves(vdi)).ok_or_else(gone)?;
            repo.host.endpoint(lease)
        };
        let export = format!("{}{OBSERVER_SUFFIX}", endpoint.export);
        let client = Client::connect(&endpoint.socket, &export);
        let client =
            client.map_err(|error| Trouble::Void(format!("its tapdisk lets nobody read along: {error}")))?;
        Ok(Self { tap: tap(repo, vdi)?, client })
    }

    /// Its size in bytes.
    pub fn virtual_bytes(&self) -> u64 {
        self.client.size_bytes()
    }

    /// Reads every block that has some data, within the budget. A block that
    /// has none when it is looked up reads as zeros then.
    pub fn read(&mut self, watch: &dyn Watch, found: Found<'_>) -> Result<u64, Trouble> {
        let end = self.virtual_bytes();
        let (mut at, mut bytes_read) = (0, 0);
        let mut next_block = 0;
        while at < end {
            let order = Request::Extents { offset: at, length: end - at };
            let extents = match self.tap.call(order).map_err(|error| lost(&error))? {
                Reply::Extents { extents } => extents,
                other => return Err(unexpected(&other)),
            };
            let told = extents.iter().map(|extent| extent.length).sum::<u64>();
            if told == 0 {
                return Err(Trouble::Void("its tapdisk does not say where its data lies".into()));
            }
            for block in with_data(at, &extents) {
                // An answer may end within a block that was read already.
                if block < next_block {
                    continue;
                }
                next_block = block + 1;
                let first = BlockNo(block).first_byte();
                let len = BLOCK_BYTES.min(end.saturating_sub(first));
                watch.allow(len)?;
                let data = self.block(watch, first, len)?;
                bytes_read += len;
                if let Some(digest) = Digest::of(&data) {
                    found(block, digest)?;
                }
            }
            at += told;
        }
        Ok(bytes_read)
    }

    fn block(&mut self, watch: &dyn Watch, offset: u64, len: u64) -> Result<Vec<u8>, Trouble> {
        let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
        let mut asked = Vec::new();
        let mut from = 0;
        while from < len {
            let part = u32::try_from(len - from).unwrap_or(u32::MAX).min(REQUEST_BYTES_MAX);
            asked.push((self.client.read(offset + from, part)?, from, part));
            from += u64::from(part);
        }
        let begun = watch.now();
        while !asked.is_empty() {
            let reply = match self.client.next(limits::RECEIPT_LOOK) {
                Err(error)
                    if error.kind() == ErrorKind::TimedOut
                        && watch.now().saturating_sub(begun) < limits::RECEIPT_READ_MAX =>
                {
                    // Guests may be held for a moment; an abort is not.
                    watch.sleep(std::time::Duration::ZERO)?;
                    continue;
                }
                reply => reply?,
            };
            let Some(of) = asked.iter().position(|(ticket, ..)| *ticket == reply.ticket) else {
                return Err(Trouble::Void("its tapdisk answered what was not asked".into()));
            };
            let (_, from, part) = asked.swap_remove(of);
            let bytes = reply.outcome.map_err(|errno| {
                Trouble::Unreadable(format!("reading {part} bytes at {}: errno {errno}", offset + from))
            })?;
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            match data.get_mut(from..from.saturating_add(bytes.len())) {
                Some(target) => target.copy_from_slice(&bytes),
                None => return Err(Trouble::Void("its tapdisk answered with too much".into())),
            }
        }
        Ok(data)
    }
}

/// The blocks that have some data, in order, of runs without gaps from `at` on.
fn with_data(mut at: u64, extents: &[Extent]) -> Vec<u32> {
    let mut blocks: Vec<u32> = Vec::new();
    for extent in extents {
        let end = at.saturating_add(extent.length);
        if extent.at.is_some() && extent.length > 0 {
            let (first, last) = (BlockNo::of_byte(at).0, BlockNo::of_byte(end - 1).0);
            let from = blocks.last().map_or(first, |before| first.max(before + 1));
            blocks.extend(from..=last);
        }
        at = end;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_with_any_data_is_read_once_and_holes_never() {
        let data = |length| Extent { length, at: Some((Uuid::nil(), 0)) };
        let hole = |length| Extent { length, at: None };
        let b = BLOCK_BYTES;
        let cases: [(u64, &[Extent], &[u32]); 6] = [
            (0, &[hole(10 * b)], &[]),
            (0, &[data(512), hole(b - 1024), data(512), hole(b)], &[0]),
            (b, &[hole(512), data(b)], &[1, 2]),
            (b / 2, &[hole(b), data(b), hole(b), data(512)], &[1, 2, 3]),
            (0, &[data(b), data(b)], &[0, 1]),
            (3 * b, &[data(0), hole(b), data(1)], &[4]),
        ];
        for (at, extents, blocks) in cases {
            assert_eq!(with_data(at, extents), blocks, "{at} {extents:?}");
        }
    }
}
