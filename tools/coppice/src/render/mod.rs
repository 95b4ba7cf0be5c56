//! Documents as text for people: tables, and trees drawn as tables.
//!
//! Pure: documents in, strings out. Printing is the commands' business.

pub mod jobs;
pub mod places;
pub mod receipts;
pub mod report;
pub mod style;
pub mod table;
pub mod tree;

use serde_json::Value;

use crate::size::human;
use crate::view::{GcSr, GcStatus, Sr, Vdi};

/// A table of storage repositories.
pub fn srs(list: &[Sr]) -> String {
    let mut table = table::Table::new(["NAME", "UUID", "TYPE", "STATE", "USED", "FREE", "DISKS", "LOCATION"]);
    for sr in list {
        table.row([
            sr.name.clone(),
            sr.uuid.clone(),
            sr.kind.clone(),
            if sr.attached { "attached" } else { "detached" }.to_owned(),
            sr.used.map_or_else(dash, human),
            sr.free.map_or_else(dash, human),
            count(&sr.vdis),
            plain(&sr.location),
        ]);
    }
    table.to_string()
}

/// A table of disks.
pub fn vdis(list: &[Vdi]) -> String {
    let mut table = table::Table::new(["NAME", "UUID", "KIND", "SIZE", "ON DISK", "DEPTH", "STATE"]);
    for vdi in list {
        table.row([
            vdi.name.clone(),
            vdi.uuid.clone(),
            vdi.kind.clone(),
            human(vdi.virtual_size),
            human(vdi.physical_size),
            vdi.depth.to_string(),
            vdi_state(vdi),
        ]);
    }
    table.to_string()
}

/// Disks that lost their tapdisk, from smd's status; nothing if there are none.
pub fn down(status: Option<&Value>) -> String {
    let Some(Value::Array(down)) = status.and_then(|status| status.get("down")) else {
        return String::new();
    };
    if down.is_empty() {
        return String::new();
    }
    let mut table = table::Table::new(["WITHOUT TAPDISK", "UUID", "STATE", "ATTEMPTS", "REASON"]);
    for disk in down {
        let field = |name: &str| plain(disk.get(name).unwrap_or(&Value::Null));
        let state = if disk["given_up"] == true { "given up: attach it" } else { "is brought back" };
        table.row([field("name"), field("vdi"), state.to_owned(), field("attempts"), field("error")]);
    }
    format!("\n{table}")
}

/// Served disks with which something is wrong, likewise.
pub fn troubled(status: Option<&Value>) -> String {
    let Some(Value::Array(troubled)) = status.and_then(|status| status.get("troubled")) else {
        return String::new();
    };
    let field = |disk: &Value, name: &str| plain(disk.get(name).unwrap_or(&Value::Null));
    let line =
        |disk| format!("\n{} ({}): {}\n", field(disk, "name"), field(disk, "vdi"), field(disk, "trouble"));
    troubled.iter().map(line).collect()
}

/// How the chains are: what needs somebody, from smd's status.
pub fn health(status: Option<&Value>) -> String {
    let Some(Value::Array(srs)) = status.and_then(|status| status.get("health")) else {
        return String::new();
    };
    let mut table = table::Table::new(["HEALTH", "DISK", "UUID", "DEPTH", "WHAT"]);
    let mut any = false;
    for sr in srs {
        let field = |of: &Value, name: &str| plain(of.get(name).unwrap_or(&Value::Null));
        let rows = |name: &str| sr[name].as_array().cloned().unwrap_or_default();
        let limit = field(sr, "depth_max");
        for one in rows("near_limit") {
            any = true;
            let what = format!("near the limit of {limit}: delete snapshots, run `coppice gc run`");
            table.row([
                field(sr, "name"),
                field(&one, "name"),
                field(&one, "vdi"),
                field(&one, "depth"),
                what,
            ]);
        }
        for one in rows("broken") {
            any = true;
            let what = style::bad(&format!("broken: {}", field(&one, "reason")));
            table.row([field(sr, "name"), field(&one, "name"), field(&one, "vdi"), dash(), what]);
        }
        if let Some(error) = sr["error"].as_str() {
            any = true;
            table.row([field(sr, "name"), dash(), dash(), dash(), style::bad(error)]);
        }
    }
    if any { format!("\n{table}") } else { format!("\n{}\n", style::good("all chains are well")) }
}

