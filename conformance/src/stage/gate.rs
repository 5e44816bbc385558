//! x to logits.

use super::{Check, magnitudes, sums};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::Data;
use crate::operands::{Operands, Output, Prepared};
use fused_moe_core::config::{GateConfig, GateNorm};
use fused_moe_core::{Backend, DType, operation, reference};

/// A case of gate.
#[derive(Clone, Debug)]
pub struct Gate {
    /// T, H, E.
    pub sizes: [usize; 3],
    /// Formats of x, of the router and of the vectors, and of `normed`.
    pub dtypes: [DType; 3],
    /// Norm, scale, soft-cap.
    pub config: GateConfig,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether the norm has a weight.
    pub weight: bool,
    /// Whether the normalised tokens are asked for.
    pub normed: bool,
}

/// The logits of a gate, and what each may be off by.
pub(super) struct Logits {
    pub(super) values: Vec<f64>,
    pub(super) errors: Vec<f64>,
}

impl Gate {
    /// The plain product.
    pub fn new(sizes: [usize; 3], dtypes: [DType; 3]) -> Self {
        Self { sizes, dtypes, config: GateConfig::default(), bias: false, weight: false, normed: false }
    }

    /// Adds the operands to a case; returns the logits.
    pub(super) fn operands(&self, prepared: &mut Prepared) -> Logits {
        let [tokens, hidden, experts] = self.sizes;
        let [x, vectors, normed] = self.dtypes;
        let data = Data::new("gate").of(&format!("{:?}", self.sizes));
        prepared.input("x", data.of("x").tokens(x, [tokens, hidden]));
        prepared.input("router", data.of("router").normal(vectors, [experts, hidden], 1.5 / (hidden as f64).sqrt()));
        let bias = self.bias.then(|| data.of("bias").normal(vectors, [experts], 0.5));
        let weight = self.weight.then(|| data.of("norm_weight").between(vectors, [hidden], 0.5, 1.5));
        prepared.input_if("bias", bias).input_if("norm_weight", weight);

        let op = reference::Gate {
            x: prepared.floats("x"),
            router: prepared.floats("router"),
            bias: prepared.floats_if("bias"),
            norm_weight: prepared.floats_if("norm_weight"),
            config: self.config,
            tokens,
            hidden,
            experts,
        };
        let (gated, errors) = gated(&op);
        if self.normed {
            let errors = sums(hidden, magnitudes(&gated.normed));
            prepared.output(Output::floats("normed", normed, [tokens, hidden], [gated.normed, errors]));
        }
        Logits { values: gated.logits, errors }
    }

    /// What the operation is called with.
    pub(super) fn call_with<'a, B: Backend>(
        &self,
        operands: &mut Operands<'a, B>,
    ) -> fused_moe_core::Result<operation::Gate<'a, B>> {
        Ok(operation::Gate {
            x: operands.input("x")?,
            router: operands.input("router")?,
            bias: operands.input_if("bias"),
            norm_weight: operands.input_if("norm_weight"),
            config: self.config,
            normed: operands.output_if("normed"),
            logits: operands.output("logits")?,
        })
    }
}

/// The reference's logits, and what each may be off by.
pub(crate) fn gated(op: &reference::Gate<'_>) -> (reference::Gated, Vec<f64>) {
    let gated = reference::gate(op);
    let (x, router, bias) = (magnitudes(&gated.normed), magnitudes(op.router), op.bias.map(magnitudes));
    let (x, router, bias) = (&x[..], &router[..], bias.as_deref());
    let config = GateConfig { norm: None, scale: op.config.scale.abs(), softcap: None };
    let magnitude = reference::gate(&reference::Gate { x, router, bias, norm_weight: None, config, ..*op });
    // the norm's sum of squares is one more sum of H terms
    let terms = op.hidden * if op.config.norm.is_some() { 2 } else { 1 };
    (gated, sums(terms, magnitude.logits))
}

impl Check for Gate {
    fn prepare(&self) -> Prepared {
        let mut prepared = Prepared::default();
        let Logits { values, errors } = self.operands(&mut prepared);
        let [tokens, _, experts] = self.sizes;
        prepared.output(Output::floats("logits", DType::F32, [tokens, experts], [values, errors]));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = self.call_with(&mut operands)?;
        backend.gate(stream, operands)
    }
}

/// The cases of gate.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let case = |name: &str, gate: Gate| {
        let [t, h, e] = gate.sizes;
        let name = format!("{name} T={t} H={h} E={e}").trim_start().to_string();
        let (dtype, placement) = (dtype_name(gate.dtypes), Default::default());
        Case { stage: Stage::Gate, name, dtype, placement, operation: Operation::Gate(gate) }
    };
    let mut sizes = vec![
        [0, 16, 8],
        [1, 1, 1],
        [1, 64, 8],
        [3, 17, 12],
        [7, 31, 24],
        [5, 67, 60],
        [4, 97, 128],
        [2, 131, 160],
        [3, 256, 256],
        [2, 41, 512],
        [1, 9, 4096],
        [65, 48, 64],
        [70, 264, 40],
        [1030, 19, 65],
        [1030, 88, 130],
    ];
    if scale == Scale::Full {
        sizes.extend([[1, 2048, 128], [300, 512, 128], [17, 2880, 32], [129, 1031, 61]]);
    }
    let mut cases = Vec::new();
    for dtype in FLOATS {
        for sizes in &sizes {
            cases.push(case("", Gate::new(*sizes, [dtype; 3])));
        }
        cases.push(case("", Gate::new([5, 67, 60], [dtype; 3])).strided());
    }
    let norm = |eps| GateConfig { norm: Some(GateNorm { eps, feeds_experts: false }), ..GateConfig::default() };
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    for dtypes in [[f32; 3], [f16; 3], [bf16; 3], [bf16, f32, f32], [f32, bf16, f16], [f16, bf16, bf16]] {
        let plain = Gate::new([6, 75, 33], dtypes);
        let all = Gate {
            config: GateConfig { scale: 0.37, softcap: Some(2.5), ..norm(1e-6) },
            bias: true,
            weight: true,
            normed: true,
            ..plain.clone()
        };
        cases.push(case("bias", Gate { bias: true, ..plain.clone() }));
        cases.push(case("norm", Gate { config: norm(1e-5), weight: true, ..plain.clone() }));
        cases.push(case("norm without weight", Gate { config: norm(0.1), normed: true, ..plain.clone() }));
        cases.push(case("everything", all.clone()));
        cases.push(case("everything", Gate { sizes: [1, 129, 7], ..all.clone() }));
        cases.push(case("everything", Gate { sizes: [0, 12, 7], ..all.clone() }));
        cases.push(case("everything", Gate { sizes: [70, 264, 40], ..all.clone() }));
        cases.push(case("everything", all).strided());
    }
    let negative = GateConfig { scale: -1.25, ..GateConfig::default() };
    cases.push(case("negative scale", Gate { config: negative, ..Gate::new([3, 40, 10], [f32; 3]) }));
    let capped = GateConfig { softcap: Some(0.5), ..GateConfig::default() };
    cases.push(case("soft-cap", Gate { config: capped, bias: true, ..Gate::new([9, 33, 19], [f32; 3]) }));
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_small_against_logits() {
        let mut prepared = Prepared::default();
        let logits = Gate::new([4, 97, 128], [DType::BF16; 3]).operands(&mut prepared);
        let largest = logits.values.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let error = logits.errors.iter().fold(0.0f64, |m, &x| m.max(x));
        assert!(largest > 1.0 && error < 1e-4 * largest, "{largest} {error}");
    }
}
