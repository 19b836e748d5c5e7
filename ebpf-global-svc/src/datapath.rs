//! The kernel side of one node: programs loaded, attached and pinned, and their maps.
//!
//! Everything lives in pins under one folder, and outlives the process: traffic flows on while the
//! agent is down. Opening again takes over what is there: maps are re-used if they still fit, and
//! attached programs are replaced one by one, each atomically. Nothing is ever flushed.
//!
//! What may be touched by others: nothing under the folder while a `Datapath` is open (it is locked).

mod links;
mod load;
mod maps;
mod migration;
mod pins;
mod readings;
mod remains;
mod trial;

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf,
    programs::{CgroupSockAddr, SchedClassifier, TcAttachType, Xdp, XdpMode},
};

use self::{
    load::{configure, load_failed, load_maps, load_programs},
    maps::MapSpec,
    migration::Migration,
    pins::Pins,
};
pub use self::{
    migration::Migrated,
    remains::Remains,
    trial::{Arrival, Trial},
};
use crate::{
    DatapathError, DatapathOptions, Tables,
    abi::{CONFIG_PACKET_SERVICES, CONFIG_PMTU_DISCOVERY, CONFIG_STRICT, ClusterState, Config, Plain},
    sys::LinkTarget,
    table::KernelTable,
};

/// `programs/`, as `build.rs` has compiled it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/clustermesh-bpf"));

/// Programs on the cgroup.
const SOCKET_PROGRAMS: [&str; 8] = [
    // What translates back comes first: no answer must arrive under a name that nobody restores.
    "cm_recvmsg4",
    "cm_recvmsg6",
    "cm_getpeername4",
    "cm_getpeername6",
    "cm_sendmsg4",
    "cm_sendmsg6",
    "cm_connect4",
    "cm_connect6",
];
const FROM_POD: &str = "cm_from_pod";
const FROM_OVERLAY: &str = "cm_from_overlay";
const TO_OVERLAY: &str = "cm_to_overlay";
const TO_POD: &str = "cm_to_pod";
const FROM_WIREGUARD: &str = "cm_from_wireguard";
const FROM_NETDEV: &str = "cm_from_netdev";
const INTERFACE_PROGRAMS: [&str; 6] =
    [FROM_POD, TO_POD, FROM_OVERLAY, TO_OVERLAY, FROM_WIREGUARD, FROM_NETDEV];
const XDP: &str = "cm_xdp";
const XDP_GENERIC: &str = "cm_xdp_generic";
const XDP_PROGRAMS: [&str; 2] = [XDP, XDP_GENERIC];
/// Those that have a link for each of several interfaces.
const NUMBERED: [&str; 6] = [FROM_POD, TO_POD, FROM_WIREGUARD, FROM_NETDEV, XDP, XDP_GENERIC];
/// On the host side of a pod's veth. The first of them names the pods that are attached.
const POD_PROGRAMS: [(&str, TcAttachType); 2] =
    [(FROM_POD, TcAttachType::Ingress), (TO_POD, TcAttachType::Egress)];

/// The loaded kernel side. Dropping it leaves everything attached; [`Datapath::unload`] removes it.
#[derive(Debug)]
pub struct Datapath {
    programs: Ebpf,
    pins: Pins,
    specs: [MapSpec; maps::MAPS],
    config: Config,
    migrated: Vec<Migrated>,
}

/// Who runs the program that takes calls from outside before the kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceleration {
    /// The device's driver.
    Driver,
    /// The kernel, for a driver that cannot: correct, and no faster.
    Generic,
}

impl Acceleration {
    const ALL: [Self; 2] = [Self::Driver, Self::Generic];

    fn link(self, ifindex: u32) -> String {
        numbered_link(self.program(), ifindex)
    }

