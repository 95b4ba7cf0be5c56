//! A client and a disk that do what the script says, in any order.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tapdisk::nbd::fuzz::script(data));
