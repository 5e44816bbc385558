//! Every kernel compiles for every architecture; needs NVRTC and no device.

use fused_moe_cuda::{Result, compile_all, compiler};

pub(crate) fn every_kernel_compiles() -> Result<()> {
    let (name, version) = compiler()?;
    println!("{name}, NVRTC {}.{}", version.0, version.1);
    for architecture in architectures() {
        println!("{} kernels for {architecture}", compile_all(&architecture)?);
    }
    Ok(())
}

/// All of them, or those that `FMOE_ARCHITECTURES` names.
fn architectures() -> Vec<String> {
    let named = std::env::var("FMOE_ARCHITECTURES").unwrap_or_else(|_| "sm_80,sm_90a,sm_100a".into());
    named.split(',').map(String::from).collect()
}
