//! Compiles the agent's gRPC contract; needs `protoc` on the PATH.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    tonic_prost_build::configure()
        .type_attribute(".", "#[derive(serde::Serialize)]")
        .btree_map(".")
        .compile_protos(&["proto/agent.proto"], &["proto"])?;
    Ok(())
}
