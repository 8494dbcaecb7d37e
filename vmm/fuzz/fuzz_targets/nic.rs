//! Bytes of a guest and of the network, as a NIC's driver, its queues and frames.
#![no_main]

#[path = "../exercise_virtio.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::nic(bytes));
