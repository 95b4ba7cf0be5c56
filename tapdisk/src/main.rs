//! `tapdisk`, the program; everything is in the library.

fn main() -> std::process::ExitCode {
    tapdisk::run(std::env::args_os())
}
