//! Reading what programs tell.

use ebpf_global_svc::{
    Datapath, EventRing, EventRules, KINDS,
    abi::{Event, EventRule},
};

/// All events of these kinds, without a limit.
pub fn all_of(kinds: &[u8]) -> EventRules {
    let mut rules = [None; KINDS];
    for kind in kinds {
        rules[usize::from(*kind)] = Some(EventRule::default());
    }
    rules
}

/// The ring, from now on with all events of these kinds.
pub fn listen(datapath: &mut Datapath, kinds: &[u8]) -> EventRing {
    datapath.set_events(&all_of(kinds)).unwrap();
    datapath.event_ring().unwrap()
}

/// What has been told since the last time.
pub fn told(ring: &mut EventRing) -> Vec<Event> {
    let mut events = Vec::new();
    assert_eq!(ring.read(usize::MAX, &mut events), 0, "records that are none of ours");
    events
}

/// Runs what follows in this thread, and in those that it starts, on one CPU: limits count for each.
pub fn stay_on_one_cpu() {
    // SAFETY: integers only, and the kernel writes no more than their size.
    unsafe {
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        let size = size_of_val(&cpus);
        assert_eq!(libc::sched_getaffinity(0, size, &raw mut cpus), 0);
        let first = (0..libc::CPU_SETSIZE as usize).find(|cpu| libc::CPU_ISSET(*cpu, &cpus)).unwrap();
        libc::CPU_ZERO(&mut cpus);
        libc::CPU_SET(first, &mut cpus);
        assert_eq!(libc::sched_setaffinity(0, size, &raw const cpus), 0);
    }
}
