//! Reverting with any journal.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vhd_fuzz::entry::journal(&vhd_fuzz::journal(data)));
