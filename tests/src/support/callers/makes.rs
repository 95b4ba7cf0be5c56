//! What makes new disks.

use std::io::Cursor;

use coppice::failure::{Failure, Outcome};
use coppice::stream;
use rand::Rng;
use serde_json::{Value, json};

use super::{BLOCK, Caller, Making, Vdi};

/// How long one look at a job waits for its end, in milliseconds.
const JOB_LOOK_MS: u64 = 1000;

impl Caller {
    fn any_sr(&mut self) -> usize {
        self.rng.random_range(0..self.srs.len())
    }

    pub(super) fn create(&mut self) {
        let (name, sr) = (self.name(), self.any_sr());
        let blocks = self.rng.random_range(1..4);
        let body = json!({"sr": self.srs[sr], "name": name, "virtual_size": blocks * BLOCK});
        let outcome = self.smd.post("/vdis", &body);
        let vdi = Vdi { name: name.clone(), sr, of: None, attached: false, blocks: vec![0; blocks as usize] };
        self.made(outcome, Making { name, sr, vdis: vec![vdi] });
    }

    /// Of up to `max` disks of one SR, at one instant; a single one may be a
    /// snapshot itself.
    pub(super) fn snapshot(&mut self, max: usize) {
        let Some(first) = self.pick(|vdi| max == 1 || vdi.of.is_none()) else { return };
        let sr = self.vdis[&first].sr;
        let fits = |uuid: &String, vdi: &Vdi| *uuid != first && vdi.of.is_none() && vdi.sr == sr;
        let others = self.vdis.iter().filter(|(uuid, vdi)| fits(uuid, vdi)).map(|(uuid, _)| uuid.clone());
        let members: Vec<String> = std::iter::once(first.clone()).chain(others.take(max - 1)).collect();
        let name = self.name();
        let outcome = self.smd.post("/vdis/snapshot", &json!({"vdis": members, "name": name}));
        let taken = |of: String| Vdi { of: Some(of.clone()), ..self.vdis[&of].leaf(&name, sr) };
        let vdis = members.into_iter().map(taken).collect();
        self.made(outcome, Making { name, sr, vdis });
    }

    pub(super) fn clone_one(&mut self) {
        let Some(of) = self.pick(|_| true) else { return };
        let name = self.name();
        let outcome = self.smd.post(&format!("/vdis/{of}/clone"), &json!({"name": name}));
        self.made_alike(outcome, name, &of, self.vdis[&of].sr);
    }

    /// To any SR; a job.
    pub(super) fn copy(&mut self) {
        let Some(of) = self.pick(|vdi| !vdi.attached) else { return };
        let (name, sr) = (self.name(), self.any_sr());
        let body = json!({"sr": self.srs[sr], "name": name});
        let asked = self.smd.post(&format!("/vdis/{of}/copy"), &body);
        let outcome = asked.and_then(|job| self.ended(&job));
        self.made_alike(outcome, name, &of, sr);
    }

    /// Waits for the end of a job. An smd that was killed knows it no more.
    fn ended(&self, job: &Value) -> Outcome<Value> {
        let path = format!("/jobs/{}?wait_ms={JOB_LOOK_MS}", job["id"].as_str().unwrap());
        loop {
            let job = match self.smd.get(&path) {
                Err(failure) if failure.code == "NOT_FOUND" => {
                    return Err(Failure::new("NOT_RUNNING", "smd ended before the job"));
                }
                answer => answer?,
            };
            match job["state"].as_str() {
                Some("queued" | "running") => {}
                Some("done") => return Ok(job["result"].clone()),
                _ => return Err(Failure::from_answer(0, job.to_string().as_bytes())),
            }
        }
    }

    /// Out as a stream and in again under another name, in any SR.
    pub(super) fn pass_through(&mut self) {
        let Some(of) = self.pick(|vdi| !vdi.attached) else { return };
        let (name, sr) = (self.name(), self.any_sr());
        let format = ["vhd", "raw", "extents"][self.rng.random_range(0..3)];
        let Some(bytes) = self.exported(&format!("/vdis/{of}/export?format={format}")) else { return };
        let path = format!("/srs/{}/import?format={format}&name={name}", self.srs[sr]);
        let outcome = stream::upload(&self.smd, &path, Cursor::new(bytes), |_| ());
        self.made_alike(outcome, name, &of, sr);
    }

    /// As what differs from any other disk, put on that one again.
    pub(super) fn pass_delta(&mut self) {
        let Some(of) = self.pick(|vdi| !vdi.attached) else { return };
        let sr = self.vdis[&of].sr;
        let Some(base) = self.pick(|vdi| !vdi.attached && vdi.sr == sr) else { return };
        if base == of {
            return;
        }
        let name = self.name();
        let Some(bytes) = self.exported(&format!("/vdis/{of}/export?format=vhd&base={base}")) else { return };
        let path = format!("/srs/{}/import?format=vhd&name={name}&base={base}", self.srs[sr]);
        let outcome = stream::upload(&self.smd, &path, Cursor::new(bytes), |_| ());
        self.made_alike(outcome, name, &of, sr);
    }

    fn exported(&mut self, path: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let take = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        let out = stream::download(&self.smd, path, |_| (), take);
        (self.changed(out.map(|()| Value::Null)) == Some(true)).then_some(bytes)
    }

    /// What came of a request for a new leaf that holds what `of` does.
    fn made_alike(&mut self, outcome: Outcome<Value>, name: String, of: &str, sr: usize) {
        let vdis = vec![self.vdis[of].leaf(&name, sr)];
        self.made(outcome, Making { name, sr, vdis });
    }
}
