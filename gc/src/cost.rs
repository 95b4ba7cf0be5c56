//! What merges cost and give, told from block tables; and what a whole
//! collection would do, without doing it.
//!
//! A prediction runs the planner on a copy of the forest and applies each
//! plan to it. A node that took others in is then a *stack* of the images it
//! will be made of, newest first, which the merge's own tables read as one:
//!
//! ```text
//!   L - N1 - N2 - P     inner [N1, N2] into P   P = stack [N1, N2, P]
//!                       leaf  L into P          L = stack [L, N1, N2, P]
//! ```

use std::collections::{BTreeMap, BTreeSet};

use sm::Repo;
use tapdisk_control::Request;
use uuid::Uuid;
use vhd::merge::{Merge as Blocks, Mode, Tables, forecast};
use vhd::rw::Presence;
use vhd::storage::VolumeName;
use vhd::units::{BLOCK_BYTES, BlockNo};

use crate::copy::{WINDOW, is_zero, leaf_slice};
use crate::forest::{Forest, Link, Node, Use};
use crate::job::Stop;
use crate::limits;
use crate::plan::{Choice, Cost, Holds, Merge, Plan, Settings, View, plan};
use crate::reason::Reason;
use crate::receipt::witness;
use crate::report::{Expected, FailedNode, Report};
use crate::sources::Sources;

/// What a merge would cost, from block tables alone: bounds to choose by.
/// An attached leaf's table is read as it is on disk; it may lag behind.
///
/// # Errors
/// A table cannot be read, or an image is of a kind that is never merged.
pub fn cost(repo: &Repo, merge: &Merge) -> Result<Cost, String> {
    let names: Vec<VolumeName> = merge.sources().iter().map(|uuid| VolumeName::vhd(*uuid)).collect();
    let parent = VolumeName::vhd(merge.parent());
    let said = |error: sm::Error| error.to_string();
    let sources = Sources::open(repo, &names, &parent).map_err(said)?;
    let own = Sources::open(repo, std::slice::from_ref(&parent), &parent).map_err(said)?;
    let sum = forecast(&sources, |block| own.presence(0, block) != Presence::Absent);
    Ok(Cost {
        copy_max: sum.bytes_max,
        freed: sum.blocks_freed * BLOCK_BYTES,
        gained_max: sum.blocks_gained * BLOCK_BYTES,
    })
}

/// What a merge that was chosen is expected to come to; `None` for what is
/// carried on, as nobody knows what was done of it.
pub(crate) fn expected(choice: &Choice) -> Option<Expected> {
    let Choice::Begin { merge, mode, cost } = choice else {
        return None;
    };
    let peak_extra_bytes = match (merge, mode) {
        // Its tapdisk does not say for which of its blocks the parent takes room.
        (Merge::Leaf { attached: true, .. }, _) => cost.copy_max.min(limits::ROOMY_SLICE_BYTES_MAX),
        (_, Mode::Shadow) => cost.gained_max,
        (Merge::Leaf { .. }, Mode::Empty) => cost.gained_max.min(limits::ROOMY_SLICE_BYTES_MAX),
        (_, Mode::Empty) => cost.gained_max.min(limits::SLICE_BYTES_MAX),
    };
    Some(Expected { bytes_copied: cost.copy_max, bytes_freed: cost.freed, peak_extra_bytes })
}

/// A node of the predicted forest.
#[derive(Debug, Clone, Default)]
struct Stack {
    /// The images it is made of, newest first.
    images: Vec<Uuid>,
    /// Blocks it has.
    blocks: BTreeSet<BlockNo>,
}

/// Predicts what collecting now, to the end, would do to a forest that
/// nobody changes, but for merges in `holds`. Given up once `late` says so.
///
/// # Errors
/// A block table cannot be read, or it was given up.
pub fn predict(
    repo: &Repo,
    forest: &Forest,
    settings: Settings,
    mut holds: Holds,
    only: Option<Uuid>,
    late: &dyn Fn() -> bool,
) -> Result<Report, Stop> {
    settle_attached(repo, forest);
    let (stacks, report) = (BTreeMap::new(), Report::default());
    let mut model = Model { repo, late, receipts: settings.receipts, stacks, report };
    let mut forest = forest.clone();
    forest.claims.retain(|claim| !claim.merge);
    let running = BTreeSet::new();
    // Every round takes at least one node away, or holds one back.
    for _ in 0..=forest.nodes().count() {
        let view = View {
            forest: &forest,
            settings,
            running: &running,
            holds: &holds,
            focus: &running,
            cost: &|merge| cost_of_original(repo, merge),
        };
        let Plan { mut choices, .. } = plan(&view);
        if let Some(vdi) = only {
            let tree = forest.root(vdi);
            for choice in &mut choices {
                if let Choice::Delete { nodes } = choice {
                    nodes.retain(|node| forest.root(*node) == tree);
                }
            }
            choices.retain(|choice| choice_tree(&forest, choice) == Some(tree));
        }
        if choices.is_empty() {
            break;
        }
        let known = model.report.failed.len();
        forest = model.apply(&forest, &choices)?;
        // What cannot be read holds up its own merge, as it will the real one.
        for failed in &model.report.failed[known..] {
            holds.insert(failed.uuid, Reason::NoCost { why: failed.reason.clone() });
        }
    }
    Ok(model.report)
}

