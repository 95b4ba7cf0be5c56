//! Completion scripts and manual pages, made from the command line's own
//! definition.

use std::path::Path;

use clap::CommandFactory;
use serde_json::json;

use crate::cli::Cli;
use crate::failure::{Failure, Outcome};
use crate::output::Output;

/// Prints the completion script of `shell`.
pub fn completions(shell: clap_complete::Shell, output: Output) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "coppice", &mut script);
    let script = String::from_utf8_lossy(&script);
    output.result(&json!({"shell": shell.to_string(), "script": script}), || script.to_string());
}

/// Writes one page per command to `folder`.
pub fn man(folder: &Path, output: Output) -> Outcome<()> {
    let pages = std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .and_then(|()| pages(folder))
        .map_err(|e| Failure::new("IO_ERROR", format!("{}: {e}", folder.display())))?;
    output.result(&json!({"folder": folder, "pages": pages}), || {
        format!("{} pages in {}\n", pages.len(), folder.display())
    });
    Ok(())
}

/// The pages in a folder, by name.
fn pages(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut pages = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        pages.extend(entry?.file_name().into_string().ok().filter(|name| name.ends_with(".1")));
    }
    pages.sort_unstable();
    Ok(pages)
}
