//! Counting packets: numbered datagrams, sent at a pace and whatever becomes of those before, each of which has to
//! come back.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{Netns, SetAtEnd, pair::PATIENCE};

/// From one datagram to the next.
const PACE: Duration = Duration::from_micros(250);
/// A machine that stands still for a second or two must not lose any in a queue.
static QUEUE: libc::c_int = 16 << 20;

/// What became of all datagrams.
#[derive(Debug)]
pub struct Counted {
    pub sent: u64,
    /// Numbers of those that did not come back.
    pub lost: Vec<u64>,
    /// Came back from elsewhere than they were sent to.
    pub strange: u64,
}

/// Has a socket hold so much that only the network loses datagrams.
pub fn widen(socket: &UdpSocket) {
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        // SAFETY: a valid descriptor, and a value of the size that is passed.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const QUEUE).cast(),
                libc::socklen_t::try_from(size_of_val(&QUEUE)).unwrap(),
            )
        };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Sends datagrams through one socket per target while `change` runs; at least `least` to each before and after it.
/// Every target echoes them.
pub fn count_packets<T>(
    netns: &Netns,
    targets: &[SocketAddr],
    least: u64,
    change: impl FnOnce() -> T,
) -> (T, Vec<Counted>) {
    let stop = AtomicBool::new(false);
    let sent: Vec<AtomicU64> = targets.iter().map(|_| AtomicU64::new(0)).collect();
    let reach = |number: u64| {
        let begin = Instant::now();
        while sent.iter().any(|sent| sent.load(Ordering::Acquire) < number) {
            assert!(begin.elapsed() < 6 * PATIENCE, "datagrams are not even sent");
            thread::park_timeout(PACE);
        }
    };
    thread::scope(|scope| {
        let streams: Vec<_> = targets
            .iter()
            .zip(&sent)
            .map(|(target, sent)| scope.spawn(|| netns.run(|| stream(*target, sent, &stop))))
            .collect();
        let end = SetAtEnd(&stop);
        reach(least);
        let result = change();
        let now = sent.iter().map(|sent| sent.load(Ordering::Acquire)).max();
        reach(now.unwrap_or(0) + least);
        drop(end);
        (result, streams.into_iter().map(|stream| stream.join().unwrap()).collect())
    })
}

fn stream(target: SocketAddr, sent: &AtomicU64, stop: &AtomicBool) -> Counted {
    let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    widen(&socket);
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    wait_for_path(&socket, target);
    let back = Mutex::new((Vec::<bool>::new(), 0));
    let complete = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 64];
            while !complete.load(Ordering::Acquire) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let number = u64::from_be_bytes(buffer[..length].try_into().unwrap());
                let mut back = back.lock().unwrap();
                let at = usize::try_from(number).unwrap();
                if back.0.len() <= at {
                    back.0.resize(at + 1, false);
                }
                back.0[at] = true;
                back.1 += u64::from(from != target);
            }
        });
        let mut next = Instant::now();
        while !stop.load(Ordering::Acquire) {
            let number = sent.load(Ordering::Acquire);
            socket.send_to(&number.to_be_bytes(), target).unwrap();
            sent.store(number + 1, Ordering::Release);
            next = (next + PACE).max(Instant::now());
            thread::park_timeout(next.saturating_duration_since(Instant::now()));
        }
        let all = sent.load(Ordering::Acquire);
        let begin = Instant::now();
        let missing = || {
            let back = back.lock().unwrap();
            (0..all)
                .filter(|n| !back.0.get(usize::try_from(*n).unwrap()).is_some_and(|is| *is))
                .collect::<Vec<_>>()
        };
        while !missing().is_empty() && begin.elapsed() < PATIENCE / 2 {
            thread::park_timeout(Duration::from_millis(5));
        }
        complete.store(true, Ordering::Release);
        Counted { sent: all, lost: missing(), strange: back.lock().unwrap().1 }
    })
}

/// A kernel that is busy takes its time to start using interfaces that have just been made.
fn wait_for_path(socket: &UdpSocket, target: SocketAddr) {
    let begin = Instant::now();
    let mut buffer = [0; 64];
    loop {
        socket.send_to(b"?", target).unwrap();
        if socket.recv_from(&mut buffer).is_ok() {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "{target} does not answer at all");
    }
    // Of those that were late.
    while socket.recv_from(&mut buffer).is_ok() {}
}

/// Fails if a packet of any stream was lost, or came from elsewhere.
#[track_caller]
pub fn assert_none_lost(counted: &[Counted]) {
    for stream in counted {
        let first = &stream.lost[..stream.lost.len().min(8)];
        assert!(first.is_empty(), "{} of {} lost, the first {first:?}", stream.lost.len(), stream.sent);
        assert_eq!(stream.strange, 0, "of {} came from elsewhere", stream.sent);
    }
    let sent: u64 = counted.iter().map(|stream| stream.sent).sum();
    println!("{sent} packets, none lost");
}
