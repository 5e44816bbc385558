//! The wgpu backend against the reference.

use fused_moe_conformance::{Options, Scale, run};
use fused_moe_core::Backend;
use fused_moe_wgpu::{Result, Wgpu};

pub(crate) fn the_reference_agrees() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    println!("{}", wgpu.describe());
    let filter = std::env::var("FMOE_FILTER").ok();
    let scale = if std::env::var_os("FMOE_FULL").is_some() { Scale::Full } else { Scale::Quick };
    let options = Options { filter, scale, ..Options::default() };
    let report = run(&wgpu, &options, &mut |_| {})?;
    println!("{report}");
    assert!(report.passed());
    Ok(())
}
