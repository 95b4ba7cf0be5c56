//! Where a disk's bytes lie, as tables.

use super::dash;
use super::table::Table;
use crate::size::human;
use crate::view::{ChangedRange, MapExtent, Stat};

/// Ranges that changed, and how much they are in all.
pub fn changed(ranges: &[ChangedRange]) -> String {
    let mut table = Table::new(["OFFSET", "LENGTH", "SIZE"]);
    for range in ranges {
        table.row([range.offset.to_string(), range.length.to_string(), human(range.length)]);
    }
    let total = ranges.iter().map(|range| range.length).sum();
    format!("{table}{} in {} ranges\n", human(total), ranges.len())
}

/// Who has which bytes, and where.
pub fn map(extents: &[MapExtent]) -> String {
    let mut table = Table::new(["OFFSET", "LENGTH", "DEPTH", "NODE", "AT BYTE", "OF VOLUME"]);
    for extent in extents {
        table.row([
            extent.offset.to_string(),
            extent.length.to_string(),
            if extent.depth == 0 { dash() } else { extent.depth.to_string() },
            extent.node.clone().unwrap_or_else(dash),
            extent.file_offset.map_or_else(dash, |offset| offset.to_string()),
            extent.volume.clone().unwrap_or_else(|| "zeros".to_owned()),
        ]);
    }
    table.to_string()
}

/// What a disk takes, and its chain.
pub fn stat(stat: &Stat) -> String {
    let mut out = String::new();
    for (what, bytes) in [
        ("own", stat.own_bytes),
        ("shared with others", stat.shared_bytes),
        ("whole chain", stat.chain_bytes),
        ("reclaimable by merging", stat.reclaimable_bytes),
        ("freed if deleted", stat.freed_if_deleted_bytes),
        ("and by merging then", stat.freed_by_merge_then_bytes),
    ] {
        out.push_str(&format!("{what:23}  {} ({bytes})\n", human(bytes)));
    }
    let mut table = Table::new(["DEPTH", "NODE", "KIND", "OWN DATA", "CHILDREN"]);
    for (at, node) in stat.chain.iter().enumerate() {
        table.row([
            (at + 1).to_string(),
            node.uuid.clone(),
            if node.hidden { "hidden" } else { "visible" }.to_owned(),
            human(node.allocated_bytes),
            node.children.to_string(),
        ]);
    }
    format!("{out}\n{table}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_say_all_and_sum_up() {
        let ranges = [ChangedRange { offset: 0, length: 1024 }, ChangedRange { offset: 4096, length: 1024 }];
        let text = changed(&ranges);
        assert!(text.contains("4096") && text.ends_with("2 KiB in 2 ranges\n"), "{text}");
        let hole = MapExtent { offset: 7, length: 9, ..MapExtent::default() };
        let text = map(&[hole]);
        assert!(text.contains("zeros") && text.contains('7'), "{text}");
    }
}
