//! The second matrix of the experts.

use super::experts::{Experts, Weights, grouped_sizes, permutation, tall_sizes};
use super::{Check, magnitudes, sums};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use fused_moe_core::config::Activation;
use fused_moe_core::operation::Matrices;
use fused_moe_core::{Backend, DType, operation, reference};

/// A case of down.
#[derive(Clone, Debug)]
pub struct Down {
    /// T, K, H, I, E.
    pub sizes: [usize; 5],
    /// How the slots spread.
    pub spread: Spread,
    /// Formats of the rows, of the weights, of the output.
    pub dtypes: [DType; 3],
    /// Whether there is a bias.
    pub bias: bool,
    /// How the matrices come.
    pub weights: Weights,
    /// Whether only the middle third of the experts is here.
    pub local: bool,
}

impl Down {
    fn experts(&self) -> Experts {
        let [_, _, hidden, intermediate, experts] = self.sizes;
        let (dtype, weights, bias) = (self.dtypes[1], self.weights, self.bias);
        Experts { sizes: [hidden, intermediate, experts], dtype, activation: Activation::default(), weights, bias }
    }
}

impl Check for Down {
    fn prepare(&self) -> Prepared {
        let [tokens, top_k, hidden, intermediate, experts] = self.sizes;
        let data = Data::new("down").of(&format!("{:?}", self.sizes));
        let local = if self.local { experts / 3..experts - experts / 3 } else { 0..experts };
        let permutation = permutation(data, [tokens, top_k, experts], self.spread, local);
        let (rows, written) = (tokens * top_k, permutation.offsets[experts] as usize);
        let mut prepared = Prepared::default();
        prepared.input("a", data.of("a").normal(self.dtypes[0], [rows, intermediate], 0.5));
        prepared.input("offsets", Tensor::ids([experts + 1], permutation.offsets));
        let [_, (_, down), _, (_, bias)] = self.experts().canonical(data);
        let of = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| tensor.as_floats().to_vec());
        let (matrices, vector) = (of(&down).unwrap_or_default(), of(&bias));
        if self.weights == Weights::Stack {
            prepared.input_if("down", down).input_if("bias", bias);
        } else {
            self.experts().host(data, &mut prepared);
        }
        let (a, offsets) = (prepared.floats("a"), prepared.ids("offsets"));
        let bias = vector.as_deref();
        let op = reference::Down { a, offsets, down: &matrices, bias, rows, hidden, intermediate };
        let y = reference::down(&op);
        let (a, matrices, bias) = (magnitudes(a), magnitudes(&matrices), bias.map(magnitudes));
        let op = reference::Down { a: &a, down: &matrices, bias: bias.as_deref(), ..op };
        let errors = sums(intermediate, reference::down(&op));
        prepared.output(Output::floats("out", self.dtypes[2], [rows, hidden], [y, errors]).only(written));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, operands: Operands<'_, B>) -> Result<(), B::Error> {
        let packed = match self.weights {
            Weights::Stack => None,
            _ => Some(backend.pack(&self.experts().of_host(&operands)?)?),
        };
        let mut operands = operands.shorten();
        let matrices = match &packed {
            Some(experts) => Matrices::Packed(experts),
            None => Matrices::Stack(operands.input("down")?),
        };
        let operands = operation::Down {
            a: operands.input("a")?,
            offsets: operands.input("offsets")?,
            matrices,
            bias: operands.input_if("bias"),
            out: operands.output("out")?,
        };
        backend.down(stream, operands)
    }
}

/// The cases of down.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let case = |name: &str, down: Down| {
        let [t, k, h, i, e] = down.sizes;
        let name = format!("{name} {:?} T={t} K={k} H={h} I={i} E={e}", down.spread).trim_start().to_string();
        let (dtype, placement) = (dtype_name(down.dtypes), Default::default());
        Case { stage: Stage::Down, name, dtype, placement, operation: Operation::Down(down) }
    };
    let mut sizes = grouped_sizes();
    if scale == Scale::Full {
        sizes.extend([([200, 4, 256, 192, 16], Spread::Skewed), ([3, 8, 1024, 256, 24], Spread::Even)]);
        sizes.extend([([513, 1, 131, 97, 3], Spread::One(1)), ([130, 2, 512, 128, 4], Spread::Even)]);
    }
    let (bias, local) = (false, false);
    let mut cases = Vec::new();
    for dtype in FLOATS {
        for (sizes, spread) in &sizes {
            let plain =
                Down { sizes: *sizes, spread: *spread, dtypes: [dtype; 3], bias, weights: Weights::Stack, local };
            cases.push(case("packed", Down { weights: Weights::packed(), ..plain.clone() }));
            cases.push(case("", plain));
        }
        for weights in Weights::all(Activation::default()) {
            for bias in [false, true] {
                let sizes = [7, 3, 45, 26, 9];
                let down = Down { sizes, spread: Spread::Skewed, dtypes: [dtype; 3], bias, weights, local: bias };
                let name = format!("{}{}", weights.name(), if bias { " bias local" } else { "" });
                cases.push(case(name.trim(), down.clone()));
                cases.push(case(name.trim(), down).strided());
            }
        }
    }
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    for dtype in [f16, bf16] {
        // so many rows of an expert that tiles may share weights, and an odd number of tiles
        let many = ([1600, 1, 280, 72, 2], Spread::Even);
        for (sizes, spread) in tall_sizes(scale).into_iter().chain([many]) {
            let plain = Down { sizes, spread, dtypes: [dtype; 3], bias, weights: Weights::Stack, local };
            cases.push(case("tall f32", Down { dtypes: [dtype, dtype, f32], ..plain.clone() }));
            cases.push(case(
                "tall packed bias local",
                Down { bias: true, weights: Weights::packed(), local: true, ..plain.clone() },
            ));
            cases.push(case("tall bias", Down { bias: true, ..plain.clone() }));
            cases.push(case("tall", plain));
        }
    }
    for dtypes in
        [[f32, bf16, f32], [f32, f16, f32], [bf16, f32, bf16], [bf16, bf16, f32], [f16, bf16, f32], [f32, f32, bf16]]
    {
        for weights in [Weights::Stack, Weights::packed()] {
            for sizes in [[11, 2, 70, 35, 5], [1, 2, 70, 35, 5]] {
                let mixed = Down { sizes, spread: Spread::Even, dtypes, bias: true, weights, local };
                cases.push(case(&weights.name(), mixed));
            }
        }
    }
    cases
}
