//! kill -9 of a tapdisk at random moments under load, again and again: every
//! acknowledged write is there, and no sector ever holds a third value
//! (invariant 1).
//!
//! Between the kills the disk is everything a disk can be: fresh, allocating,
//! over an ancestor's data, in a merge into its parent, committed, refreshed,
//! settling. Without smd, so that a kill takes a tenth of a second:
//! `COPPICE_KILLS` says how many (2,000 is the long run), `COPPICE_SEED`
//! repeats one run's choices.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tapdisk_control::{ImageRef, MergePhase, Reply, Request};
use vhd::storage::{VolumeName, Volumes};

use crate::support::tap::{Place, Tap};
use crate::support::verifier::Verifier;

/// Kills where nothing else is said.
const KILLS: u64 = 40;
/// Size of the disk: small, so that all of it is read after every kill.
const DISK_BYTES: u64 = 16 << 20;
/// Longest life of a tapdisk.
const LIFE_MS_MAX: u64 = 60;
/// The same of one that merges: some are to reach the commit.
const MERGE_MS_MAX: u64 = 600;
/// Kills between changes of the tree.
const KILLS_PER_TREE: u64 = 12;
/// Longest chain.
const DEPTH_MAX: usize = 4;
/// Name of the leaf's volume.
const LEAF: &str = "leaf.vhd";

/// A number from the environment.
pub(super) fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

/// What a tapdisk is asked for while it serves, and is killed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Nothing.
    Serve,
    /// To re-read its chain over and over.
    Refresh,
    /// To settle over and over.
    Settle,
    /// To merge the leaf into its parent, and to commit.
    Merge,
}

/// What happened, for the report.
#[derive(Debug, Default)]
struct Seen {
    refreshes: u64,
    settles: u64,
    merges: u64,
    commits: u64,
    trees: u64,
}

/// The disk, its images and its guest.
struct Campaign {
    place: Place,
    /// Leaf first.
    chain: Vec<ImageRef>,
    guest: Verifier,
    rng: SmallRng,
    seen: Seen,
    names: u64,
}

impl Campaign {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let place = Place::new();
        let leaf = place.image(LEAF, DISK_BYTES, None);
        let guest = Verifier::new(DISK_BYTES, rng.random());
        Self { place, chain: vec![leaf], guest, rng, seen: Seen::default(), names: 0 }
    }

    /// One life of a tapdisk, ended by kill -9 under load.
    fn life(&mut self) {
        let tap = self.place.start(&self.chain[0]);
        assert!(self.guest.check(&tap.at), "it died unasked: {}", self.place.tail());
        let order = match self.rng.random_range(0..10) {
            0..4 => Order::Serve,
            4 => Order::Refresh,
            5 => Order::Settle,
            _ if self.chain.len() > 1 => Order::Merge,
            _ => Order::Serve,
        };
        let life_ms_max = if order == Order::Merge { MERGE_MS_MAX } else { LIFE_MS_MAX };
        let life = Duration::from_micros(self.rng.random_range(0..life_ms_max * 1000));
        let began = Instant::now();
        let chain = &self.chain;
        let lived = std::thread::scope(|scope| {
            let clerk = scope.spawn(|| clerk(&tap, chain, order));
            let mut shot = false;
            let lived = self.guest.work(&tap.at, |_| {
                if !shot && began.elapsed() >= life {
                    tap.shoot();
                    shot = true;
                }
                false
            });
            assert!(shot, "it died unasked after {:?}", began.elapsed());
            clerk.join().unwrap().count(&mut self.seen);
            lived
        });
        assert!(!lived);
        tap.kill();
        self.recover(order);
    }

    /// What the daemons do before the disk is served again: the parent of a
    /// leaf in merge is settled. The leaf's name leads to the leaf or, once a
    /// commit has renamed, to its former parent.
    fn recover(&mut self, order: Order) {
        let volumes = self.place.volumes();
        let leaf = VolumeName::new(LEAF).unwrap();
        let file = volumes.open(&leaf, vhd::storage::Access::Read).unwrap();
        let footer = vhd::meta::Meta::read(file.as_ref()).unwrap().uuid();
        if self.chain[0].footer != footer {
            self.chain.remove(0);
            assert_eq!(self.chain[0].footer, footer, "the leaf's name leads elsewhere");
            self.chain[0].volume = LEAF.to_owned();
            self.seen.commits += 1;
        } else if order == Order::Merge {
            self.place.settle(&self.chain[1]);
        }
    }

    /// The leaf becomes a base with a new empty leaf over it; a chain that is
    /// long gives way to a new disk.
    fn next_tree(&mut self) {
        self.seen.trees += 1;
        let tap = self.place.start(&self.chain[0]);
        assert!(self.guest.check(&tap.at));
        tap.end();
        let volumes = self.place.volumes();
        if self.chain.len() == DEPTH_MAX {
            for image in self.chain.drain(..) {
                volumes.delete(&VolumeName::new(&image.volume).unwrap()).unwrap();
            }
            self.guest = Verifier::new(DISK_BYTES, self.rng.random());
            self.chain.push(self.place.image(LEAF, DISK_BYTES, None));
            return;
        }
        self.names += 1;
        let base = ImageRef { volume: format!("base-{}.vhd", self.names), ..self.chain[0].clone() };
        let (from, to) = (VolumeName::new(LEAF).unwrap(), VolumeName::new(&base.volume).unwrap());
        volumes.rename(&from, &to).unwrap();
        self.chain[0] = base;
        let leaf = self.place.image(LEAF, DISK_BYTES, Some(&self.chain[0]));
        self.chain.insert(0, leaf);
    }
}

