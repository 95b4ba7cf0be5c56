//! A client's bytes, from the greeting on.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tapdisk::nbd::fuzz::raw(data));
