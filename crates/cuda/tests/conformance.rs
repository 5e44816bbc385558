//! The CUDA backend against the reference.

use fused_moe_conformance::{Options, Scale, run};
use fused_moe_core::Backend;
use fused_moe_cuda::{Cuda, Error};

#[test]
fn the_reference_agrees() {
    let cuda = match Cuda::new(0) {
        Ok(cuda) => cuda,
        Err(Error::NoDriver { .. }) => return println!("no NVIDIA driver: not run"),
        Err(error @ Error::NoDevice { .. }) => return println!("{error}: not run"),
        Err(error) => panic!("{error}"),
    };
    println!("{}", cuda.describe());
    let filter = std::env::var("FMOE_FILTER").ok();
    let scale = if std::env::var_os("FMOE_FULL").is_some() { Scale::Full } else { Scale::Quick };
    let options = Options { filter, scale, ..Options::default() };
    let report = run(&cuda, &options, &mut |_| {}).unwrap();
    println!("{report}");
    assert!(report.passed());
}
