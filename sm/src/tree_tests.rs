use super::*;
use crate::journal::{
    ImageRef, Intent, Member, RecordName, RecordState, Shape, Sibling, SiblingKind, SnapshotIntent,
};

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn footer(n: u128) -> Uuid {
    Uuid::from_u128(n + 1000)
}

fn vhd(n: u128, parent: Option<u128>) -> Image {
    let parent = parent.map(|p| ParentName { footer: footer(p), candidates: vec![VolumeName::vhd(id(p))] });
    let head = Head { footer: footer(n), virtual_bytes: 1 << 21, hidden: false, created_s: 0, parent };
    Image {
        volume: VolumeName::vhd(id(n)),
        physical_bytes: 3584,
        allocated_bytes: 4096,
        head: Ok(head),
        may_stand_on: None,
    }
}

fn change(mut image: Image, change: impl FnOnce(&mut Head)) -> Image {
    change(image.head.as_mut().unwrap());
    image
}

fn hidden(image: Image) -> Image {
    change(image, |head| head.hidden = true)
}

fn state(tree: &VdiTree, n: u128) -> NodeState {
    tree.nodes[tree.by_uuid(id(n)).unwrap()].state.clone()
}

#[test]
fn depths_and_children() {
    let images = vec![hidden(vhd(1, None)), hidden(vhd(2, Some(1))), vhd(3, Some(2)), vhd(4, Some(1))];
    let tree = VdiTree::build(images, &[]);
    let depths: Vec<u32> = tree.nodes.iter().map(|n| n.depth).collect();
    assert_eq!(depths, [1, 2, 3, 2]);
    assert_eq!(tree.roots, [0]);
    assert_eq!(tree.nodes[0].children, [1, 3]);
    assert_eq!(tree.chain(2).map(|n| n.uuid).collect::<Vec<_>>(), [id(3), id(2), id(1)]);
}

#[test]
fn every_kind_of_breakage_is_named_and_stays_in_its_tree() {
    let mut unreadable = vhd(20, None);
    unreadable.head = Err("bad footer checksum".into());
    let outside = change(vhd(5, Some(1)), |h| h.parent.as_mut().unwrap().candidates.clear());
    let mismatch = change(vhd(6, Some(1)), |h| h.parent.as_mut().unwrap().footer = footer(99));
    let images = vec![
        hidden(vhd(1, None)),
        vhd(2, Some(1)),
        vhd(3, Some(77)),
        vhd(4, Some(3)),
        outside,
        mismatch,
        vhd(8, Some(9)),
        vhd(9, Some(8)),
        unreadable,
        vhd(21, Some(20)),
    ];
    let tree = VdiTree::build(images, &[]);
    let broken = |n| match state(&tree, n) {
        NodeState::Broken(broken) => broken,
        whole => panic!("{n} is {whole:?}"),
    };
    assert_eq!(state(&tree, 1), NodeState::Hidden);
    assert_eq!(state(&tree, 2), NodeState::Visible);
    assert_eq!(broken(3), Broken::ParentMissing { name: VolumeName::vhd(id(77)) });
    assert_eq!(broken(4), Broken::OnBroken { ancestor: VolumeName::vhd(id(3)) });
    assert_eq!(broken(5), Broken::ParentOutside);
    let name = VolumeName::vhd(id(1));
    assert_eq!(broken(6), Broken::ParentMismatch { name, expected: footer(99) });
    assert_eq!(broken(8), Broken::Cycle);
    assert_eq!(broken(9), Broken::Cycle);
    assert_eq!(broken(21), Broken::OnBroken { ancestor: VolumeName::vhd(id(20)) });
    let unknown: Vec<_> = tree.parents_unknown().collect();
    assert_eq!(unknown, [(&VolumeName::vhd(id(20)), "bad footer checksum")]);
}

#[test]
fn an_unreadable_image_with_known_parents_holds_back_those_only() {
    let unreadable = |known: Option<Vec<Uuid>>| {
        let mut image = vhd(20, None);
        image.head = Err("bad footer checksum".into());
        image.may_stand_on = known;
        VdiTree::build(vec![hidden(vhd(1, None)), hidden(vhd(2, None)), vhd(3, Some(2)), image], &[])
    };
    let maybe = |tree: &VdiTree| tree.nodes[tree.by_uuid(id(20)).unwrap()].may_stand_on.clone();
    let known = unreadable(Some(vec![footer(1), footer(2)]));
    assert_eq!((known.parents_unknown().count(), maybe(&known)), (0, Some(vec![0, 1])));
    let root = unreadable(Some(Vec::new()));
    assert_eq!((root.parents_unknown().count(), maybe(&root)), (0, Some(vec![])));
    // A parent that is not there any more says that the record is old.
    for unknown in [None, Some(vec![footer(1), footer(50)])] {
        let tree = unreadable(unknown);
        assert_eq!((tree.parents_unknown().count(), maybe(&tree)), (1, None));
    }
}

#[test]
fn a_merge_that_relinks_an_unreadable_image_names_its_parents_too() {
    let mut image = vhd(20, None);
    image.head = Err("torn".into());
    image.may_stand_on = Some(vec![footer(2)]);
    let named = |n: u128| ImageRef { volume: VolumeName::vhd(id(n)).as_str().into(), footer: footer(n) };
    let intent = Intent::Inner(crate::journal::InnerIntent {
        id: id(90),
        nodes: vec![named(2)],
        parent: named(1),
        state: crate::journal::JobState::Relinking { children: vec![named(20)] },
    });
    let stored = Stored { name: RecordName { id: id(90), state: RecordState::Job }, intent };
    let tree = VdiTree::build(vec![hidden(vhd(1, None)), hidden(vhd(2, Some(1))), image], &[stored]);
    let node = &tree.nodes[tree.by_uuid(id(20)).unwrap()];
    assert_eq!(node.may_stand_on, Some(vec![0, 1]));
}

