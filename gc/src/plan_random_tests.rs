//! Random forests, collected to the end.

use super::*;

/// A small generator, so that a failure is repeated by its seed alone.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) % n
    }
}

fn random_nodes(random: &mut Random) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    for n in 1..=u128::from(1 + random.below(30)) {
        let parent = u128::from(random.below(n as u64));
        nodes.push(if random.below(3) == 0 { leaf(n, parent) } else { hidden(n, parent) });
    }
    // Whoever has children is hidden.
    let parents: BTreeSet<Link> = nodes.iter().map(|node| node.link.clone()).collect();
    for node in &mut nodes {
        if parents.contains(&Link::Child(node.uuid)) {
            node.role = Role::Hidden;
        }
    }
    nodes
}

fn apply(forest: &Forest, plan: &Plan) -> Forest {
    let mut nodes: BTreeMap<Uuid, Node> = forest.nodes().map(|n| (n.uuid, n.clone())).collect();
    for choice in &plan.choices {
        match choice {
            Choice::Resume { .. } => panic!("there are no records"),
            Choice::Delete { nodes: gone } => {
                for uuid in gone {
                    assert!(nodes.values().all(|n| n.link != Link::Child(*uuid)), "a child is left");
                    assert_eq!(nodes.remove(uuid).unwrap().role, Role::Hidden);
                }
            }
            Choice::Begin { merge: Merge::Inner { sources, parent }, .. } => {
                for node in nodes.values_mut().filter(|n| n.link == Link::Child(sources[0])) {
                    node.link = Link::Child(*parent);
                }
                for source in sources {
                    assert_eq!(nodes.remove(source).unwrap().role, Role::Hidden);
                }
            }
            Choice::Begin { merge: Merge::Leaf { vdi, parent, .. }, .. } => {
                let base = nodes.remove(parent).unwrap();
                assert_eq!(base.role, Role::Hidden);
                nodes.get_mut(vdi).unwrap().link = base.link;
            }
        }
    }
    let mut after = Forest::new(nodes.into_values());
    after.leases = forest.leases.clone();
    after.free_bytes = forest.free_bytes;
    after
}

#[test]
fn collecting_any_forest_ends_at_the_minimal_one() {
    for seed in 1..500 {
        let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (seed << 20));
        let mut forest = forest(random_nodes(&mut random));
        let visible = |f: &Forest| -> Vec<Uuid> {
            f.nodes().filter(|n| n.role == Role::Visible).map(|n| n.uuid).collect()
        };
        let before = visible(&forest);
        let limit = forest.nodes().count() + 1;
        let settings = Settings { parallel: 1 + random.below(3) as usize, ..Settings::default() };
        let mut rounds = 0;
        loop {
            let plan = planned_with(&forest, settings, &Holds::new(), &|_| Ok(COST));
            if plan.choices.is_empty() {
                assert!(plan.waits.is_empty(), "seed {seed}: {:?}", plan.waits);
                break;
            }
            forest = apply(&forest, &plan);
            rounds += 1;
            assert!(rounds <= limit, "seed {seed}: no end");
        }
        assert_eq!(visible(&forest), before, "seed {seed}");
        for node in forest.nodes().filter(|node| node.role == Role::Hidden) {
            assert!(forest.children(node.uuid).count() > 1, "seed {seed}: {node:?} is not needed");
        }
    }
}

#[test]
fn whatever_is_left_has_a_reason() {
    for seed in 1..500 {
        let mut random = Random(0x1234_5678_9ABC_DEF1 ^ (seed << 20));
        let mut nodes = random_nodes(&mut random);
        for node in &mut nodes {
            match random.below(12) {
                0 => node.health = Health::Unsettled,
                1 => node.format = Format::Raw,
                2 => node.virtual_bytes = 2 << 30,
                3 if random.below(4) == 0 => node.health = Health::Broken("torn".into()),
                _ => {}
            }
        }
        let mut forest = forest(nodes);
        let chains: Vec<Vec<Uuid>> =
            forest.nodes().map(|n| forest.ancestry(n.uuid).map(|n| n.uuid).collect()).collect();
        for chain in chains {
            if random.below(6) == 0 {
                let usage = [Use::Writes, Use::Reads, Use::Copies][random.below(3) as usize];
                forest.leases.push(Lease { vdi: chain[0], chain, usage });
            }
        }
        let kept = forest.leases.iter().filter(|lease| {
            lease.usage == Use::Copies || forest.node(lease.vdi).unwrap().role == Role::Visible
        });
        forest.leases = kept.cloned().collect();
        let broken = forest.broken_trees();
        let plan = planned(&forest);
        for choice in &plan.choices {
            let touched = match choice {
                Choice::Delete { nodes } => nodes.clone(),
                Choice::Begin { merge, .. } => [merge.sources(), &[merge.parent()]].concat(),
                Choice::Resume { .. } => vec![],
            };
            for node in touched {
                assert!(!broken.contains_key(&forest.root(node)), "seed {seed}");
                assert!(!plan.waits.contains_key(&node) || matches!(choice, Choice::Begin { .. }));
            }
        }
        let working: Vec<Uuid> = plan
            .choices
            .iter()
            .flat_map(|choice| match choice {
                Choice::Delete { nodes } => nodes.clone(),
                Choice::Begin { merge, .. } => merge.sources().to_vec(),
                Choice::Resume { .. } => vec![],
            })
            .collect();
        let rest = forest.without(&working);
        for node in rest.nodes().filter(|node| node.role == Role::Hidden) {
            let waits = |uuid: Uuid| plan.waits.contains_key(&uuid);
            let explained = match rest.children(node.uuid).count() {
                0 => {
                    waits(node.uuid)
                        || working.iter().any(|w| {
                            forest.parent(forest.node(*w).unwrap()).map(|p| p.uuid) == Some(node.uuid)
                        })
                }
                1 => {
                    rest.only_child(node.uuid).is_some_and(|child| waits(child.uuid))
                        || forest.children(node.uuid).count() > 1
                }
                _ => true,
            };
            assert!(explained, "seed {seed}: {node:?} {:?}", plan);
        }
    }
}
