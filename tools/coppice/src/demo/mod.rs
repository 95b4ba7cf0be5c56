//! demo
use crate::cli::DemoArgs;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
/// x
pub fn run(_args: &DemoArgs, _output: Output) -> Outcome<()> {
    Err(Failure::new("UNSUPPORTED", "not yet"))
}
