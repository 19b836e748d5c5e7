#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| clustermesh_fuzz_properties::run("reflector", input));
