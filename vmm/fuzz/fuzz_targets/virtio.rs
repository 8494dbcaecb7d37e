//! Bytes of a guest, as a disk's driver and its queue.
#![no_main]

#[path = "../exercise_virtio.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::virtio(bytes));
