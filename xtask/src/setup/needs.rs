//! What is needed, and for what.

/// Oldest kernel that the programs are made for.
pub(super) const KERNEL: (u32, u32) = (6, 1);
/// Version of bpf-linker.
pub(super) const BPF_LINKER: &str = "0.13.0";
/// LLVM that bpf-linker is built with: not older than that of the compiler of the eBPF programs.
pub(super) const LLVM: u32 = 22;
/// Where Debian keeps that LLVM.
pub(super) const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// A Debian package.
pub(super) struct Package {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    /// What to look for on other systems.
    pub(super) program: Option<&'static str>,
    /// A rustup nightly with rust-src does as well.
    pub(super) or_nightly: bool,
}

const fn package(name: &'static str, program: Option<&'static str>, why: &'static str) -> Package {
    Package { name, why, program, or_nightly: false }
}

/// All packages, in the order in which their reasons read best.
pub(super) const PACKAGES: &[Package] = &[
    package("gcc", Some("gcc"), "links programs, compiles the C parts of the TLS library"),
    package("g++", Some("g++"), "compiles bpf-linker's binding to LLVM, and libFuzzer"),
    package("libc6-dev", None, "headers for the same"),
    package("make", Some("make"), "builds the TLS library"),
    package("cmake", Some("cmake"), "builds the TLS library"),
    package("protobuf-compiler", Some("protoc"), "generates the agent's gRPC interface"),
    package("libprotobuf-dev", None, "the well-known protobuf types that it may import"),
    Package {
        name: "rustc-web",
        why: "a Rust compiler that has the eBPF target",
        program: None,
        or_nightly: true,
    },
    Package {
        name: "libstd-rust-web-dev-bpf",
        why: "Rust's core library for eBPF",
        program: None,
        or_nightly: true,
    },
    package("llvm-22-dev", None, "LLVM, to build bpf-linker"),
    package("libpolly-22-dev", None, "a part of LLVM that it links to"),
    package("libzstd-dev", None, "a library that LLVM links to"),
    package("zlib1g-dev", None, "a library that LLVM links to"),
    package("etcd-server", Some("etcd"), "every lab cluster has an etcd of its own"),
    package("etcd-client", Some("etcdctl"), "scenarios look into etcd with a client that is not ours"),
    package("iproute2", Some("ip"), "labs are made of network namespaces"),
    package("util-linux", Some("nsenter"), "runs programs in them"),
    package("procps", Some("sysctl"), "sets the kernel's network options in them"),
    package("nftables", Some("nft"), "the bench compares with it"),
    package("iptables", Some("iptables"), "the bench compares with it"),
    package("ipvsadm", Some("ipvsadm"), "the bench compares with it where the kernel can"),
    package("tcpdump", Some("tcpdump"), "for looking at what a lab sends"),
];

/// What `cargo xtask vm` needs besides. They are looked for by their programs: busybox, for one, comes in more than
/// one package.
pub(super) const VM_PACKAGES: &[Package] = &[
    package("qemu-system-x86", Some("qemu-system-x86_64"), "boots other kernels"),
    package("busybox-static", Some("busybox"), "the shell and the commands in there"),
    package("cpio", Some("cpio"), "packs their file system"),
    package("xz-utils", Some("xz"), "unpacks kernel modules"),
];
