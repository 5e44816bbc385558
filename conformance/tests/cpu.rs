//! The CPU backend against the reference: every instruction set that this processor has, one thread and two.

use fused_moe_conformance::{Options, run};
use fused_moe_cpu::Cpu;
use fused_moe_cpu::arch::Isa;

fn hold(threads: usize, isa: Isa) {
    let cpu = Cpu::with_threads(threads).unwrap().with_isa(isa).unwrap();
    let report = run(&cpu, &Options::default(), &mut |_| {}).unwrap();
    println!("{report}");
    assert!(report.passed(), "{isa} with {threads} threads");
}

#[test]
fn one_thread() {
    hold(1, Isa::best());
}

#[test]
fn two_threads_on_every_instruction_set() {
    for isa in Isa::available() {
        hold(2, isa);
    }
}
