//! The CPU backend against the reference: every instruction set that this processor has, one thread and two.
#![allow(clippy::unwrap_used)]

use fused_moe_conformance::{Options, run, run_backward};
use fused_moe_cpu::arch::Isa;
use fused_moe_cpu::{Cpu, Result};

fn hold(threads: usize, isa: Isa) -> Result<()> {
    let cpu = Cpu::with_threads(threads)?.with_isa(isa)?;
    let report = run(&cpu, &Options::default(), &mut |_| {})?;
    println!("{report}");
    assert!(report.passed(), "{isa} with {threads} threads");
    Ok(())
}

#[test]
fn one_thread() -> Result<()> {
    hold(1, Isa::best())
}

#[test]
fn two_threads_on_every_instruction_set() -> Result<()> {
    Isa::available().into_iter().try_for_each(|isa| hold(2, isa))
}

#[test]
fn gradients() -> Result<()> {
    let threads_and_sets = Isa::available().into_iter().map(|isa| (2, isa)).chain([(1, Isa::best())]);
    for (threads, isa) in threads_and_sets {
        let cpu = Cpu::with_threads(threads)?.with_isa(isa)?;
        let report = run_backward(&cpu, &Options::default(), &mut |_| {})?;
        println!("{report}");
        assert!(report.passed(), "{isa} with {threads} threads");
    }
    Ok(())
}
