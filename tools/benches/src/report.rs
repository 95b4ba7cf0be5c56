//! What was measured: rows, the table, the document. Pure.

use std::fmt::Write;

use serde::Serialize;

use crate::stats::{median, paired_ratio};

/// What a measure must reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Floor {
    /// The figure must not be lower.
    AtLeast(f64),
    /// The figure must not be higher.
    AtMost(f64),
    /// Told for comparison only.
    None,
}

/// Whether it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It did.
    Met,
    /// It did not.
    Missed,
    /// Nothing was asked.
    Information,
}

/// What one contender came to, round by round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Series {
    /// Who.
    pub name: String,
    /// One figure per round.
    pub rounds: Vec<f64>,
}

impl Series {
    /// The median of the rounds; not a number without any.
    #[must_use]
    pub fn median(&self) -> f64 {
        median(&self.rounds).unwrap_or(f64::NAN)
    }
}

/// A measured row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub measure: String,
    /// Unit of both sides.
    pub unit: &'static str,
    /// Ours.
    pub ours: Series,
    /// The peer; `None` where the figure itself is held against the floor.
    pub peer: Option<Series>,
    /// Median over the rounds of ours to the peer's, or our median.
    pub figure: f64,
    /// What it must reach.
    pub floor: Floor,
    /// Whether it did.
    pub verdict: Verdict,
}

impl Row {
    /// A ratio to a peer measured in the same rounds.
    #[must_use]
    pub fn ratio(measure: &str, unit: &'static str, ours: Series, peer: Series, floor: Floor) -> Self {
        let figure = paired_ratio(&ours.rounds, &peer.rounds).unwrap_or(f64::NAN);
        let verdict = verdict(figure, floor);
        Self { measure: measure.to_owned(), unit, ours, peer: Some(peer), figure, floor, verdict }
    }

    /// A figure that is held against the floor itself.
    #[must_use]
    pub fn absolute(measure: &str, unit: &'static str, ours: Series, floor: Floor) -> Self {
        let figure = ours.median();
        let verdict = verdict(figure, floor);
        Self { measure: measure.to_owned(), unit, ours, peer: None, figure, floor, verdict }
    }
}

fn verdict(figure: f64, floor: Floor) -> Verdict {
    let met = match floor {
        Floor::None => return Verdict::Information,
        Floor::AtLeast(least) => figure >= least,
        Floor::AtMost(most) => figure <= most,
    };
    if met { Verdict::Met } else { Verdict::Missed }
}

/// Something that could not be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// Which group of measures.
    pub measure: String,
    /// Why, and what to do about it.
    pub reason: String,
}

/// All of one run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Under which conditions: versions, sizes, rounds.
    pub conditions: std::collections::BTreeMap<String, String>,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What was not.
    pub missing: Vec<Missing>,
}

impl Report {
    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.conditions {
            let _ = writeln!(text, "{name}: {value}"); // a String takes everything
        }
        let width = self.rows.iter().map(|row| row.measure.chars().count()).max().unwrap_or(0).max(7);
        let _ = writeln!(
            text,
            "\n{:width$}  {:>10} {:>10} {:7}  {:>7}  {:>8}  result",
            "measure", "ours", "peer", "unit", "ratio", "floor"
        );
        for row in &self.rows {
            let peer = row.peer.as_ref().map_or_else(|| "-".to_owned(), |peer| number(peer.median()));
            let ratio = row.peer.as_ref().map_or_else(|| "-".to_owned(), |_| format!("{:.2}", row.figure));
            let floor = match row.floor {
                Floor::AtLeast(least) => format!(">= {least}"),
                Floor::AtMost(most) => format!("<= {most}"),
                Floor::None => String::new(),
            };
            let verdict = match row.verdict {
                Verdict::Met => "met",
                Verdict::Missed => "MISSED",
                Verdict::Information => "",
            };
            let _ = writeln!(
                text,
                "{:width$}  {:>10} {peer:>10} {:7}  {ratio:>7}  {floor:>8}  {verdict}",
                row.measure,
                number(row.ours.median()),
                row.unit,
            );
        }
        for missing in &self.missing {
            let _ = writeln!(text, "not measured: {}: {}", missing.measure, missing.reason);
        }
        text
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value {
        v if !v.is_finite() => "?".to_owned(),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, rounds: &[f64]) -> Series {
        Series { name: name.to_owned(), rounds: rounds.to_vec() }
    }

    #[test]
    fn a_floor_is_met_or_missed_on_its_own_side() {
        assert_eq!(verdict(0.9, Floor::AtLeast(0.9)), Verdict::Met);
        assert_eq!(verdict(0.89, Floor::AtLeast(0.9)), Verdict::Missed);
        assert_eq!(verdict(10.0, Floor::AtMost(10.0)), Verdict::Met);
        assert_eq!(verdict(10.1, Floor::AtMost(10.0)), Verdict::Missed);
        assert_eq!(verdict(f64::NAN, Floor::AtMost(10.0)), Verdict::Missed);
        assert_eq!(verdict(1.0, Floor::None), Verdict::Information);
    }

    #[test]
    fn the_table_says_ratio_floor_and_what_is_missing() {
        let ours = series("ours", &[120.0, 130.0, 125.0]);
        let peer = series("qemu-nbd", &[100.0, 100.0, 100.0]);
        let mut report = Report::default();
        report.rows.push(Row::ratio("reads", "kIOPS", ours.clone(), peer, Floor::AtLeast(1.3)));
        report.rows.push(Row::absolute("stall", "ms", series("ours", &[2.5]), Floor::AtMost(10.0)));
        report.missing.push(Missing { measure: "raw".into(), reason: "fio is missing".into() });
        let table = report.table();
        let line = |start: &str| table.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
        let words = |line: String| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(line("reads")), ["reads", "125", "100", "kIOPS", "1.25", ">=", "1.3", "MISSED"]);
        assert_eq!(words(line("stall")), ["stall", "2.50", "-", "ms", "-", "<=", "10", "met"]);
        assert!(table.contains("not measured: raw: fio is missing"));
    }
}
