//! The CPU backend against the reference: every instruction set that this processor has, one thread and two.

use fused_moe_conformance::{Options, Report, Scale, run};
use fused_moe_cpu::Cpu;

fn hold(cpu: &Cpu) -> Report {
    let options = Options {
        filter: std::env::var("CONFORMANCE_FILTER").ok(),
        scale: if std::env::var_os("CONFORMANCE_FULL").is_some() { Scale::Full } else { Scale::Quick },
        ..Options::default()
    };
    let report = run(cpu, &options, &mut |_| {}).unwrap();
    println!("{report}");
    report
}

#[test]
fn one_thread() {
    assert!(hold(&Cpu::with_threads(1).unwrap()).passed());
}

#[test]
fn two_threads() {
    assert!(hold(&Cpu::with_threads(2).unwrap()).passed());
}
