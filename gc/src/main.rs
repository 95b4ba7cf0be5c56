//! `gcd`, the program; everything is in the library.

fn main() -> std::process::ExitCode {
    gc::run(std::env::args_os())
}
