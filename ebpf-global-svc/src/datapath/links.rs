//! Puts programs on hooks, for good: a pinned link outlives us, and gets a new program in one step.

use std::{
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
};

use aya::{
    programs::{
        CgroupAttachMode, CgroupSockAddr, LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp,
        XdpMode,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
    util::KernelVersion,
};

use super::{maps::open_cgroup, pins};
use crate::{
    DatapathError,
    sys::{self, LinkTarget},
};

/// Our place among the filters of an interface on kernels without tcx.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Attaches to a cgroup, or replaces the program that is attached there.
pub(super) fn attach_cgroup(
    program: &mut CgroupSockAddr,
    name: &str,
    pin: &Path,
    cgroup: &Path,
) -> Result<(), DatapathError> {
    let failed = |reason: String| attach_failed(name, &cgroup.display().to_string(), reason);
    let folder = open_cgroup(cgroup)?;
    let id = folder.metadata().map_err(|error| failed(error.to_string()))?.ino();
    let descriptor = program.fd().map_err(|error| failed(describe(&error)))?;
    if replace(pin, &LinkTarget::Cgroup(id), descriptor.as_fd()).map_err(|error| failed(error.to_string()))? {
        return Ok(());
    }
    pins::detach(pin)?;
    // `Single` is flags 0, the only ones that the kernel takes for a link, which then admits others.
    let link = program
        .attach(folder, CgroupAttachMode::Single)
        .and_then(|id| program.take_link(id))
        .map_err(|error| failed(describe(&error)))?;
    keep(link, pin).map_err(failed)
}

/// Attaches to an interface of this network namespace, or replaces the program that is attached there.
pub(super) fn attach_interface(
    program: &mut SchedClassifier,
    name: &str,
    pin: &Path,
    interface: u32,
    direction: TcAttachType,
) -> Result<(), DatapathError> {
    let failed = |reason: String| attach_failed(name, &format!("interface {interface}"), reason);
    let device = sys::interface_name(interface).map_err(|error| failed(error.to_string()))?;
    if !has_tcx() {
        return attach_filter(program, &device, direction).map_err(|error| failed(describe(&error)));
    }
    let descriptor = program.fd().map_err(|error| failed(describe(&error)))?;
    let target = LinkTarget::Interface(interface);
    if replace(pin, &target, descriptor.as_fd()).map_err(|error| failed(error.to_string()))? {
        return Ok(());
    }
    pins::detach(pin)?;
    let link = program
        .attach_with_options(&device, direction, TcAttachOptions::TcxOrder(LinkOrder::first()))
        .and_then(|id| program.take_link(id))
        .map_err(|error| failed(describe(&error)))?;
    keep(link, pin).map_err(failed)
}

/// Pins a link, so that it outlives the agent.
fn keep<L>(link: L, pin: &Path) -> Result<(), String>
where
    FdLink: TryFrom<L, Error: std::fmt::Display>,
{
    let link = FdLink::try_from(link).map_err(|error| error.to_string())?;
    link.pin(pin).map(drop).map_err(|error| error.to_string())
}

/// Attaches to an interface of this network namespace, ahead of the kernel, or replaces the program that is attached there.
/// All kernels that we know have links for it.
pub(super) fn attach_xdp(
    program: &mut Xdp,
    name: &str,
    pin: &Path,
    interface: u32,
    mode: XdpMode,
) -> Result<(), DatapathError> {
    let device = sys::interface_name(interface).unwrap_or_else(|_| format!("interface {interface}"));
    let failed = |reason: String| attach_failed(name, &device, reason);
    let descriptor = program.fd().map_err(|error| failed(describe(&error)))?;
    let target = LinkTarget::Interface(interface);
    if replace(pin, &target, descriptor.as_fd()).map_err(|error| failed(error.to_string()))? {
        return Ok(());
    }
    pins::detach(pin)?;
    let link = program
        .attach_to_if_index(interface, mode)
        .and_then(|id| program.take_link(id))
        .map_err(|error| failed(describe(&error)))?;
    keep(link, pin).map_err(failed)
}

/// Detaches from an interface. One that is gone is fine.
pub(super) fn detach_interface(
    name: &str,
    pin: &Path,
    interface: u32,
    direction: TcAttachType,
) -> Result<(), DatapathError> {
    pins::detach(pin)?;
    if has_tcx() {
        return Ok(());
    }
    if let Ok(device) = sys::interface_name(interface) {
        // It fails if nothing is attached, which is what we want.
        let _ = tc::qdisc_detach_program(&device, direction, name);
    }
    Ok(())
}

/// Gives a pinned link another program, in one step. False if there is no such link, or if it is not
/// (or no longer) attached to `target`.
pub(super) fn replace(pin: &Path, target: &LinkTarget, program: BorrowedFd<'_>) -> std::io::Result<bool> {
    let link: OwnedFd = match sys::open_pin(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if !target.is_target_of(link.as_fd())? {
        return Ok(false);
    }
    match sys::update_link(link.as_fd(), program) {
        Ok(()) => Ok(true),
        // The cgroup or interface has gone in between.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the filters of programs from all interfaces of this network namespace.
pub(super) fn remove_filters(names: &[&str]) {
    let Ok(interfaces) = std::fs::read_dir("/sys/class/net") else { return };
    for device in interfaces.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        remove_filters_of(&device, names);
    }
}

fn remove_filters_of(device: &str, names: &[&str]) {
    for name in names {
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            // It fails where nothing is attached, which is nearly everywhere.
            let _ = tc::qdisc_detach_program(device, direction, name);
        }
    }
}

/// Kernels from 6.6 on have links for interfaces; before, a program is a filter that stays by itself.
pub(super) fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

/// A filter of fixed priority and handle, so that the next version replaces it in one step.
fn attach_filter(
    program: &mut SchedClassifier,
    device: &str,
    direction: TcAttachType,
) -> Result<(), ProgramError> {
    // It fails if the qdisc is there already; if it fails otherwise, so does the attachment.
    let _ = tc::qdisc_add_clsact(device);
    let replaced = SchedClassifierLink::attached(device, direction, PRIORITY, HANDLE, None)
        .map_err(ProgramError::from)
        .and_then(|old| program.attach_to_link(old));
    let id = match replaced {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, ..NlOptions::default() };
            program.attach_with_options(device, direction, TcAttachOptions::Netlink(options))?
        }
    };
    // Dropping the link would remove the filter.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn attach_failed(program: &str, target: &str, reason: String) -> DatapathError {
    DatapathError::Attach { program: program.to_owned(), target: target.to_owned(), reason }
}

