//! A caller of smd that knows what its disks must be: random operations, and
//! a model of what each leaves. What a killed smd did not answer either
//! happened wholly or not at all, and the model then takes what is found.
//!
//! Here: the model, what is made of answers, and the check; `disks`: what is
//! done to one disk in place; `makes`: what makes new ones.

mod disks;
mod makes;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coppice::client::Daemon;
use coppice::failure::{Failure, Outcome};
use coppice::nbd_client::Client;
use coppice::stream;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::host::LIMIT;

const BLOCK: u64 = 2 << 20;
/// Disks in one snapshot.
const GROUP_MAX: usize = 3;
/// Disks and snapshots of one caller.
const VDIS_MAX: usize = 8;
/// Longest wait for an answer of a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a VDI must be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Vdi {
    name: String,
    /// The SR, as an index.
    sr: usize,
    /// What it is a snapshot of; `None`: a leaf.
    of: Option<String>,
    attached: bool,
    /// The stamp at the beginning of each block; 0: zeros.
    blocks: Vec<u64>,
}

impl Vdi {
    /// As a new leaf with the same content.
    fn leaf(&self, name: &str, sr: usize) -> Self {
        Self { name: name.to_owned(), sr, of: None, attached: false, blocks: self.blocks.clone() }
    }
}

/// What one request makes, all of it or nothing: VDIs of one name.
#[derive(Debug, Clone)]
struct Making {
    name: String,
    sr: usize,
    vdis: Vec<Vdi>,
}

/// One caller; its VDIs are its own.
#[derive(Debug)]
pub struct Caller {
    id: usize,
    smd: Daemon,
    srs: Vec<String>,
    folder: PathBuf,
    rng: SmallRng,
    vdis: BTreeMap<String, Vdi>,
    /// What was cut off and is not there yet: a tapdisk that lives may decide
    /// it, and recovery finish it, in a moment.
    maybe: Vec<Making>,
    next: u64,
    /// Whether smd is killed now and then: only then is a request cut off.
    is_killed: bool,
    /// Operations that were answered, refused as they may be, and cut off.
    pub answered: u64,
    pub refused: u64,
    pub cut_off: u64,
}

/// Refusals that are no fault: somebody else was at it, or the chain is long.
fn is_refused(failure: &Failure) -> bool {
    matches!(failure.code.as_str(), "BUSY" | "CHAIN_TOO_LONG" | "IN_USE")
}

impl Caller {
    pub fn new(id: usize, run: &Path, srs: &[String], folder: &Path, seed: u64, is_killed: bool) -> Self {
        Self {
            id,
            smd: Daemon::smd(run),
            srs: srs.to_vec(),
            folder: folder.to_owned(),
            rng: SmallRng::seed_from_u64(seed ^ (id as u64) << 32),
            vdis: BTreeMap::new(),
            maybe: Vec::new(),
            next: 0,
            is_killed,
            answered: 0,
            refused: 0,
            cut_off: 0,
        }
    }

    /// Whether an operation of a killed daemon ended so.
    fn is_cut_off(&self, failure: &Failure) -> bool {
        self.is_killed && matches!(failure.code.as_str(), "NOT_RUNNING" | "IO_ERROR" | "CANCELLED")
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("c{}-{}", self.id, self.next)
    }

    fn pick(&mut self, fits: impl Fn(&Vdi) -> bool) -> Option<String> {
        let fitting: Vec<String> =
            self.vdis.iter().filter(|(_, vdi)| fits(vdi)).map(|(uuid, _)| uuid.clone()).collect();
        let n = fitting.len();
        (n > 0).then(|| fitting[self.rng.random_range(0..n)].clone())
    }

    /// Does one random thing: about as often as people do it.
    pub fn step(&mut self) {
        if self.vdis.len() >= VDIS_MAX {
            return self.delete();
        }
        match self.rng.random_range(0..100) {
            0..9 => self.create(),
            9..21 => self.snapshot(1),
            21..27 => self.snapshot(GROUP_MAX),
            27..33 => self.clone_one(),
            33..41 => self.delete(),
            41..45 => self.rename(),
            45..56 => self.attach(),
            56..64 => self.detach(),
            64..79 => self.write(),
            79..82 => self.resize(),
            82..88 => self.revert(),
            88..91 => self.copy(),
            91..94 => self.pass_through(),
            94..96 => self.pass_delta(),
            96..98 => self.compare(),
            _ => self.look(),
        }
    }

    /// What came of a request that makes VDIs.
    fn made(&mut self, outcome: Outcome<Value>, making: Making) {
        let answered = self.changed(outcome);
        let found = self.take(&making, answered.is_none());
        match answered {
            Some(wanted) => assert_eq!(found, wanted, "{}: {making:?}", self.id),
            None if !found => self.maybe.push(making),
            None => {}
        }
    }

