//! Prometheus' text format: families of samples, in the order they are
//! written.

use std::fmt::{Display, Write};

/// A page being written.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
}

/// What a family's values mean.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Samples `_bucket`, `_sum` and `_count`.
    Histogram,
}

/// One family; its samples stand together.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: &'a str,
}

impl Page {
    /// Begins a family; its samples are written before the next one begins.
    pub fn family<'a>(&'a mut self, kind: Kind, name: &'a str, help: &str) -> Family<'a> {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        Family { text: &mut self.text, name }
    }

    /// A family of one sample without labels.
    pub fn single(&mut self, kind: Kind, name: &str, help: &str, value: impl Display) {
        self.family(kind, name, help).sample(&[], value);
    }

    /// The whole page.
    #[must_use]
    pub fn text(self) -> String {
        self.text
    }
}

impl Family<'_> {
    /// A sample; what the labels say is escaped.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.suffixed("", labels, value);
    }

    /// A sample of a histogram.
    pub fn suffixed(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.text, "{}{suffix}", self.name);
        for (ix, (label, value)) in labels.iter().enumerate() {
            let begin = if ix == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{begin}{label}=\"{}\"", Escaped(value));
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{end} {value}");
    }
}

/// A label's value: people choose the names of disks.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            c => f.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_told_once_and_its_labels_are_escaped() {
        let mut page = Page::default();
        page.single(Kind::Counter, "a_total", "Of nothing.", 3);
        let mut family = page.family(Kind::Histogram, "b_seconds", "Spread.");
        family.suffixed("_bucket", &[("vdi", "a\\b\"c\nd"), ("le", "+Inf")], 1);
        family.suffixed("_sum", &[("vdi", "é")], 0.25);
        let text = "# HELP a_total Of nothing.\n# TYPE a_total counter\na_total 3\n\
            # HELP b_seconds Spread.\n# TYPE b_seconds histogram\n\
            b_seconds_bucket{vdi=\"a\\\\b\\\"c\\nd\",le=\"+Inf\"} 1\nb_seconds_sum{vdi=\"é\"} 0.25\n";
        assert_eq!(page.text(), text);
    }
}
