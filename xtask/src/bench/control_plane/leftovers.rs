//! What a run has left behind that was killed: its network namespace and its folder on tmpfs. Its programs
//! end with it ([`super::process`]).

use super::super::exec;
use super::netns;
use std::fs;
use std::path::Path;

/// Where folders on tmpfs are, and how their names begin; the process ID follows.
pub(super) const FOLDERS: &str = "/dev/shm";
pub(super) const FOLDER: &str = "clustermesh-bench-";

/// Removes what runs have left whose process is not there any more, and says so.
pub(super) fn remove() {
    for pid in dead(Path::new("/run/netns"), netns::NAME) {
        eprintln!("removing network namespace {}{pid}, which a killed run has left", netns::NAME);
        // What fails here is in nobody's way; a namespace may be gone, but for its name.
        let _ = exec::run(&format!("ip netns del {}{pid}", netns::NAME));
        let _ = exec::run(&format!("ip link del {}{pid}", netns::CABLE));
    }
    for pid in dead(Path::new(FOLDERS), FOLDER) {
        let path = Path::new(FOLDERS).join(format!("{FOLDER}{pid}"));
        eprintln!("removing {}, which a killed run has left", path.display());
        let _ = fs::remove_dir_all(path);
    }
}

/// Processes that entries of `folder` are named after and that have ended.
fn dead(folder: &Path, prefix: &str) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok());
    pids.filter(|pid: &u32| !Path::new("/proc").join(pid.to_string()).exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_dead_are_removed() {
        let folder = std::env::temp_dir().join(format!("leftovers-{}", std::process::id()));
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let (alive, ended) = (std::process::id(), ended.id());
        for name in [format!("x-{alive}"), format!("x-{ended}"), format!("y-{ended}"), "x-".to_owned()] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        assert_eq!(dead(&folder, "x-"), [ended]);
        fs::remove_dir_all(&folder).unwrap();
        assert!(dead(&folder, "x-").is_empty());
    }
}
