//! `fmoe`: run, inspect, check and measure Mixture-of-Experts layers.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod check;
mod devices;
mod families;
mod inspect;
mod output;
mod run;
mod tensors;

use args::{Arguments, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    let result = match &Arguments::get().command {
        Command::Run(arguments) => run::run(arguments),
        Command::Inspect(arguments) => inspect::inspect(arguments),
        Command::Check(arguments) => check::check(arguments),
        Command::Bench(arguments) => bench::bench(arguments),
        Command::Devices(arguments) => devices::devices(arguments),
        Command::Families(arguments) => families::families(arguments),
    };
    result.unwrap_or_else(|error| output::fail(&error))
}
