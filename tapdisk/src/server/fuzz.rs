//! Entry point of the fuzzer for control peers, also used by the tests.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;
use tapdisk_control::{Answer, Refusal, Reply, Stats};

use super::peers::{Event, Peers};
use crate::driver::PeerId;
use crate::limits::CONTROL_PEERS_MAX;

/// What peers say that is nearly right.
const LINES: [&str; 7] = [
    r#"{"id":1,"request":"stats"}"#,
    r#"{"id":2,"request":"settle"}"#,
    r#"{"id":3,"request":"pause","intent":{"pending":"a","decided":"b","void":"c"},"limit_ms":5}"#,
    r#"{"id":4,"request":"refresh","leaf":{"volume":"x.vhd","footer":"00000000-0000-0000-0000-000000000001"},"parent":null}"#,
    r#"{"id":18446744073709551615,"request":"stop","force":true}"#,
    r#"{"id":5,"request":"no such thing"}"#,
    r#"{"id":6,"request":"tracked","list":"00000000-0000-0000-0000-000000000001","from":0}"#,
];

/// Plays peers that connect, talk, fall silent and leave as `script` says, and
/// a core that answers some of them, late or never. Panics where something
/// does not hold.
pub fn control(script: &[u8]) {
    let mut world = World::default();
    let mut rest = script;
    while let Some((action, after)) = rest.split_first() {
        rest = world.act(*action, after);
        world.turn();
    }
    world.ends.clear();
    for _ in 0..4 {
        world.turn();
    }
    assert_eq!(world.peers.sources().count(), 0, "a peer is never forgotten");
    assert_eq!(world.gone.len() as u64, world.connected, "somebody's end was not told");
}

#[derive(Default)]
struct World {
    peers: Peers,
    /// The other ends.
    ends: Vec<UnixStream>,
    connected: u64,
    /// Peers with a call that is not answered, and its number.
    asking: BTreeMap<PeerId, u64>,
    gone: BTreeSet<PeerId>,
}

impl World {
    fn act<'a>(&mut self, action: u8, rest: &'a [u8]) -> &'a [u8] {
        let (which, rest) = rest.split_first().map_or((0, rest), |(first, rest)| (usize::from(*first), rest));
        let end = which % self.ends.len().max(1);
        match action % 8 {
            0 => self.connect(),
            1 | 2 => {
                let n = rest.len().min(which);
                let (bytes, rest) = rest.split_at(n);
                let end = n % self.ends.len().max(1);
                self.say(end, bytes);
                return rest;
            }
            3 | 4 => {
                let line = LINES.get(which % LINES.len()).copied().unwrap_or_default();
                let mut line = line.as_bytes().to_vec();
                if action & 8 != 0
                    && let Some(byte) = line.get_mut(usize::from(action >> 1))
                {
                    *byte ^= action;
                }
                line.push(b'\n');
                self.say(usize::from(action >> 4) % self.ends.len().max(1), &line);
            }
            5 => self.answer(which, action & 8 == 0),
            6 => {
                if let Some(end) = self.ends.get_mut(end) {
                    let _ = end.read(&mut [0; 4096]); // or there is nothing
                }
            }
            _ if action & 8 != 0 => {
                // More than the limit of what may wait.
                self.say(end, &[b'x'; 5000].repeat(which % 16));
            }
            _ if end < self.ends.len() => drop(self.ends.swap_remove(end)),
            _ => {}
        }
        rest
    }

    fn connect(&mut self) {
        let Ok((ours, theirs)) = UnixStream::pair() else { return };
        let _ = theirs.set_nonblocking(true);
        let before = self.peers.sources().count();
        self.peers.admit(ours);
        self.ends.push(theirs);
        let now = self.peers.sources().count();
        self.connected += (now - before) as u64;
        assert!(now <= CONTROL_PEERS_MAX);
    }

    fn say(&mut self, end: usize, bytes: &[u8]) {
        if let Some(end) = self.ends.get_mut(end) {
            let _ = end.write(bytes); // as much as goes
        }
    }

    fn answer(&mut self, which: usize, last: bool) {
        let Some((peer, id)) = self.asking.iter().nth(which % self.asking.len().max(1)) else { return };
        let (peer, id) = (*peer, *id);
        let outcome = match which % 3 {
            0 => Ok(Reply::Done),
            1 => Ok(Reply::Stats(Box::new(Stats { state: "x".repeat(3000), ..Stats::default() }))),
            _ => Err(Refusal::Voided),
        };
        if last {
            self.asking.remove(&peer);
        }
        self.peers.answer(peer, &Answer { id, last, outcome });
    }

    /// A turn of the server.
    fn turn(&mut self) {
        let ids: Vec<PeerId> = self.peers.sources().map(|(id, ..)| id).collect();
        for id in ids {
            self.peers.serve(id, PollFlags::POLLIN);
        }
        let Self { peers, asking, gone, .. } = self;
        peers.take_calls(|event| match event {
            Event::Call(peer, call) => {
                assert!(!gone.contains(&peer), "it asks and was gone");
                assert_eq!(asking.insert(peer, call.id), None, "it asks twice at a time");
            }
            Event::Gone(peer) => assert!(gone.insert(peer), "it went twice"),
        });
        self.peers.flush();
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, RngCore, SeedableRng};

    #[test]
    fn random_scripts_hold() {
        for seed in 0..300 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut script = vec![0; rng.random_range(0..600)];
            rng.fill_bytes(&mut script);
            super::control(&script);
        }
    }
}
