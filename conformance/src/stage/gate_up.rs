//! The first matrix of the experts.

use super::experts::{Experts, Weights, grouped_sizes, permutation, tall_sizes};
use super::{Check, magnitudes, sums};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::config::{Activation, Function};
use fused_moe_core::operation::{GateUpOutput, Matrices, RowSource};
use fused_moe_core::reference::{self, Gather, PreActivation};
use fused_moe_core::{Backend, DType, Permutation, operation};

/// A case of gate_up.
#[derive(Clone, Debug)]
pub struct GateUp {
    /// T, K, H, I, E.
    pub sizes: [usize; 5],
    /// How the slots spread.
    pub spread: Spread,
    /// Formats of x, of the weights, of the output.
    pub dtypes: [DType; 3],
    /// The activation.
    pub activation: Activation,
    /// Whether it is applied.
    pub output: GateUpOutput,
    /// Whether x holds rows.
    pub rows: bool,
    /// Whether rows are weighted before the product.
    pub input_weights: bool,
    /// Whether there is a bias.
    pub bias: bool,
    /// How the matrices come.
    pub weights: Weights,
    /// Whether only the middle third of the experts is here.
    pub local: bool,
}

impl GateUp {
    /// Tokens times a stack, activated.
    pub fn new(sizes: [usize; 5], spread: Spread, dtypes: [DType; 3]) -> Self {
        Self {
            sizes,
            spread,
            dtypes,
            activation: Activation::default(),
            output: GateUpOutput::Activated,
            rows: false,
            input_weights: false,
            bias: false,
            weights: Weights::Stack,
            local: false,
        }
    }

    fn experts(&self) -> Experts {
        let [_, _, hidden, intermediate, experts] = self.sizes;
        let (activation, weights, bias) = (self.activation, self.weights, self.bias);
        Experts { sizes: [hidden, intermediate, experts], dtype: self.dtypes[1], activation, weights, bias }
    }

    /// The result and what it may be off by, before it is stored.
    fn expected(&self, prepared: &Prepared, gate_up: &[f64], bias: Option<&[f64]>) -> [Vec<f64>; 2] {
        let [tokens, top_k, hidden, intermediate, _] = self.sizes;
        let rows = tokens * top_k;
        let outputs = self.activation.gate_up_rows(intermediate);
        let gather = (!self.rows).then(|| Gather { row_slot: prepared.ids("row_slot"), top_k });
        let (x, offsets) = (prepared.floats("x"), prepared.ids("offsets"));
        let input_weights = prepared.floats_if("input_weights");
        let op = reference::GateUp { x, gather, input_weights, offsets, gate_up, bias, rows, hidden, outputs };
        let z = reference::gate_up(&op);
        let (x, gate_up, bias) = (magnitudes(x), magnitudes(gate_up), bias.map(magnitudes));
        let op = reference::GateUp { x: &x, gate_up: &gate_up, bias: bias.as_deref(), ..op };
        let errors = sums(hidden, reference::gate_up(&op));
        if self.output == GateUpOutput::PreActivation {
            return [z, errors];
        }
        let a = reference::activation(self.activation, PreActivation::Halves(&z), rows, intermediate);
        let error = |i: usize| {
            let (row, column) = (i / intermediate, i % intermediate);
            let up = if self.activation.is_gated() { intermediate } else { 0 };
            let (g, u) = (row * outputs + column, row * outputs + up + column);
            tolerance::activated(self.activation, [z[g], z[u]], [errors[g], errors[u]])
        };
        let moved = (0..a.len()).map(error).collect();
        [a, moved]
    }
}

