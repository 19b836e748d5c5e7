//! Places to test in, each with this process's ID in its name and gone when dropped, also by a panic.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its part")]

pub mod events;
pub mod old_maps;
pub mod packets;
pub mod pair;
pub mod sockets;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aya::util::KernelVersion;
use ebpf_global_svc::{
    Datapath, DatapathOptions, MapSizes, Tables,
    abi::{
        BACKEND_EXCLUSIVE, BackendValue, EndpointValue, FAMILY_V4, FAMILY_V6, Group, IpKey, IpValue,
        MAX_GROUPS, NodeKey, NodeValue, PrefixKey, PrefixValue, ServiceKey, ServiceValue, SlotKey,
        TranslateKey, TranslateValue, scope, translate,
    },
};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Different for every call in every process that runs at the same time.
pub fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Fails at once, and says why, where these tests cannot run.
pub fn require_root() {
    // SAFETY: no preconditions.
    let user = unsafe { libc::geteuid() };
    assert_eq!(user, 0, "this test loads programs into the kernel: run it as root");
}

/// Whether programs are on interfaces by links. Before Linux 6.6 they are filters, which stay with their interface
/// and are nobody's to list: each start attaches anew.
pub fn has_links() -> bool {
    KernelVersion::current().unwrap() >= KernelVersion::new(6, 6, 0)
}

/// The datapath remembers the programs on these pods' interfaces, where a kernel has links for that.
#[track_caller]
pub fn assert_attached(datapath: &Datapath, pods: &[u32]) {
    let expected = if has_links() { pods } else { &[] };
    assert_eq!(datapath.attached_pods().unwrap(), expected);
}

/// Set when it goes, also in a panic: who waits for it ends too.
pub struct SetAtEnd<'a>(pub &'a std::sync::atomic::AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Release);
    }
}

/// A folder for pins.
pub struct Root(PathBuf);

