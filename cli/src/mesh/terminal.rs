//! How results look: symbols and colours where a person reads them, plain ASCII in pipes and logs.

use std::io::IsTerminal as _;

use super::plan::Outcome;

/// What standard output can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Symbols and ANSI colours.
    Rich,
    /// ASCII.
    Plain,
}

/// Colours by meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Doubtful,
    Bad,
}

impl Style {
    /// Rich on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
    pub(crate) fn of_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stdout().is_terminal() && !refused { Self::Rich } else { Self::Plain }
    }

    /// The symbol in front of a line.
    pub(crate) fn mark(self, outcome: Outcome) -> &'static str {
        match (self, outcome) {
            (Self::Rich, Outcome::Pass) => "✅",
            // The trailing space belongs to it: terminals draw U+26A0 U+FE0F one cell too narrow.
            (Self::Rich, Outcome::Warn) => "⚠️ ",
            (Self::Rich, Outcome::Fail) => "❌",
            (Self::Rich, Outcome::Skipped) => "➖",
            (Self::Plain, Outcome::Pass) => "[ok]  ",
            (Self::Plain, Outcome::Warn) => "[warn]",
            (Self::Plain, Outcome::Fail) => "[FAIL]",
            (Self::Plain, Outcome::Skipped) => "[skip]",
        }
    }

    /// `rich` where symbols can be shown, else `plain`.
    pub(crate) fn pick(self, rich: &'static str, plain: &'static str) -> &'static str {
        match self {
            Self::Rich => rich,
            Self::Plain => plain,
        }
    }

    /// `text` in the colour that means `tone`.
    pub(crate) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => 32,
            Tone::Doubtful => 33,
            Tone::Bad => 31,
        };
        match self {
            Self::Rich => format!("\x1b[{code}m{text}\x1b[0m"),
            Self::Plain => text.into(),
        }
    }
}

/// `text` on one line and without control characters. Messages of agents quote keys and errors of other
/// clusters, which must not break the layout, let alone drive the terminal.
pub(crate) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// Prints `text` and a line feed. A reader that has gone away (`| head`) is not an error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_drive_the_terminal() {
        assert_eq!(one_line("a key\n\x1b[2Jgone\u{9b}31m\tok "), "a key [2Jgone 31m ok");
    }

    #[test]
    fn plain_output_is_ascii() {
        for outcome in [Outcome::Pass, Outcome::Warn, Outcome::Fail, Outcome::Skipped] {
            assert!(Style::Plain.mark(outcome).is_ascii());
        }
        assert_eq!(Style::Plain.paint(Tone::Bad, "text"), "text");
    }
}