/// aya's errors name the system call; the kernel's reason is their source.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::{Datapath, DatapathOptions, MapSizes};

    /// Kernels with tcx have filters too, so what older ones use is tested everywhere.
    #[test]
    fn a_filter_is_replaced_and_removed() {
        let name = format!("clustermesh-test-{}-filter", std::process::id());
        let netns = Netns::new(&name);
        let options = DatapathOptions {
            sizes: MapSizes { affinity: 64, sock_rev: 64, overlay_rx: 64, ct: 64, ..MapSizes::default() },
            ..DatapathOptions::new(format!("/sys/fs/bpf/{name}"), 1)
        };
        let _root = Root(&options.bpf_root);
        let mut datapath = Datapath::open(&options).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                netns.enter();
                let program = super::super::classifier(&mut datapath.programs, "cm_from_pod").unwrap();
                attach_filter(program, "lo", TcAttachType::Ingress).unwrap();
                let first = netns.filters();
                assert_eq!(first.matches("direct-action").count(), 1, "{first}");
                attach_filter(program, "lo", TcAttachType::Ingress).unwrap();
                let second = netns.filters();
                assert_eq!(second.matches("direct-action").count(), 1, "{second}");

                drop(datapath);
                assert_eq!(netns.filters(), second, "it stays without us");
                remove_filters_of("lo", &["cm_from_pod"]);
                assert_eq!(netns.filters(), "");
            });
        });
    }

    struct Root<'a>(&'a Path);

    impl Drop for Root<'_> {
        fn drop(&mut self) {
            let _ = Datapath::unload(self.0);
        }
    }

    struct Netns<'a>(&'a str);

    impl<'a> Netns<'a> {
        fn new(name: &'a str) -> Self {
            let status = Command::new("ip").args(["netns", "add", name]).status().unwrap();
            assert!(status.success(), "this test needs root and iproute2");
            Self(name)
        }

        fn enter(&self) {
            sys::enter_netns(Path::new("/run/netns").join(self.0).as_path()).unwrap();
        }

        fn filters(&self) -> String {
            let output =
                Command::new("tc").args(["filter", "show", "dev", "lo", "ingress"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        }
    }

    impl Drop for Netns<'_> {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["netns", "delete", self.0]).status();
        }
    }
}
