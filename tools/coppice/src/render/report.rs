//! What `sr probe`, `sr check` and `gc run` found, for people.

use serde_json::Value;

use super::style;
use super::table::Table;
use super::{object, plain};
use crate::size::human;

/// A probe: what is there, and what to do with it.
pub fn probe(answer: &Value) -> String {
    let next = match answer["found"].as_str() {
        Some("missing") => "there is no such folder; `coppice sr create` makes it",
        Some("nothing") => "a folder without images: `coppice sr create` takes it",
        Some("ours") => "one of ours: `coppice sr introduce` takes it",
        Some("reference") => "images of the reference storage manager: `coppice sr introduce` takes them",
        _ => "",
    };
    let mut text = format!("{}\n\n{}", style::strong(next), object(answer));
    text.push_str(&remarks("BROKEN IMAGE", &answer["broken"]));
    text.push_str(&remarks("LEFTOVER", &answer["leftovers"]));
    text
}

/// A check: broken images first, then what is only worth knowing.
pub fn check(answer: &Value) -> String {
    let images = plain(&answer["images"]);
    let broken = answer["broken"].as_array().map_or(&[][..], Vec::as_slice);
    let mut text = if broken.is_empty() {
        format!("{images} images, {}\n", style::good("none broken"))
    } else {
        format!("{images} images, {}\n", style::bad(&format!("{} broken", broken.len())))
    };
    let mut table = Table::new(["BROKEN IMAGE", "NAME", "REASON", "DISKS LOST WITH IT"]);
    for image in broken {
        let lost = image["takes_with_it"].as_array().map_or(0, Vec::len);
        let reasons = image["reasons"].as_array().map_or(&[][..], Vec::as_slice);
        for (at, reason) in reasons.iter().enumerate() {
            let first = |text: String| if at == 0 { text } else { String::new() };
            table.row([
                first(plain(&image["volume"])),
                first(plain(&image["name"])),
                plain(reason),
                first(lost.to_string()),
            ]);
        }
    }
    if !broken.is_empty() {
        text.push_str(&format!("\n{table}"));
    }
    for volume in answer["unsettled"].as_array().into_iter().flatten() {
        text.push_str(&format!("\n{}: its writer died; whole again once it is attached\n", plain(volume)));
    }
    text.push_str(&remarks("IN USE", &answer["in_use"]));
    text.push_str(&remarks("ORPHAN", &answer["orphans"]));
    text.push_str(&remarks("HALF DONE", &answer["half_done"]));
    text.push_str(&remarks("LEFTOVER", &answer["leftovers"]));
    text
}

/// What a collection did, beside what was predicted; or a prediction.
pub fn collected(answer: &Value) -> String {
    if answer.get("coalesced").is_none() {
        return object(answer);
    }
    let figures = [
        ("coalesced", ""),
        ("leaf_coalesced", ""),
        ("deleted", ""),
        ("bytes_copied", "at most "),
        ("bytes_cloned", "at most "),
        ("bytes_freed", ""),
        ("peak_extra_bytes", "at most "),
        ("receipt_bytes_read", "at most "),
        ("seconds", "about "),
    ];
    let figures = figures.into_iter().filter(|(name, _)| {
        // Only there if receipts were asked for.
        *name != "receipt_bytes_read" || !answer[name].is_null() || !answer["predicted"][name].is_null()
    });
    let done = |name: &str| figure(name, &answer[name]);
    let mut text = if let Some(predicted) = answer.get("predicted") {
        let mut table = Table::new(["FIGURE", "VALUE", "PREDICTED"]);
        for (name, bound) in figures {
            table.row([name.to_owned(), done(name), format!("{bound}{}", figure(name, &predicted[name]))]);
        }
        table.to_string()
    } else {
        let mut table = Table::new(["FIGURE", "VALUE"]);
        figures.for_each(|(name, _)| table.row([name.to_owned(), done(name)]));
        table.to_string()
    };
    let failed: Vec<Value> = answer["failed"].as_array().into_iter().flatten().cloned().collect();
    if !failed.is_empty() {
        let mut table = Table::new(["NOT COLLECTED", "REASON"]);
        failed.iter().for_each(|one| table.row([plain(&one["uuid"]), plain(&one["reason"])]));
        text.push_str(&format!("\n{table}"));
    }
    text
}

fn figure(name: &str, value: &Value) -> String {
    match (value.as_u64(), value.as_f64()) {
        (Some(bytes), _) if name.contains("bytes") => format!("{} ({bytes})", human(bytes)),
        (None, Some(seconds)) => format!("{seconds:.1}"),
        _ => plain(value),
    }
}

/// A table of things and what they are; nothing if there are none.
fn remarks(heading: &str, list: &Value) -> String {
    let Some(list) = list.as_array().filter(|list| !list.is_empty()) else {
        return String::new();
    };
    let mut table = Table::new([heading, "WHAT IT IS"]);
    for one in list {
        table.row([plain(&one["what"]), plain(&one["why"])]);
    }
    format!("\n{table}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_run_stands_beside_its_prediction() {
        let text = collected(&json!({
            "coalesced": 2, "leaf_coalesced": 1, "deleted": 0, "bytes_copied": 4096, "bytes_cloned": 0,
            "bytes_freed": 2048, "peak_extra_bytes": 0, "seconds": 0.25,
            "failed": [{"uuid": "x", "reason": "no space"}],
            "predicted": {"coalesced": 2, "leaf_coalesced": 1, "deleted": 0, "bytes_copied": 8192,
                "bytes_cloned": 8192, "bytes_freed": 2048, "peak_extra_bytes": 1024, "seconds": 0.5},
        }));
        let text = anstream::adapter::strip_str(&text).to_string();
        for words in ["4 KiB (4096)", "at most 8 KiB (8192)", "about 0.5", "no space"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(collected(&json!({"done": true})).trim(), "done  true");
        let alone = collected(&json!({"coalesced": 2, "failed": []}));
        assert!(alone.contains("coalesced") && !alone.contains("PREDICTED"), "{alone}");
    }

    #[test]
    fn a_check_names_each_broken_image_with_every_reason() {
        let text = check(&json!({
            "images": 3, "sound": false,
            "broken": [{"volume": "x.vhd", "name": "web", "reasons": ["no footer", "no header"],
                "takes_with_it": ["a", "b"]}],
            "leftovers": [{"what": "leaf_1", "why": "an interrupted merge"}],
        }));
        let text = anstream::adapter::strip_str(&text).to_string();
        for words in ["3 images, 1 broken", "x.vhd", "web", "no footer", "no header", "leaf_1"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(!text.contains("ORPHAN"), "{text}");
    }
}
