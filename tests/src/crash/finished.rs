//! What a collection that went to its end may leave: nothing to do.
//!
//! Told from the trees as they stand on the SR, without the collector's own
//! idea of what can be merged: what it does not see, it would not do either.

use sm::scan::scan;

use super::world::World;

/// Nothing is half done, no image is left over, and no hidden node is there
/// that fewer than two others need.
///
/// No scenario has a node that may stay for another reason: readers refresh,
/// and no merge of theirs is obstructed by sizes.
pub fn nothing_left(world: &World) -> Result<(), String> {
    let volumes = world.repo.volumes.as_ref();
    let records = volumes.records().map_err(|e| format!("records: {e}"))?;
    if !records.is_empty() {
        return Err(format!("records are left: {records:?}"));
    }
    let tree = scan(&world.repo).map_err(|e| format!("scan: {e}"))?.tree;
    if let Some(image) = tree.prepared.first() {
        return Err(format!("the image {} is left", image.volume));
    }
    if let Some(volume) = tree.foreign.first() {
        return Err(format!("the volume {volume} is left"));
    }
    let needless = tree.nodes.iter().find(|node| node.is_hidden() && node.children.len() < 2);
    match needless {
        None => Ok(()),
        Some(node) => {
            Err(format!("the hidden node {} with {} children is left", node.volume, node.children.len()))
        }
    }
}
