//! `records/<device>/<date>.csv` and JSON.

use super::backward::PassesTiming;
use super::machine::Ceilings;
use super::measure::{Spans, Timing};
use super::meter::Pass;
use crate::output::remedied;
use anyhow::{Context, Result};
use fused_moe::config::LayerConfig;
use serde_json::{Value, json};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What all rows of a run have in common.
#[derive(Debug)]
pub(crate) struct Setting<'a> {
    pub(crate) version: &'a str,
    pub(crate) backend: &'a str,
    pub(crate) device: String,
    pub(crate) threads: Option<usize>,
    /// The processor's instruction set in use.
    pub(crate) isa: Option<String>,
    pub(crate) shape: &'a str,
    pub(crate) config: &'a LayerConfig,
    pub(crate) dtype: String,
    pub(crate) routing: String,
    pub(crate) from: String,
    pub(crate) numerics: String,
    pub(crate) layers: usize,
    pub(crate) ceilings: Ceilings,
    /// Whose arithmetic the rate is.
    pub(crate) arithmetic: String,
    /// The backend that was measured beside it.
    pub(crate) beside: Option<String>,
}

/// Times in microseconds, rates in 10^9 a second; bytes and flops are those a call needs at least; a run is timed as a
/// whole and divided by its calls.
const HEADER: &str = "date,version,backend,device,threads,shape,hidden,intermediate,experts,top_k,dtype,routing,tokens,\
layers,runs,median_us,p10_us,p90_us,touched_experts,bytes,flops,gb_s,gflop_s,read_gb_s,arithmetic_gflop_s,floor_us,\
max_error,from,calls,byte_floor_us,flop_floor_us,arithmetic_by,beside_us,beside,numerics,isa";

/// Name and value of every column of a row, in the order of the header.
fn columns(setting: &Setting<'_>, timing: &Timing) -> Vec<Value> {
    let config = setting.config;
    let [read, arithmetic] = timing.floors(&setting.ceilings);
    vec![
        json!(today()),
        json!(setting.version),
        json!(setting.backend),
        json!(setting.device),
        json!(setting.threads),
        json!(setting.shape),
        json!(config.hidden),
        json!(config.intermediate),
        json!(config.experts),
        json!(config.top_k),
        json!(setting.dtype),
        json!(setting.routing),
        json!(timing.tokens),
        json!(setting.layers),
        json!(timing.runs),
        micros(timing.median),
        micros(timing.spread[0]),
        micros(timing.spread[1]),
        json!((timing.touched * 10.0).round() / 10.0),
        json!(timing.cost.bytes),
        json!(timing.cost.flops),
        giga(timing.bandwidth()),
        giga(timing.arithmetic()),
        giga(setting.ceilings.bandwidth),
        giga(timing.rate(&setting.ceilings)),
        micros(timing.floor(&setting.ceilings)),
        json!(timing.verified.error),
        json!(setting.from),
        json!(timing.calls),
        micros(read),
        micros(arithmetic),
        json!(setting.arithmetic),
        timing.beside.map_or(Value::Null, micros),
        json!(setting.beside),
        json!(setting.numerics),
        json!(setting.isa),
    ]
}

/// The columns of passes: those that a call has too, then the times of each pass and the backward pass over either of the
/// others. Bytes, flops, rates and floors are the backward pass's.
const PASSES_HEADER: &str = "date,version,backend,device,threads,shape,hidden,intermediate,experts,top_k,dtype,routing,\
tokens,from,runs,calls,touched_experts,forward_us,forward_p10_us,forward_p90_us,saving_us,saving_p10_us,saving_p90_us,\
backward_us,backward_p10_us,backward_p90_us,of_forward,of_saving,kept_bytes_a_token,bytes,flops,gb_s,gflop_s,read_gb_s,\
arithmetic_gflop_s,byte_floor_us,flop_floor_us,arithmetic_by,max_error,isa";

