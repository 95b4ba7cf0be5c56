//! What to do next, decided from data alone: no I/O, no clock, no lock.
//!
//! Order, and why:
//! 1. Merges already begun: their records keep others away.
//! 2. Garbage to a fixed point, children first: it costs nothing, frees
//!    space, and may leave more to merge.
//! 3. Trees that somebody waits for.
//! 4. Chains near their limit, longest first: soon no snapshot fits.
//! 5. Then most bytes freed per byte copied.
//!
//! One merge per tree at a time, as many trees at once as allowed. Whatever
//! is left out has a [`Reason`].

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use vhd::merge::Mode;

pub use crate::candidates::Merge;
use crate::candidates::candidates;
use crate::forest::{Forest, Node, Role, Use};
use crate::limits;
pub use crate::reason::Reason;

/// What may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Merges at one time.
    pub parallel: usize,
    /// Longest chain before snapshots are refused.
    pub chain_max: usize,
    /// Free bytes that merges leave to others.
    pub reserve_bytes: u64,
    /// Extra bytes a sliced merge needs at its peak.
    pub slice_bytes: u64,
    /// Whether the disks on each merge are read before and after it: matters
    /// to what a prediction says, not to what is chosen.
    pub receipts: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            parallel: limits::PARALLEL,
            chain_max: limits::CHAIN_MAX,
            reserve_bytes: limits::RESERVE_BYTES,
            slice_bytes: limits::SLICE_BYTES_MAX,
            receipts: false,
        }
    }
}

/// What a merge takes and gives, told from block tables (bytes).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// At most this much is copied.
    pub copy_max: u64,
    /// This much goes away: source blocks less what the parent gains.
    pub freed: u64,
    /// At most this much is needed beyond what is in use, if nothing is
    /// given back on the way.
    pub gained_max: u64,
}

/// Merges that are not begun now, as they failed or their disk is switched off.
pub type Holds = BTreeMap<Uuid, Reason>;

/// What the planner looks at.
pub struct View<'a> {
    /// The trees, leases, intents and free space.
    pub forest: &'a Forest,
    /// Bounds.
    pub settings: Settings,
    /// Intents that are being worked on right now.
    pub running: &'a BTreeSet<Uuid>,
    /// Those, by [`Merge::node`] or intent.
    pub holds: &'a Holds,
    /// Trees (by root) that somebody waits for: they go before others.
    pub focus: &'a BTreeSet<Uuid>,
    /// Tells what a merge would cost.
    pub cost: &'a dyn Fn(&Merge) -> Result<Cost, String>,
}

/// Something to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// Carry on with a merge whose record stands in the journal.
    Resume {
        /// The record.
        intent: Uuid,
    },
    /// Delete garbage.
    Delete {
        /// Children before their parents.
        nodes: Vec<Uuid>,
    },
    /// Begin a merge.
    Begin {
        /// What goes where.
        merge: Merge,
        /// Whether space is given back on the way.
        mode: Mode,
        /// The forecast it was chosen by.
        cost: Cost,
    },
}

/// What to do, and why the rest waits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In the order to start them; all may run at the same time, the
    /// deletion first.
    pub choices: Vec<Choice>,
    /// Node and reason, by node.
    pub waits: BTreeMap<Uuid, Reason>,
}

/// Decides. Deterministic: the same view gives the same plan.
#[must_use]
pub fn plan(view: &View<'_>) -> Plan {
    let mut plan = Plan::default();
    let broken = view.forest.broken_trees();
    let unknown = view.forest.unknown_parents();
    let blocked = |forest: &Forest, uuid: Uuid| {
        if let Some((node, why)) = unknown {
            return Some(Reason::UnknownParents { node: node.uuid, why: why.to_owned() });
        }
        let root = forest.root(uuid);
        if let Some((node, why)) = broken.get(&root) {
            return Some(Reason::BrokenTree { node: *node, why: why.clone() });
        }
        let mut alarms = view.forest.alarms.iter();
        let (vdi, job) = alarms.find(|(vdi, _)| view.forest.root(*vdi) == root)?;
        Some(Reason::Differs { vdi: *vdi, job: job.clone() })
    };
    let mut slots = Slots::new(view);
    resume(view, &blocked, &mut slots, &mut plan);

    let garbage = garbage(view.forest, &blocked, &mut plan.waits);
    let rest = view.forest.without(&garbage);
    if !garbage.is_empty() {
        plan.choices.push(Choice::Delete { nodes: garbage });
    }
    begin(view, &rest, &blocked, &mut slots, &mut plan);
    forget_worked_on(view, &mut plan);
    plan
}

