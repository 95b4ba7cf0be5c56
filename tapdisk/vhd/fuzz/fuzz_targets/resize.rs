//! Growing and shrinking any image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vhd_fuzz::entry::resize(&vhd_fuzz::image(data)));
