//! smd, the storage daemon; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    sm::run(std::env::args_os())
}
