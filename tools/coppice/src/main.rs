//! `coppice`, the program; everything is in the library.

fn main() -> std::process::ExitCode {
    coppice::main()
}
