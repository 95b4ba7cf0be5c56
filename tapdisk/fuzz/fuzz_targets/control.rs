//! Control peers that talk, stall and leave.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tapdisk::server::fuzz::control(data));
