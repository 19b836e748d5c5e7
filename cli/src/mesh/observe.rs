//! `clustermesh observe`: what happens to single packets and calls, on one node or in the whole mesh.

mod filter;
mod follow;
mod json;
mod merge;
mod text;

use std::time::{Duration, SystemTime};

use anyhow::bail;
use clap::{Args, ValueEnum};
use clustermesh_agent_api::v1::observe_response::What;
use clustermesh_agent_api::v1::{ObserveRequest, ObserveResponse};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::Wait;
use super::terminal::{Style, print};
use crate::context::{self, Context};
use crate::error::usage;
use filter::FilterArgs;
use follow::{Heard, Seat};
use merge::Merge;

/// How long a flow is held back, for others that happened before it and come later.
const HOLD: Duration = Duration::from_millis(300);
/// Flows that are shown if nobody says how many.
const LAST: u32 = 20;

/// Show drops, decisions of policies, passed packets and calls, as the nodes see them.
///
/// Drops, refused calls and what audited policies would drop are remembered by every agent; everything else is seen
/// only while somebody follows.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh observe --drops                                   the last drops in the whole lab
  clustermesh observe --context alpha --follow                  everything that happens in alpha
  clustermesh observe --follow --to-pod shop/orders             to pods of that name
  clustermesh observe --type call --service shop/orders --follow   which cluster answers calls
  clustermesh observe --since 5m --verdict DROPPED --reason policy --to-label app=orders
  clustermesh observe --from-cluster beta --port 8080 --follow -o json | jq .flow.source.pod_name")]
pub(crate) struct ObserveArgs {
    /// The cluster: a directory with a context.yaml, or a cluster of a running lab ([LAB/]CLUSTER). Without it: all
    /// clusters of the running lab.
    #[arg(long)]
    context: Option<String>,
    /// Only this node.
    #[arg(long)]
    node: Option<String>,
    /// Go on with what happens from now on.
    #[arg(short, long)]
    follow: bool,
    /// So many of the newest that are remembered [default: 20; with --follow: none, with --since: all]
    #[arg(long, value_name = "N")]
    last: Option<u32>,
    /// Only of this time or later: 5m (ago), or 2026-11-26T15:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<i64>,
    /// With --follow: end after so many.
    #[arg(long, value_name = "N", requires = "follow")]
    limit: Option<u64>,
    /// With --follow: end after so long.
    #[arg(long = "for", value_name = "DURATION", requires = "follow")]
    duration: Option<Wait>,
    /// With --follow: show one of so many passed packets and calls, by chance.
    #[arg(long, value_name = "N", requires = "follow", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
    #[command(flatten)]
    filter: FilterArgs,
    /// How to print them.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Say in each line which node has seen it.
    #[arg(long)]
    print_node_name: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A line for each.
    #[default]
    #[value(alias = "text")]
    Compact,
    /// Columns; not with --follow.
    Table,
    /// An object in each line, as Hubble's.
    #[value(alias = "jsonpb")]
    Json,
}

