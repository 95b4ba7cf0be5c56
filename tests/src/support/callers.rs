//! A caller of smd that knows what its disks must be: random operations, and
//! a model of what each leaves. What a killed smd did not answer either
//! happened wholly or not at all, and the model then takes what is found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coppice::client::Daemon;
use coppice::failure::{Failure, Outcome};
use coppice::nbd_client::Client;
use coppice::stream;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::host::LIMIT;

const BLOCK: u64 = 2 << 20;
/// Disks and snapshots of one caller.
const VDIS_MAX: usize = 6;
/// Longest wait for an answer of a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a VDI must be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Vdi {
    name: String,
    snapshot: bool,
    attached: bool,
    /// The stamp at the beginning of each block; 0: zeros.
    blocks: Vec<u64>,
}

/// One caller; its VDIs are its own.
#[derive(Debug)]
pub struct Caller {
    id: usize,
    smd: Daemon,
    sr: String,
    folder: PathBuf,
    rng: SmallRng,
    vdis: BTreeMap<String, Vdi>,
    /// What was cut off and is not there yet: a tapdisk that lives may decide
    /// it, and recovery finish it, in a moment.
    maybe: Vec<Vdi>,
    next: u64,
    /// Operations that were answered, and those cut off.
    pub answered: u64,
    pub cut_off: u64,
}

/// Whether an operation of a killed daemon ended so.
fn is_cut_off(failure: &Failure) -> bool {
    matches!(failure.code.as_str(), "NOT_RUNNING" | "IO_ERROR" | "CANCELLED")
}

/// Refusals that are no fault: somebody else was at it, or the chain is long.
fn is_refused(failure: &Failure) -> bool {
    matches!(failure.code.as_str(), "BUSY" | "CHAIN_TOO_LONG" | "IN_USE")
}