impl Check for GateUp {
    fn prepare(&self) -> Prepared {
        let [tokens, top_k, hidden, intermediate, experts] = self.sizes;
        let data = Data::new("gate_up").of(&format!("{:?}", self.sizes));
        let local = if self.local { experts / 3..experts - experts / 3 } else { 0..experts };
        let permutation = permutation(data, [tokens, top_k, experts], self.spread, local);
        let (rows, written) = (tokens * top_k, permutation.offsets[experts] as usize);
        let mut prepared = Prepared::default();
        prepared.input("x", data.of("x").tokens(self.dtypes[0], [if self.rows { rows } else { tokens }, hidden]));
        prepared.input("row_slot", Tensor::ids([rows], permutation.row_slot));
        prepared.input("slot_row", Tensor::ids([rows], permutation.slot_row));
        prepared.input("offsets", Tensor::ids([experts + 1], permutation.offsets));
        if self.input_weights {
            prepared.input("input_weights", data.of("weights").between(DType::F32, [tokens, top_k], 0.05, 1.0));
        }
        let [(_, gate_up), _, (_, bias), _] = self.experts().canonical(data);
        let of = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| tensor.as_floats().to_vec());
        let (matrices, vector) = (of(&gate_up).unwrap_or_default(), of(&bias));
        if self.weights == Weights::Stack {
            prepared.input_if("gate_up", gate_up).input_if("bias", bias);
        } else {
            self.experts().host(data, &mut prepared);
        }
        let expected = self.expected(&prepared, &matrices, vector.as_deref());
        let width = match self.output {
            GateUpOutput::Activated => intermediate,
            GateUpOutput::PreActivation => self.activation.gate_up_rows(intermediate),
        };
        prepared.output(Output::floats("out", self.dtypes[2], [rows, width], expected).only(written));
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
            None => Matrices::Stack(operands.input("gate_up")?),
        };
        let operands = operation::GateUp {
            x: operands.input("x")?,
            rows: if self.rows { RowSource::Rows } else { RowSource::Tokens { top_k: self.sizes[1] } },
            permutation: Permutation {
                row_slot: operands.input("row_slot")?,
                slot_row: operands.input("slot_row")?,
                offsets: operands.input("offsets")?,
            },
            input_weights: operands.input_if("input_weights"),
            matrices,
            bias: operands.input_if("bias"),
            activation: self.activation,
            output: self.output,
            out: operands.output("out")?,
        };
        backend.gate_up(stream, operands)
    }
}

/// The activations in use.
pub(crate) const ACTIVATIONS: [(&str, Activation); 12] = [
    ("silu", Activation::Gated(Function::Silu)),
    ("gelu tanh", Activation::Gated(Function::GeluTanh)),
    ("gelu erf", Activation::Gated(Function::GeluErf)),
    ("relu", Activation::Gated(Function::Relu)),
    ("relu^2", Activation::Gated(Function::ReluSquared)),
    ("identity", Activation::Gated(Function::Identity)),
    ("clamped silu", Activation::ClampedSilu { limit: 1.25 }),
    ("clamped swish", Activation::ClampedSwish { alpha: 1.702, limit: 1.5 }),
    ("silu then clamp", Activation::SiluThenClamp { limit: 0.75 }),
    ("softcapped silu", Activation::SoftcappedSilu { gate_cap: 0.75, up_cap: 1.5 }),
    ("plain relu^2", Activation::Plain(Function::ReluSquared)),
    ("plain gelu", Activation::Plain(Function::GeluErf)),
];

