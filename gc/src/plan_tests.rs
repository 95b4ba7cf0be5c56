//! One table per rule, and random forests collected to the end.

use super::*;
use crate::forest::{Claim, Format, Health, Lease, Link};

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn node(n: u128, parent: u128, role: Role) -> Node {
    Node {
        uuid: id(n),
        footer: id(n + 1_000_000),
        link: if parent == 0 { Link::Root } else { Link::Child(id(parent)) },
        role,
        format: Format::Sparse,
        health: Health::Settled,
        virtual_bytes: 1 << 30,
    }
}

fn hidden(n: u128, parent: u128) -> Node {
    node(n, parent, Role::Hidden)
}

fn leaf(n: u128, parent: u128) -> Node {
    node(n, parent, Role::Visible)
}

fn forest(nodes: Vec<Node>) -> Forest {
    let mut forest = Forest::new(nodes);
    forest.free_bytes = 1 << 40;
    forest
}

fn lease(chain: &[u128], usage: Use) -> Lease {
    Lease { vdi: id(chain[0]), chain: chain.iter().map(|n| id(*n)).collect(), usage }
}

const COST: Cost = Cost { copy_max: 100 << 20, freed: 10 << 20, gained_max: 90 << 20 };

fn planned(forest: &Forest) -> Plan {
    planned_with(forest, Settings::default(), &Holds::new(), &|_| Ok(COST))
}

fn planned_with(
    forest: &Forest,
    settings: Settings,
    holds: &Holds,
    cost: &dyn Fn(&Merge) -> Result<Cost, String>,
) -> Plan {
    plan(&View { forest, settings, running: &BTreeSet::new(), holds, focus: &BTreeSet::new(), cost })
}

fn inner(sources: &[u128], parent: u128) -> Merge {
    Merge::Inner { sources: sources.iter().map(|n| id(*n)).collect(), parent: id(parent) }
}

fn merges(plan: &Plan) -> Vec<Merge> {
    plan.choices
        .iter()
        .filter_map(|choice| match choice {
            Choice::Begin { merge, .. } => Some(merge.clone()),
            Choice::Resume { .. } | Choice::Delete { .. } => None,
        })
        .collect()
}

#[test]
fn nothing_to_do_in_a_minimal_tree() {
    let plan = planned(&forest(vec![hidden(1, 0), leaf(2, 1), leaf(3, 1), leaf(4, 0)]));
    assert_eq!(plan, Plan::default());
}

#[test]
fn garbage_goes_to_a_fixed_point_children_first_and_frees_what_it_leaves() {
    // 1 - 2 - 3 (all garbage above 2's leaf 9) and 1 - 4 - 5.
    let plan = planned(&forest(vec![hidden(1, 0), leaf(9, 1), hidden(4, 1), hidden(5, 4), hidden(6, 4)]));
    let Some(Choice::Delete { nodes }) = plan.choices.first() else { panic!("{plan:?}") };
    assert_eq!(nodes.last(), Some(&id(4)));
    assert_eq!(nodes.len(), 3);
    let leaf = Merge::Leaf { vdi: id(9), parent: id(1), attached: false };
    assert_eq!(merges(&plan), [leaf], "in the same pass");
}

#[test]
fn garbage_that_is_read_or_named_stays_with_its_reason() {
    let mut read = forest(vec![hidden(1, 0), hidden(2, 1)]);
    read.leases.push(lease(&[2, 1], Use::Copies));
    let plan = planned(&read);
    assert!(plan.choices.is_empty());
    assert_eq!(plan.waits[&id(2)], Reason::Read { node: id(2), vdi: id(2) });

    let mut named = forest(vec![hidden(1, 0)]);
    named.claims.push(Claim { id: id(77), nodes: vec![id(1)], merge: false });
    assert_eq!(planned(&named).waits[&id(1)], Reason::Claimed { node: id(1), id: id(77) });
}

#[test]
fn adjacent_candidates_join_and_the_leaf_waits_for_them() {
    let chain = vec![hidden(1, 0), hidden(2, 1), hidden(3, 2), leaf(4, 3)];
    let plan = planned(&forest(chain));
    assert_eq!(merges(&plan), [inner(&[3, 2], 1)]);
    assert_eq!(plan.waits[&id(4)], Reason::ParentFirst { parent: id(3) });

    let forked = vec![hidden(1, 0), hidden(2, 1), leaf(4, 2), hidden(3, 2), leaf(5, 3), leaf(6, 3)];
    assert_eq!(merges(&planned(&forest(forked))), [inner(&[2], 1)]);
}