/// The tree a choice works in. A deletion may span several; it is then
/// nobody's alone.
pub(crate) fn choice_tree(forest: &Forest, choice: &Choice) -> Option<Uuid> {
    match choice {
        Choice::Resume { intent } => {
            let claim = forest.claims.iter().find(|claim| claim.id == *intent)?;
            claim.nodes.first().map(|node| forest.root(*node))
        }
        Choice::Delete { nodes } => nodes.first().map(|node| forest.root(*node)),
        Choice::Begin { merge, .. } => Some(forest.root(merge.parent())),
    }
}

/// In the model later merges have sources that are not there yet; their cost
/// only matters for the order, which a prediction need not keep.
fn cost_of_original(repo: &Repo, merge: &Merge) -> Result<Cost, String> {
    cost(repo, merge).or(Ok(Cost::default()))
}

/// What guests wrote a moment ago is in the tapdisks' memory; once settled,
/// the block tables on disk are those of this moment.
fn settle_attached(repo: &Repo, forest: &Forest) {
    for lease in forest.leases.iter().filter(|lease| lease.usage == Use::Writes) {
        if let Ok(Some(mut tap)) = repo.host.tap(lease.vdi)
            && let Err(error) = tap.call(Request::Settle)
        {
            tracing::debug!(sr = %repo.uuid, vdi = %lease.vdi, %error, "settle for a prediction");
        }
    }
}

struct Model<'a> {
    repo: &'a Repo,
    /// Whether to give up.
    late: &'a dyn Fn() -> bool,
    /// Whether disks are read before and after each merge.
    receipts: bool,
    stacks: BTreeMap<Uuid, Stack>,
    report: Report,
}

