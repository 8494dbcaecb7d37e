//! Bytes of a guest, as a console's driver and its queues.
#![no_main]

#[path = "../exercise_virtio.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::console(bytes));
