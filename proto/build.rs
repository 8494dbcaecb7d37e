//! Compiles the .proto files with protox: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["common", "controller", "fleet", "vmm", "save", "state", "raft"]
        .map(|name| format!("proto/drover/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;
    // What may hold secrets has a `Debug` of its own: see lib.rs.
    tonic_prost_build::configure()
        .skip_debug(["drover.v1.CloudInit", "drover.v1.CloudSeed"])
        .compile_fds(descriptors)?;
    Ok(())
}
