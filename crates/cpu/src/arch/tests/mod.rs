//! Every kernel, on every instruction set of this CPU.

mod activation;
mod activation_backward;
mod dot;
mod elementwise;
mod outer;
mod panel;
mod shared;
mod store;

use super::{Isa, Kernels};
use fused_moe_core::dtype::Float;

/// The kernels of every instruction set of this CPU.
fn all() -> Vec<Kernels> {
    Isa::available().into_iter().map(|isa| Kernels::new(isa).unwrap()).collect()
}

/// A small generator of numbers in -1..1 (a 64-bit linear congruence, its upper bits).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn vec<X: Float>(&mut self, length: usize) -> Vec<X> {
        (0..length).map(|_| X::from_f32(self.next())).collect()
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn instruction_sets_have_names() {
    for isa in Isa::ALL {
        assert_eq!(isa.to_string().parse(), Ok(isa));
        assert_eq!(Kernels::new(isa).map(Kernels::isa), isa.is_available().then_some(isa));
    }
    let error = "sse9".parse::<Isa>().unwrap_err().to_string();
    for isa in Isa::ALL {
        assert!(error.contains(&isa.to_string()), "{error}");
    }
    assert_eq!(Isa::available().last(), Some(&Isa::best()));
    assert_eq!(Kernels::best().isa(), Isa::best());
}
