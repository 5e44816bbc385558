//! What all commands print with: errors with a remedy, tables, numbers, progress.

use anstyle::{AnsiColor, Style};
use fused_moe::checkpoint::{Checkpoint, TensorProblem};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

pub(crate) const BOLD: Style = Style::new().bold();
pub(crate) const DIM: Style = Style::new().dimmed();
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
pub(crate) const WARN: Style = AnsiColor::Yellow.on_default();
const HELP: Style = AnsiColor::Cyan.on_default();

/// An error with what to do about it.
#[derive(Debug)]
pub(crate) struct Remedied {
    message: String,
    help: String,
    code: u8,
}

/// An error with what to do about it.
pub(crate) fn remedied(message: impl Into<String>, help: impl Into<String>) -> anyhow::Error {
    Remedied { message: message.into(), help: help.into(), code: 1 }.into()
}

/// A command line that makes no sense, with what would: the exit code is 2.
pub(crate) fn misused(message: impl Into<String>, help: impl Into<String>) -> anyhow::Error {
    Remedied { message: message.into(), help: help.into(), code: 2 }.into()
}

/// A checkpoint, or the named one of the language models in it.
pub(crate) fn open(path: &Path, part: Option<&str>) -> anyhow::Result<Checkpoint> {
    match part {
        Some(part) => Checkpoint::open_part(path, part),
        None => Checkpoint::open(path),
    }
    .map_err(checkpoint_error)
}

/// A checkpoint's error: what follows the semicolon of its message is what to do.
pub(crate) fn checkpoint_error(error: fused_moe::checkpoint::Error) -> anyhow::Error {
    use fused_moe::checkpoint::Error;
    let message = error.to_string();
    let elsewhere = match &error {
        Error::Io { source, .. } => match source.kind() {
            io::ErrorKind::OutOfMemory => {
                "the address space has no room for the file; raise `ulimit -v`, or close what else needs memory"
            }
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => "check the path and its permissions",
            _ => "check that it is a regular file or a directory, on a file system that can map files into memory",
        },
        Error::NoSuchPart { .. } => "name one of them with --part",
        Error::UnknownModel { .. } => "check `model_type` in config.json; `fmoe families` lists those that can be read",
        Error::ConfigUnsupported { .. } => {
            "fmoe has no layer for this; if config.json is as its makers published it, report it with that file"
        }
        Error::ConfigMissing { .. }
        | Error::ConfigValue { .. }
        | Error::ConfigContradiction { .. }
        | Error::Config { .. } => "correct config.json, or take the model's own again",
        Error::DenseWithExperts { .. } => "the files and config.json are not of one model, or config.json was changed",
        Error::Tensors { problems, .. } if problems.iter().all(is_format) => {
            "convert the model with save_pretrained to F32, F16 or BF16"
        }
        Error::NoSuchLayer { .. } | Error::DenseLayer { .. } => "`fmoe inspect` lists the layers",
        Error::Tensors { .. } | Error::Layer { .. } => {
            "the files and config.json are not of one model; download both again"
        }
        _ => {
            return match message.rsplit_once("; ") {
                Some((message, help)) => remedied(message, help),
                None => remedied(message, "download or write the file again"),
            };
        }
    };
    remedied(message, elsewhere)
}

fn is_format(problem: &TensorProblem) -> bool {
    matches!(problem, TensorProblem::Format { .. } | TensorProblem::TableFormat { .. })
}

impl fmt::Display for Remedied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Remedied {}

/// Prints an error and its remedy; a reader that has gone away is no error.
pub(crate) fn fail(error: &anyhow::Error) -> ExitCode {
    let gone = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(gone) {
        return ExitCode::SUCCESS;
    }
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            let separator = if text.is_empty() { "" } else { ": " };
            let _ = write!(text, "{separator}{cause}");
        }
    }
    let mut stderr = anstream::stderr().lock();
    let _ = writeln!(stderr, "{BAD}error:{BAD:#} {text}");
    if let Some(help) = help(error) {
        let _ = writeln!(stderr, "{HELP}help:{HELP:#} {help}");
    }
    ExitCode::from(code(error))
}

fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(|cause| cause.downcast_ref::<Remedied>()).map_or(1, |remedied| remedied.code)
}

/// What to do about an error, where anything is known.
pub(crate) fn help(error: &anyhow::Error) -> Option<&str> {
    if let Some(remedied) = error.chain().find_map(|cause| cause.downcast_ref::<Remedied>()) {
        return Some(&remedied.help);
    }
    let of_device = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(fused_moe::cuda::Error::OutOfMemory { .. }))
            || matches!(cause.downcast_ref(), Some(fused_moe::wgpu::Error::OutOfMemory { .. }))
    };
    if error.chain().any(of_device) {
        return Some("free memory of the device, or ask for less: fewer tokens, smaller layers");
    }
    match error.chain().find_map(|cause| cause.downcast_ref::<io::Error>())?.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some("make room, or write the output elsewhere"),
        io::ErrorKind::OutOfMemory => Some("close what else needs memory, or ask for less"),
        _ => None,
    }
}

/// Something worth knowing that is no error.
pub(crate) fn warn(message: impl fmt::Display) {
    let _ = writeln!(anstream::stderr().lock(), "{WARN}warning:{WARN:#} {message}");
}

/// Something that was done.
pub(crate) fn note(message: impl fmt::Display) {
    let _ = writeln!(anstream::stderr().lock(), "{message}");
}

/// Standard output, without colours where nobody sees them; its errors are to be passed on, for a closed pipe is one.
pub(crate) fn stdout() -> impl Write {
    anstream::stdout().lock()
}

/// Pretty JSON and a line end.
pub(crate) fn print_json(value: &serde_json::Value) -> io::Result<()> {
    let mut out = stdout();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)
}

/// How often a long task says how far it is where no terminal shows a bar.
const EVERY: Duration = Duration::from_secs(10);

/// A bar over `length` steps on a terminal, drawn after a second; elsewhere a line every [`EVERY`]. 0 steps: nobody knows.
pub(crate) fn progress(length: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::hidden());
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    let waiting = bar.downgrade();
    let running = move || waiting.upgrade().filter(|bar| !bar.is_finished());
    std::thread::spawn(move || {
        if io::stderr().is_terminal() {
            std::thread::sleep(Duration::from_secs(1));
            if let Some(bar) = running() {
                bar.set_draw_target(ProgressDrawTarget::stderr());
                bar.enable_steady_tick(Duration::from_millis(200));
            }
            return;
        }
        loop {
            std::thread::sleep(EVERY);
            let Some(bar) = running() else { return };
            note(so_far(&bar.message(), bar.position(), bar.length().unwrap_or(0), bar.elapsed()));
        }
    });
    bar
}

/// `checking: 12 of 99 after 20 s`.
fn so_far(what: &str, position: u64, length: u64, time: Duration) -> String {
    let seconds = time.as_secs();
    match length {
        0 => format!("{what}: at it for {seconds} s"),
        length => format!("{what}: {position} of {length} after {seconds} s"),
    }
}

/// Columns of equal width; the first is aligned to the left, the others to the right unless they are said to be text.
#[derive(Debug, Default)]
pub(crate) struct Table {
    header: Vec<String>,
    text: Vec<usize>,
    rows: Vec<Vec<(String, Style)>>,
}

impl Table {
    pub(crate) fn new<const N: usize>(header: [&str; N]) -> Self {
        Self { header: header.map(str::to_owned).into(), text: vec![0], rows: Vec::new() }
    }

    /// One more column, if there is one.
    pub(crate) fn column(mut self, name: Option<&str>) -> Self {
        self.header.extend(name.map(str::to_owned));
        self
    }

