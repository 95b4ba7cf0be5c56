//! A check of any image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vhd_fuzz::entry::check_image(&vhd_fuzz::image(data)));