impl Caller {
    pub fn new(id: usize, run: &Path, sr: &str, folder: &Path, seed: u64) -> Self {
        Self {
            id,
            smd: Daemon::smd(run),
            sr: sr.to_owned(),
            folder: folder.to_owned(),
            rng: SmallRng::seed_from_u64(seed ^ (id as u64) << 32),
            vdis: BTreeMap::new(),
            maybe: Vec::new(),
            next: 0,
            answered: 0,
            cut_off: 0,
        }
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

    /// Does one random thing.
    pub fn step(&mut self) {
        if self.vdis.len() >= VDIS_MAX {
            return self.delete();
        }
        match self.rng.random_range(0..100) {
            0..12 => self.create(),
            12..30 => self.sibling("snapshot"),
            30..38 => self.sibling("clone"),
            38..46 => self.delete(),
            46..52 => self.rename(),
            52..64 => self.attach(),
            64..72 => self.detach(),
            72..90 => self.write(),
            90..94 => self.resize(),
            _ => self.pass_through(),
        }
    }

    /// What came of a request that makes a VDI called `name`.
    fn made(&mut self, outcome: Outcome<Value>, name: &str, vdi: Vdi) {
        let answered = self.changed(outcome);
        match self.find(name) {
            Some(uuid) => drop(self.vdis.insert(uuid, vdi)),
            None if answered.is_none() => self.maybe.push(vdi),
            None => assert_eq!(answered, Some(false), "{}: {name} was made and is not there", self.id),
        }
    }

    /// What came of a request that changes a VDI. If it was cut off nobody
    /// knows.
    fn changed(&mut self, outcome: Outcome<Value>) -> Option<bool> {
        match outcome {
            Ok(_) => {
                self.answered += 1;
                Some(true)
            }
            Err(failure) if is_cut_off(&failure) => {
                self.cut_off += 1;
                None
            }
            Err(failure) if is_refused(&failure) => Some(false),
            Err(failure) => panic!("{}: {failure}", self.id),
        }
    }

    /// Asks until smd answers.
    fn ask(&self, path: &str) -> Outcome<Value> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.smd.get(path) {
                Err(failure) if is_cut_off(&failure) || failure.code == "BUSY" => {
                    assert!(Instant::now() < deadline, "smd does not come back: {failure}");
                    std::thread::sleep(Duration::from_millis(20));
                }
                answer => return answer,
            }
        }
    }

    fn find(&self, name: &str) -> Option<String> {
        match self.ask(&format!("/vdis/{name}")) {
            Ok(vdi) => Some(vdi["uuid"].as_str().unwrap().to_owned()),
            Err(failure) => {
                assert_eq!(failure.code, "NOT_FOUND", "{failure}");
                None
            }
        }
    }

    fn create(&mut self) {
        let name = self.name();
        let blocks = self.rng.random_range(1..4);
        let body = json!({"sr": self.sr, "name": name, "virtual_size": blocks * BLOCK});
        let outcome = self.smd.post("/vdis", &body);
        let vdi =
            Vdi { name: name.clone(), snapshot: false, attached: false, blocks: vec![0; blocks as usize] };
        self.made(outcome, &name, vdi);
    }

    fn sibling(&mut self, kind: &str) {
        let Some(of) = self.pick(|_| true) else { return };
        let name = self.name();
        let snapshot = kind == "snapshot";
        let outcome = match snapshot {
            true => self.smd.post("/vdis/snapshot", &json!({"vdis": [of], "name": name})),
            false => self.smd.post(&format!("/vdis/{of}/clone"), &json!({"name": name})),
        };
        let vdi = Vdi { name: name.clone(), snapshot, attached: false, ..self.vdis[&of].clone() };
        self.made(outcome, &name, vdi);
    }

    fn delete(&mut self) {
        let Some(uuid) = self.pick(|vdi| !vdi.attached) else { return self.detach() };
        let outcome = self.smd.delete(&format!("/vdis/{uuid}"));
        match self.changed(outcome) {
            Some(true) => drop(self.vdis.remove(&uuid)),
            Some(false) => {}
            None => {
                let name = self.vdis[&uuid].name.clone();
                if self.find(&name).is_none() {
                    self.vdis.remove(&uuid);
                }
            }
        }
    }

    fn rename(&mut self) {
        let Some(uuid) = self.pick(|_| true) else { return };
        let name = self.name();
        let outcome = self.smd.post(&format!("/vdis/{uuid}/rename"), &json!({"name": name}));
        let renamed = self.changed(outcome).unwrap_or_else(|| self.find(&name).is_some());
        if let Some(vdi) = self.vdis.get_mut(&uuid).filter(|_| renamed) {
            vdi.name = name;
        }
    }

    fn attach(&mut self) {
        let Some(uuid) = self.pick(|vdi| !vdi.snapshot && !vdi.attached) else { return };
        let outcome = self.smd.post(&format!("/vdis/{uuid}/attach"), &json!({}));
        self.attached_or_not(&uuid, outcome);
    }

    fn detach(&mut self) {
        let Some(uuid) = self.pick(|vdi| vdi.attached) else { return };
        let outcome = self.smd.post(&format!("/vdis/{uuid}/detach"), &json!({"force": true}));
        self.attached_or_not(&uuid, outcome);
    }

    /// As it is found; what was cut off may still be under way, so it is
    /// asked for once more.
    fn attached_or_not(&mut self, uuid: &str, outcome: Outcome<Value>) {
        if let Some(false) = self.changed(outcome) {
            return;
        }
        let shown = self.ask(&format!("/vdis/{uuid}")).unwrap();
        if let Some(vdi) = self.vdis.get_mut(uuid) {
            vdi.attached = shown["attached"] == true;
        }
    }

    /// Through the disk's own socket: smd has no part in it, dead or alive.
    fn write(&mut self) {
        let Some(uuid) = self.pick(|vdi| vdi.attached) else { return self.attach() };
        let shown = self.ask(&format!("/vdis/{uuid}")).unwrap();
        let Some(socket) = shown["socket"].as_str() else {
            panic!("{}: {uuid} is not attached any more: {shown}", self.id)
        };
        let blocks = self.vdis[&uuid].blocks.len();
        let mut client = Client::connect(Path::new(socket), &uuid).unwrap();
        for _ in 0..self.rng.random_range(1..4) {
            let block = self.rng.random_range(0..blocks);
            let value = self.rng.random_range(1..u64::MAX);
            client.write(block as u64 * BLOCK, &stamp(value), false).unwrap();
            client.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
            if let Some(vdi) = self.vdis.get_mut(&uuid) {
                vdi.blocks[block] = value;
            }
        }
        client.close();
    }

    fn resize(&mut self) {
        let Some(uuid) = self.pick(|vdi| !vdi.snapshot) else { return };
        let blocks = self.vdis[&uuid].blocks.len() + 1;
        let body = json!({"virtual_size": blocks as u64 * BLOCK});
        let outcome = self.smd.post(&format!("/vdis/{uuid}/resize"), &body);
        let grown = self.changed(outcome).unwrap_or_else(|| {
            let shown = self.ask(&format!("/vdis/{uuid}")).unwrap();
            shown["virtual_size"] == blocks as u64 * BLOCK
        });
        if let Some(vdi) = self.vdis.get_mut(&uuid).filter(|_| grown) {
            vdi.blocks.resize(blocks, 0);
        }
    }

    /// Out as a stream and in again under another name.
    fn pass_through(&mut self) {
        let Some(of) = self.pick(|vdi| !vdi.attached) else { return };
        let mut bytes = Vec::new();
        let out = stream::download(
            &self.smd,
            &format!("/vdis/{of}/export?format=vhd"),
            |_| (),
            |piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            },
        );
        if self.changed(out.map(|()| Value::Null)) != Some(true) {
            return;
        }
        let name = self.name();
        let path = format!("/srs/{}/import?format=vhd&name={name}", self.sr);
        let outcome = stream::upload(&self.smd, &path, std::io::Cursor::new(bytes), |_| ());
        let vdi = Vdi { name: name.clone(), snapshot: false, attached: false, ..self.vdis[&of].clone() };
        self.made(outcome, &name, vdi);
    }

    /// Compares everything with what smd shows and the disks hold. Returns the
    /// uuids.
    pub fn check(&mut self) -> Vec<String> {
        for vdi in std::mem::take(&mut self.maybe) {
            if let Some(uuid) = self.find(&vdi.name) {
                self.vdis.insert(uuid, vdi);
            }
        }
        let vdis = self.vdis.clone();
        for (uuid, vdi) in &vdis {
            let shown = self.ask(&format!("/vdis/{uuid}")).unwrap();
            let kind = if vdi.snapshot { "snapshot" } else { "leaf" };
            assert_eq!(
                (shown["name"].as_str(), shown["kind"].as_str()),
                (Some(vdi.name.as_str()), Some(kind))
            );
            assert_eq!(shown["virtual_size"], vdi.blocks.len() as u64 * BLOCK, "{shown}");
            assert_eq!(shown["attached"], vdi.attached, "{shown}");
            let held = if vdi.attached { self.read_live(uuid, &shown) } else { self.read_export(uuid) };
            let want: Vec<Vec<u8>> = vdi.blocks.iter().map(|value| stamp(*value)).collect();
            assert!(held == want, "{}: the content of {uuid} ({vdi:?})", self.id);
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

    fn read_export(&self, uuid: &str) -> Vec<Vec<u8>> {
        let file = self.folder.join(format!("{uuid}.raw"));
        let mut raw = std::fs::File::create(&file).unwrap();
        let path = format!("/vdis/{uuid}/export?format=raw");
        stream::download(&self.smd, &path, |_| (), |piece| Ok(std::io::Write::write_all(&mut raw, piece)?))
            .unwrap();
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        bytes.chunks(BLOCK as usize).map(|block| block[..4096].to_vec()).collect()
    }
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(512)
}