#[test]
fn an_unsettled_node_cuts_the_run() {
    let mut nodes = vec![hidden(1, 0), hidden(2, 1), hidden(3, 2), hidden(4, 3), leaf(5, 4), leaf(6, 4)];
    nodes[2].health = Health::Unsettled;
    let plan = planned(&forest(nodes));
    assert_eq!(merges(&plan), [inner(&[2], 1)]);
    assert_eq!(plan.waits[&id(4)], Reason::Unsettled { node: id(3) });
}

#[test]
fn what_stands_against_a_pair() {
    let pair = || vec![hidden(1, 0), hidden(2, 1), leaf(3, 2), leaf(4, 2)];
    let reason = |change: &dyn Fn(&mut Vec<Node>)| {
        let mut nodes = pair();
        change(&mut nodes);
        let plan = planned(&forest(nodes));
        assert_eq!(merges(&plan), []);
        plan.waits.get(&id(2)).cloned()
    };
    let into = Reason::ParentTakesNothing { parent: id(1) };
    assert_eq!(reason(&|n| n[0].format = Format::Raw), Some(into.clone()));
    assert_eq!(reason(&|n| n[0].format = Format::Fixed), Some(into));
    assert_eq!(reason(&|n| n[1].format = Format::OtherBlocks), Some(Reason::OtherBlocks { node: id(2) }));
    assert_eq!(reason(&|n| n[0].virtual_bytes *= 2), Some(Reason::SmallerThanParent { parent: id(1) }));
    let broken = Reason::BrokenTree { node: id(4), why: "torn".into() };
    assert_eq!(reason(&|n| n[3].health = Health::Broken("torn".into())), Some(broken));
    // Grandparent 9 is larger than 1, and 2 would make 1 grow.
    let uncovers = reason(&|n| {
        n.push(hidden(9, 0));
        n.push(leaf(10, 9));
        n[0].link = Link::Child(id(9));
        n[1].virtual_bytes = 3 << 30;
        n[4].virtual_bytes = 2 << 30;
    });
    assert_eq!(uncovers, Some(Reason::Uncovers { parent: id(1), ancestor: id(9) }));
}

#[test]
fn leases_count_as_children() {
    let nodes = || vec![hidden(1, 0), hidden(2, 1), leaf(3, 2), leaf(4, 2)];
    for (chain, usage, want) in [
        (&[3, 2, 1][..], Use::Writes, None),
        (&[3, 2, 1], Use::Copies, None),
        (&[2, 1], Use::Copies, Some(Reason::Read { node: id(2), vdi: id(2) })),
        // An old map, in which 3 lay on 1.
        (&[3, 1], Use::Reads, Some(Reason::Read { node: id(1), vdi: id(3) })),
    ] {
        let mut forest = forest(nodes());
        forest.leases.push(lease(chain, usage));
        assert_eq!(planned(&forest).waits.get(&id(2)), want.as_ref(), "{chain:?}");
    }
    for (usage, attached, want) in [
        (Use::Writes, true, None),
        (Use::Reads, false, Some(Reason::AttachedReadOnly)),
        (Use::Copies, false, Some(Reason::Read { node: id(2), vdi: id(2) })),
    ] {
        let mut forest = forest(vec![hidden(1, 0), leaf(2, 1)]);
        forest.leases.push(lease(&[2, 1], usage));
        let plan = planned(&forest);
        assert_eq!(plan.waits.get(&id(2)), want.as_ref());
        if want.is_none() {
            assert_eq!(merges(&plan), [Merge::Leaf { vdi: id(2), parent: id(1), attached }]);
        }
    }
}

#[test]
fn one_broken_tree_holds_up_no_other() {
    let mut nodes = vec![hidden(1, 0), leaf(2, 1), hidden(11, 0), leaf(12, 11)];
    nodes.push(Node {
        health: Health::Broken("bad footer".into()),
        link: Link::OneOf(vec![id(1)]),
        ..leaf(5, 0)
    });
    nodes.push(leaf(6, 99));
    let plan = planned(&forest(nodes.clone()));
    assert_eq!(merges(&plan), [Merge::Leaf { vdi: id(12), parent: id(11), attached: false }]);

    // Unless nobody knows whose child it is.
    nodes[4].link = Link::Unknown;
    let plan = planned(&forest(nodes));
    assert_eq!(plan.choices, []);
    let reason = Reason::UnknownParents { node: id(5), why: "bad footer".into() };
    assert_eq!(plan.waits, BTreeMap::from([(id(2), reason.clone()), (id(12), reason)]));
}

#[test]
fn a_cycle_and_a_missing_parent_are_broken_trees() {
    let plan = planned(&forest(vec![hidden(1, 2), hidden(2, 1), hidden(3, 98), leaf(4, 3)]));
    assert_eq!(plan.choices, []);
    assert!(matches!(plan.waits[&id(4)], Reason::BrokenTree { .. }));
    assert!(plan.waits[&id(1)].to_string().contains("cycle"));
}

