//! A bar on standard error for what takes long.
//!
//! ```text
//!   copy  ████████████▌            42%  1.2 GiB of 3 GiB  118 MiB/s  15 s left
//! ```
//!
//! On a terminal one line, drawn again and again; otherwise a plain line now
//! and then; with `--json` nothing.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::output::{Output, say};
use crate::size::human;

/// Pause between two drawings on a terminal.
const REDRAW: Duration = Duration::from_millis(100);
/// Pause between two plain lines.
const LINE: Duration = Duration::from_secs(5);
/// Cells of the bar.
const CELLS: u64 = 24;

/// How far something is. Sizes in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Done so far.
    pub done: u64,
    /// To do in all, if that is known.
    pub total: Option<u64>,
    /// Bytes per second.
    pub rate: f64,
    /// Seconds left.
    pub eta_s: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Bar,
    Lines,
    Silent,
}

/// See the module.
#[derive(Debug)]
pub struct Progress {
    what: String,
    style: Style,
    began: Instant,
    shown: Option<Instant>,
}

impl Progress {
    /// For an operation called `what`. Nothing is drawn yet.
    pub fn new(output: Output, what: &str) -> Self {
        let style = match (output.json, std::io::stderr().is_terminal()) {
            (true, _) => Style::Silent,
            (false, true) => Style::Bar,
            (false, false) => Style::Lines,
        };
        Self { what: what.to_owned(), style, began: Instant::now(), shown: None }
    }

    /// Shows how far it is, unless that was done a moment ago.
    pub fn show(&mut self, figures: &Figures) {
        let pause = if self.style == Style::Bar { REDRAW } else { LINE };
        let last = self.shown.unwrap_or(self.began);
        if self.style == Style::Silent || last.elapsed() < pause {
            return;
        }
        self.shown = Some(Instant::now());
        match self.style {
            // Erased first: the last one may have been longer.
            Style::Bar => draw(&format!("\r\x1b[K{}  {}", self.what, bar(figures))),
            Style::Lines => say(&format!("{}: {}", self.what, line(figures))),
            Style::Silent => {}
        }
    }

    /// As [`Self::show`], with the rate since the beginning.
    pub fn show_bytes(&mut self, done: u64, total: Option<u64>) {
        let seconds = self.began.elapsed().as_secs_f64().max(1e-3);
        let rate = done as f64 / seconds;
        let eta_s = total.filter(|_| done > 0).map(|total| total.saturating_sub(done) as f64 / rate);
        self.show(&Figures { done, total, rate, eta_s });
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.style == Style::Bar && self.shown.is_some() {
            draw("\r\x1b[K");
        }
    }
}

fn draw(text: &str) {
    let mut out = std::io::stderr().lock();
    // Nobody looks: no reason to stop.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn bar(figures: &Figures) -> String {
    let Some(total) = figures.total.filter(|total| *total > 0) else {
        return line(figures);
    };
    let eighths = 8 * CELLS * figures.done.min(total) / total;
    let full = "█".repeat((eighths / 8) as usize);
    let part = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][(eighths % 8) as usize];
    let empty = CELLS - eighths.div_ceil(8);
    format!("{full}{part}{:width$} {}", "", line(figures), width = empty as usize)
}

fn line(figures: &Figures) -> String {
    let mut text = match figures.total.filter(|total| *total > 0) {
        Some(total) => {
            let percent = 100 * figures.done.min(total) / total;
            format!("{percent:3}%  {} of {}", human(figures.done), human(total))
        }
        None => human(figures.done),
    };
    if figures.rate >= 1.0 {
        text.push_str(&format!("  {}/s", human(figures.rate as u64)));
    }
    if let Some(eta_s) = figures.eta_s {
        text.push_str(&format!("  {} left", duration(eta_s)));
    }
    text
}

/// `15 s`, `3 min 20 s`, `2 h 5 min`.
fn duration(seconds: f64) -> String {
    match seconds.round() as u64 {
        s if s < 60 => format!("{s} s"),
        s if s < 3600 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_fills_as_the_work_is_done() {
        let at = |done| bar(&Figures { done, total: Some(1000), rate: 0.0, eta_s: None });
        assert!(at(0).starts_with(&format!("{:24} ", "")), "{}", at(0));
        assert!(at(500).starts_with(&format!("{}{:12} ", "█".repeat(12), "")), "{}", at(500));
        assert!(at(1000).starts_with(&"█".repeat(24)), "{}", at(1000));
        assert!(at(2000).contains("100%"), "{}", at(2000));
    }

    #[test]
    fn what_is_not_known_is_not_shown() {
        let figures = Figures { done: 3 << 20, ..Figures::default() };
        assert_eq!(bar(&figures), "3 MiB");
        let figures = Figures { rate: 1048576.0, eta_s: Some(200.0), total: Some(6 << 20), ..figures };
        assert_eq!(line(&figures), " 50%  3 MiB of 6 MiB  1 MiB/s  3 min 20 s left");
    }
}
