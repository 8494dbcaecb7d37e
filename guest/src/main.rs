//! The probe guest: a freestanding kernel that owns memory, keeps rewriting it, and says at once when a page is not what it last wrote.
//!
//! Built by `cargo build -p drover-probe --profile guest` it is an ELF image that boots under Drover and under QEMU (`-kernel`). Under every
//! other profile this target is the stub below, so that the whole workspace can be checked and tested in one go. Parameters and console
//! lines: `docs/probe.md`.
#![cfg_attr(freestanding, no_std, no_main)]

#[cfg(freestanding)]
mod kernel;

#[cfg(not(freestanding))]
fn main() -> std::process::ExitCode {
    eprintln!(
        "probe is a guest kernel: build it with `cargo build -p drover-probe --profile guest` and boot target/guest/probe (see docs/probe.md)"
    );
    std::process::ExitCode::from(2)
}