#[test]
fn records_come_first_then_long_chains_then_worth() {
    let mut nodes = Vec::new();
    for tree in [100, 200, 300] {
        nodes.extend([
            hidden(tree, 0),
            hidden(tree + 1, tree),
            leaf(tree + 2, tree + 1),
            leaf(tree + 3, tree + 1),
        ]);
    }
    // Tree 400: a long chain of forks, mergeable at its foot.
    nodes.extend([hidden(400, 0), hidden(401, 400)]);
    for n in 402..425 {
        nodes.extend([hidden(n, n - 1), leaf(n + 1000, n - 1)]);
    }
    nodes.extend([leaf(425, 424), leaf(426, 424)]);
    let mut forest = forest(nodes);
    forest.claims.push(Claim { id: id(7), nodes: vec![id(101), id(100)], merge: true });
    let cost = |merge: &Merge| Ok(Cost { freed: if merge.parent() == id(300) { 20 } else { 10 }, ..COST });
    let all = Settings { parallel: 4, ..Settings::default() };
    let plan = planned_with(&forest, all, &Holds::new(), &cost);
    assert_eq!(plan.choices[0], Choice::Resume { intent: id(7) });
    assert_eq!(merges(&plan), [inner(&[401], 400), inner(&[301], 300), inner(&[201], 200)]);
    assert!(plan.waits.is_empty());

    let two = Settings { parallel: 2, ..all };
    let plan = planned_with(&forest, two, &Holds::new(), &cost);
    assert_eq!(merges(&plan), [inner(&[401], 400)]);
    assert_eq!(plan.waits[&id(201)], Reason::Parallel { running: 2 });
}

#[test]
fn space_decides_between_whole_slices_and_waiting() {
    let mut forest = forest(vec![hidden(1, 0), hidden(2, 1), leaf(3, 2), leaf(4, 2)]);
    let mode = |forest: &Forest| match planned(forest).choices.first() {
        Some(Choice::Begin { mode, .. }) => Ok(*mode),
        _ => Err(planned(forest).waits[&id(2)].clone()),
    };
    forest.free_bytes = COST.gained_max + limits::RESERVE_BYTES;
    assert_eq!(mode(&forest), Ok(Mode::Shadow));
    forest.free_bytes -= 1;
    assert_eq!(mode(&forest), Ok(Mode::Empty));
    forest.free_bytes = limits::SLICE_BYTES_MAX - 1;
    let needed = limits::SLICE_BYTES_MAX;
    assert_eq!(mode(&forest), Err(Reason::NoSpace { needed, free: needed - 1 }));
    forest.free_bytes = limits::SLICE_BYTES_MAX;
    forest.leases.push(lease(&[3, 2, 1], Use::Copies));
    assert_eq!(mode(&forest), Err(Reason::Read { node: id(2), vdi: id(3) }));
}

#[test]
fn two_merges_do_not_count_on_the_same_room() {
    let mut forest = forest(vec![
        hidden(1, 0),
        hidden(2, 1),
        leaf(3, 2),
        leaf(4, 2),
        hidden(11, 0),
        hidden(12, 11),
        leaf(13, 12),
        leaf(14, 12),
    ]);
    let one = COST.gained_max + limits::RESERVE_BYTES;
    forest.free_bytes = 2 * one - 1;
    let plan = planned(&forest);
    assert_eq!(merges(&plan), [inner(&[2], 1)]);
    assert_eq!(plan.waits[&id(12)], Reason::NoSpace { needed: one, free: one - 1 });
    forest.free_bytes += 1;
    assert_eq!(merges(&planned(&forest)).len(), 2);
}

#[test]
fn held_nodes_wait_with_their_reason() {
    let forest = forest(vec![hidden(1, 0), leaf(2, 1)]);
    let reason = Reason::SetAside { attempts: 6, why: "EIO".into() };
    let holds = Holds::from([(id(2), reason.clone())]);
    let plan = planned_with(&forest, Settings::default(), &holds, &|_| Ok(COST));
    assert_eq!((plan.choices, plan.waits), (vec![], BTreeMap::from([(id(2), reason)])));
}

#[test]
fn a_disk_that_is_switched_off_keeps_its_leaf_and_nothing_else() {
    let forest = forest(vec![hidden(1, 0), hidden(2, 1), leaf(3, 2), hidden(11, 0), leaf(12, 11)]);
    let off = Holds::from([3, 12].map(|n| (id(n), Reason::SwitchedOff { vdi: id(n) })));
    let plan = planned_with(&forest, Settings::default(), &off, &|_| Ok(COST));
    assert_eq!(merges(&plan), [inner(&[2], 1)]);
    assert_eq!(plan.waits[&id(12)], Reason::SwitchedOff { vdi: id(12) });
}

#[path = "plan_random_tests.rs"]
mod random;