fn passes_columns(setting: &Setting<'_>, timing: &PassesTiming) -> Vec<Value> {
    let PassesTiming { backward, passes, kept, .. } = timing;
    let hundredth = |x: f64| json!((x * 100.0).round() / 100.0);
    let mut columns = vec![
        json!(today()),
        json!(setting.version),
        json!(setting.backend),
        json!(setting.device),
        json!(setting.threads),
        json!(setting.shape),
        json!(setting.config.hidden),
        json!(setting.config.intermediate),
        json!(setting.config.experts),
        json!(setting.config.top_k),
        json!(setting.dtype),
        json!(setting.routing),
        json!(backward.tokens),
        json!(setting.from),
        json!(backward.runs),
        json!(backward.calls),
        json!((backward.touched * 10.0).round() / 10.0),
    ];
    for Spans { median, spread: [low, high] } in passes {
        columns.extend([median, low, high].map(|time| micros(*time)));
    }
    let [read, arithmetic] = backward.floors(&setting.ceilings);
    columns.extend([
        hundredth(timing.over(Pass::Forward)),
        hundredth(timing.over(Pass::Saving)),
        json!(kept),
        json!(backward.cost.bytes),
        json!(backward.cost.flops),
        giga(backward.bandwidth()),
        giga(backward.arithmetic()),
        giga(setting.ceilings.bandwidth),
        giga(backward.rate(&setting.ceilings)),
        micros(read),
        micros(arithmetic),
        json!(setting.arithmetic),
        json!(backward.verified.error),
        json!(setting.isa),
    ]);
    columns
}

/// What rows of a file have in them.
#[derive(Debug)]
pub(crate) struct Kind {
    /// What the name of a CSV file has behind the date.
    suffix: &'static str,
    header: &'static str,
}

/// Calls of a layer.
pub(crate) const CALLS: Kind = Kind { suffix: "", header: HEADER };
/// Passes of a training step.
pub(crate) const PASSES: Kind = Kind { suffix: "-backward", header: PASSES_HEADER };

/// Rows of a file.
#[derive(Debug)]
pub(crate) struct Rows {
    kind: Kind,
    /// A value a column.
    rows: Vec<Vec<Value>>,
}

impl Rows {
    /// A row a batch size.
    pub(crate) fn calls(setting: &Setting<'_>, timings: &[Timing]) -> Self {
        let rows = timings.iter().map(|timing| columns(setting, timing)).collect();
        Self { kind: CALLS, rows }
    }

    /// A row a batch size.
    pub(crate) fn passes(setting: &Setting<'_>, timings: &[PassesTiming]) -> Self {
        let rows = timings.iter().map(|timing| passes_columns(setting, timing)).collect();
        Self { kind: PASSES, rows }
    }

    /// An object a row, with the columns as keys.
    pub(crate) fn json(&self) -> Value {
        let object = |row: &Vec<Value>| -> Value {
            self.kind.header.split(',').map(str::to_owned).zip(row.clone()).collect::<serde_json::Map<_, _>>().into()
        };
        self.rows.iter().map(object).collect()
    }
}

fn micros(time: Duration) -> Value {
    json!((time.as_secs_f64() * 1e7).round() / 10.0)
}

/// In 10^9 a second.
fn giga(rate: f64) -> Value {
    json!((rate / 1e7).round() / 100.0)
}

/// Errors before anything is measured where a file could not be written; leaves no trace. What is no file, as a pipe, is not
/// opened: who reads it would take that for the end.
pub(crate) fn writable(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let tried = standing(path).and_then(|there| match there {
        Some(there) if there.is_file() || there.is_dir() => OpenOptions::new().append(true).open(path).map(|_| ()),
        Some(there) if there.permissions().readonly() => Err(io::ErrorKind::PermissionDenied.into()),
        Some(_) => Ok(()),
        None => tempfile::tempfile_in(folder).map(|_| ()),
    });
    tried.map_err(|error| unwritable(path, &error))
}

