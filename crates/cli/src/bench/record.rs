//! `records/<device>/<date>.csv` and JSON.

use super::machine::Ceilings;
use super::measure::Timing;
use crate::output::remedied;
use anyhow::{Context, Result};
use fused_moe::config::LayerConfig;
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What all rows of a run have in common.
#[derive(Debug)]
pub(crate) struct Setting<'a> {
    pub(crate) version: &'a str,
    pub(crate) backend: &'a str,
    pub(crate) device: String,
    pub(crate) threads: Option<usize>,
    pub(crate) shape: &'a str,
    pub(crate) config: &'a LayerConfig,
    pub(crate) dtype: String,
    pub(crate) routing: String,
    pub(crate) from: String,
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
max_error,from,calls,byte_floor_us,flop_floor_us,arithmetic_by,beside_us,beside";

/// Name and value of every column of a row, in the order of the header.
fn columns(setting: &Setting<'_>, timing: &Timing) -> Vec<Value> {
    let config = setting.config;
    let micros = |time: std::time::Duration| json!((time.as_secs_f64() * 1e7).round() / 10.0);
    let [read, arithmetic] = timing.floors(&setting.ceilings);
    let giga = |rate: f64| json!((rate / 1e7).round() / 100.0);
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
    ]
}

/// An object a batch size, with the columns as keys.
pub(crate) fn json(setting: &Setting<'_>, timings: &[Timing]) -> Value {
    let object = |timing: &Timing| -> Value {
        HEADER.split(',').map(str::to_owned).zip(columns(setting, timing)).collect::<serde_json::Map<_, _>>().into()
    };
    timings.iter().map(object).collect()
}

/// Errors before anything is measured where a file could not be written; leaves no trace.
pub(crate) fn writable(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let tried = match path.exists() {
        true => OpenOptions::new().append(true).open(path),
        false => tempfile::tempfile_in(folder),
    };
    tried.map(|_| ()).map_err(|error| unwritable(path, &error))
}

/// Makes the folder of the records, and errors before anything is measured where it cannot be written.
pub(crate) fn prepare(directory: &Path) -> Result<()> {
    let tried = fs::create_dir_all(directory).and_then(|()| tempfile::tempfile_in(directory));
    tried.map(|_| ()).map_err(|error| unwritable(directory, &error))
}

fn unwritable(path: &Path, error: &io::Error) -> anyhow::Error {
    remedied(format!("{}: cannot write: {error}", path.display()), "make its folder, or name another place")
}

/// Appends a row a batch size; returns the file.
pub(crate) fn append(directory: &Path, setting: &Setting<'_>, timings: &[Timing]) -> Result<PathBuf> {
    let folder = directory.join(slug(&setting.device));
    fs::create_dir_all(&folder).with_context(|| format!("{}: cannot create the directory", folder.display()))?;
    let path = folder.join(format!("{}.csv", today()));
    let failed = || format!("{}: cannot write", path.display());
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).with_context(failed)?;
    let mut present = String::new();
    file.read_to_string(&mut present).with_context(failed)?;
    let mut text = String::new();
    match present.lines().next() {
        None => text = format!("{HEADER}\n"),
        Some(HEADER) => {}
        Some(_) => {
            let message = format!("{}: has other columns than this version of fmoe writes", path.display());
            return Err(remedied(message, "move the file away, or give another directory to --record"));
        }
    }
    for timing in timings {
        let cells: Vec<String> = columns(setting, timing).iter().map(cell).collect();
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