/// What is worked on does not wait, though its own record holds it.
fn forget_worked_on(view: &View<'_>, plan: &mut Plan) {
    let resumed: BTreeSet<Uuid> = plan
        .choices
        .iter()
        .filter_map(|choice| match choice {
            Choice::Resume { intent } => Some(*intent),
            Choice::Delete { .. } | Choice::Begin { .. } => None,
        })
        .collect();
    let ours = view
        .forest
        .claims
        .iter()
        .filter(|claim| claim.merge && (view.running.contains(&claim.id) || resumed.contains(&claim.id)));
    for node in ours.flat_map(|claim| &claim.nodes) {
        plan.waits.remove(node);
    }
}

/// Says why a node's tree must not be touched, if so.
type Blocked<'a> = dyn Fn(&Forest, Uuid) -> Option<Reason> + 'a;

/// Trees with a merge in them, and how many more merges may start.
struct Slots {
    busy: BTreeSet<Uuid>,
    used: usize,
    parallel: usize,
}

impl Slots {
    fn new(view: &View<'_>) -> Self {
        let mut slots = Self { busy: BTreeSet::new(), used: 0, parallel: view.settings.parallel };
        for claim in view.forest.claims.iter().filter(|claim| claim.merge) {
            slots.busy.extend(claim.nodes.iter().map(|node| view.forest.root(*node)));
            slots.used += usize::from(view.running.contains(&claim.id));
        }
        slots
    }

    fn take(&mut self) -> Result<(), Reason> {
        if self.used >= self.parallel {
            return Err(Reason::Parallel { running: self.used });
        }
        self.used += 1;
        Ok(())
    }
}

fn resume(view: &View<'_>, blocked: &Blocked<'_>, slots: &mut Slots, plan: &mut Plan) {
    for claim in view.forest.claims.iter().filter(|claim| claim.merge) {
        if view.running.contains(&claim.id) {
            continue;
        }
        let held = view.holds.get(&claim.id).cloned();
        let against = claim.nodes.iter().find_map(|node| blocked(view.forest, *node)).or(held);
        match against.map_or_else(|| slots.take(), Err) {
            Ok(()) => plan.choices.push(Choice::Resume { intent: claim.id }),
            Err(reason) => {
                // The record names the parent last; it is not what waits.
                let sources = claim.nodes.split_last().map_or(&[][..], |(_, sources)| sources);
                plan.waits.extend(sources.iter().map(|node| (*node, reason.clone())));
            }
        }
    }
}

/// Hidden nodes nobody needs, to a fixed point, children first.
fn garbage(forest: &Forest, blocked: &Blocked<'_>, waits: &mut BTreeMap<Uuid, Reason>) -> Vec<Uuid> {
    let mut gone: BTreeSet<Uuid> = BTreeSet::new();
    let mut order = Vec::new();
    let childless = |node: &Node, gone: &BTreeSet<Uuid>| {
        node.role == Role::Hidden && forest.children(node.uuid).all(|c| gone.contains(&c.uuid))
    };
    let mut look: Vec<Uuid> = forest.nodes().map(|node| node.uuid).collect();
    while let Some(uuid) = look.pop() {
        let Some(node) = forest.node(uuid).filter(|n| childless(n, &gone)) else {
            continue;
        };
        let claimed = || forest.claim_on(uuid).map(|claim| Reason::Claimed { node: uuid, id: claim.id });
        let read = || forest.leases_on(uuid).next().map(|l| Reason::Read { node: uuid, vdi: l.vdi });
        match blocked(forest, uuid).or_else(claimed).or_else(read) {
            Some(reason) => {
                waits.entry(uuid).or_insert(reason);
            }
            None if gone.insert(uuid) => {
                order.push(uuid);
                look.extend(forest.parent(node).map(|parent| parent.uuid));
            }
            None => {}
        }
    }
    order
}

/// A merge ready to start.
struct Ready {
    merge: Merge,
    mode: Mode,
    cost: Cost,
    tree: Uuid,
    /// Images on the longest chain through it.
    height: usize,
}

