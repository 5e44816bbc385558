//! `fmoe families`: the model types that can be read.

use crate::args;
use crate::output;
use anyhow::Result;
use fused_moe::checkpoint::known_model_types;
use std::io::Write;
use std::process::ExitCode;

/// Names in a line.
const COLUMNS: usize = 4;

pub(crate) fn families(arguments: &args::Families) -> Result<ExitCode> {
    let mut types: Vec<&str> = known_model_types().collect();
    types.sort_unstable();
    if arguments.json {
        output::print_json(&types.into())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = output::stdout();
    let width = types.iter().map(|name| name.len()).max().unwrap_or(0) + 2;
    for names in types.chunks(COLUMNS) {
        let line: String = names.iter().map(|name| format!("{name:width$}")).collect();
        writeln!(out, "{}", line.trim_end())?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
