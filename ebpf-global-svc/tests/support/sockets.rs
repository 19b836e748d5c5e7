//! A node whose services are reached from real sockets: one cgroup, and one network namespace whose only
//! interface is its loopback, so that a frontend that is not translated is unreachable.

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use ebpf_global_svc::{Datapath, DatapathOptions, Tables, abi::ClusterState};

use super::{Backend, Cgroup, Netns, Root, Service, UDP};

pub const LOCAL: u16 = 1;
pub const REMOTE: u16 = 2;
pub const VIP4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
pub const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 96, 0, 0, 0, 0, 0, 1));
pub const MAPPED_VIP4: IpAddr = IpAddr::V6(Ipv4Addr::new(10, 96, 0, 1).to_ipv6_mapped());
pub const PORT: u16 = 80;
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The node, and the pod that is its only client.
pub struct Node {
    pub datapath: Option<Datapath>,
    pub tables: Tables,
    pub options: DatapathOptions,
    _root: Root,
    pub netns: Netns,
    _cgroup: Cgroup,
}

impl Node {
    pub fn new() -> Self {
        let cgroup = Cgroup::enter();
        let netns = Netns::new("sockets");
        for n in 1..=4 {
            netns.ip(&format!("addr add {}/128 dev lo", server6(n)));
        }
        let root = Root::new();
        let options = DatapathOptions { cgroup: Some(cgroup.path().to_owned()), ..root.options(LOCAL) };
        let datapath = Datapath::open(&options).unwrap();
        let tables = datapath.tables().unwrap();
        Self { datapath: Some(datapath), tables, options, _root: root, netns, _cgroup: cgroup }
    }

    pub fn datapath(&self) -> &Datapath {
        self.datapath.as_ref().unwrap()
    }

    pub fn install(&mut self, service: &Service<'_>) {
        service.install(LOCAL, &mut self.tables);
    }

    /// Installs it with session affinity, in its units.
    /// Over UDP, a service of each family with two backends here and two elsewhere.
    pub fn install_both(&mut self, four: &[Backend], six: &[Backend]) {
        for (id, vip, backends) in [(1, VIP4, four), (2, VIP6, six)] {
            let groups = &[(LOCAL, 1, &backends[..2]), (REMOTE, 1, &backends[2..])];
            self.install(&Service { id, frontend: (vip, PORT), proto: UDP, groups });
        }
    }

    pub fn sticky(&mut self, service: &Service<'_>, affinity: u16) {
        service.install_as(LOCAL, &mut self.tables, affinity, |_| 0);
    }

    pub fn set_cluster(&mut self, cluster: u16, state: u32) {
        self.tables.cluster.upsert(&[(cluster.into(), ClusterState { state })]).unwrap();
    }

    /// A listener that answers every connection with its name.
    pub fn serve_tcp(&self, ip: IpAddr, name: &'static str) -> u16 {
        self.netns.run(|| {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let _ = io::Write::write_all(&mut stream.unwrap(), name.as_bytes());
                }
            });
            port
        })
    }

    /// A socket that answers every datagram with its name.
    pub fn serve_udp(&self, ip: IpAddr, name: &'static str) -> u16 {
        self.netns.run(|| {
            let socket = UdpSocket::bind((ip, 0)).unwrap();
            let port = socket.local_addr().unwrap().port();
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, client)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(name.as_bytes(), client);
                }
            });
            port
        })
    }

    /// Who answers a connection to `ip`, and who the kernel says it is.
    pub fn connect(&self, ip: IpAddr) -> io::Result<(String, SocketAddr)> {
        self.netns.run(|| connect(ip))
    }

    /// Which servers answer `n` connections to [`VIP4`], and how often.
    pub fn answers(&self, n: u32) -> BTreeMap<String, u32> {
        let mut answers = BTreeMap::new();
        self.netns.run(|| {
            for _ in 0..n {
                *answers.entry(connect(VIP4).unwrap().0).or_default() += 1;
            }
        });
        answers
    }
}

pub fn connect(ip: IpAddr) -> io::Result<(String, SocketAddr)> {
    let mut stream = TcpStream::connect((ip, PORT))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let peer = stream.peer_addr()?;
    let mut name = String::new();
    stream.read_to_string(&mut name)?;
    Ok((name, peer))
}

pub fn server4(n: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, n).into()
}

pub fn server6(n: u16) -> IpAddr {
    Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, n).into()
}
