//! The wgpu backend against the reference.

use fused_moe_conformance::{Options, Report, Scale, run, run_backward};
use fused_moe_core::Backend;
use fused_moe_wgpu::{Result, Wgpu};

fn hold(suite: impl FnOnce(&Wgpu, &Options) -> Result<Report>) -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    println!("{}", wgpu.describe());
    let filter = std::env::var("FMOE_FILTER").ok();
    let scale = if std::env::var_os("FMOE_FULL").is_some() { Scale::Full } else { Scale::Quick };
    let report = suite(&wgpu, &Options { filter, scale, ..Options::default() })?;
    println!("{report}");
    assert!(report.passed());
    Ok(())
}

pub(crate) fn the_reference_agrees() -> Result<()> {
    hold(|wgpu, options| run(wgpu, options, &mut |_| {}))
}

pub(crate) fn the_reference_agrees_with_the_gradients() -> Result<()> {
    hold(|wgpu, options| run_backward(wgpu, options, &mut |_| {}))
}