    /// Columns that hold words.
    pub(crate) fn text(mut self, columns: &[usize]) -> Self {
        self.text.extend(columns);
        self
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = (String, Style)>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|(cell, _)| cell.chars().count());
            cells.chain(self.header.get(column).map(|name| name.chars().count())).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let header: Vec<_> = self.header.iter().map(|name| (name.clone(), DIM)).collect();
        for row in std::iter::once(&header).chain(&self.rows) {
            for (column, (cell, style)) in row.iter().enumerate() {
                let gap = if column > 0 { "  " } else { "" };
                let width = widths.get(column).copied().unwrap_or(0);
                let last = column + 1 == row.len();
                let padding = width.saturating_sub(cell.chars().count());
                let (before, after) = match self.text.contains(&column) {
                    true if last => (0, 0),
                    true => (0, padding),
                    false => (padding, 0),
                };
                write!(out, "{gap}{:before$}{style}{cell}{style:#}{:after$}", "", "")?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// A cell without colour.
pub(crate) fn plain(cell: impl fmt::Display) -> (String, Style) {
    (cell.to_string(), Style::new())
}

/// `1 layer`, `2 layers`.
pub(crate) fn counted<N: fmt::Display + PartialEq + From<u8>>(n: N, what: &str) -> String {
    let plural = if n == N::from(1) { "" } else { "s" };
    format!("{n} {what}{plural}")
}

/// `1.4 GB`.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 1 };
    format!("{value:.digits$} {}", units[unit])
}

/// `12.3 us`, `4.56 ms`, `1.23 s`.
pub(crate) fn duration(time: Duration) -> String {
    let micros = time.as_secs_f64() * 1e6;
    match micros {
        ..1e3 => format!("{micros:.1} us"),
        1e3..1e6 => format!("{:.2} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

/// Three significant digits.
pub(crate) fn rounded(x: f64) -> String {
    match x.abs() {
        99.95.. => format!("{x:.0}"),
        9.995..99.95 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

/// A bar for each expert, or for each of a few ranges of experts where they are many; empty where no terminal shows it.
pub(crate) fn histogram(counts: &[u32]) -> String {
    const WIDTH: usize = 64;
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    if !io::stdout().is_terminal() || counts.is_empty() {
        return String::new();
    }
    let bins: Vec<u32> =
        counts.chunks(counts.len().div_ceil(WIDTH)).filter_map(|bin| bin.iter().max().copied()).collect();
    let most = bins.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&n: &u32| match n {
        0 => ' ',
        n => BARS[(u64::from(n) * 8).div_ceil(u64::from(most)) as usize - 1],
    };
    bins.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!([0, 999, 1000, 1_500_000].map(bytes), ["0 B", "999 B", "1.0 kB", "1.5 MB"]);
        assert_eq!(bytes(u64::MAX), "18447 PB");
        assert_eq!([0usize, 1, 2].map(|n| counted(n, "row")), ["0 rows", "1 row", "2 rows"]);
        assert_eq!(
            [1.0, 15e3, 2e6].map(|us| duration(Duration::from_secs_f64(us / 1e6))),
            ["1.0 us", "15.00 ms", "2.00 s"]
        );
        assert_eq!([1.234, 12.34, 123.4].map(rounded), ["1.23", "12.3", "123"]);
    }

    #[test]
    fn progress_in_words() {
        assert_eq!(so_far("checking", 12, 99, Duration::from_millis(20_900)), "checking: 12 of 99 after 20 s");
        assert_eq!(so_far("kernels for sm_80", 0, 0, EVERY), "kernels for sm_80: at it for 10 s");
    }

    #[test]
    fn a_misuse_has_a_code_of_its_own() {
        let errors = [remedied("m", "h"), misused("m", "h"), misused("m", "h").context("c"), anyhow::anyhow!("m")];
        assert_eq!(errors.map(|error| code(&error)), [1, 2, 2, 1]);
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["stage", "us"]);
        table.row([plain("gate"), plain("7")]);
        table.row([plain("gate_up"), plain("123")]);
        let mut text = Vec::new();
        table.print(&mut anstream::StripStream::new(&mut text)).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), "stage     us\ngate       7\ngate_up  123\n");
    }
}