/// The collector's state: one line per storage repository, then one per node
/// with something to tell.
pub fn gc_status(status: &GcStatus) -> String {
    let mut srs = table::Table::new(["SR", "STATE", "RUNNING", "WAITING", "RATE", "LAST ERROR"]);
    let mut nodes = table::Table::new(["NODE", "SR", "STATE"]);
    let mut any = false;
    for sr in &status.srs {
        let waiting = sr.nodes.values().filter(|node| node.state != "merging").count();
        srs.row([
            sr.name.clone(),
            match (sr.paused, sr.quiet_s) {
                (true, _) => "paused".to_owned(),
                (false, Some(left_s)) => format!("aborted, goes on in {left_s} s"),
                (false, None) => "collecting".to_owned(),
            },
            format!("{} of {}", sr.running, sr.parallel),
            waiting.to_string(),
            gc_rate(sr),
            sr.error.clone().unwrap_or_else(dash),
        ]);
        for (node, state) in &sr.nodes {
            any = true;
            nodes.row([node.clone(), sr.name.clone(), tree::gc_state(state)]);
        }
    }
    for (sr, why) in &status.refused {
        srs.row([sr.clone(), "refused".to_owned(), dash(), dash(), dash(), why.clone()]);
    }
    let mut text = receipts::alarms(status);
    text.push_str(&srs.to_string());
    if any {
        text.push_str(&format!("\n{nodes}"));
    }
    text.push_str(&jobs::ended(status));
    text.push_str(&receipts::of_jobs(status));
    text
}

/// What merges may take in a second, and what they are held back to while
/// disks in use are slow.
fn gc_rate(sr: &GcSr) -> String {
    let set = if sr.rate == 0 { "no limit".to_owned() } else { format!("{}/s", human(sr.rate)) };
    match sr.held_back_to {
        Some(limit) => format!("{set}, held back to {}/s", human(limit)),
        None => set,
    }
}

/// Any object as `name  value` lines, nested ones left out.
pub fn object(document: &Value) -> String {
    let Value::Object(map) = document else {
        return format!("{}\n", plain(document));
    };
    let width = map.keys().map(String::len).max().unwrap_or(0);
    let mut out = String::new();
    // What it is called stands first, the rest by the alphabet.
    let named = |key: &str| key == "name" || key == "uuid";
    let first = map.iter().filter(|(key, _)| named(key));
    for (key, value) in first.chain(map.iter().filter(|(key, _)| !named(key))) {
        let shown = match value {
            Value::Number(n) if is_size(key) => {
                n.as_u64().map_or_else(|| n.to_string(), |bytes| format!("{} ({bytes})", human(bytes)))
            }
            Value::Object(_) => continue,
            Value::Array(items) if items.is_empty() => dash(),
            Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
            other => plain(other),
        };
        out.push_str(&format!("{key:width$}  {shown}\n"));
    }
    out
}

/// `attached`, `read-only`, why it is broken, or nothing.
pub fn vdi_state(vdi: &Vdi) -> String {
    if let Some(why) = &vdi.broken {
        return style::bad(&format!("broken: {why}"));
    }
    if vdi.down.is_object() {
        return style::bad("attached, its tapdisk died");
    }
    match (vdi.attached, vdi.read_only) {
        (true, true) => style::good("attached read-only"),
        (true, false) => style::good("attached"),
        (false, true) => "read-only".to_owned(),
        (false, false) => dash(),
    }
}

fn is_size(key: &str) -> bool {
    key.ends_with("_size")
        || key.starts_with("bytes_")
        || key.ends_with("_bytes")
        || ["size", "used", "free", "allocated"].contains(&key)
}

fn count(value: &Value) -> String {
    match value {
        Value::Array(items) => items.len().to_string(),
        other => plain(other),
    }
}

pub(crate) fn plain(value: &Value) -> String {
    match value {
        Value::Null => dash(),
        Value::String(s) if s.is_empty() => dash(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn dash() -> String {
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn objects_show_sizes_both_ways() {
        let text = object(&json!({"name": "a", "virtual_size": 2048, "parent": null}));
        assert!(text.contains("virtual_size  2 KiB (2048)"), "{text}");
        assert!(text.contains("parent        -"), "{text}");
    }

    #[test]
    fn the_collectors_limits_and_what_its_jobs_came_to_are_shown() {
        let status = crate::view::read(&json!({
            "srs": [{"name": "store", "running": 1, "parallel": 3, "rate": 1 << 20, "held_back_to": 2048}],
            "done": [
                {"job": "j1", "kind": "leaf", "vdi": "x", "bytes_copied": 1024, "bytes_freed": 4096,
                    "predicted": {"bytes_copied": 8192, "bytes_freed": 512, "peak_extra_bytes": 0}},
                {"job": "j2", "kind": "inner", "vdi": "y", "error": "aborted"},
            ],
        }));
        let text = anstream::adapter::strip_str(&gc_status(&status.unwrap())).to_string();
        for words in [
            "1 of 3",
            "1 MiB/s, held back to 2 KiB/s",
            "1 KiB (at most 8 KiB)",
            "4 KiB (at least 512",
            "aborted",
            "done",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn lists_name_every_disk() {
        let disk = Vdi { name: "web".into(), attached: true, depth: 3, ..Vdi::default() };
        let text = vdis(&[disk]);
        assert!(text.contains("web") && text.contains("attached") && text.contains('3'), "{text}");
    }
}
