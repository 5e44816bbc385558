//! Compiles every kernel for the architectures that are named, `sm_90a` and the like.

fn main() -> fused_moe_cuda::Result<()> {
    for architecture in std::env::args().skip(1) {
        let start = std::time::Instant::now();
        let count = fused_moe_cuda::compile_all(&architecture)?;
        println!("{count} kernels for {architecture} in {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}
