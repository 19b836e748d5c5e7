//! Kernel modules that the guest loads when it starts, in an order in which each finds what it needs.
//!
//! Nothing loads them on demand there, so that the list says what ClusterMesh and its tests need of a kernel.

use anyhow::Context as _;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What is asked for; what those depend on comes with them. Those that a kernel has built in are left out.
const WANTED: &[&str] = &[
    // Interfaces of a lab, and the filters on them.
    "veth",
    "bridge",
    "vxlan",
    "tun",
    "dummy",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    // Raw sockets of the tests.
    "af_packet",
    // Encryption between nodes.
    "wireguard",
    "xfrm_user",
    "xfrm_interface",
    "esp4",
    "esp6",
    "seqiv",
    "echainiv",
    "authenc",
    "gcm",
    "ghash_generic",
    "ctr",
    "aes_generic",
    "crypto_null",
    "drbg",
];

/// One module of a kernel.
#[derive(Debug)]
struct Module {
    file: PathBuf,
    depends: Vec<String>,
}

/// Writes the modules, and `more` of them, into `target`; gives the names of the files in the order in which they load.
///
/// # Errors
/// If the kernel has one neither as a module nor built in.
pub(super) fn copy(modules: &Path, more: &[&str], target: &Path) -> anyhow::Result<Vec<String>> {
    fs::create_dir_all(target)?;
    let wanted = [WANTED, more].concat();
    let known = read(modules, &wanted)?;
    let builtin =
        fs::read_to_string(modules.join("modules.builtin")).context("no list of built-in modules")?;
    let builtin: BTreeSet<String> = builtin.lines().map(name).collect();
    let depends = |module: &str| known.get(module).map(|module| module.depends.as_slice());
    let order = order(&wanted, depends, &|module| builtin.contains(module))?;
    let mut files = Vec::new();
    for module in order {
        let file = format!("{module}.ko");
        fs::write(target.join(&file), contents(&known[&module].file)?)?;
        files.push(file);
    }
    Ok(files)
}

/// Each after what it depends on, each once.
fn order<'a>(
    wanted: &[&str],
    depends: impl Fn(&str) -> Option<&'a [String]>,
    builtin: &dyn Fn(&str) -> bool,
) -> anyhow::Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    // The last one is next; `true`: all that it depends on is in.
    let mut stack: Vec<(String, bool)> =
        wanted.iter().rev().map(|module| ((*module).to_owned(), false)).collect();
    while let Some((module, ready)) = stack.pop() {
        if builtin(&module) || order.contains(&module) {
            continue;
        }
        let needed = depends(&module).with_context(|| format!("this kernel has no module {module}"))?;
        if ready {
            order.push(module);
        } else {
            stack.push((module, true));
            stack.extend(needed.iter().map(|needed| (needed.clone(), false)));
        }
    }
    Ok(order)
}

/// All modules of a kernel, by name. What they depend on is read only of those that are asked for.
fn read(modules: &Path, wanted: &[&str]) -> anyhow::Result<BTreeMap<String, Module>> {
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut folders = vec![modules.join("kernel")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().contains(".ko") {
                found.insert(name(&path.to_string_lossy()), path);
            }
        }
    }
    let mut modules = BTreeMap::new();
    let mut next: Vec<String> = wanted.iter().map(|module| (*module).to_owned()).collect();
    while let Some(module) = next.pop() {
        let Some(file) = found.remove(&module) else { continue };
        let depends = depends(&contents(&file)?);
        next.extend(depends.iter().cloned());
        modules.insert(module, Module { file, depends });
    }
    Ok(modules)
}

/// A module as the kernel takes it; some distributions compress them.
fn contents(file: &Path) -> anyhow::Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(file).with_context(|| format!("cannot read {}", file.display())),
    };
    let output = std::process::Command::new(program).arg("-dc").arg(file).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    anyhow::ensure!(output.status.success(), "{program} cannot read {}", file.display());
    Ok(output.stdout)
}

/// `kernel/net/ipv4/ip-tunnel.ko.xz` is `ip_tunnel`, as modules call each other.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The `depends=` entry of a module's section `.modinfo`, whose entries end with a zero.
fn depends(module: &[u8]) -> Vec<String> {
    const ENTRY: &[u8] = b"\0depends=";
    let Some(begin) = module.windows(ENTRY.len()).position(|window| window == ENTRY) else {
        return Vec::new();
    };
    let rest = &module[begin + ENTRY.len()..];
    let value = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_depends_on_comes_before_it() {
        let known: BTreeMap<&str, Vec<String>> = [
            ("wireguard", vec!["udp_tunnel".to_owned(), "ip6_udp_tunnel".to_owned()]),
            ("vxlan", vec!["ip6_udp_tunnel".to_owned(), "udp_tunnel".to_owned()]),
            ("udp_tunnel", vec!["ipv6".to_owned()]),
            ("ip6_udp_tunnel", vec!["udp_tunnel".to_owned()]),
        ]
        .into();
        let depends = |module: &str| known.get(module).map(Vec::as_slice);
        let builtin = |module: &str| module == "ipv6" || module == "tun";
        let found = order(&["vxlan", "tun", "wireguard"], depends, &builtin).unwrap();
        assert_eq!(found, ["udp_tunnel", "ip6_udp_tunnel", "vxlan", "wireguard"]);
        let error = order(&["nothing"], depends, &builtin).unwrap_err();
        assert!(error.to_string().contains("no module nothing"), "{error}");
    }

    #[test]
    fn reads_a_modules_section() {
        assert_eq!(
            depends(b"\x7fELF\0license=GPL\0depends=udp_tunnel,ip6-udp-tunnel\0name=x\0"),
            ["udp_tunnel", "ip6_udp_tunnel"]
        );
        assert_eq!(depends(b"\0depends=\0"), Vec::<String>::new());
        assert_eq!(name("kernel/drivers/net/ip-tunnel.ko.xz"), "ip_tunnel");
    }
}
