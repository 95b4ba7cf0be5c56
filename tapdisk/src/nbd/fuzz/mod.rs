//! Entry points of the fuzzer, also used by the tests.

mod raw;
mod script;

pub use raw::raw;
pub use script::script;
