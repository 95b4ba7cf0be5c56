//! Both readings of a job's disks.

use serde::Serialize;
use sm::Repo;
use sm::limits::PAPER_BYTES_MAX;
use uuid::Uuid;
use vhd::units::BLOCK_BYTES;

use super::compare::{Against, Digest, Found, Hashes, Sum, judge};
use super::live::{self, Live};
use super::read::{Detached, Trouble};
use super::{DiskReceipt, FirstReading, OpenReceipt, Opened, Receipt, State, Verdict};
use crate::forest::{Forest, Role};
use crate::job::Result;
use crate::limits;
use crate::plan::Merge;
use crate::watch::{Aborted, Watch};

/// How far the readings are, for people: which of them, disk so-and-so of so
/// many.
pub(crate) type Tell<'a> = &'a dyn Fn(&'static str, usize, usize);

/// A first reading.
struct Seen {
    virtual_bytes: u64,
    hashes: Hashes,
    sum: Digest,
    by: By,
}

/// What shows whether somebody wrote the disk since.
enum By {
    /// Its tapdisk keeps this list.
    List(Uuid),
    /// Its content has this name.
    Content(Uuid),
}

/// The disks of a job between its two readings. Dropped, it takes back what it
/// asked of tapdisks.
pub(crate) struct Witness<'a> {
    repo: &'a Repo,
    watch: &'a dyn Watch,
    seen: Vec<(Uuid, std::result::Result<Seen, Verdict>)>,
    /// Lists that tapdisks keep for us.
    lists: Vec<(Uuid, Uuid)>,
    bytes_read: u64,
    hashes: usize,
}

/// The disks whose content stands on what a merge touches.
pub(crate) fn disks(forest: &Forest, merge: &Merge) -> Vec<Uuid> {
    let Merge::Inner { sources, .. } = merge else {
        return vec![merge.node()];
    };
    let mut look: Vec<Uuid> = sources.first().copied().into_iter().collect();
    let mut disks = Vec::new();
    while let Some(node) = look.pop() {
        for child in forest.children(node) {
            look.push(child.uuid);
            if child.role == Role::Visible {
                disks.push(child.uuid);
            }
        }
    }
    disks.sort_unstable();
    disks
}

impl<'a> Witness<'a> {
    /// Reads every disk for the first time.
    ///
    /// # Errors
    /// [`crate::job::Stop::Aborted`]. Whatever else goes wrong makes one
    /// disk's receipt void.
    pub fn first(repo: &'a Repo, watch: &'a dyn Watch, disks: &[Uuid], tell: Tell<'_>) -> Result<Self> {
        let (seen, lists) = (Vec::new(), Vec::new());
        let mut witness = Self { repo, watch, seen, lists, bytes_read: 0, hashes: 0 };
        for (n, vdi) in disks.iter().enumerate() {
            tell("first reading", n + 1, disks.len());
            let seen = if n >= limits::RECEIPT_DISKS_MAX {
                Err(Verdict::void(format!("more than {} disks in one job", limits::RECEIPT_DISKS_MAX)))
            } else {
                match witness.look(*vdi) {
                    Ok(seen) => Ok(seen),
                    Err(Trouble::Aborted) => return Err(Aborted.into()),
                    Err(Trouble::Attached) => Err(Verdict::void("it was attached and detached all the time")),
                    Err(Trouble::Unreadable(why)) => {
                        Err(Verdict::void(format!("it could not be read before the merge: {why}")))
                    }
                    Err(Trouble::Void(why)) => Err(Verdict::Void { reason: why }),
                }
            };
            witness.seen.push((*vdi, seen));
        }
        Ok(witness)
    }

    /// One that is attached or detached just then is looked at anew.
    fn look(&mut self, vdi: Uuid) -> std::result::Result<Seen, Trouble> {
        for _ in 0..limits::RECEIPT_ATTEMPTS_MAX {
            if live::is_attached(self.repo, vdi)? {
                return self.look_live(vdi);
            }
            match Detached::open(self.repo, self.watch, vdi) {
                Ok(disk) => return self.look_detached(&disk),
                Err(Trouble::Attached) => {}
                Err(other) => return Err(other),
            }
        }
        Err(Trouble::Attached)
    }

    /// The list begins before the first byte is read.
    fn look_live(&mut self, vdi: Uuid) -> std::result::Result<Seen, Trouble> {
        let list = self.repo.ids.uuid();
        live::track(self.repo, vdi, list)?;
        self.lists.push((vdi, list));
        let mut disk = Live::open(self.repo, vdi)?;
        let virtual_bytes = disk.virtual_bytes();
        let watch = self.watch;
        self.collect(virtual_bytes, By::List(list), |found| disk.read(watch, found))
    }

    /// The lease stands when its content is named.
    fn look_detached(&mut self, disk: &Detached) -> std::result::Result<Seen, Trouble> {
        let content = disk.name_content(self.repo)?;
        let (repo, watch) = (self.repo, self.watch);
        self.collect(disk.virtual_bytes(), By::Content(content), |found| disk.read(repo, watch, found))
    }

