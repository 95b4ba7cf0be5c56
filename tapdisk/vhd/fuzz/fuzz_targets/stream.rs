//! Importing any stream.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vhd_fuzz::entry::stream(&vhd_fuzz::image(data)));
