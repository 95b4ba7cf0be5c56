//! Colours and weights of words. Always written; whoever prints takes them
//! out again where nobody wants them.

use anstyle::{AnsiColor, Effects, Style};

fn painted(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// What is wrong.
pub fn bad(text: &str) -> String {
    painted(AnsiColor::Red.on_default().effects(Effects::BOLD), text)
}

/// What works.
pub fn good(text: &str) -> String {
    painted(AnsiColor::Green.on_default(), text)
}

/// Headings.
pub fn strong(text: &str) -> String {
    painted(Style::new().bold(), text)
}

/// Characters that are seen.
pub fn width(text: &str) -> usize {
    anstream::adapter::strip_str(text).map(|part| part.chars().count()).sum()
}