#[test]
fn the_candidate_with_the_right_uuid_is_the_parent() {
    let both = change(vhd(3, Some(1)), |h| {
        h.parent.as_mut().unwrap().candidates = vec![VolumeName::vhd(id(2)), VolumeName::vhd(id(1))];
    });
    let tree = VdiTree::build(vec![hidden(vhd(1, None)), hidden(vhd(2, None)), both], &[]);
    assert_eq!(tree.nodes[2].parent, Some(0));
}

#[test]
fn two_names_of_one_footer_are_refused_both() {
    let twin = change(vhd(2, None), |h| h.footer = footer(1));
    let tree = VdiTree::build(vec![vhd(1, None), twin], &[]);
    assert!(tree.nodes.iter().all(|n| matches!(n.broken(), Some(Broken::SharedFooter { .. }))));
}

#[test]
fn a_raw_parent_is_named_by_a_nil_uuid() {
    let raw = Image {
        volume: VolumeName::new(&format!("{}.raw", id(1))).unwrap(),
        physical_bytes: 1 << 21,
        allocated_bytes: 0,
        head: Ok(Head {
            footer: Uuid::nil(),
            virtual_bytes: 1 << 21,
            hidden: false,
            created_s: 0,
            parent: None,
        }),
        may_stand_on: None,
    };
    let volume = raw.volume.clone();
    let child = change(vhd(2, Some(1)), |h| {
        h.parent = Some(ParentName { footer: Uuid::nil(), candidates: vec![volume] });
    });
    let tree = VdiTree::build(vec![raw, child], &[]);
    assert_eq!(tree.nodes[1].depth, 2);
    assert!(tree.nodes.iter().all(|n| n.broken().is_none()));
}

fn snapshot_of_1(state: RecordState) -> Stored {
    let intent = id(50);
    let image =
        |n, f| ImageRef { volume: VolumeName::temporary(intent, n).as_str().to_owned(), footer: footer(f) };
    let member = Member {
        vdi: id(1),
        leaf_footer: footer(1),
        shape: Shape::Divide { base: id(40), new_leaf: image(0, 41) },
        sibling: Sibling { image: image(1, 42), vdi: id(42), name: "s".into(), filled: false },
    };
    let snapshot = SnapshotIntent { id: intent, kind: SiblingKind::Snapshot, members: vec![member] };
    Stored { name: RecordName { id: intent, state }, intent: Intent::Snapshot(snapshot) }
}

#[test]
fn a_pending_snapshot_shows_one_vdi() {
    let second_name = change(vhd(40, None), |h| h.footer = footer(1));
    let mut prepared = vhd(41, Some(40));
    prepared.volume = VolumeName::temporary(id(50), 0);
    let images = vec![vhd(1, None), second_name, prepared];
    let tree = VdiTree::build(images, &[snapshot_of_1(RecordState::Pending)]);
    assert_eq!(tree.nodes.len(), 1);
    assert_eq!(tree.nodes[0].state, NodeState::Visible);
    assert_eq!(tree.nodes[0].intent, Some(id(50)));
    assert_eq!(tree.prepared.len(), 2);
}

#[test]
fn in_the_middle_of_a_swap_the_disk_is_there_and_its_base_hidden() {
    let base = change(vhd(40, None), |h| h.footer = footer(1));
    let mut leaf = change(vhd(41, Some(40)), |h| h.parent.as_mut().unwrap().footer = footer(1));
    leaf.volume = VolumeName::temporary(id(50), 0);
    let tree = VdiTree::build(vec![base, leaf], &[snapshot_of_1(RecordState::Decided)]);
    assert_eq!(
        (tree.nodes.len(), state(&tree, 40), state(&tree, 1)),
        (2, NodeState::Hidden, NodeState::Visible)
    );
    let (leaf, base) = (tree.by_uuid(id(1)).unwrap(), tree.by_uuid(id(40)).unwrap());
    assert_eq!((tree.nodes[leaf].parent, tree.nodes[leaf].footer), (Some(base), footer(41)));
    assert_eq!(tree.nodes[leaf].intent, Some(id(50)));
    assert!(tree.prepared.is_empty());
}

#[test]
fn after_the_swap_the_base_counts_as_hidden() {
    let base = change(vhd(40, None), |h| h.footer = footer(1));
    let leaf = change(vhd(1, Some(40)), |h| {
        h.footer = footer(41);
        h.parent.as_mut().unwrap().footer = footer(1);
    });
    let sibling = change(vhd(42, Some(40)), |h| h.parent.as_mut().unwrap().footer = footer(1));
    let stored = snapshot_of_1(RecordState::Decided);
    let tree = VdiTree::build(vec![base, leaf, sibling], &[stored]);
    assert_eq!(state(&tree, 40), NodeState::Hidden);
    assert_eq!(state(&tree, 1), NodeState::Visible);
    assert_eq!(tree.by_uuid(id(42)), None, "the sibling is not a VDI before the end");
    let base = &tree.nodes[tree.by_uuid(id(40)).unwrap()];
    assert_eq!(tree.prepared_on(base).count(), 1);
}
