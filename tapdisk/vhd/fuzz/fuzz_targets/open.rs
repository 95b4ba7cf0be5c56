//! Opening: footers, header, parent, BAT, BATmap.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vhd_fuzz::entry::open(&vhd_fuzz::image(data)));