impl Model<'_> {
    fn apply(&mut self, forest: &Forest, choices: &[Choice]) -> Result<Forest, Stop> {
        let mut nodes: BTreeMap<Uuid, Node> = forest.nodes().map(|n| (n.uuid, n.clone())).collect();
        let mut peak = 0;
        for choice in choices {
            match choice {
                Choice::Resume { .. } => {}
                Choice::Delete { nodes: gone } => {
                    for uuid in gone {
                        nodes.remove(uuid);
                        match self.stack(*uuid).map(|stack| stack.blocks.len() as u64) {
                            Ok(blocks) => {
                                self.report.bytes_freed += blocks * BLOCK_BYTES;
                                self.report.deleted += 1;
                            }
                            Err(stop) => self.fails(*uuid, &stop),
                        }
                    }
                }
                Choice::Begin { merge, mode, .. } => match self.merge(forest, merge, *mode) {
                    Ok(room) => {
                        peak += room;
                        relink(&mut nodes, merge);
                    }
                    Err(Stop::Aborted) => return Err(Stop::Aborted),
                    Err(stop) => self.fails(merge.node(), &stop),
                },
            }
        }
        self.report.peak_extra_bytes = self.report.peak_extra_bytes.max(peak);
        let mut after = Forest::new(nodes.into_values());
        after.leases = forest.leases.iter().map(|lease| refreshed(&after, lease)).collect();
        after.claims.clone_from(&forest.claims);
        after.alarms.clone_from(&forest.alarms);
        after.free_bytes = forest.free_bytes;
        Ok(after)
    }

    fn fails(&mut self, uuid: Uuid, stop: &Stop) {
        self.report.failed.push(FailedNode { uuid, reason: stop.to_string() });
    }

    fn stack(&mut self, uuid: Uuid) -> Result<&mut Stack, Stop> {
        if !self.stacks.contains_key(&uuid) {
            let name = VolumeName::vhd(uuid);
            let own = Sources::open(self.repo, std::slice::from_ref(&name), &name)?;
            let blocks = (0..own.blocks()).map(BlockNo);
            let blocks = blocks.filter(|block| own.presence(0, *block) != Presence::Absent).collect();
            self.stacks.insert(uuid, Stack { images: vec![uuid], blocks });
        }
        self.stacks.get_mut(&uuid).ok_or_else(|| Stop::Later("a node vanished".into()))
    }

    /// Adds a merge to the report and makes the parent's new stack. Returns
    /// the room it needs at its peak.
    fn merge(&mut self, forest: &Forest, merge: &Merge, mode: Mode) -> Result<u64, Stop> {
        let mut images = Vec::new();
        let mut held = 0;
        for source in merge.sources() {
            let stack = self.stack(*source)?;
            images.extend(stack.images.iter().copied());
            held += stack.blocks.len() as u64;
        }
        // Blocks dropped earlier are zeros in the original images still.
        let mut present = BTreeSet::new();
        for source in merge.sources() {
            present.extend(self.stack(*source)?.blocks.iter().copied());
        }
        let mut below = BTreeSet::new();
        for node in forest.ancestry(merge.parent()).skip(1) {
            below.extend(self.stack(node.uuid)?.blocks.iter().copied());
        }
        if self.receipts {
            self.report.receipt_bytes_read += self.receipt_bytes(forest, merge)?;
        }
        let own = self.stack(merge.parent())?.clone();
        let gained = self.copied(merge, &images, &present, &own.blocks, &below)?;
        // What was freed by now is there when this one begins.
        let free = forest.free_bytes.saturating_add(self.report.bytes_freed);
        self.report.bytes_freed += (held - gained.len() as u64) * BLOCK_BYTES;
        let room = gained.len() as u64 * BLOCK_BYTES;
        let mut stack = own;
        stack.images.splice(0..0, images);
        stack.blocks.extend(gained);
        match merge {
            Merge::Inner { sources, parent } => {
                self.report.coalesced += sources.len() as u64;
                self.stacks.insert(*parent, stack);
            }
            Merge::Leaf { vdi, .. } => {
                self.report.leaf_coalesced += 1;
                self.stacks.insert(*vdi, stack);
            }
        }
        let held = present.len() as u64 * BLOCK_BYTES;
        Ok(match (merge, mode) {
            // Its tapdisk does not say for which of its blocks the parent takes
            // room.
            (Merge::Leaf { attached: true, .. }, _) => leaf_slice(free, held).1,
            (_, Mode::Shadow) => room,
            (Merge::Leaf { .. }, Mode::Empty) => leaf_slice(free, room).1,
            (_, Mode::Empty) => room.min(limits::SLICE_BYTES_MAX),
        })
    }

    /// Bytes that are read before and after a merge: every block that is
    /// anywhere in the chain of a disk on it.
    fn receipt_bytes(&mut self, forest: &Forest, merge: &Merge) -> Result<u64, Stop> {
        let mut bytes = 0;
        for disk in witness::disks(forest, merge) {
            let mut blocks = BTreeSet::new();
            for node in forest.ancestry(disk) {
                blocks.extend(self.stack(node.uuid)?.blocks.iter().copied());
            }
            bytes += 2 * blocks.len() as u64 * BLOCK_BYTES;
        }
        Ok(bytes)
    }

    /// Counts the bytes of a merge, and returns the blocks its parent gains.
    fn copied(
        &mut self,
        merge: &Merge,
        images: &[Uuid],
        present: &BTreeSet<BlockNo>,
        own: &BTreeSet<BlockNo>,
        below: &BTreeSet<BlockNo>,
    ) -> Result<BTreeSet<BlockNo>, Stop> {
        let names: Vec<VolumeName> = images.iter().map(|uuid| VolumeName::vhd(*uuid)).collect();
        let parent = images.last().copied().unwrap_or_else(|| merge.parent());
        let sources = Sources::open(self.repo, &names, &VolumeName::vhd(parent))?;
        let mut walk = Blocks::new(Mode::Shadow, WINDOW, BlockNo(0));
        // A tapdisk copies what a leaf has without looking at it: its guest
        // waits meanwhile.
        let drops_zeros = !matches!(merge, Merge::Leaf { attached: true, .. });
        let mut gained = BTreeSet::new();
        while let Some(window) = sources.next(&mut walk)? {
            if (self.late)() {
                return Err(Stop::Aborted);
            }
            for copy in window.copies.iter().filter(|copy| present.contains(&copy.block)) {
                let is_below = own.contains(&copy.block) || below.contains(&copy.block);
                if drops_zeros && !is_below && is_zero(&sources, copy)? {
                    continue;
                }
                self.report.bytes_copied += copy.bytes();
                self.report.bytes_cloned += copy.bytes();
                if !own.contains(&copy.block) {
                    gained.insert(copy.block);
                }
            }
        }
        Ok(gained)
    }
}

fn relink(nodes: &mut BTreeMap<Uuid, Node>, merge: &Merge) {
    match merge {
        Merge::Inner { sources, parent } => {
            let top = sources.first().copied();
            for node in nodes.values_mut() {
                if let Link::Child(above) = &mut node.link
                    && Some(*above) == top
                {
                    *above = *parent;
                }
            }
            let size = top.and_then(|top| nodes.get(&top)).map_or(0, |node| node.virtual_bytes);
            if let Some(parent) = nodes.get_mut(parent) {
                parent.virtual_bytes = parent.virtual_bytes.max(size);
            }
            nodes.retain(|uuid, _| !sources.contains(uuid));
        }
        Merge::Leaf { vdi, parent, .. } => {
            let link = nodes.remove(parent).map(|parent| parent.link);
            if let (Some(leaf), Some(link)) = (nodes.get_mut(vdi), link) {
                leaf.link = link;
            }
        }
    }
}

/// A reader's chain once it has refreshed its map.
fn refreshed(forest: &Forest, lease: &crate::forest::Lease) -> crate::forest::Lease {
    let chain = match lease.chain.first() {
        Some(top) if forest.node(*top).is_some() => forest.ancestry(*top).map(|n| n.uuid).collect(),
        _ => lease.chain.clone(),
    };
    crate::forest::Lease { chain, ..lease.clone() }
}
