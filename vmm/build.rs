//! Asks the linker for a build id, whatever its default is: by it an agent tells whether a VMM that runs is the one installed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,--build-id=sha1");
}
