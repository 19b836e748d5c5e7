//! From the object that is built in to maps and programs in the kernel.

use std::path::Path;

use aya::{Ebpf, EbpfError, EbpfLoader, maps::MapError, programs::ProgramError, sys::SyscallError};

use super::{
    INTERFACE_PROGRAMS, OBJECT, SOCKET_PROGRAMS, XDP_PROGRAMS, classifier, links,
    maps::{self, MapSpec},
    migration::Migration,
    pins::Pins,
    socket_program, xdp,
};
use crate::{
    DatapathError, DatapathOptions,
    abi::{CONFIG_ENCRYPTS, CONFIG_STRICT, CONFIG_UNDERLAY_V6, Config, SCHEMA_VERSION},
};

/// Creates the maps that are not pinned yet; opens the others. With `flows_before`, for programs that also know that map
/// of flows.
pub(super) fn load_maps(
    pins: &Pins,
    specs: &[MapSpec],
    migration: &Migration,
    flows_before: Option<&Path>,
) -> Result<Ebpf, DatapathError> {
    let mut loader = EbpfLoader::new();
    for spec in specs {
        let pin = migration.pin(pins, spec.name);
        loader.map_max_entries(spec.name, spec.max_entries).map_pin_path(spec.name, pin);
    }
    if let Some(before) = flows_before {
        loader.override_global("CT_CHANGES", &1_u32, true).map_pin_path("cm_ct_before", before);
    }
    loader.load(OBJECT).map_err(open_failed)
}

/// Writes what this node is. What this life does not know yet stays as an earlier one left it: packets
/// flow through the overlay while the agent restarts.
pub(super) fn configure(path: &Path, options: &DatapathOptions) -> Result<Config, DatapathError> {
    let before = maps::read_config(path)?;
    let underlay = if options.underlay_ipv6 { CONFIG_UNDERLAY_V6 } else { 0 };
    // A node of one family is not known by an address, or a number, of the other one.
    let (mut node_ip, node_ip6) = match before.flags & CONFIG_UNDERLAY_V6 == underlay {
        true => (before.node_ip, before.node_ip6),
        false => ([0; 4], [0; 16]),
    };
    if let Some(ip) = options.node_ip.filter(|_| !options.underlay_ipv6) {
        node_ip = ip.octets();
    }
    let mut flags = before.flags & !(CONFIG_ENCRYPTS | CONFIG_UNDERLAY_V6) | underlay;
    if options.encrypts {
        flags |= CONFIG_ENCRYPTS;
    }
    if !options.strict {
        flags &= !CONFIG_STRICT;
    }
    let config = Config {
        schema: SCHEMA_VERSION,
        cluster: options.cluster,
        identity_shift: options.identity_shift,
        overlay_ifindex: before.overlay_ifindex,
        node_ip,
        overlay_port: options.overlay_port,
        flags,
        events: before.events,
        reserved: [0; 2],
        node_ip6,
    };
    maps::write_config(path, &config)?;
    Ok(config)
}

pub(super) fn load_programs(programs: &mut Ebpf) -> Result<(), DatapathError> {
    for name in SOCKET_PROGRAMS {
        let program = socket_program(programs, name)?;
        uninterrupted(|| program.load(), is_interrupted).map_err(|error| load_failed(name, error))?;
    }
    for name in INTERFACE_PROGRAMS {
        let program = classifier(programs, name)?;
        uninterrupted(|| program.load(), is_interrupted).map_err(|error| load_failed(name, error))?;
    }
    for name in XDP_PROGRAMS {
        let program = xdp(programs, name)?;
        uninterrupted(|| program.load(), is_interrupted).map_err(|error| load_failed(name, error))?;
    }
    Ok(())
}

/// The verifier gives up when its thread gets a signal: on a busy machine that happens. libbpf tries as often.
fn uninterrupted<E>(
    mut load: impl FnMut() -> Result<(), E>,
    is_interrupted: impl Fn(&E) -> bool,
) -> Result<(), E> {
    const ATTEMPTS: u32 = 5;
    for _ in 1..ATTEMPTS {
        match load() {
            Err(error) if is_interrupted(&error) => {}
            done => return done,
        }
    }
    load()
}

fn is_interrupted(error: &ProgramError) -> bool {
    match error {
        ProgramError::LoadError { io_error, .. } => io_error.raw_os_error() == Some(libc::EAGAIN),
        _ => false,
    }
}

pub(super) fn load_failed(program: &str, error: ProgramError) -> DatapathError {
    match error {
        ProgramError::LoadError { io_error, .. }
        | ProgramError::SyscallError(SyscallError { io_error, .. })
            if is_permission(&io_error) && io_error.raw_os_error() == Some(libc::EPERM) =>
        {
            DatapathError::NotPermitted { action: format!("load program {program}") }
        }
        ProgramError::LoadError { io_error, verifier_log } => DatapathError::Verifier {
            program: program.to_owned(),
            log: format!("{io_error}\n{verifier_log}"),
        },
        error => DatapathError::Verifier { program: program.to_owned(), log: links::describe(&error) },
    }
}

fn open_failed(error: EbpfError) -> DatapathError {
    match &error {
        EbpfError::MapError(MapError::CreateError { io_error, .. }) if is_permission(io_error) => {
            DatapathError::NotPermitted { action: "create maps".to_owned() }
        }
        EbpfError::MapError(MapError::CreateError { io_error, .. })
            if io_error.raw_os_error() == Some(libc::ENOSYS) =>
        {
            DatapathError::NoBpf { reason: "it has no bpf system call".to_owned() }
        }
        _ => DatapathError::NoBpf { reason: links::describe(&error) },
    }
}

fn is_permission(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_verifier_is_asked_again_but_not_for_ever() {
        for (interrupts, failures, attempts) in [(true, 0, 1), (true, 4, 5), (true, 9, 5), (false, 9, 1)] {
            let mut asked = 0;
            let load = || {
                asked += 1;
                if asked > failures { Ok(()) } else { Err(interrupts) }
            };
            let done = uninterrupted(load, |interrupts| *interrupts);
            assert_eq!((asked, done.is_ok()), (attempts, attempts > failures));
        }
    }
}