impl Root {
    pub fn new() -> Self {
        require_root();
        Self(PathBuf::from(format!("/sys/fs/bpf/clustermesh-test-{}", unique())))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn options(&self, cluster: u16) -> DatapathOptions {
        DatapathOptions { sizes: SMALL, ..DatapathOptions::new(&self.0, cluster) }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Err(error) = Datapath::unload(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

pub const SMALL: MapSizes = MapSizes {
    ipcache: 16_384,
    prefix: 16_384,
    endpoint: 1_024,
    node: 1_024,
    service: 1_024,
    slot: 4_096,
    backend: 4_096,
    affinity: 1_024,
    sock_rev: 1_024,
    overlay_rx: 1_024,
    policy: 16_384,
    cidr: 1_024,
    translate: 64,
    ct: 1_024,
    verdict: 1_024,
    fragment: 256,
    calls: 256,
    nat: 1_024,
    events: 1 << 16,
};

/// A cgroup that this process is in, alone among its tests: the kernel looks at the cgroup of the
/// process that creates a socket.
pub struct Cgroup {
    path: PathBuf,
    before: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Cgroup {
    pub fn enter() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        require_root();
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mount = cgroup2_mount();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("a cgroup v2");
        let cgroup = Self {
            path: mount.join(format!("clustermesh-test-{}", unique())),
            before: mount.join(own),
            _alone: alone,
        };
        fs::create_dir(&cgroup.path).unwrap();
        move_to(&cgroup.path);
        cgroup
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        move_to(&self.before);
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn move_to(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount =
        mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields[2] == "cgroup2");
    mount.expect("cgroup v2 is mounted")[1].into()
}

/// A named network namespace with its loopback up.
pub struct Netns(String, Owner);

/// Who removes a namespace.
#[derive(PartialEq, Eq)]
enum Owner {
    Us,
    Somebody,
}

impl Netns {
    pub fn new(name: &str) -> Self {
        require_root();
        let netns = Self(format!("cmt-{}-{name}", unique()), Owner::Us);
        run("ip", &["netns", "add", &netns.0]);
        netns.ip("link set lo up");
        netns.sysctl("net/ipv6/conf/all/accept_dad", "0");
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0");
        netns
    }

    /// The same once more, for who must not borrow it. It ends with the first one.
    pub fn again(&self) -> Self {
        Self(self.0.clone(), Owner::Somebody)
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// `ip -n NAME ...`
    pub fn ip(&self, arguments: &str) {
        let mut all = vec!["-n", self.0.as_str()];
        all.extend(arguments.split(' '));
        if arguments.starts_with("addr add") && arguments.contains("::") {
            // Else the kernel lets nobody use the address until a task of its own has come round.
            all.push("nodad");
        }
        run("ip", &all);
    }

    /// The route to an address, with what the kernel has learnt on the way.
    pub fn route_to(&self, to: IpAddr) -> String {
        let output = Command::new("ip").args(["-n", &self.0, "route", "get", &to.to_string()]).output();
        String::from_utf8(output.expect("iproute2 is there").stdout).unwrap()
    }

    /// Programs that are filters of an interface in a direction (`ingress`, `egress`), by name.
    pub fn filters(&self, device: &str, direction: &str) -> Vec<String> {
        let output = Command::new("tc")
            .args(["-n", &self.0, "filter", "show", "dev", device, direction])
            .output()
            .expect("iproute2 is there");
        let text = String::from_utf8(output.stdout).unwrap();
        let named = |line: &str| line.split(' ').find(|word| word.starts_with("cm_")).map(str::to_owned);
        text.lines().filter_map(named).collect()
    }

    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{name}");
        let value = value.to_owned();
        self.run(move || fs::write(path, value).unwrap());
    }

    /// Runs code on a thread of its own that is in this namespace; a panic goes on in the caller.
    pub fn run<T: Send>(&self, code: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.0)).unwrap();
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    // SAFETY: a valid descriptor; this thread alone changes, and ends soon.
                    let moved = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                    assert_eq!(moved, 0, "setns: {}", std::io::Error::last_os_error());
                    code()
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub fn ifindex(&self, interface: &str) -> u32 {
        let path = interface.to_owned();
        self.run(move || {
            let name = std::ffi::CString::new(path).unwrap();
            // SAFETY: a string that ends in NUL.
            let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
            assert_ne!(index, 0, "{name:?}: {}", std::io::Error::last_os_error());
            index
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if self.1 == Owner::Us {
            let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
        }
    }
}

/// Runs a tool that must succeed.
pub fn run(program: &str, arguments: &[&str]) {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {}: {}{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Family and bytes of an address, as maps have them.
pub fn address(ip: IpAddr) -> (u8, [u8; 16]) {
    match ip {
        IpAddr::V4(ip) => (FAMILY_V4, v4_bytes(ip)),
        IpAddr::V6(ip) => (FAMILY_V6, ip.octets()),
    }
}

fn v4_bytes(ip: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&ip.octets());
    bytes
}

pub fn ip_key(cluster: u16, ip: IpAddr) -> IpKey {
    let (family, ip) = address(ip);
    IpKey { cluster, family, pad: 0, ip }
}

pub fn ip_value(identity: u32, node: Ipv4Addr) -> IpValue {
    IpValue { identity, node_ip: node.octets(), key: 0, flags: 0, pad: 0 }
}

pub fn prefix_key(ip: IpAddr, length: u32) -> PrefixKey {
    let (family, ip) = address(ip);
    PrefixKey { prefixlen: 32 + length, family, pad: [0; 3], ip }
}

pub fn prefix_value(cluster: u16, node: Ipv4Addr) -> PrefixValue {
    PrefixValue { cluster, flags: 0, pad: 0, node_ip: node.octets(), reserved: 0 }
}

pub fn node(ip: Ipv4Addr, cluster: u16) -> (NodeKey, NodeValue) {
    node_at(ip.into(), cluster)
}

/// One of either family; without a number.
pub fn node_at(ip: IpAddr, cluster: u16) -> (NodeKey, NodeValue) {
    let (family, ip) = address(ip);
    (NodeKey { family, pad: [0; 3], ip }, NodeValue { cluster, flags: 0, number: 0 })
}

pub fn endpoint(ifindex: u32, identity: u32) -> EndpointValue {
    EndpointValue { ifindex, identity, pod_mac: [2, 0, 0, 0, 0, 2], host_mac: [2, 0, 0, 0, 0, 1], flags: 0 }
}

/// ID, address and port of a backend.
pub type Backend = (u32, IpAddr, u16);

/// A frontend and, by cluster, weights and backends.
pub struct Service<'a> {
    pub id: u32,
    pub frontend: (IpAddr, u16),
    pub proto: u8,
    pub groups: &'a [(u16, u16, &'a [Backend])],
}

impl Service<'_> {
    pub fn key(&self, cluster: u16) -> ServiceKey {
        let (family, ip) = address(self.frontend.0);
        let (port, proto) = (self.frontend.1.to_be(), self.proto);
        ServiceKey { cluster, port, proto, family, scope: scope::MESH, pad: 0, ip }
    }

    /// Installs it in the order that the agent keeps: backends, slots, service.
    pub fn install(&self, cluster: u16, tables: &mut Tables) {
        self.install_as(cluster, tables, 0, |_| 0);
    }

    /// Installs it with session affinity, in its units, and with the tiers of its clusters.
    pub fn install_as(&self, cluster: u16, tables: &mut Tables, affinity: u16, tier: impl Fn(u16) -> u8) {
        let mut value = ServiceValue {
            id: self.id,
            n_groups: u16::try_from(self.groups.len()).unwrap(),
            affinity_timeout: affinity,
            groups: [Group::default(); MAX_GROUPS],
        };
        for (group, (from, weight, backends)) in value.groups.iter_mut().zip(self.groups) {
            for (slot, (id, ip, port)) in (0..).zip(*backends) {
                let flags = if affinity == 0 { 0 } else { BACKEND_EXCLUSIVE };
                let backend = BackendValue { flags, ..self.backend(*id, *from, *ip, *port) };
                tables.backend.upsert(&[(*id, backend)]).unwrap();
                let key = SlotKey { service: self.id, slot, cluster: *from, pad: 0 };
                tables.slot.upsert(&[(key, *id)]).unwrap();
            }
            *group = Group::new(*from, *weight, tier(*from), u32::try_from(backends.len()).unwrap());
        }
        tables.service.upsert(&[(self.key(cluster), value)]).unwrap();
    }

    /// Installs it for the outside too.
    pub fn publish(&self, cluster: u16, tables: &mut Tables) {
        self.install(cluster, tables);
        let key = self.key(cluster);
        let value = tables.service.get(&[key]).unwrap()[0].unwrap();
        tables.service.upsert(&[(ServiceKey { scope: scope::OUTSIDE, ..key }, value)]).unwrap();
    }

    pub fn backend(&self, id: u32, cluster: u16, ip: IpAddr, port: u16) -> BackendValue {
        let (family, ip) = address(ip);
        BackendValue {
            ip,
            cluster,
            port: port.to_be(),
            proto: self.proto,
            family,
            state: 0,
            flags: 0,
            generation: id,
        }
    }
}

/// Both entries for a prefix of a cluster's pods and the virtual one, of `length` bits.
pub fn translation(
    cluster: u16,
    real: IpAddr,
    virtual_: IpAddr,
    length: u32,
) -> [(TranslateKey, TranslateValue); 2] {
    let ((family, real), (_, other)) = (address(real), address(virtual_));
    let bits = std::array::from_fn(|n| real[n] ^ other[n]);
    [(translate::TO_REAL, other), (translate::TO_VIRTUAL, real)].map(|(way, ip)| {
        (TranslateKey { prefixlen: 32 + length, cluster, family, way, ip }, TranslateValue { bits })
    })
}

/// A counter of `cm_metrics`.
pub fn metric(datapath: &Datapath, reason: u8) -> u64 {
    let metrics = datapath.metrics().unwrap();
    metrics.iter().find(|(code, _)| *code == reason).map_or(0, |(_, counter)| counter.packets)
}

/// Runs and nanoseconds of a program that this process has loaded; others may have loaded theirs of that name.
pub fn spent(program: &str) -> (u64, u64) {
    let mut own = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
        // The folder's own descriptor is gone again.
        let Ok(text) = std::fs::read_to_string(entry.path()) else { continue };
        let field = |name: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
        };
        if let (Some(id), Some(runs), Some(time)) =
            (field("prog_id:"), field("run_cnt:"), field("run_time_ns:"))
        {
            own.insert(id, (runs, time));
        }
    }
    let mut named =
        aya::programs::loaded_programs().flatten().filter(|info| info.name_as_str() == Some(program));
    named.find_map(|info| own.get(&info.id().into()).copied()).unwrap()
}

/// Waits for a condition, not for a guess of its time.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "still not: {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
}
