//! What the demo found, as data and as text.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::render;
use crate::size::human;
use crate::view::Forest;

/// Everything the demo measured and checked. Sizes in bytes.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Whether everything held; otherwise there is no report but an error.
    pub ok: bool,
    /// Seed of the random requests.
    pub seed: u64,
    /// Duration of the whole run.
    pub seconds: f64,
    /// The disk's uuid.
    pub vdi: String,
    /// Its size.
    pub virtual_size: u64,
    /// What was done to it.
    pub load: LoadReport,
    /// The snapshots, in order.
    pub snapshots: Vec<SnapshotReport>,
    /// The trees before the snapshots were deleted.
    pub tree_before: serde_json::Value,
    /// And after everything was merged.
    pub tree_after: serde_json::Value,
    /// Length of the disk's chain before.
    pub depth_before: u64,
    /// And after.
    pub depth_after: u64,
    /// The merges, in order.
    pub merges: Vec<MergeReport>,
    /// Bytes copied by all merges.
    pub bytes_copied: u64,
    /// Bytes shared instead of copied.
    pub bytes_cloned: u64,
    /// Bytes given back.
    pub bytes_freed: u64,
    /// The longest that any read or write waited, in microseconds.
    pub longest_stall_us: u64,
    /// The end result.
    pub verification: Verification,
}

/// What the guest did.
#[derive(Debug, Default, Serialize)]
pub struct LoadReport {
    /// Writes acknowledged.
    pub writes: u64,
    /// Their bytes.
    pub bytes_written: u64,
    /// Reads answered, each compared with what was acknowledged.
    pub reads_verified: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Longest flush, in microseconds.
    pub longest_flush_us: u64,
    /// Least requests in flight at any time.
    pub in_flight_min: usize,
}

/// One snapshot.
#[derive(Debug, Default, Serialize)]
pub struct SnapshotReport {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// From asking to answer, in microseconds.
    pub took_us: u64,
    /// Longest wait of a request meanwhile, in microseconds.
    pub longest_stall_us: u64,
    /// Writes acknowledged while it was taken.
    pub writes_acked: u64,
    /// Blocks that the level below holds in part.
    pub blocks_partly_written: usize,
    /// Bytes read back and compared with the model of its instant; 0 when
    /// this one was not read.
    pub bytes_verified: u64,
}

/// One merge.
#[derive(Debug, Default, Clone, Serialize)]
pub struct MergeReport {
    /// `inner` or `leaf`.
    pub kind: String,
    /// The node that was merged away.
    pub uuid: String,
    /// How long it took.
    pub seconds: f64,
    /// Writes acknowledged meanwhile.
    pub writes_acked: u64,
    /// Longest wait of a request meanwhile, in microseconds.
    pub longest_stall_us: u64,
    /// Bytes it copied.
    pub bytes_copied: u64,
    /// Bytes it shared instead.
    pub bytes_cloned: u64,
    /// Bytes it gave back.
    pub bytes_freed: u64,
}

/// The final comparison of every byte.
#[derive(Debug, Default, Serialize)]
pub struct Verification {
    /// Bytes compared, each time.
    pub bytes: u64,
    /// SHA-256 of the disk, read while attached.
    pub sha256: String,
    /// SHA-256 of what was acknowledged.
    pub sha256_expected: String,
    /// SHA-256 of the disk after detaching and attaching it again.
    pub sha256_reattached: String,
}

impl Report {
    /// The report as text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "\nBefore: {} snapshots of a disk in use, chain of {}\n",
            self.snapshots.len(),
            self.depth_before
        );
        out.push_str(&tree(&self.tree_before));
        let _ = writeln!(out, "\nAfter: all deleted and merged, chain of {}\n", self.depth_after);
        out.push_str(&tree(&self.tree_after));
        out.push('\n');
        out.push_str(&self.snapshot_table());
        out.push('\n');
        out.push_str(&self.merge_table());
        let load = &self.load;
        let check = &self.verification;
        let lines = [
            ("writes acknowledged", format!("{} ({})", load.writes, human(load.bytes_written))),
            ("reads verified", load.reads_verified.to_string()),
            ("requests in flight", format!("never fewer than {}", load.in_flight_min)),
            ("longest stall", ms(self.longest_stall_us)),
            ("longest flush", ms(load.longest_flush_us)),
            (
                "copied by merges",
                format!("{}, cloned {}", human(self.bytes_copied), human(self.bytes_cloned)),
            ),
            ("freed", human(self.bytes_freed)),
            ("verified", format!("{}, every byte as acknowledged", human(check.bytes))),
            ("sha256 of the disk", check.sha256.clone()),
            ("sha256 of the model", check.sha256_expected.clone()),
            ("sha256 reattached", check.sha256_reattached.clone()),
            ("seed", self.seed.to_string()),
            ("took", format!("{:.1} s", self.seconds)),
        ];
        out.push('\n');
        for (name, value) in lines {
            let _ = writeln!(out, "{name:21} {value}");
        }
    }

    fn snapshot_table(&self) -> String {
        let mut table = render::table::Table::new([
            "SNAPSHOT",
            "TOOK",
            "LONGEST STALL",
            "WRITES MEANWHILE",
            "PARTLY WRITTEN BLOCKS",
            "VERIFIED",
        ]);
        for snapshot in &self.snapshots {
            let verified = match snapshot.bytes_verified {
                0 => "-".to_owned(),
                bytes => human(bytes),
            };
            table.row([
                snapshot.name.clone(),
                ms(snapshot.took_us),
                ms(snapshot.longest_stall_us),
                snapshot.writes_acked.to_string(),
                snapshot.blocks_partly_written.to_string(),
                verified,
            ]);
        }
        table.to_string()
    }

    fn merge_table(&self) -> String {
        let mut table = render::table::Table::new([
            "MERGE",
            "NODE",
            "TOOK",
            "WRITES MEANWHILE",
            "LONGEST STALL",
            "COPIED",
            "CLONED",
            "FREED",
        ]);
        for merge in &self.merges {
            table.row([
                merge.kind.clone(),
                merge.uuid.chars().take(8).collect(),
                format!("{:.2} s", merge.seconds),
                merge.writes_acked.to_string(),
                ms(merge.longest_stall_us),
                human(merge.bytes_copied),
                human(merge.bytes_cloned),
                human(merge.bytes_freed),
            ]);
        }
        table.to_string()
    }
}

/// Whole microseconds.
pub fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn ms(us: u64) -> String {
    format!("{}.{:01} ms", us / 1000, us % 1000 / 100)
}

fn tree(document: &serde_json::Value) -> String {
    match crate::view::read::<Forest>(document) {
        Ok(forest) => render::tree::forest(&forest),
        Err(failure) => format!("{failure}\n"),
    }
}
