//! Footers: the first 512 bytes of any image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vhd_fuzz::entry::footer(&vhd_fuzz::headers(data)));
