//! `fmoe inspect`: what a checkpoint is made of.

use crate::args;
use crate::output::{self, BAD, BOLD, GOOD, Table, bytes, counted, plain};
use anyhow::Result;
use fused_moe::checkpoint::{LayerKind, LayerSummary, Summary, layer_numbers};
use std::io::Write;
use std::process::ExitCode;

pub(crate) fn inspect(arguments: &args::Inspect) -> Result<ExitCode> {
    let checkpoint = output::open(&arguments.checkpoint, arguments.part.as_deref())?;
    let summary = checkpoint.inspect();
    if arguments.json {
        output::print_json(&serde_json::to_value(&summary)?)?;
    } else {
        print(&summary)?;
    }
    Ok(if summary.runs() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(summary: &Summary) -> Result<()> {
    let mut out = output::stdout();
    let Summary { model_type, family, layer_count, moe_layers, layers, .. } = summary;
    writeln!(out, "{BOLD}{}{BOLD:#}", summary.path.display())?;
    writeln!(out, "model      {model_type}, family {family}")?;
    if !summary.parts.is_empty() {
        writeln!(out, "parts      {}; --part chooses", summary.parts.join(", "))?;
    }
    writeln!(out, "files      {}, {}", summary.files.len(), counted(summary.tensors, "tensor"))?;
    let numbers = layer_numbers(moe_layers);
    writeln!(out, "layers     {layer_count}, of them {} with experts: {numbers}", moe_layers.len())?;
    for kind in &summary.kinds {
        if summary.kinds.len() > 1 {
            writeln!(out, "{BOLD}layers {}{BOLD:#}", layer_numbers(&kind.layers))?;
        }
        describe(&mut out, kind)?;
    }
    if let Some(beside) = summary.beside {
        writeln!(out, "beside     {beside}")?;
    }
    let formats: Vec<String> = summary.formats.iter().map(|(format, n)| format!("{} of {format}", bytes(*n))).collect();
    let formats = if formats.is_empty() { "none".to_owned() } else { formats.join(", ") };
    writeln!(out, "weights    {} parameters in MoE layers: {formats}", count(summary.parameters))?;
    let mut table = Table::new(["layer", "bytes", "an expert", "runs", "tensors"]).text(&[3, 4]);
    for layers in layers.chunk_by(alike) {
        let [first, ..] = layers else { continue };
        let number = match layers {
            [.., last] if last.index > first.index => format!("{}-{}", first.index, last.index),
            _ => first.index.to_string(),
        };
        match &first.problem {
            None => table.row([
                plain(number),
                plain(bytes(first.bytes)),
                plain(bytes(first.expert_bytes)),
                ("yes".to_owned(), GOOD),
                plain(first.name.as_deref().unwrap_or_default()),
            ]),
            Some(problem) => {
                table.row([plain(number), plain("-"), plain("-"), ("no".to_owned(), BAD), plain(problem)]);
            }
        }
    }
    table.print(&mut out)?;
    out.flush()?;
    Ok(())
}

fn describe(out: &mut impl Write, kind: &LayerKind) -> Result<()> {
    let LayerKind { sizes, routing, router, activation, biases, shared, around, .. } = kind;
    let (hidden, intermediate) = (sizes.hidden, sizes.intermediate);
    write!(out, "sizes      H {hidden}, I {intermediate}, E {}, K {}", sizes.experts, sizes.top_k)?;
    for (letter, size) in [("S", sizes.shared_intermediate), ("L", sizes.latent)] {
        if let Some(size) = size {
            write!(out, ", {letter} {size}")?;
        }
    }
    writeln!(out, "\nrouting    {routing}\nactivation {activation}")?;
    for (name, text) in [("router", router), ("biases", biases), ("shared", shared), ("around", around)] {
        if let Some(text) = text {
            writeln!(out, "{name:<11}{text}")?;
        }
    }
    Ok(())
}

/// Successive layers that differ in their number alone.
fn alike(a: &LayerSummary, b: &LayerSummary) -> bool {
    let numberless = |text: &Option<String>, index: usize| {
        text.as_ref()
            .map(|text| text.replace(&format!(".{index}."), ".{}.").replace(&format!("layer {index}"), "layer {}"))
    };
    b.index == a.index + 1
        && (a.bytes, a.expert_bytes) == (b.bytes, b.expert_bytes)
        && numberless(&a.name, a.index) == numberless(&b.name, b.index)
        && numberless(&a.problem, a.index) == numberless(&b.problem, b.index)
}

/// `30.5 billion`.
fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} million", n as f64 / 1e6),
        _ => format!("{:.1} billion", n as f64 / 1e9),
    }
}
