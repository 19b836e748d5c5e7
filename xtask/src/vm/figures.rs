//! How many instructions the verifier looked at, per program and kernel, beside what it used to be.
//!
//! The table is in a page of the documentation and is written by `cargo xtask vm --accept`.

use anyhow::Context as _;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// More than this above what was accepted is a jump.
const TOLERANCE_PERCENT: u64 = 10;
/// Of a program of a hundred instructions a few more are none.
const TOLERANCE: u64 = 50;
const BEGIN: &str = "<!-- figures -->\n";
const END: &str = "<!-- end of figures -->\n";
/// A kernel of which nothing was accepted yet.
const NOTHING: &str = "-";

/// By program, in instructions.
pub(crate) type Figures = BTreeMap<String, u64>;

/// What was accepted, by kernel series (`6.1`).
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Accepted(BTreeMap<Series, Figures>);

/// In the order of versions, not of letters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Series(Vec<u32>, String);

impl Series {
    fn new(name: &str) -> Self {
        Self(name.split('.').map_while(|number| number.parse().ok()).collect(), name.to_owned())
    }
}

/// `cm_from_pod 7706 verified, 2733 long`, as the test of the tables prints it.
pub(crate) fn parse(line: &str) -> Option<(String, u64)> {
    let (program, rest) = line.trim().split_once(' ')?;
    let (verified, rest) = rest.trim().split_once(' ')?;
    rest.starts_with("verified, ").then_some(())?;
    Some((program.to_owned(), verified.parse().ok()?))
}

impl Accepted {
    /// Reads the table in a page.
    ///
    /// # Errors
    /// If there is no table, or a row of it is no row.
    pub(crate) fn read(page: &str) -> anyhow::Result<Self> {
        let (_, table, _) = split(page)?;
        let mut rows = table.lines().map(cells);
        let header = rows.next().context("the table of figures is empty")?;
        let series: Vec<Series> = header.iter().skip(1).map(|name| Series::new(name)).collect();
        let mut accepted: BTreeMap<Series, Figures> =
            series.iter().map(|series| (series.clone(), Figures::new())).collect();
        for row in rows.skip(1) {
            let wrong = || format!("the table of figures has a row that is none: {}", row.join(" | "));
            anyhow::ensure!(row.len() == series.len() + 1, wrong());
            for (series, cell) in series.iter().zip(&row[1..]).filter(|(_, cell)| **cell != NOTHING) {
                let program = row[0].trim_matches('`').to_owned();
                accepted
                    .entry(series.clone())
                    .or_default()
                    .insert(program, cell.parse().with_context(wrong)?);
            }
        }
        Ok(Self(accepted))
    }

    /// The page with this table in it.
    pub(crate) fn write(&self, page: &str) -> anyhow::Result<String> {
        let (before, _, after) = split(page)?;
        let mut table = String::from("| Program |");
        self.0.keys().for_each(|Series(_, name)| table += &format!(" {name} |"));
        table += "\n|---|";
        self.0.keys().for_each(|_| table += "---|");
        table += "\n";
        let mut programs: Vec<&String> = self.0.values().flat_map(BTreeMap::keys).collect();
        programs.sort();
        programs.dedup();
        for program in programs {
            write!(table, "| `{program}` |")?;
            for figures in self.0.values() {
                let figure = figures.get(program).map_or_else(|| NOTHING.to_owned(), u64::to_string);
                write!(table, " {figure} |")?;
            }
            table += "\n";
        }
        Ok(format!("{before}{BEGIN}{table}{END}{after}"))
    }

    /// Whether the table has a column for a kernel.
    pub(crate) fn knows(&self, series: &str) -> bool {
        self.0.contains_key(&Series::new(series))
    }

    /// Takes what a kernel says now.
    pub(crate) fn accept(&mut self, series: &str, figures: Figures) {
        self.0.insert(Series::new(series), figures);
    }

