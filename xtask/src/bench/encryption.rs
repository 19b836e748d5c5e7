//! `cargo xtask bench encryption`: what encryption costs in the mesh, beside a bare tunnel of the same kind on the same two
//! nodes. In virtual machines, for kernels with WireGuard and ESP; their processors are interpreted, so only ratios mean
//! something.

use super::Output;
use super::report::table;
use super::series::{Series, Summary};
use crate::vm;
use anyhow::{Context as _, ensure};
use comfy_table::Table;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the guest runs.
const SCRIPT: &str = include_str!("encryption.sh");
/// In the order of the tables, with what the mesh stands beside.
const KINDS: [(&str, &str); 3] =
    [("none", "plain routing"), ("wireguard", "a WireGuard tunnel"), ("ipsec", "an ESP tunnel")];

/// WireGuard and IPsec between nodes beside bare tunnels, in a virtual machine (needs root).
#[derive(Debug, clap::Args)]
pub(super) struct EncryptionArgs {
    /// Kernel of the virtual machine.
    #[arg(long, default_value = "6.1", value_parser = ["6.1", "6.12"])]
    kernel: String,
    /// How often each way is measured; the ways take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
    /// Length of one measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// How the result is printed; progress goes to standard error.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

/// Everything that was measured.
#[derive(Serialize)]
struct Findings {
    kernel: String,
    rounds: u32,
    seconds: u32,
    figures: Vec<Figure>,
}

/// One kind of encryption.
#[derive(Serialize)]
struct Figure {
    encryption: &'static str,
    bare: &'static str,
    /// One TCP stream.
    gbit_per_second: Pair,
    /// Median of a byte forth and back over one TCP connection.
    round_trip_us: Pair,
}

#[derive(Clone, Copy, Serialize)]
struct Pair {
    bare: Summary,
    mesh: Summary,
    /// How much of the bare one's the mesh reaches: 1 is the same.
    ratio: f64,
}

/// What the probe says of a stream, or of round trips.
#[derive(Deserialize)]
struct Said {
    gbit_per_second: Option<f64>,
    round_trip_us: Option<super::variant::Percentiles>,
}

/// Measures and prints.
pub(super) fn run(args: &EncryptionArgs) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    let script = vm::Script {
        name: "encryption",
        text: SCRIPT,
        arguments: &format!("{} {}", args.rounds, args.seconds),
        // What it takes when the machine has other things to do as well, four times.
        limit: 600 + u64::from(args.rounds * args.seconds) * 60,
        needs: vm::Needs::default(),
    };
    vm::measure(&args.kernel, &script, |line| {
        eprintln!("  {line}");
        lines.extend(line.contains("figure\t").then(|| line.to_owned()));
    })?;
    let findings = Findings {
        kernel: args.kernel.clone(),
        rounds: args.rounds,
        seconds: args.seconds,
        figures: figures(&lines)?,
    };
    match args.output {
        Output::Text => print!("{}", findings.text()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
    }
    Ok(())
}

/// From `figure<TAB>ENCRYPTION<TAB>WAY<TAB>JSON`.
fn figures(lines: &[String]) -> anyhow::Result<Vec<Figure>> {
    let mut all: BTreeMap<(String, String, bool), Series> = BTreeMap::new();
    for line in lines {
        let fields: Vec<_> = line.trim().splitn(4, '\t').collect();
        let [_, encryption, way, said] = fields[..] else { continue };
        let said: Said = serde_json::from_str(said).with_context(|| format!("the guest said {line:?}"))?;
        let mut push = |is_stream, figure| {
            all.entry((encryption.to_owned(), way.to_owned(), is_stream)).or_default().push(figure);
        };
        if let Some(gbit) = said.gbit_per_second {
            push(true, gbit);
        }
        if let Some(trip) = said.round_trip_us {
            push(false, trip.p50);
        }
    }
    let summary = |encryption: &str, way: &str, is_stream| {
        let series = all.get(&(encryption.to_owned(), way.to_owned(), is_stream));
        series.and_then(Series::summary).with_context(|| format!("no figures of {encryption}, {way}"))
    };
    KINDS
        .iter()
        .map(|(encryption, peer)| {
            let pair = |is_stream| {
                let (bare, mesh) =
                    (summary(encryption, "bare", is_stream)?, summary(encryption, "mesh", is_stream)?);
                ensure!(bare.median > 0.0 && mesh.median > 0.0, "nothing went by {encryption}");
                let (more, less) = if is_stream { (mesh, bare) } else { (bare, mesh) };
                Ok(Pair { bare, mesh, ratio: more.median / less.median })
            };
            let (gbit_per_second, round_trip_us) = (pair(true)?, pair(false)?);
            Ok(Figure { encryption, bare: peer, gbit_per_second, round_trip_us })
        })
        .collect()
}

impl Findings {
    fn text(&self) -> String {
        let Self { kernel, rounds, seconds, .. } = self;
        format!(
            "Linux {kernel} in a virtual machine without hardware support, {rounds} rounds of {seconds} s\n{}\n",
            self.table()
        )
    }

    fn table(&self) -> Table {
        let rows = self.figures.iter().flat_map(|figure| {
            let streams = figure.gbit_per_second;
            let trips = figure.round_trip_us;
            let row = |what: &str, Pair { bare, mesh, ratio }: Pair, digits| {
                let cell = |Summary { median, min, max }| {
                    format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
                };
                let name = match figure.encryption {
                    "none" => "nothing encrypted",
                    other => other,
                };
                vec![
                    format!("{name}: {what}"),
                    format!("{} by {}", cell(bare), figure.bare),
                    cell(mesh),
                    format!("{ratio:.2}"),
                ]
            };
            [row("one stream, Gbit/s", streams, 3), row("TCP round trip, µs", trips, 0)]
        });
        table(&["", "without the mesh", "mesh", "ratio"], rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_ratios_of_medians_of_the_same_kind() {
        let mut lines = Vec::new();
        for (encryption, _) in KINDS {
            for (way, gbit, trip) in [("bare", 0.2, 100.0), ("mesh", 0.1, 200.0)] {
                lines.push(format!(
                    "  figure\t{encryption}\t{way}\t{{\"bytes\":1,\"gbit_per_second\":{gbit}}}\r"
                ));
                lines.push(format!("figure\t{encryption}\t{way}\t{{\"round_trip_us\":{{\"p50\":{trip}}}}}"));
            }
        }
        let figures = figures(&lines).unwrap();
        assert_eq!(figures.len(), 3);
        for figure in &figures {
            assert!((figure.gbit_per_second.ratio - 0.5).abs() < 1e-9, "half of the stream");
            assert!((figure.round_trip_us.ratio - 0.5).abs() < 1e-9, "twice the time");
        }
        lines.retain(|line| !line.contains("ipsec\tmesh"));
        super::figures(&lines).err().expect("one is missing");
    }
}
