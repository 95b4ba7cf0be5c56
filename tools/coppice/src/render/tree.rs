//! The trees of a storage repository, drawn.
//!
//! ```text
//! TREE               KIND      DEPTH  DATA      ON DISK   STATE
//! base of web        hidden    1      40 MiB    41 MiB    merging 45%, 3 s left
//! ├─ web@monday      snapshot  2      0 B       6 KiB     read-only
//! └─ web             leaf      2      12 MiB    13 MiB    attached
//! ```

use super::style;
use super::table::Table;
use super::vdi_state;
use crate::size::human;
use crate::view::{Forest, GcState, Node};

/// Deepest nesting drawn; chains are limited to 30 nodes long before.
const DEPTH_MAX: usize = 256;

/// Draws every tree of one storage repository.
pub fn forest(forest: &Forest) -> String {
    let mut table = Table::new(["TREE", "KIND", "DEPTH", "DATA", "ON DISK", "STATE"]);
    for root in &forest.roots {
        draw(&mut table, root, "", "", 0);
    }
    table.to_string()
}

/// Draws `node` behind `lead`, and its children behind `below`.
fn draw(table: &mut Table<6>, node: &Node, lead: &str, below: &str, nesting: usize) {
    let vdi = &node.vdi;
    table.row([
        format!("{lead}{}", label(node)),
        vdi.kind.clone(),
        vdi.depth.to_string(),
        human(vdi.allocated),
        human(vdi.physical_size),
        node.gc.as_ref().map_or_else(|| vdi_state(vdi), gc_state),
    ]);
    if nesting == DEPTH_MAX {
        return;
    }
    let last = node.children.len().saturating_sub(1);
    for (i, child) in node.children.iter().enumerate() {
        let (branch, rest) = if i == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        draw(table, child, &format!("{below}{branch}"), &format!("{below}{rest}"), nesting + 1);
    }
}

/// The name, or for a nameless node the start of its uuid.
fn label(node: &Node) -> String {
    if node.vdi.name.is_empty() { node.vdi.uuid.chars().take(8).collect() } else { node.vdi.name.clone() }
}

/// One line on what the collector does or waits for.
pub fn gc_state(gc: &GcState) -> String {
    let mut text = match gc.state.as_str() {
        "blocked" => style::bad("blocked"),
        "merging" => style::good("merging"),
        other => other.to_owned(),
    };
    if let (Some(done), Some(total)) = (gc.bytes_done, gc.bytes_total)
        && total > 0
    {
        text.push_str(&format!(" {}%", done.min(total) * 100 / total));
    }
    if let Some(rate) = gc.rate.filter(|r| *r >= 1.0) {
        text.push_str(&format!(", {}/s", human(rate as u64)));
    }
    if let Some(eta_s) = gc.eta_s {
        text.push_str(&format!(", {eta_s:.0} s left"));
    }
    if let Some(reason) = gc.reason.as_deref().filter(|r| !r.is_empty()) {
        text.push_str(&format!(": {reason}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use crate::view::{Forest, read};
    use serde_json::json;

    #[test]
    fn a_chain_with_a_snapshot_is_drawn() {
        let document = json!({"sr": {"name": "s"}, "roots": [{
            "uuid": "0123456789", "kind": "hidden", "depth": 1, "allocated": 4096,
            "gc": {"state": "merging", "bytes_done": 1, "bytes_total": 4, "eta_s": 3.2},
            "children": [
                {"name": "snap", "kind": "snapshot", "depth": 2, "read_only": true, "children": [
                    {"name": "deep", "kind": "leaf", "depth": 3}]},
                {"name": "disk", "kind": "leaf", "depth": 2, "attached": true}]}]});
        let forest: Forest = read(&document).unwrap();
        let text = super::forest(&forest);
        let text = anstream::adapter::strip_str(&text).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("01234567 ") && lines[1].ends_with("merging 25%, 3 s left"), "{text}");
        assert!(lines[2].starts_with("├─ snap ") && lines[2].ends_with("read-only"), "{text}");
        assert!(lines[3].starts_with("│  └─ deep "), "{text}");
        assert!(lines[4].starts_with("└─ disk ") && lines[4].ends_with("attached"), "{text}");
    }
}