fn begin(view: &View<'_>, forest: &Forest, blocked: &Blocked<'_>, slots: &mut Slots, plan: &mut Plan) {
    let heights = forest.heights();
    let mut ready = Vec::new();
    for (merge, against) in candidates(forest) {
        let tree = forest.root(merge.parent());
        let held = || view.holds.get(&merge.node()).cloned();
        let reason = blocked(forest, merge.parent()).or(against).or_else(held);
        let outcome = match reason {
            Some(reason) => Err(reason),
            None => weigh(view, forest, &merge),
        };
        match outcome {
            Ok((mode, cost)) => {
                let height = heights.get(&merge.node()).copied().unwrap_or_default();
                ready.push(Ready { merge, mode, cost, tree, height });
            }
            Err(reason) => wait(plan, &merge, &reason),
        }
    }
    ready.sort_by(|a, b| {
        let unfocused = |ready: &Ready| !view.focus.contains(&ready.tree);
        unfocused(a).cmp(&unfocused(b)).then_with(|| order(a, b, view.settings.chain_max))
    });
    // Two merges must not both count on the same room.
    let mut spoken_for = 0_u64;
    for Ready { merge, mode, cost, tree, .. } in ready {
        let room = room(mode, &cost, view.settings);
        let left = forest.free_bytes.saturating_sub(spoken_for);
        let free = if slots.busy.contains(&tree) {
            Err(Reason::TreeBusy)
        } else if spoken_for > 0 && room > left {
            let needed = room;
            Err(Reason::NoSpace { needed, free: left })
        } else {
            slots.take()
        };
        match free {
            Ok(()) => {
                slots.busy.insert(tree);
                spoken_for = spoken_for.saturating_add(room);
                plan.choices.push(Choice::Begin { merge, mode, cost });
            }
            Err(reason) => wait(plan, &merge, &reason),
        }
    }
}

/// Bytes a merge needs at its peak.
fn room(mode: Mode, cost: &Cost, settings: Settings) -> u64 {
    match mode {
        Mode::Shadow if cost.gained_max == 0 => 0,
        Mode::Shadow => cost.gained_max.saturating_add(settings.reserve_bytes),
        Mode::Empty => cost.gained_max.min(settings.slice_bytes),
    }
}

fn wait(plan: &mut Plan, merge: &Merge, reason: &Reason) {
    for source in merge.sources() {
        plan.waits.entry(*source).or_insert_with(|| reason.clone());
    }
}

/// What it costs and how it fits into the free space.
fn weigh(view: &View<'_>, forest: &Forest, merge: &Merge) -> Result<(Mode, Cost), Reason> {
    let cost = (view.cost)(merge).map_err(|why| Reason::NoCost { why })?;
    let free = forest.free_bytes;
    let slice = view.settings.slice_bytes.min(cost.gained_max);
    if slice > free {
        return Err(Reason::NoSpace { needed: slice, free });
    }
    if matches!(merge, Merge::Leaf { .. }) {
        return Ok((Mode::Empty, cost));
    }
    if cost.gained_max.saturating_add(view.settings.reserve_bytes) <= free || cost.gained_max == 0 {
        return Ok((Mode::Shadow, cost));
    }
    // In slices every reader must drop its old map before a slice's space is
    // given back, and a copy under way cannot.
    let copies = merge.sources().iter().flat_map(|node| forest.leases_on(*node).map(move |l| (node, l)));
    match copies.into_iter().find(|(_, lease)| lease.usage == Use::Copies) {
        Some((node, lease)) => Err(Reason::Read { node: *node, vdi: lease.vdi }),
        None => Ok((Mode::Empty, cost)),
    }
}

/// Which of two merges goes first.
fn order(a: &Ready, b: &Ready, chain_max: usize) -> Ordering {
    let urgent = |ready: &Ready| {
        if ready.height + limits::NEAR_LIMIT >= chain_max { ready.height } else { 0 }
    };
    // freed / copied, compared without dividing.
    let worth = |x: &Ready, y: &Ready| u128::from(x.cost.freed + 1) * u128::from(y.cost.copy_max + 1);
    Reverse(urgent(a))
        .cmp(&Reverse(urgent(b)))
        .then_with(|| worth(b, a).cmp(&worth(a, b)))
        .then_with(|| a.merge.cmp(&b.merge))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
