//! What is done to one disk in place, and asked about it.

use std::path::Path;

use coppice::failure::Outcome;
use coppice::nbd_client::Client;
use rand::Rng;
use serde_json::{Value, json};

use super::{ANSWER_LIMIT, BLOCK, Caller, content, is_refused, stamp};

impl Caller {
    pub(super) fn delete(&mut self) {
        let Some(uuid) = self.pick(|vdi| !vdi.attached) else { return self.detach() };
        let outcome = self.smd.delete(&format!("/vdis/{uuid}"));
        let gone = self.changed(outcome).unwrap_or_else(|| self.shown(&uuid).is_none());
        if gone {
            self.vdis.remove(&uuid);
        }
    }

    pub(super) fn rename(&mut self) {
        let Some(uuid) = self.pick(|_| true) else { return };
        let name = self.name();
        let outcome = self.smd.post(&format!("/vdis/{uuid}/rename"), &json!({"name": name}));
        let is_renamed = |of: &Self| of.shown(&uuid).is_some_and(|shown| shown["name"] == name.as_str());
        let renamed = self.changed(outcome).unwrap_or_else(|| is_renamed(self));
        if let Some(vdi) = self.vdis.get_mut(&uuid).filter(|_| renamed) {
            vdi.name = name;
        }
    }

    /// A snapshot only to be read.
    pub(super) fn attach(&mut self) {
        let Some(uuid) = self.pick(|vdi| !vdi.attached) else { return };
        let body = json!({"read_only": self.vdis[&uuid].of.is_some()});
        let outcome = self.smd.post(&format!("/vdis/{uuid}/attach"), &body);
        self.attached_or_not(&uuid, outcome);
    }

    pub(super) fn detach(&mut self) {
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
    pub(super) fn write(&mut self) {
        let Some(uuid) = self.pick(|vdi| vdi.attached && vdi.of.is_none()) else { return self.attach() };
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

    pub(super) fn resize(&mut self) {
        let Some(uuid) = self.pick(|vdi| vdi.of.is_none()) else { return };
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

    /// Back to a snapshot of it. What was cut off is told by the content.
    pub(super) fn revert(&mut self) {
        let vdis = self.vdis.clone();
        let is_down = |uuid: &String| vdis.get(uuid).is_some_and(|vdi| !vdi.attached && vdi.of.is_none());
        let Some(to) = self.pick(|vdi| vdi.of.as_ref().is_some_and(is_down)) else { return };
        let Some(uuid) = vdis[&to].of.clone() else { return };
        let (before, after) = (&vdis[&uuid].blocks, &vdis[&to].blocks);
        let outcome = self.smd.post(&format!("/vdis/{uuid}/revert"), &json!({"to": to}));
        let reverted = self.changed(outcome).unwrap_or_else(|| {
            let held = self.read_export(&uuid);
            let reverted = held == content(after);
            assert!(reverted || held == content(before), "{}: half a revert of {uuid}", self.id);
            reverted
        });
        if let Some(vdi) = self.vdis.get_mut(&uuid).filter(|_| reverted) {
            vdi.blocks.clone_from(after);
        }
    }

    /// What is said to differ between two disks holds all that does.
    pub(super) fn compare(&mut self) {
        let (Some(one), Some(other)) = (self.pick(|_| true), self.pick(|_| true)) else { return };
        if self.vdis[&one].sr != self.vdis[&other].sr {
            return;
        }
        let outcome = self.smd.get(&format!("/vdis/{one}/changed?since={other}"));
        if self.changed(outcome.clone()) != Some(true) {
            return;
        }
        let ranges = outcome.unwrap()["ranges"].as_array().unwrap().clone();
        let is_told = |at: u64| {
            ranges.iter().any(|range| {
                let (offset, length) = (range["offset"].as_u64().unwrap(), range["length"].as_u64().unwrap());
                offset <= at && at + 4096 <= offset + length
            })
        };
        let (now, then) = (&self.vdis[&one].blocks, &self.vdis[&other].blocks);
        for (block, value) in now.iter().enumerate() {
            let same = *value == then.get(block).copied().unwrap_or(0);
            let told = same || is_told(block as u64 * BLOCK);
            assert!(told, "{}: block {block} of {one} differs from {other}: {ranges:?}", self.id);
        }
    }

    /// Questions whose answers depend on what the others do.
    pub(super) fn look(&mut self) {
        let Some(uuid) = self.pick(|_| true) else { return };
        let sr = &self.srs[self.vdis[&uuid].sr];
        let asked = [format!("/vdis/{uuid}/stat"), format!("/vdis/{uuid}/map"), format!("/srs/{sr}/tree")];
        for path in asked {
            match self.ask(&path) {
                Ok(_) => self.answered += 1,
                Err(failure) => assert!(is_refused(&failure), "{}: {path}: {failure}", self.id),
            }
        }
    }
}
