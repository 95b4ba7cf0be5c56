//! Content receipts, for people.

use serde_json::Value;

use super::table::Table;
use super::{dash, plain, style};
use crate::view::{GcDiskReceipt, GcStatus};

/// Receipts of so many jobs are shown, the newest; `--json` has them all.
const JOBS_SHOWN: usize = 20;

/// Alarms, before everything else.
pub fn alarms(status: &GcStatus) -> String {
    let all = status.srs.iter().flat_map(|sr| sr.alarms.iter().map(move |alarm| (sr, alarm)));
    let text = all.map(|(sr, alarm)| {
        let text = format!("ALARM in {}, merge {}: {}", sr.name, alarm.job, alarm.text);
        format!("{}\n\n", style::bad(&text))
    });
    text.collect()
}

/// The receipts of finished jobs; nothing if there are none.
pub fn of_jobs(status: &GcStatus) -> String {
    let mut table = Table::new(["MERGE", "DISK", "CONTENT RECEIPT"]);
    let with = status.done.iter().filter_map(|done| Some((&done.job, done.receipt.as_ref()?)));
    let with: Vec<_> = with.collect();
    for (job, receipt) in with.iter().skip(with.len().saturating_sub(JOBS_SHOWN)) {
        if let Some(why) = &receipt.void {
            table.row([(*job).clone(), dash(), format!("void: {why}")]);
        }
        for disk in &receipt.disks {
            table.row([(*job).clone(), disk.vdi.clone(), verdict(disk)]);
        }
    }
    if with.is_empty() { String::new() } else { format!("\n{table}") }
}

fn verdict(disk: &GcDiskReceipt) -> String {
    let reason = disk.reason.clone().unwrap_or_default();
    let figures =
        format!("{} blocks the same, {} written by the guest meanwhile", disk.matched, disk.written);
    match disk.verdict.as_str() {
        "same" => style::good(&figures),
        "different" => {
            let named: Vec<String> = disk.different_blocks.iter().map(u64::to_string).collect();
            let more = if disk.different > named.len() as u64 { ", …" } else { "" };
            style::bad(&format!(
                "DIFFERENT: {} blocks ({}{more}); {figures}",
                disk.different,
                named.join(", ")
            ))
        }
        "unreadable" => style::bad(&format!("CANNOT BE READ: {reason}")),
        other => format!("{other}: {reason}"),
    }
}

/// The hashes of a job's disks.
pub fn hashes(answer: &Value) -> String {
    let mut text = String::new();
    for disk in answer["disks"].as_array().into_iter().flatten() {
        let list = |key: &str| disk[key].as_array().map_or(&[][..], Vec::as_slice).iter();
        let mut table = Table::new(["BLOCK", "BEFORE (SHA-256)", "AFTER"]);
        let mut after = list("unequal_after").peekable();
        let number = |entry: &Value| entry[0].as_u64().unwrap_or_default();
        let zeros = |hash: &Value| if hash.is_null() { "zeros".to_owned() } else { plain(hash) };
        for entry in list("before") {
            while let Some(new) = after.next_if(|new| number(new) < number(entry)) {
                table.row([number(new).to_string(), "zeros".to_owned(), zeros(&new[1])]);
            }
            let then = after.next_if(|new| number(new) == number(entry));
            let then = then.map_or_else(|| "the same".to_owned(), |new| zeros(&new[1]));
            table.row([number(entry).to_string(), plain(&entry[1]), then]);
        }
        for new in after {
            table.row([number(new).to_string(), "zeros".to_owned(), zeros(&new[1])]);
        }
        text.push_str(&format!("disk {}; blocks not named are zeros\n{table}\n", plain(&disk["vdi"])));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stripped(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn an_alarm_comes_first_and_each_verdict_has_its_words() {
        let status: GcStatus = serde_json::from_value(json!({
            "srs": [{"name": "store", "alarms": [{"job": "j2", "text": "disk d differs"}]}],
            "done": [
                {"job": "j0"},
                {"job": "j1", "receipt": {"disks": [
                    {"vdi": "a", "verdict": "same", "matched": 7, "written": 2},
                    {"vdi": "b", "verdict": "void", "reason": "deleted"}]}},
                {"job": "j2", "receipt": {"disks": [
                    {"vdi": "d", "verdict": "different", "matched": 1, "different": 40, "different_blocks": [3, 9]},
                    {"vdi": "e", "verdict": "unreadable", "reason": "no footer"}]}},
                {"job": "j3", "receipt": {"disks": [], "void": "stopped"}},
            ],
        }))
        .unwrap();
        let text = stripped(&super::super::gc_status(&status));
        assert!(text.starts_with("ALARM in store, merge j2: disk d differs"), "{text}");
        for words in [
            "7 blocks the same, 2 written by the guest meanwhile",
            "void: deleted",
            "DIFFERENT: 40 blocks (3, 9, …)",
            "CANNOT BE READ: no footer",
            "void: stopped",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(of_jobs(&GcStatus::default()), "");
    }

    #[test]
    fn hashes_before_and_after_stand_side_by_side() {
        let text = stripped(&hashes(&json!({"disks": [{"vdi": "x",
            "before": [[1, "aa"], [4, "bb"], [6, "cc"]], "unequal_after": [[2, "dd"], [4, null], [9, "ee"]]}]})));
        let rows: Vec<Vec<&str>> =
            text.lines().skip(2).map(|line| line.split_whitespace().collect()).collect();
        let wanted = ["1 aa the same", "2 zeros dd", "4 bb zeros", "6 cc the same", "9 zeros ee"];
        for (row, wanted) in rows.iter().zip(wanted) {
            assert_eq!(row.join(" "), wanted, "{text}");
        }
        assert!(rows.len() >= wanted.len(), "{text}");
    }
}
