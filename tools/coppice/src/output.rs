//! Where words go: one document or tables on standard output, everything
//! else on standard error.

use std::io::{IsTerminal, Write};

use serde_json::Value;

use crate::failure::Failure;
use crate::render::style;

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Whether documents are wanted.
    pub json: bool,
}

impl Output {
    /// Prints `document`, or what `human` makes of it.
    pub fn result(self, document: &Value, human: impl FnOnce() -> String) {
        let text = if self.json { format!("{document}\n") } else { human() };
        print(&text);
    }

    /// Prints `document` as one line of many, or draws what `human` makes of
    /// it over the last drawing.
    pub fn frame(self, document: &Value, human: impl FnOnce() -> String) {
        if self.json {
            return print(&format!("{document}\n"));
        }
        let clear = if std::io::stdout().is_terminal() { "\u{1b}[H\u{1b}[2J" } else { "" };
        print(&format!("{clear}{}\n", human()));
    }

    /// Prints why the command failed.
    pub fn failure(self, failure: &Failure) {
        if self.json {
            print(&format!("{}\n", failure.document()));
        }
        say(&format!("{} {failure}", style::bad("coppice:")));
        if let Some(advice) = failure.advice() {
            say(&format!("{} {advice}", style::strong("coppice: next:")));
        }
    }
}

/// One line of progress on standard error.
pub fn say(line: &str) {
    // Nobody listening there is no reason to stop.
    let _ = writeln!(anstream::stderr().lock(), "{line}");
}

/// Text on standard output. Colours reach terminals only, and not where
/// `NO_COLOR` is set.
pub fn print(text: &str) {
    // A closed pipe (`| head`) only means that enough was read.
    let _ = anstream::stdout().lock().write_all(text.as_bytes());
}
