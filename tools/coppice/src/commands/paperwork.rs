//! Completion scripts and manual pages, made from the command line's own
//! definition.

use std::path::Path;

use clap::CommandFactory;

use crate::cli::Cli;
use crate::failure::{Failure, Outcome};
use crate::output;

/// Prints the completion script of `shell`.
pub fn completions(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "coppice", &mut script);
    output::print(&String::from_utf8_lossy(&script));
}

/// Writes one page per command to `folder`.
pub fn man(folder: &Path) -> Outcome<()> {
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .map_err(|e| Failure::new("IO_ERROR", format!("{}: {e}", folder.display())))
}
