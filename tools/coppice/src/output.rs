//! Where words go: one document or tables on standard output, everything
//! else on standard error.

use std::io::Write;

use serde_json::Value;

use crate::failure::Failure;

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

    /// Prints why the command failed.
    pub fn failure(self, failure: &Failure) {
        if self.json {
            print(&format!("{}\n", failure.document()));
        }
        say(&format!("coppice: {failure}"));
        if let Some(advice) = failure.advice() {
            say(&format!("coppice: next: {advice}"));
        }
    }
}

/// One line of progress on standard error.
pub fn say(line: &str) {
    // Nobody listening there is no reason to stop.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Text on standard output.
pub fn print(text: &str) {
    // A closed pipe (`| head`) only means that enough was read.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