    fn program(self) -> &'static str {
        match self {
            Self::Driver => XDP,
            Self::Generic => XDP_GENERIC,
        }
    }

    fn mode(self) -> XdpMode {
        match self {
            Self::Driver => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// One loaded program, as the kernel sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Its name.
    pub name: String,
    /// Instructions that the verifier walked through, over all paths (its limit is a million).
    pub verified_instructions: u32,
    /// Size after translation, in instructions.
    pub instructions: u32,
}

impl Datapath {
    /// Loads the datapath, or takes over the one that is pinned under `options.bpf_root`.
    ///
    /// # Errors
    /// See [`DatapathError`]. After an error the previous datapath, if any, is still running.
    pub fn open(options: &DatapathOptions) -> Result<Self, DatapathError> {
        let pins = Pins::open(&options.bpf_root)?;
        let specs = maps::specs(&options.sizes);
        maps::check(&pins, options.cluster)?;
        let mut migration = Migration::plan(&pins, &specs)?;
        let mut programs = load_maps(&pins, &specs, &migration, None)?;
        migration.copy_tables()?;
        let config = configure(&migration.pin(&pins, "cm_config"), options)?;
        load_programs(&mut programs)?;
        let between = match migration.flows_before() {
            // Where there are no links, programs on interfaces are the agent's to replace.
            Some(before) if links::has_tcx() => {
                let mut programs = load_maps(&pins, &specs, &migration, Some(before))?;
                load_programs(&mut programs)?;
                Some(programs)
            }
            _ => None,
        };
        migration.commit()?;
        let mut datapath = Self { programs, pins, specs, config, migrated: Vec::new() };
        if let Some(between) = between {
            let last = std::mem::replace(&mut datapath.programs, between);
            datapath.replace_programs(options)?;
            datapath.migrated = migration.finish()?;
            datapath.programs = last;
            datapath.replace_programs(options)?;
        } else {
            datapath.replace_programs(options)?;
            datapath.migrated = migration.finish()?;
        }
        Ok(datapath)
    }

    /// Maps that were replaced when this datapath was opened, because those that were pinned had another size or
    /// layout.
    #[must_use]
    pub fn migrated(&self) -> &[Migrated] {
        &self.migrated
    }

    /// Removes a datapath: programs, then maps. Nothing there is fine.
    ///
    /// # Errors
    /// Those of [`Datapath::remains`], and [`DatapathError::File`] if a pin cannot be removed.
    pub fn unload(bpf_root: &Path) -> Result<(), DatapathError> {
        Self::remains(bpf_root)?.map_or(Ok(()), Remains::remove)
    }

    /// Watches what a pod sends and receives: attaches to the host side of its veth, in the calling
    /// thread's network namespace. Once more for the same interface is fine.
    ///
    /// # Errors
    /// [`DatapathError::Attach`].
    pub fn attach_pod(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        // What comes first is what counts: see `attached_pods`.
        for (name, direction) in POD_PROGRAMS.into_iter().rev() {
            let pin = self.pins.link(&numbered_link(name, ifindex));
            links::attach_interface(classifier(&mut self.programs, name)?, name, &pin, ifindex, direction)?;
        }
        Ok(())
    }

    /// Undoes [`Datapath::attach_pod`]. An interface that is gone is fine.
    ///
    /// # Errors
    /// [`DatapathError::File`] if the pin cannot be removed.
    pub fn detach_pod(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        POD_PROGRAMS.into_iter().rev().try_for_each(|(name, direction)| {
            let pin = self.pins.link(&numbered_link(name, ifindex));
            links::detach_interface(name, &pin, ifindex, direction)
        })
    }

    /// Interfaces to which [`Datapath::attach_pod`] has attached, also in an earlier life. Empty on
    /// kernels before 6.6, whose filters go with their interface.
    ///
    /// # Errors
    /// [`DatapathError::File`] if the pins cannot be listed.
    pub fn attached_pods(&self) -> Result<Vec<u32>, DatapathError> {
        let links = self.pins.links()?;
        let of = |program| links.iter().filter_map(move |name| interface_of_link(program, name));
        // One with half of its programs wants to be attached (again).
        Ok(of(FROM_POD).filter(|ifindex| of(TO_POD).any(|other| other == *ifindex)).collect())
    }

    /// Makes an existing VXLAN device (external, of the calling thread's network namespace) the overlay.
    ///
    /// # Errors
    /// [`DatapathError::Attach`].
    pub fn attach_overlay(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        for (name, direction) in [(FROM_OVERLAY, TcAttachType::Ingress), (TO_OVERLAY, TcAttachType::Egress)] {
            let pin = self.pins.link(name);
            links::attach_interface(classifier(&mut self.programs, name)?, name, &pin, ifindex, direction)?;
        }
        // Pods may send there from now on.
        self.config.overlay_ifindex = ifindex;
        maps::write_config(&self.pins.map("cm_config"), &self.config)
    }

    /// Marks what a WireGuard device (of the calling thread's network namespace) has decrypted.
    ///
    /// # Errors
    /// [`DatapathError::Attach`].
    pub fn attach_wireguard(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        let pin = self.pins.link(&numbered_link(FROM_WIREGUARD, ifindex));
        let program = classifier(&mut self.programs, FROM_WIREGUARD)?;
        links::attach_interface(program, FROM_WIREGUARD, &pin, ifindex, TcAttachType::Ingress)
    }

    /// Lets in what comes for a service's frontend at one of the node's own Ethernet interfaces (of the calling thread's
    /// network namespace). Once more for the same interface is fine.
    ///
    /// # Errors
    /// [`DatapathError::Attach`].
    pub fn attach_netdev(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        let pin = self.pins.link(&numbered_link(FROM_NETDEV, ifindex));
        let program = classifier(&mut self.programs, FROM_NETDEV)?;
        links::attach_interface(program, FROM_NETDEV, &pin, ifindex, TcAttachType::Ingress)
    }

    /// Undoes [`Datapath::attach_netdev`]. An interface that is gone is fine.
    ///
    /// # Errors
    /// [`DatapathError::File`] if the pin cannot be removed.
    pub fn detach_netdev(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        let pin = self.pins.link(&numbered_link(FROM_NETDEV, ifindex));
        links::detach_interface(FROM_NETDEV, &pin, ifindex, TcAttachType::Ingress)
    }

    /// Interfaces to which [`Datapath::attach_netdev`] has attached, also in an earlier life. Empty on kernels before
    /// 6.6.
    ///
    /// # Errors
    /// [`DatapathError::File`] if the pins cannot be listed.
    pub fn attached_netdevs(&self) -> Result<Vec<u32>, DatapathError> {
        let links = self.pins.links()?;
        Ok(links.iter().filter_map(|name| interface_of_link(FROM_NETDEV, name)).collect())
    }

    /// Takes packets of calls that [`Datapath::attach_netdev`] has let in at an interface (of the calling thread's network
    /// namespace) before the kernel does. Once more is fine; in another mode the program is away for a moment, in which the
    /// kernel does it all.
    ///
    /// # Errors
    /// [`DatapathError::Attach`]; one that runs already, in another mode, may be gone then.
    pub fn accelerate(&mut self, ifindex: u32, by: Acceleration) -> Result<(), DatapathError> {
        for other in Acceleration::ALL.into_iter().filter(|other| *other != by) {
            pins::detach(&self.pins.link(&other.link(ifindex)))?;
        }
        let pin = self.pins.link(&by.link(ifindex));
        let name = by.program();
        links::attach_xdp(xdp(&mut self.programs, name)?, name, &pin, ifindex, by.mode())
    }

    /// Undoes [`Datapath::accelerate`]. An interface that is gone is fine.
    ///
    /// # Errors
    /// [`DatapathError::File`] if the pin cannot be removed.
    pub fn slow_down(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        Acceleration::ALL.into_iter().try_for_each(|by| pins::detach(&self.pins.link(&by.link(ifindex))))
    }

    /// Interfaces for which [`Datapath::accelerate`] was called, also in an earlier life.
    ///
    /// # Errors
    /// [`DatapathError::File`] if the pins cannot be listed.
    pub fn accelerated(&self) -> Result<Vec<(u32, Acceleration)>, DatapathError> {
        let links = self.pins.links()?;
        let by = |by: Acceleration, name: &String| Some((interface_of_link(by.program(), name)?, by));
        Ok(links
            .iter()
            .flat_map(|name| Acceleration::ALL.into_iter().filter_map(move |one| by(one, name)))
            .collect())
    }

    /// Has the programs translate packets that pods send to frontends past all socket hooks; what they do already is
    /// fine.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn set_packet_services(&mut self, on: bool) -> Result<(), DatapathError> {
        self.set_flag(CONFIG_PACKET_SERVICES, on)
    }

    /// Has the programs tell pods of packets that are too big for the overlay, rather than send these in fragments; what
    /// they do already is fine.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn set_pmtu_discovery(&mut self, on: bool) -> Result<(), DatapathError> {
        self.set_flag(CONFIG_PMTU_DISCOVERY, on)
    }

    /// Tells the programs this node's underlay address, and what the tables call it: its number, or an IPv4 address
    /// itself. What they have already is fine.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn set_node(&mut self, node_ip: [u8; 4], address: IpAddr) -> Result<(), DatapathError> {
        let node_ip6 = match address {
            IpAddr::V4(_) => [0; 16],
            IpAddr::V6(ip) => ip.octets(),
        };
        if (self.config.node_ip, self.config.node_ip6) == (node_ip, node_ip6) {
            return Ok(());
        }
        let config = Config { node_ip, node_ip6, ..self.config };
        maps::write_config(&self.pins.map("cm_config"), &config)?;
        self.config = config;
        Ok(())
    }

    /// Has the programs drop tunnel packets that should be encrypted and are not, as `cm_node` says; what they do
    /// already is fine.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn set_strict(&mut self, strict: bool) -> Result<(), DatapathError> {
        self.set_flag(CONFIG_STRICT, strict)
    }

    fn set_flag(&mut self, flag: u16, on: bool) -> Result<(), DatapathError> {
        let flags = if on { self.config.flags | flag } else { self.config.flags & !flag };
        if self.config.flags == flags {
            return Ok(());
        }
        let config = Config { flags, ..self.config };
        maps::write_config(&self.pins.map("cm_config"), &config)?;
        self.config = config;
        Ok(())
    }

    /// Tables over the kernel's maps. Entries of earlier lives are in them.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if a pin cannot be opened.
    pub fn tables(&self) -> Result<Tables, DatapathError> {
        let cluster = self.open_map("cm_cluster")?;
        Ok(Tables {
            ipcache: Box::new(self.table("cm_ipcache")?),
            prefix: Box::new(self.table("cm_prefix")?),
            endpoint: Box::new(self.table("cm_endpoint")?),
            node: Box::new(self.table("cm_node")?),
            underlay: Box::new(self.table("cm_underlay")?),
            service: Box::new(self.table("cm_service")?),
            slot: Box::new(self.table("cm_slot")?),
            backend: Box::new(self.table("cm_backend")?),
            cluster: Box::new(KernelTable::array(
                cluster.0,
                cluster.1.name,
                cluster.1.max_entries,
                ClusterState::default(),
            )),
            policy: Box::new(self.table("cm_policy")?),
            cidr: Box::new(self.table("cm_cidr")?),
            translate: Box::new(self.table("cm_translate")?),
            affinity: Box::new(self.table("cm_affinity")?),
        })
    }

    /// What this node is configured as.
    #[must_use]
    pub fn config(&self) -> Config {
        self.config
    }

    /// All programs with their sizes.
    ///
    /// # Errors
    /// [`DatapathError::Verifier`] if one is not loaded, which [`Datapath::open`] excludes.
    pub fn programs(&self) -> Result<Vec<ProgramInfo>, DatapathError> {
        const INSTRUCTION: u32 = 8;
        self.programs
            .programs()
            .map(|(name, program)| {
                let info = program.info().map_err(|error| load_failed(name, error))?;
                Ok(ProgramInfo {
                    name: name.to_owned(),
                    verified_instructions: info.verified_instruction_count().unwrap_or(0),
                    instructions: info.size_translated().unwrap_or(0) / INSTRUCTION,
                })
            })
            .collect()
    }

    /// Puts our programs on all hooks that have some already, and on the cgroup.
    fn replace_programs(&mut self, options: &DatapathOptions) -> Result<(), DatapathError> {
        self.replace_interface_programs()?;
        self.attach_sockets(options.cgroup.as_deref())
    }

    fn attach_sockets(&mut self, cgroup: Option<&Path>) -> Result<(), DatapathError> {
        for name in SOCKET_PROGRAMS {
            let pin = self.pins.link(name);
            match cgroup {
                Some(cgroup) => {
                    links::attach_cgroup(socket_program(&mut self.programs, name)?, name, &pin, cgroup)?
                }
                None => pins::detach(&pin)?,
            }
        }
        Ok(())
    }

    /// Gives our programs to all interfaces that run those of an earlier version, and forgets
    /// interfaces that are gone.
    fn replace_interface_programs(&mut self) -> Result<(), DatapathError> {
        for link in self.pins.links()? {
            let numbered =
                NUMBERED.into_iter().find_map(|name| Some((name, interface_of_link(name, &link)?)));
            let (name, target) = match numbered {
                Some((name, ifindex)) => (name, LinkTarget::Interface(ifindex)),
                None if link == FROM_OVERLAY || link == TO_OVERLAY => {
                    (link.as_str(), LinkTarget::Interface(self.config.overlay_ifindex))
                }
                None => continue,
            };
            let pin = self.pins.link(&link);
            let failed =
                |reason| DatapathError::Attach { program: name.to_owned(), target: link.clone(), reason };
            let program = program(&mut self.programs, name)?;
            let descriptor = program.fd().map_err(|error| failed(links::describe(&error)))?;
            let replaced = links::replace(&pin, &target, descriptor.as_fd())
                .map_err(|error| failed(error.to_string()))?;
            if !replaced {
                pins::detach(&pin)?;
            }
        }
        Ok(())
    }

    fn table<K: Plain, V: Plain>(&self, name: &'static str) -> Result<KernelTable<K, V>, DatapathError> {
        let (map, spec) = self.open_map(name)?;
        assert!(
            spec.key_size == size_of::<K>() && spec.value_size == size_of::<V>(),
            "{name} is opened as another map"
        );
        Ok(KernelTable::new(map, spec.name, spec.max_entries))
    }

    fn open_map(&self, name: &'static str) -> Result<(OwnedFd, MapSpec), DatapathError> {
        // The names are all in this file.
        let spec = *self.specs.iter().find(|spec| spec.name == name).expect("a map of ours");
        Ok((maps::open(&self.pins.map(name), name)?, spec))
    }
}

fn socket_program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr, DatapathError> {
    program(programs, name)?.try_into().map_err(|error| load_failed(name, error))
}

fn classifier<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, DatapathError> {
    program(programs, name)?.try_into().map_err(|error| load_failed(name, error))
}

fn xdp<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, DatapathError> {
    program(programs, name)?.try_into().map_err(|error| load_failed(name, error))
}

fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program, DatapathError> {
    programs.program_mut(name).ok_or_else(|| DatapathError::Verifier {
        program: name.to_owned(),
        log: "it is not in the object that was built in".to_owned(),
    })
}

fn numbered_link(program: &str, ifindex: u32) -> String {
    format!("{program}-{ifindex}")
}

fn interface_of_link(program: &str, name: &str) -> Option<u32> {
    name.strip_prefix(program)?.strip_prefix('-')?.parse().ok()
}
