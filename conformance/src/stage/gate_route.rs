//! x to routes, in one.

use super::Check;
use super::choice::Choice;
use super::gate::{Gate, Logits};
use super::route::{always_rules, rules};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::{Data, Values};
use crate::operands::{Operands, Output, Prepared};
use fused_moe_core::config::{GateConfig, GateNorm, Selection};
use fused_moe_core::{Backend, DType, operation};

/// A case of gate and route in one.
#[derive(Clone, Debug)]
pub struct GateRoute {
    /// How the logits are made.
    pub gate: Gate,
    /// K.
    pub top_k: usize,
    /// How experts are chosen.
    pub choice: Choice,
}

impl GateRoute {
    /// T, E, K.
    fn sizes(&self) -> [usize; 3] {
        let [tokens, _, experts] = self.gate.sizes;
        [tokens, experts, self.top_k]
    }
}

impl Check for GateRoute {
    fn prepare(&self) -> Prepared {
        let mut prepared = Prepared::default();
        let Logits { values, errors } = self.gate.operands(&mut prepared);
        let sizes = self.sizes();
        self.choice.operands(Data::new("gate_route").of(&format!("{sizes:?}")), sizes, &mut prepared);
        self.choice.outputs(sizes, [&values, &errors], &mut prepared);
        prepared.output(Output::floats("logits", DType::F32, [sizes[0], sizes[1]], [values, errors]));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let gate = self.gate.call_with(&mut operands)?;
        let choice = self.choice.call_with(&mut operands)?;
        backend.gate_route(stream, operation::GateRoute { gate, choice })
    }

    fn resolve(&self, prepared: &mut Prepared, found: &[(&'static str, Values)]) {
        let Logits { values, errors } = self.gate.operands(&mut Prepared::default());
        self.choice.resolve(self.sizes(), [&values, &errors], prepared, found);
    }
}

/// The cases of gate and route in one.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let case = |name: &str, gate: Gate, top_k: usize, choice: Choice| {
        let [t, h, e] = gate.sizes;
        let name = format!("{name} T={t} H={h} E={e} K={top_k}");
        let dtype = dtype_name(gate.dtypes);
        let operation = Operation::GateRoute(GateRoute { gate, top_k, choice });
        Case { stage: Stage::GateRoute, name, dtype, placement: Default::default(), operation }
    };
    let mut cases = Vec::new();
    for (name, rule) in rules() {
        for dtype in FLOATS {
            let witness = matches!(rule.selection, Selection::TopK { .. });
            let choice = Choice { dtype, witness, ..Choice::new(rule) };
            let gate = Gate::new([9, 43, 24], [dtype; 3]);
            cases.push(case(name, gate.clone(), 3, choice.clone()));
            cases.push(case(name, gate, 3, choice.clone()).strided());
            let norm = Some(GateNorm { eps: 1e-6, feeds_experts: true });
            let config = GateConfig { norm, scale: 1.5, softcap: Some(3.0) };
            let everything =
                Gate { config, bias: true, weight: true, normed: true, ..Gate::new([2, 33, 60], [dtype; 3]) };
            cases.push(case(&format!("{name} everything"), everything, 4, choice));
        }
    }
    let mut sizes = vec![
        ([0, 16, 8], 2),
        ([1, 1, 1], 1),
        ([1, 64, 8], 8),
        ([7, 31, 12], 2),
        ([5, 64, 60], 4),
        ([4, 97, 128], 8),
        ([2, 129, 160], 6),
        ([3, 128, 256], 8),
        ([2, 40, 512], 10),
        ([1, 8, 4096], 16),
    ];
    if scale == Scale::Full {
        sizes.extend([([1, 2048, 128], 8), ([300, 512, 128], 8), ([17, 2880, 32], 4), ([64, 1031, 61], 61)]);
    }
    for (name, rule, always) in always_rules() {
        for (dtype, [t, h, e, k]) in FLOATS.into_iter().zip([[9, 43, 10, 3], [2, 33, 130, 6], [1, 64, 18, 4]]) {
            let choice = Choice { dtype, witness: true, ..Choice::new(rule) };
            let gate = Gate { bias: true, ..Gate::new([t, h, e], [dtype; 3]) };
            cases.push(case(&format!("{name} always {always}"), gate, k, choice));
        }
    }
    for (sizes, top_k) in sizes {
        for (name, rule) in rules().into_iter().take(2) {
            for dtype in FLOATS {
                cases.push(case(name, Gate::new(sizes, [dtype; 3]), top_k, Choice::new(rule)));
            }
        }
    }
    cases
}
