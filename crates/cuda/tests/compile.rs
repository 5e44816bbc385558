//! Every kernel compiles for every architecture; needs NVRTC and no device.

use fused_moe_cuda::{Error, compile_all, compiler};

#[test]
fn every_kernel_compiles() {
    match compiler() {
        Ok((name, version)) => println!("{name}, NVRTC {}.{}", version.0, version.1),
        Err(error @ Error::NoCompiler { .. }) => return println!("not run: {error}"),
        Err(error) => panic!("{error}"),
    }
    for architecture in architectures() {
        let count = compile_all(&architecture).unwrap_or_else(|error| panic!("{error}"));
        println!("{count} kernels for {architecture}");
    }
}

#[test]
fn a_device_or_a_reason() {
    match fused_moe_cuda::Cuda::new(0) {
        Ok(cuda) => println!("{}", fused_moe_core::Backend::describe(&cuda)),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("NVIDIA driver") || text.contains("device"), "{text}");
            println!("no NVIDIA device: {text}");
        }
    }
}

/// All of them, or those that `FMOE_ARCHITECTURES` names.
fn architectures() -> Vec<String> {
    let named = std::env::var("FMOE_ARCHITECTURES").unwrap_or_else(|_| "sm_80,sm_90a,sm_100a".into());
    named.split(',').map(String::from).collect()
}
