//! Tells the linker to keep functions of the same code once. Kinds of objects, records and messages make many of
//! them, and what is not in the program takes no memory (docs/performance.md).

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = |key: &str| env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    // Where the compiler's own linker is lld; others do not know the flag.
    if target("ARCH") == "x86_64" && target("OS") == "linux" && target("ENV") == "gnu" {
        println!("cargo:rustc-link-arg-bins=-Wl,--icf=all");
    }
}