    fn collect(
        &mut self,
        virtual_bytes: u64,
        by: By,
        read: impl FnOnce(super::read::Found<'_>) -> std::result::Result<u64, Trouble>,
    ) -> std::result::Result<Seen, Trouble> {
        let mut hashes = Hashes::new();
        let mut sum = Sum::default();
        let room = limits::RECEIPT_HASHES_MAX - self.hashes;
        self.bytes_read += read(&mut |block, digest| {
            if hashes.len() >= room {
                let most = limits::RECEIPT_HASHES_MAX;
                return Err(Trouble::Void(format!("the job's disks have more than {most} blocks of data")));
            }
            sum.add(block, &digest);
            hashes.push((block, digest));
            Ok(())
        })?;
        self.hashes += hashes.len();
        Ok(Seen { virtual_bytes, hashes, sum: sum.end(), by })
    }

    /// What the first readings came to.
    pub fn opened(&self, job: &str) -> Opened {
        let first = |(vdi, seen): &(Uuid, std::result::Result<Seen, Verdict>)| FirstReading {
            vdi: *vdi,
            sha256: seen.as_ref().ok().map(|seen| seen.sum),
        };
        let disks = self.seen.iter().map(first).collect();
        Opened { job: job.to_owned(), receipt: OpenReceipt { state: State::Open, disks } }
    }

    /// Reads every disk again and compares. `job` is what its papers are kept
    /// under. An abort makes what is left void.
    pub fn second(mut self, job: &str, tell: Tell<'_>) -> Receipt {
        let seen = std::mem::take(&mut self.seen);
        let count = seen.len();
        let mut disks = Vec::new();
        for (n, (vdi, seen)) in seen.into_iter().enumerate() {
            tell("second reading", n + 1, count);
            let seen = match seen {
                Ok(seen) => seen,
                Err(verdict) => {
                    disks.push(DiskReceipt { vdi, attached: false, verdict, sha256: None });
                    continue;
                }
            };
            let attached = matches!(seen.by, By::List(_));
            let mut again = self.again(vdi, &seen);
            if let Err(Trouble::Unreadable(why)) = &again {
                // So loud a word is not said for a single failed read.
                tracing::warn!(sr = %self.repo.uuid, %vdi, job, %why, "content receipt: read once more");
                again = self.again(vdi, &seen);
            }
            let (verdict, sha256) = match again {
                Ok((found, unequal, sum)) => {
                    self.keep(job, n, vdi, &seen, &unequal);
                    (Verdict::of(found), Some([seen.sum, sum]))
                }
                Err(trouble) => (after(trouble), None),
            };
            disks.push(DiskReceipt { vdi, attached, verdict, sha256 });
        }
        Receipt { state: State::Compared, disks, void: None, bytes_read: self.bytes_read }
    }

    fn again(&mut self, vdi: Uuid, seen: &Seen) -> std::result::Result<(Found, Unequal, Digest), Trouble> {
        let mut against = Against::new(&seen.hashes);
        let mut note = |block, digest| {
            against.add(block, digest);
            Ok(())
        };
        let changed = match seen.by {
            By::List(list) => {
                let mut disk = Live::open(self.repo, vdi)?;
                same_size(seen, disk.virtual_bytes())?;
                self.bytes_read += disk.read(self.watch, &mut note)?;
                // Only now: what was written during this reading is on it.
                live::tracked(self.repo, vdi, list)?
            }
            By::Content(content) => {
                let disk = Detached::open(self.repo, self.watch, vdi)?;
                if !disk.has_content(self.repo, content)? {
                    let why = "it was attached for writing, resized or reverted between the readings";
                    return Err(Trouble::Void(why.into()));
                }
                same_size(seen, disk.virtual_bytes())?;
                self.bytes_read += disk.read(self.repo, self.watch, &mut note)?;
                Vec::new()
            }
        };
        let (unequal, sum) = against.end();
        Ok((judge(seen.virtual_bytes, &unequal, &changed), unequal, sum))
    }

    /// Keeps the hashes of every block, beside the history.
    fn keep(&self, job: &str, number: usize, vdi: Uuid, seen: &Seen, unequal: &Unequal) {
        let paper = Paper {
            vdi,
            block_bytes: BLOCK_BYTES,
            hash: "sha256",
            virtual_bytes: seen.virtual_bytes,
            before: &seen.hashes,
            unequal_after: unequal,
        };
        let kept = serde_json::to_string(&paper).map_err(|error| error.to_string()).and_then(|text| {
            if text.len() as u64 > u64::from(PAPER_BYTES_MAX) {
                return Err(format!("{} bytes are more than all receipts may take", text.len()));
            }
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            self.repo.labels.keep_paper(job, number, &text).map_err(|error| error.to_string())
        });
        if let Err(error) = kept {
            tracing::warn!(sr = %self.repo.uuid, %vdi, job, %error, "hashes of a receipt are not kept");
        }
    }
}

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        for (vdi, list) in &self.lists {
            live::track_end(self.repo, *vdi, *list);
        }
    }
}

type Unequal = Vec<(u32, Option<Digest>)>;

/// Every hash of one disk. What is not listed is zeros; what is not listed as
/// unequal is after the merge as before.
#[derive(Serialize)]
struct Paper<'a> {
    vdi: Uuid,
    block_bytes: u64,
    hash: &'static str,
    virtual_bytes: u64,
    before: &'a Hashes,
    unequal_after: &'a Unequal,
}

fn same_size(seen: &Seen, now: u64) -> std::result::Result<(), Trouble> {
    if seen.virtual_bytes == now {
        return Ok(());
    }
    Err(Trouble::Void(format!("it had {} bytes and has {now}", seen.virtual_bytes)))
}

/// What ended the second reading.
fn after(trouble: Trouble) -> Verdict {
    match trouble {
        Trouble::Aborted => Verdict::void("the second reading was stopped"),
        Trouble::Attached => Verdict::void("it was attached for writing between the readings"),
        Trouble::Unreadable(reason) => Verdict::Unreadable { reason },
        Trouble::Void(reason) => Verdict::Void { reason },
    }
}