/// The cases of gate_up.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let case = |name: &str, gate_up: GateUp| {
        let [t, k, h, i, e] = gate_up.sizes;
        let name = format!("{name} {:?} T={t} K={k} H={h} I={i} E={e}", gate_up.spread).trim_start().to_string();
        let (dtype, placement) = (dtype_name(gate_up.dtypes), Default::default());
        Case { stage: Stage::GateUp, name, dtype, placement, operation: Operation::GateUp(gate_up) }
    };
    let mut sizes = grouped_sizes();
    if scale == Scale::Full {
        sizes.extend([([200, 4, 256, 192, 16], Spread::Skewed), ([3, 8, 1024, 256, 24], Spread::Even)]);
        sizes.extend([([513, 1, 131, 97, 3], Spread::One(1)), ([130, 2, 512, 128, 4], Spread::Even)]);
    }
    let mut cases = Vec::new();
    for dtype in FLOATS {
        for (sizes, spread) in &sizes {
            let plain = GateUp::new(*sizes, *spread, [dtype; 3]);
            cases.push(case("packed", GateUp { weights: Weights::packed(), ..plain.clone() }));
            cases.push(case("", plain));
        }
        let sizes = [7, 3, 45, 26, 9];
        let plain = GateUp::new(sizes, Spread::Skewed, [dtype; 3]);
        for (name, activation) in ACTIVATIONS {
            for output in [GateUpOutput::Activated, GateUpOutput::PreActivation] {
                let all = GateUp { activation, output, bias: true, ..plain.clone() };
                cases.push(case(&format!("{name} {output:?}"), all));
            }
        }
        for activation in [Activation::default(), Activation::Plain(Function::Relu)] {
            for weights in Weights::all(activation) {
                for bias in [false, true] {
                    let gated = if activation.is_gated() { "gated" } else { "plain" };
                    let name = format!("{gated} {}{}", weights.name(), if bias { " bias" } else { "" });
                    cases.push(case(&name, GateUp { activation, weights, bias, ..plain.clone() }));
                }
            }
        }
        for (rows, input_weights, local) in
            [(true, false, false), (true, true, false), (false, true, false), (false, false, true), (true, true, true)]
        {
            let name = [(rows, "rows"), (input_weights, "input weights"), (local, "local")];
            let name: Vec<&str> = name.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
            let all = GateUp { rows, input_weights, local, ..plain.clone() };
            cases.push(case(&name.join(" "), all.clone()));
            cases.push(case(&name.join(" "), all).strided());
        }
    }
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    let mut tall = |name: &str, gate_up: GateUp| cases.push(case(format!("tall {name}").trim(), gate_up));
    for dtype in [f16, bf16] {
        let sizes = tall_sizes(scale);
        for &(sizes, spread) in &sizes {
            tall("", GateUp::new(sizes, spread, [dtype; 3]));
        }
        // so many rows of an expert that tiles may share weights; an odd number of tiles, of columns too
        let many = GateUp::new([1600, 1, 72, 152, 2], Spread::Even, [dtype; 3]);
        tall("bias", GateUp { bias: true, ..many.clone() });
        tall("input weights local", GateUp { input_weights: true, local: true, ..many.clone() });
        tall("before the activation", GateUp { output: GateUpOutput::PreActivation, ..many.clone() });
        tall("", many);
        for sizes in [[150, 3, 200, 88, 5], [150, 3, 224, 112, 5]] {
            let plain = GateUp::new(sizes, Spread::Even, [dtype; 3]);
            tall("f32", GateUp { dtypes: [dtype, dtype, f32], bias: true, ..plain.clone() });
            tall("packed bias", GateUp { weights: Weights::packed(), bias: true, ..plain.clone() });
            tall("bias", GateUp { bias: true, ..plain.clone() });
            tall("rows", GateUp { rows: true, ..plain.clone() });
            tall("input weights local", GateUp { input_weights: true, local: true, ..plain.clone() });
            tall("before the activation", GateUp { output: GateUpOutput::PreActivation, ..plain.clone() });
        }
    }
    for (name, activation) in ACTIVATIONS {
        for intermediate in [24, 32] {
            tall(name, GateUp { activation, ..GateUp::new([110, 2, 40, intermediate, 3], Spread::Even, [bf16; 3]) });
        }
    }
    for dtypes in
        [[f32, bf16, f32], [f32, f16, f32], [bf16, f32, bf16], [bf16, bf16, f32], [f16, bf16, f32], [f32, f32, bf16]]
    {
        for weights in [Weights::Stack, Weights::packed()] {
            let mixed = GateUp { weights, bias: true, ..GateUp::new([11, 2, 70, 35, 5], Spread::Even, dtypes) };
            cases.push(case(&weights.name(), mixed.clone()));
            cases.push(case(&weights.name(), GateUp { sizes: [1, 2, 70, 35, 5], ..mixed.clone() }));
            cases.push(case(&weights.name(), GateUp { output: GateUpOutput::PreActivation, ..mixed }).strided());
        }
    }
    cases
}
