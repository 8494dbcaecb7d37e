//! Turns the `probe` binary into a freestanding kernel when, and only when, it is built under the profile `guest`.
//!
//! Under every other profile the same target is an ordinary program (see `src/main.rs`), so that checking or testing the whole
//! workspace needs no special case. The profile's name is read from the output folder, `<target>/<profile>/build/…/out`: Cargo tells a
//! build script the panic strategy of the target, not of the profile.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rerun-if-changed=src/kernel/boot.s");
    println!("cargo::rustc-check-cfg=cfg(freestanding)");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    let profile_folder = Path::new(&out).ancestors().nth(3).and_then(Path::file_name);
    if profile_folder.is_none_or(|name| name != "guest") {
        return;
    }
    println!("cargo::rustc-cfg=freestanding");
    let here = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR for build scripts");
    let script = format!("-Wl,-T,{here}/link.ld");
    let arguments = [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,noexecstack",
        &script,
    ];
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