/// What was done of an order before the kill.
struct Done {
    order: Order,
    times: u64,
}

impl Done {
    fn count(&self, seen: &mut Seen) {
        match self.order {
            Order::Serve => {}
            Order::Refresh => seen.refreshes += self.times,
            Order::Settle => seen.settles += self.times,
            Order::Merge => seen.merges += self.times,
        }
    }
}

/// Carries an order out until the tapdisk is dead.
fn clerk(tap: &Tap, chain: &[ImageRef], order: Order) -> Done {
    let mut times = 0;
    while order != Order::Serve && once(tap, chain, order).is_some() {
        times += 1;
        if order == Order::Merge {
            break;
        }
    }
    Done { order, times }
}

fn once(tap: &Tap, chain: &[ImageRef], order: Order) -> Option<()> {
    let mut control = tap.control()?;
    let leaf = chain[0].clone();
    match order {
        Order::Serve => {}
        Order::Refresh => drop(control.call(Request::Refresh { leaf, parent: None }).ok()?),
        Order::Settle => drop(control.call(Request::Settle).ok()?),
        Order::Merge => {
            let parent = chain[1].clone();
            let start = Request::MergeStart {
                leaf: leaf.clone(),
                parent: parent.clone(),
                rate_bytes_per_s: 0,
                // One limit after the other, as the tapdisks follow each other.
                extra_blocks_max: 1 + leaf.footer.as_u128() as u32 % tapdisk_control::MERGE_EXTRA_BLOCKS_MAX,
            };
            control.call(start).ok()?;
            loop {
                let Reply::Merge(status) = control.call(Request::MergeStatus).ok()? else { return None };
                assert_eq!(status.error, None);
                if status.phase == MergePhase::Empty {
                    break;
                }
            }
            control.call(Request::MergeCommit { leaf, parent, aside: None }).ok()?;
        }
    }
    Some(())
}

#[test]
fn no_kill_at_any_moment_loses_an_acknowledged_write() {
    let seed = number("COPPICE_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    let kills = number("COPPICE_KILLS").unwrap_or(KILLS);
    eprintln!("COPPICE_SEED={seed} COPPICE_KILLS={kills}");
    let (mut campaign, began) = (Campaign::new(seed), Instant::now());
    let mut answered = 0;
    for kill in 1..=kills {
        let before = campaign.guest.tally.all();
        campaign.life();
        answered += campaign.guest.tally.all() - before;
        if kill % KILLS_PER_TREE == 0 {
            campaign.next_tree();
        }
        if kill % 100 == 0 {
            eprintln!(
                "{kill} kills, {:?}, {answered} requests answered, {:?}",
                began.elapsed(),
                campaign.seen
            );
        }
    }
    let tap = campaign.place.start(&campaign.chain[0]);
    assert!(campaign.guest.check(&tap.at));
    eprintln!("{kills} kills, {:?}, {answered} requests answered, {:?}", began.elapsed(), campaign.seen);
}