    /// Takes what was made into the model, if it is there: all of it, at once
    /// where the request was answered.
    fn take(&mut self, making: &Making, cut_off: bool) -> bool {
        let path = format!("/vdis?sr={}&name={}", self.srs[making.sr], making.name);
        let deadline = Instant::now() + LIMIT;
        let found = loop {
            let found = self.ask(&path).unwrap()["vdis"].as_array().unwrap().clone();
            if found.is_empty() {
                return false;
            }
            if found.len() == making.vdis.len() {
                break found;
            }
            let late = !cut_off || Instant::now() > deadline;
            assert!(!late, "{}: a part of {making:?}: {found:?}", self.id);
            std::thread::sleep(Duration::from_millis(20));
        };
        for shown in found {
            let of = shown["snapshot_of"].as_str();
            let vdi = making.vdis.iter().find(|vdi| vdi.of.as_deref() == of);
            let vdi = vdi.unwrap_or_else(|| panic!("{}: {making:?} became {shown}", self.id));
            self.vdis.insert(shown["uuid"].as_str().unwrap().to_owned(), vdi.clone());
        }
        true
    }

    /// What came of a request that changes a VDI. If it was cut off nobody
    /// knows.
    fn changed(&mut self, outcome: Outcome<Value>) -> Option<bool> {
        match outcome {
            Ok(_) => {
                self.answered += 1;
                Some(true)
            }
            Err(failure) if self.is_cut_off(&failure) => {
                self.cut_off += 1;
                None
            }
            Err(failure) if is_refused(&failure) => {
                self.refused += 1;
                Some(false)
            }
            Err(failure) => panic!("{}: {failure}", self.id),
        }
    }

    /// Asks until smd answers.
    fn ask(&self, path: &str) -> Outcome<Value> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.smd.get(path) {
                Err(failure) if self.is_cut_off(&failure) || failure.code == "BUSY" => {
                    assert!(Instant::now() < deadline, "smd does not come back: {failure}");
                    std::thread::sleep(Duration::from_millis(20));
                }
                answer => return answer,
            }
        }
    }

    /// What is shown of a VDI; nothing where it is gone, or a hidden node.
    fn shown(&self, uuid: &str) -> Option<Value> {
        match self.ask(&format!("/vdis/{uuid}")) {
            Ok(vdi) => (vdi["kind"] != "hidden").then_some(vdi),
            Err(failure) => {
                assert_eq!(failure.code, "NOT_FOUND", "{failure}");
                None
            }
        }
    }

    /// Compares everything with what smd shows and the disks hold. Returns the
    /// uuids.
    pub fn check(&mut self) -> Vec<String> {
        for making in std::mem::take(&mut self.maybe) {
            self.take(&making, true);
        }
        let vdis = self.vdis.clone();
        for (uuid, vdi) in &vdis {
            let shown = self.ask(&format!("/vdis/{uuid}")).unwrap();
            let kind = if vdi.of.is_some() { "snapshot" } else { "leaf" };
            assert_eq!(
                (shown["name"].as_str(), shown["kind"].as_str()),
                (Some(vdi.name.as_str()), Some(kind))
            );
            assert_eq!(shown["snapshot_of"].as_str(), vdi.of.as_deref(), "{shown}");
            assert_eq!(shown["virtual_size"], vdi.blocks.len() as u64 * BLOCK, "{shown}");
            assert_eq!(shown["attached"], vdi.attached, "{shown}");
            let held = if vdi.attached { self.read_live(uuid, &shown) } else { self.read_export(uuid) };
            assert!(held == content(&vdi.blocks), "{}: the content of {uuid} ({vdi:?})", self.id);
        }
        vdis.into_keys().collect()
    }

    fn read_live(&self, uuid: &str, shown: &Value) -> Vec<Vec<u8>> {
        let mut client = Client::connect(Path::new(shown["socket"].as_str().unwrap()), uuid).unwrap();
        let blocks = self.vdis[uuid].blocks.len() as u64;
        let read = |block| {
            client.read(block * BLOCK, 4096).unwrap();
            client.next(ANSWER_LIMIT).unwrap().outcome.unwrap()
        };
        (0..blocks).map(read).collect()
    }

    /// Exports a disk until that is not cut off; its content, block by block.
    fn read_export(&self, uuid: &str) -> Vec<Vec<u8>> {
        let file = self.folder.join(format!("{uuid}.raw"));
        let path = format!("/vdis/{uuid}/export?format=raw");
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut raw = std::fs::File::create(&file).unwrap();
            let write = |piece: &[u8]| Ok(std::io::Write::write_all(&mut raw, piece)?);
            match stream::download(&self.smd, &path, |_| (), write) {
                Ok(()) => break,
                Err(failure) if self.is_cut_off(&failure) || failure.code == "BUSY" => {
                    assert!(Instant::now() < deadline, "{}: {uuid} cannot be read: {failure}", self.id);
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(failure) => panic!("{}: {uuid} cannot be read: {failure}", self.id),
            }
        }
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        bytes.chunks(BLOCK as usize).map(|block| block[..4096].to_vec()).collect()
    }
}

/// What blocks with these stamps hold at their beginning.
fn content(blocks: &[u64]) -> Vec<Vec<u8>> {
    blocks.iter().map(|value| stamp(*value)).collect()
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(512)
}