    /// What is wrong with what a kernel says now, a line for each program; nothing if nothing is.
    pub(crate) fn compare(&self, series: &str, now: &Figures) -> Vec<String> {
        let nothing = Figures::new();
        let accepted = self.0.get(&Series::new(series)).unwrap_or(&nothing);
        let mut wrong = Vec::new();
        for (program, verified) in now {
            match accepted.get(program) {
                None => wrong.push(format!("{program}: {verified}, and there is no figure to compare with")),
                Some(old) if *verified > limit(*old) => {
                    wrong.push(format!(
                        "{program}: {verified}, {} % more than {old}",
                        (verified - old) * 100 / old.max(&1)
                    ));
                }
                Some(_) => {}
            }
        }
        let gone = accepted.keys().filter(|program| !now.contains_key(*program));
        wrong.extend(gone.map(|program| format!("{program}: there is no such program any more")));
        wrong
    }
}

/// The most that is no jump.
fn limit(accepted: u64) -> u64 {
    accepted + (accepted * TOLERANCE_PERCENT / 100).max(TOLERANCE)
}

/// What is before, in and after the table.
fn split(page: &str) -> anyhow::Result<(&str, &str, &str)> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("there is no line {BEGIN:?}"))?;
    let (table, after) = rest.split_once(END).with_context(|| format!("there is no line {END:?}"))?;
    Ok((before, table, after))
}

fn cells(row: &str) -> Vec<&str> {
    row.trim().trim_matches('|').split('|').map(str::trim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# Verifier\n\n<!-- figures -->\n\
        | Program | 6.1 | 6.12 |\n|---|---|---|\n\
        | `cm_from_pod` | 7000 | - |\n| `cm_recvmsg4` | 100 | 115 |\n\
        <!-- end of figures -->\nMore.\n";

    fn figures(all: &[(&str, u64)]) -> Figures {
        all.iter().map(|(program, verified)| ((*program).to_owned(), *verified)).collect()
    }

    #[test]
    fn the_table_is_read_and_written() {
        let mut accepted = Accepted::read(PAGE).unwrap();
        assert_eq!(accepted.write(PAGE).unwrap(), PAGE);
        assert!(accepted.knows("6.12") && !accepted.knows("6.18"));
        accepted.accept("6.2", figures(&[("cm_new", 5)]));
        let page = accepted.write(PAGE).unwrap();
        assert!(page.contains("| Program | 6.1 | 6.2 | 6.12 |\n"), "{page}");
        assert!(page.contains("| `cm_new` | - | 5 | - |\n"), "{page}");
        assert!(page.starts_with("# Verifier") && page.ends_with("More.\n"), "{page}");
        assert_eq!(Accepted::read(&page).unwrap(), accepted);
        Accepted::read("nothing").unwrap_err();
        Accepted::read(&PAGE.replace("7000", "many")).unwrap_err();
        Accepted::read(&PAGE.replace("| 7000 ", "")).unwrap_err();
    }

    #[test]
    fn jumps_are_found() {
        let accepted = Accepted::read(PAGE).unwrap();
        let wrong = |all: &[(&str, u64)]| accepted.compare("6.1", &figures(all));
        assert_eq!(wrong(&[("cm_from_pod", 7_700), ("cm_recvmsg4", 150)]), Vec::<String>::new());
        assert_eq!(
            wrong(&[("cm_from_pod", 3_000), ("cm_recvmsg4", 1)]),
            Vec::<String>::new(),
            "fewer is fine"
        );
        let told = wrong(&[("cm_from_pod", 7_710), ("cm_recvmsg4", 151)]);
        assert_eq!(told, ["cm_from_pod: 7710, 10 % more than 7000", "cm_recvmsg4: 151, 51 % more than 100"]);
        assert_eq!(wrong(&[("cm_from_pod", 7_000), ("cm_recvmsg4", 100), ("cm_new", 1)]).len(), 1);
        assert_eq!(wrong(&[("cm_from_pod", 7_000)]), ["cm_recvmsg4: there is no such program any more"]);
        assert_eq!(accepted.compare("6.18", &figures(&[("cm_from_pod", 1)])).len(), 1);
    }

    #[test]
    fn reads_what_the_test_prints() {
        let line = "cm_from_pod        7706 verified,  2733 long";
        assert_eq!(parse(line), Some(("cm_from_pod".into(), 7706)));
        assert_eq!(parse("test programs_stay ... ok"), None);
        assert_eq!(parse("cm_from_pod none verified, 1 long"), None);
    }
}