/// What is at a path; none where there is nothing, not even a symbolic link.
fn standing(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::metadata(path) {
        Ok(there) => Ok(Some(there)),
        Err(error) if fs::symlink_metadata(path).is_ok() => {
            Err(io::Error::new(error.kind(), format!("the target of this symbolic link: {error}")))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a folder of records, and errors before anything is measured where it cannot be written.
pub(crate) fn prepare(folder: &Path) -> Result<()> {
    if fs::metadata(folder).is_ok_and(|there| !there.is_dir()) {
        let message = format!("{}: cannot write records: is no directory", folder.display());
        return Err(remedied(message, "move it away, or give another directory to --record"));
    }
    let tried = fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
    tried.map(|_| ()).map_err(|error| unwritable(folder, &error))
}

fn unwritable(path: &Path, error: &io::Error) -> anyhow::Error {
    remedied(format!("{}: cannot write: {error}", path.display()), "make its folder, or name another place")
}

/// The file of the day.
fn file_of(directory: &Path, device: &str, kind: &Kind) -> PathBuf {
    directory.join(slug(device)).join(format!("{}{}.csv", today(), kind.suffix))
}

/// Errors before anything is measured where rows could not be appended to the file of the day.
pub(crate) fn appendable(directory: &Path, device: &str, kind: &Kind) -> Result<()> {
    let path = file_of(directory, device, kind);
    path.parent().map_or(Ok(()), prepare)?;
    opened(&path, kind).map(|_| ())
}

/// A file that rows can be appended to and what has to be written before them; none where there is no file yet.
fn opened(path: &Path, kind: &Kind) -> Result<Option<(File, String)>> {
    let failed = |error: io::Error| unwritable(path, &error);
    match standing(path).map_err(failed)? {
        None => return Ok(None),
        Some(there) if !there.is_file() => {
            let message = format!("{}: cannot write: is no regular file", path.display());
            return Err(remedied(message, "move it away, or give another directory to --record"));
        }
        Some(_) => {}
    }
    let mut file = OpenOptions::new().read(true).append(true).open(path).map_err(failed)?;
    let mut start = Vec::new();
    (&mut file).take(kind.header.len() as u64 + 2).read_to_end(&mut start).map_err(failed)?;
    if start.is_empty() {
        return Ok(Some((file, format!("{}\n", kind.header))));
    }
    if !matches!(start.strip_prefix(kind.header.as_bytes()), Some([] | [b'\n', ..] | [b'\r', b'\n'])) {
        let message = format!("{}: has other columns than this version of fmoe writes", path.display());
        return Err(remedied(message, "move the file away, or give another directory to --record"));
    }
    // an earlier run may have been stopped within a line
    let mut last = [0];
    file.seek(SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut last)).map_err(failed)?;
    Ok(Some((file, if last == *b"\n" { String::new() } else { "\n".to_owned() })))
}

/// Appends rows to the file of the day; returns it.
pub(crate) fn append(directory: &Path, device: &str, rows: &Rows) -> Result<PathBuf> {
    let path = file_of(directory, device, &rows.kind);
    path.parent().map_or(Ok(()), prepare)?;
    let failed = || format!("{}: cannot write", path.display());
    let (mut file, mut text) = match opened(&path, &rows.kind)? {
        Some(there) => there,
        None => {
            let file = OpenOptions::new().append(true).create(true).open(&path).with_context(failed)?;
            (file, format!("{}\n", rows.kind.header))
        }
    };
    for row in &rows.rows {
        let cells: Vec<String> = row.iter().map(cell).collect();
        text += &cells.join(",");
        text.push('\n');
    }
    file.write_all(text.as_bytes()).with_context(failed)?;
    Ok(path)
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) if text.contains([',', '"', '\n']) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// A name as the name of a folder: `intel-r-xeon-r-processor`.
fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let slug = words.collect::<Vec<_>>().join("-").to_ascii_lowercase();
    if slug.is_empty() { "unknown".to_owned() } else { slug }
}

/// The date of the system's clock in UTC, `2026-01-31`.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let (year, month, day) = civil(seconds / 86400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Year, month, day of a number of days since 1970-01-01 (Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!([0, 59, 11_016, 20_000].map(civil), [(1970, 1, 1), (1970, 3, 1), (2000, 2, 29), (2024, 10, 4)]);
    }

    #[test]
    fn names() {
        assert_eq!(slug("Intel(R) Xeon(R) Processor @ 2.3GHz"), "intel-r-xeon-r-processor-2-3ghz");
        assert_eq!(slug("NVIDIA H200"), "nvidia-h200");
        assert_eq!(slug("//.."), "unknown");
        assert_eq!(cell(&Value::Null), "");
        assert_eq!(cell(&json!("a,\"b\"")), "\"a,\"\"b\"\"\"");
    }
}