impl ObserveArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// If an agent cannot be asked; what the others say is printed all the same.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        if self.follow && self.output == Format::Table {
            return Err(usage(
                "a table is drawn when all rows are there: leave out --follow, or use -o compact",
            ));
        }
        let seats = self.seats()?;
        let request = self.request()?;
        let (heard, mut inbox) = mpsc::channel(1024);
        for (number, seat) in seats.iter().enumerate() {
            tokio::spawn(follow::listen(number, seat.clone(), request.clone(), heard.clone()));
        }
        drop(heard);
        let shown =
            if self.follow { self.show_live(&mut inbox).await? } else { self.show_known(&mut inbox).await? };
        match shown.errors.is_empty() {
            true => Ok(()),
            false => bail!("{}", shown.errors.join("; ")),
        }
    }

    /// The agents that are asked.
    fn seats(&self) -> anyhow::Result<Vec<Seat>> {
        let contexts = match &self.context {
            None => context::only_lab()?,
            Some(name) => vec![context::resolve(name)?],
        };
        let seats_of = |context: &Context| {
            let cluster = context.cluster.to_string();
            let agents = context
                .agents
                .iter()
                .filter(|agent| self.node.as_ref().is_none_or(|node| agent.node == *node));
            agents.map(|agent| Seat { cluster: cluster.clone(), agent: agent.clone() }).collect::<Vec<_>>()
        };
        let seats: Vec<Seat> = contexts.iter().flat_map(seats_of).collect();
        match &self.node {
            Some(node) if seats.is_empty() => {
                let all = contexts
                    .iter()
                    .flat_map(|context| context.agents.iter().map(|agent| agent.node.as_str()));
                Err(usage(format!("there is no node {node:?}; there are {}", Vec::from_iter(all).join(", "))))
            }
            _ => Ok(seats),
        }
    }

    fn request(&self) -> anyhow::Result<ObserveRequest> {
        let last = match (self.last, self.since, self.follow) {
            (Some(last), ..) => last,
            (None, None, false) => LAST,
            (None, ..) => 0,
        };
        if last == 0 && !self.follow && self.since.is_none() {
            return Err(usage("--last 0 shows nothing: add --follow, or ask for some"));
        }
        Ok(ObserveRequest {
            filter: Some(self.filter.message()),
            last,
            since_ns: self.since.unwrap_or(0),
            follow: self.follow,
            sample: self.sample,
        })
    }

    /// All that is remembered, once every agent has told.
    async fn show_known(&self, inbox: &mut mpsc::Receiver<(usize, Heard)>) -> anyhow::Result<Shown> {
        let (mut flows, mut shown) = (Vec::new(), Shown::default());
        while let Some((_, heard)) = inbox.recv().await {
            match heard {
                Heard::Told(told) => flows.push(*told),
                Heard::Failed(error) | Heard::Interrupted(error) => shown.errors.push(error),
            }
        }
        flows.sort_by_key(merge::time);
        let last = usize::try_from(self.request()?.last).unwrap_or(usize::MAX);
        if last > 0 {
            flows.drain(..flows.len().saturating_sub(last));
        }
        let printer = Printer::new(self);
        if self.output == Format::Table {
            if !flows.is_empty() || shown.errors.is_empty() {
                print(&text::table(&flows, &printer.zone, printer.style))?;
            }
            return Ok(shown);
        }
        for flow in &flows {
            printer.print(flow)?;
        }
        Ok(shown)
    }

    /// What comes, in the order in which it happened.
    async fn show_live(&self, inbox: &mut mpsc::Receiver<(usize, Heard)>) -> anyhow::Result<Shown> {
        let (printer, begin) = (Printer::new(self), Instant::now());
        let end = self.duration.map(|duration| begin + duration.0);
        // Each agent sends as many of those that it remembers as are to be shown altogether.
        let most = self.last.and_then(|last| usize::try_from(last).ok());
        let mut merge = Merge::new(HOLD, wall_now(), most);
        let (mut shown, mut open) = (Shown::default(), true);
        loop {
            for told in merge.ready(Instant::now().into_std(), !open) {
                let is_flow = matches!(told.what, Some(What::Flow(_)));
                printer.print(&told)?;
                shown.flows += u64::from(is_flow);
                if is_flow && self.limit == Some(shown.flows) {
                    return Ok(shown);
                }
            }
            let wakes = [merge.wakes_at().map(Instant::from_std), end];
            let wake = wakes.into_iter().flatten().min();
            tokio::select! {
                heard = inbox.recv(), if open => match heard {
                    Some((_, Heard::Told(told))) => merge.push(*told, Instant::now().into_std()),
                    Some((_, Heard::Failed(error))) => shown.errors.push(error),
                    Some((_, Heard::Interrupted(error))) => eprintln!("{error}; trying again"),
                    None => open = false,
                },
                () = sleep_until(wake.unwrap_or(begin)), if wake.is_some() => {}
                else => return Ok(shown),
            }
            if end.is_some_and(|end| end <= Instant::now()) {
                for told in merge.ready(Instant::now().into_std(), true) {
                    printer.print(&told)?;
                }
                return Ok(shown);
            }
        }
    }
}

/// What was printed, and what could not be.
#[derive(Default)]
struct Shown {
    flows: u64,
    errors: Vec<String>,
}

struct Printer {
    format: Format,
    style: Style,
    zone: TimeZone,
    with_node: bool,
}

impl Printer {
    fn new(args: &ObserveArgs) -> Self {
        Self {
            format: args.output,
            style: Style::of_stdout(),
            zone: TimeZone::system(),
            with_node: args.print_node_name,
        }
    }

    /// A flow is a result; what is missing is a remark, but for programs.
    fn print(&self, told: &ObserveResponse) -> anyhow::Result<()> {
        match (&told.what, self.format) {
            (Some(_), Format::Json) => print(&json::line(told).to_string()),
            (Some(What::Flow(flow)), _) => print(&text::line(flow, &self.zone, self.style, self.with_node)),
            (Some(What::Lost(lost)), _) => {
                eprintln!("{}", text::lost(lost, &self.zone));
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }
}

fn wall_now() -> i64 {
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::MAX);
    i64::try_from(now.as_nanosecond()).unwrap_or(i64::MAX)
}

/// Nanoseconds since the Unix epoch.
fn since(text: &str) -> Result<i64, String> {
    let malformed =
        || "write a duration such as 30s or 5m, or a time such as 2026-11-26T15:00:00Z".to_owned();
    let time = match text.parse::<SignedDuration>() {
        Ok(ago) if ago.is_negative() => return Err(malformed()),
        Ok(ago) => Timestamp::now().checked_sub(ago).map_err(|_| malformed())?,
        Err(_) => text.parse().map_err(|_| malformed())?,
    };
    i64::try_from(time.as_nanosecond()).map_err(|_| malformed())
}

#[cfg(test)]
#[path = "observe/tests.rs"]
mod tests;
