//! The dynamic header and its locators.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vhd_fuzz::entry::header(
    vhd_fuzz::headers(data).get(512..).unwrap_or_default()
));
