//! What the guest does: one script that is its first process, and the lines that it says.

/// Begins every line that is ours and not of a program.
const MARK: &str = "@clustermesh-vm@";
/// The guest ends itself so many seconds after its limit, should nobody have ended it.
const GRACE: u64 = 30;

/// How results are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A test program of Rust's.
    Tests,
    /// The scenario runner, or a script that prints as it does.
    Scenarios,
}

/// Something to run in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suite {
    /// Without spaces.
    pub(super) name: String,
    pub(super) kind: Kind,
    /// For the shell.
    pub(super) command: String,
}

/// What the guest says between the lines of its programs.
#[derive(Debug, PartialEq)]
pub(super) enum Event {
    /// It is up; the kernel's release and the seconds since it began.
    Up {
        release: String,
        seconds: f64,
    },
    Begin {
        suite: String,
    },
    End {
        suite: String,
        status: i32,
    },
    /// Something that it cannot work without did not work.
    Broken {
        what: String,
    },
    /// Everything was run.
    Done,
}

/// Where programs and tools are looked for.
pub(super) const PATH: &str = "/opt/clustermesh/bin:/usr/sbin:/usr/bin:/opt/busybox";

/// The first process of the guest. `modules` are files in `/opt/modules`.
pub(super) fn init(modules: &[String], suites: &[Suite], limit: u64) -> String {
    let mut script = format!(
        r#"#!/bin/sh
export PATH={PATH} HOME=/root RUST_BACKTRACE=1
say() {{ echo "{MARK} $*"; }}
broken() {{ say "broken $*"; poweroff -f; }}
busybox=/bin/busybox
$busybox mkdir -p /proc /sys /dev /tmp /run /root /opt/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox mount -t devtmpfs dev /dev
$busybox --install -s /opt/busybox
stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS1 2>&1
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for place in /dev/shm /tmp /run; do mount -t tmpfs -o mode=1777 tmp $place || broken "no tmpfs on $place"; done
mount -t cgroup2 cgroup /sys/fs/cgroup || broken "no cgroup2"
mount -t bpf bpf /sys/fs/bpf || broken "no BPF file system"
(sleep {}; broken "its time was up, and nobody ended it") &
for module in {}; do insmod /opt/modules/$module || broken "module $module is not taken"; done
ip link set lo up || broken "no ip"
cd /src || broken "no folder to work in"
say "up $(uname -r) $(cut -d' ' -f1 /proc/uptime)"
"#,
        limit + GRACE,
        modules.join(" "),
    );
    for Suite { name, command, .. } in suites {
        script +=
            &format!("say 'begin {name}'\n( {command} )\nstatus=$?\necho\nsay \"end {name} $status\"\n");
    }
    script + "say done\nsync\npoweroff -f\n"
}

impl Event {
    /// An event, if this line is one.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let text = line.trim().strip_prefix(MARK)?.trim();
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        match word {
            "up" => {
                let (release, seconds) = rest.split_once(' ')?;
                Some(Self::Up { release: release.to_owned(), seconds: seconds.parse().ok()? })
            }
            "begin" => Some(Self::Begin { suite: rest.to_owned() }),
            "end" => {
                let (suite, status) = rest.split_once(' ')?;
                Some(Self::End { suite: suite.to_owned(), status: status.parse().ok()? })
            }
            "broken" => Some(Self::Broken { what: rest.to_owned() }),
            "done" => Some(Self::Done),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn what_the_script_says_is_understood() {
        let suite = |name: &str, command: &str| Suite {
            name: name.into(),
            kind: Kind::Tests,
            command: command.into(),
        };
        let script =
            init(&["veth.ko".into()], &[suite("good", "true"), suite("bad", "printf x; exit 3")], 60);
        assert!(script.contains("sleep 90"), "{script}");
        // From where it only talks.
        let (setup, talk) = script.split_once("cd /src").unwrap();
        let talk = talk.replace("poweroff -f", "true").split_once('\n').unwrap().1.to_owned();
        let say = setup.lines().find(|line| line.starts_with("say()")).unwrap();
        let output =
            Command::new("sh").arg("-c").arg(format!("{say}\n{talk}")).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let events: Vec<Event> = text.lines().filter_map(Event::parse).collect();
        assert!(matches!(&events[0], Event::Up { seconds, .. } if *seconds > 0.0), "{text}");
        let begin = |suite: &str| Event::Begin { suite: suite.into() };
        let end = |suite: &str, status| Event::End { suite: suite.into(), status };
        assert_eq!(events[1..], [begin("good"), end("good", 0), begin("bad"), end("bad", 3), Event::Done]);
    }

    #[test]
    fn a_programs_lines_are_no_events() {
        assert_eq!(Event::parse("test result: ok. 1 passed"), None);
        assert_eq!(Event::parse("@clustermesh-vm@ end x"), None);
        let what = "module x is not taken".to_owned();
        assert_eq!(
            Event::parse("@clustermesh-vm@ broken module x is not taken\r"),
            Some(Event::Broken { what })
        );
    }
}
