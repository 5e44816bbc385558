//! Trains a small language model with a Mixture-of-Experts layer twice, with and without a loss that balances the load of
//! the experts, on text made here, and draws what happened.
//!
//!     cargo run --release --example train -- [--steps N] [--plot FILE.svg]

mod model;
mod plot;
mod text;

use model::{CONTEXT, EXPERTS, Model};
use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;
use text::{Random, readable, text};

/// Tokens of a batch, and a seed for everything.
const TOKENS: usize = 512;
const SEED: u64 = 7;
/// Adam's rate at first; it falls to nothing in a straight line.
const RATE: f32 = 4e-3;
/// Factor on the load-balancing loss, where there is one.
const BALANCE: f32 = 0.05;

/// A training run.
struct Trained {
    name: &'static str,
    /// Of each step.
    losses: Vec<f32>,
    /// The part of all slots that each expert had in the last tenth of the steps, the busiest first.
    load: Vec<f64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut steps, mut plot) = (1500, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument}: a value is missing"))?;
        match argument.as_str() {
            "--steps" => steps = value.parse::<usize>()?.max(2),
            "--plot" => plot = Some(PathBuf::from(value)),
            _ => return Err(format!("{argument}: there are --steps N and --plot FILE.svg").into()),
        }
    }
    let [weights, kept] = Model::new(TOKENS, SEED)?.bytes();
    println!("{EXPERTS} experts, 2 a token; {weights} bytes of weights in the layer, read where Adam updates them:");
    println!("a step copies and packs none of them; a token keeps {kept} bytes for its backward pass");
    let runs = [train("without balancing", 0.0, steps)?, train("with balancing", BALANCE, steps)?];
    for run in &runs {
        let idle = run.load.iter().filter(|&&part| part * (EXPERTS as f64) < 0.1).count();
        let [busiest, loss] = [run.load[0] * EXPERTS as f64, f64::from(mean(last_tenth(&run.losses)))];
        println!(
            "{}: loss {loss:.3}, the busiest expert has {busiest:.1} times its share, {idle} of {EXPERTS} hardly any",
            run.name
        );
        let first = run.losses[0];
        if loss.is_nan() || loss >= f64::from(first) {
            return Err(format!("{}: the loss was {first:.3} and is {loss:.3}", run.name).into());
        }
    }
    if let Some(path) = plot {
        std::fs::write(&path, plot::svg(&runs)?)?;
        println!("drawn in {}", path.display());
    }
    Ok(())
}

fn train(name: &'static str, balance: f32, steps: usize) -> Result<Trained, Box<dyn Error>> {
    println!("\n{name}");
    let start = Instant::now();
    let mut model = Model::new(TOKENS, SEED)?;
    let random = &mut Random(SEED);
    let mut run = Trained { name, losses: Vec::with_capacity(steps), load: Vec::new() };
    let mut load = [0; EXPERTS];
    for step in 0..steps {
        let symbols = text(TOKENS + CONTEXT, random);
        let contexts: Vec<&[u8]> = symbols.windows(CONTEXT + 1).collect();
        let rate = RATE * (1.0 - step as f32 / steps as f32);
        let shown = model.step(&contexts, rate, balance)?;
        run.losses.push(shown.loss);
        if step >= steps - steps.div_ceil(10) {
            load.iter_mut().zip(shown.load).for_each(|(sum, slots)| *sum += slots);
        }
        if step % steps.div_ceil(6) == 0 || step + 1 == steps {
            println!("step {:5}  loss {:.3}  {:5.1} s", step + 1, shown.loss, start.elapsed().as_secs_f64());
        }
    }
    let slots: usize = load.iter().sum();
    run.load = load.iter().map(|&part| part as f64 / slots as f64).collect();
    run.load.sort_by(|a, b| b.total_cmp(a));

    let mut recited = text(CONTEXT, random);
    for _ in 0..60 {
        recited.push(model.next(&recited[recited.len() - CONTEXT..])?);
    }
    println!("goes on  {}|{}", readable(&recited[..CONTEXT]), readable(&recited[CONTEXT..]));
    Ok(run)
}

fn last_tenth(losses: &[f32]) -> &[f32] {
    &losses[losses.len() - losses.len().div_ceil(10)..]
}

fn mean(losses: &[f32]) -> f32 {
    losses.iter().sum::<f32>() / losses.len() as f32
}
