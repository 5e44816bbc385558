//! Expert by expert.

use super::experts::{Experts, Weights};
use super::gate_up::ACTIVATIONS;
use super::{Check, bound};
use crate::cases::{Case, FLOATS, Operation, Scale, Stage, dtype_name};
use crate::data::{Data, Spread};
use crate::operands::{Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::config::{Activation, LayerConfig, WeightOn};
use fused_moe_core::operation::{self, Expert};
use fused_moe_core::{Backend, DType, Status, reference};

/// A case of the expert loop.
#[derive(Clone, Debug)]
pub struct ExpertLoop {
    /// T, K, H, I, E.
    pub sizes: [usize; 5],
    /// How the slots spread.
    pub spread: Spread,
    /// Formats of x, of the weights, of the output.
    pub dtypes: [DType; 3],
    /// The activation.
    pub activation: Activation,
}

impl Check for ExpertLoop {
    fn prepare(&self) -> Prepared {
        let [tokens, top_k, hidden, intermediate, count] = self.sizes;
        let data = Data::new("expert_loop").of(&format!("{:?}", self.sizes));
        let mut prepared = Prepared::default();
        prepared.input("x", data.of("x").tokens(self.dtypes[0], [tokens, hidden]));
        let experts = Experts {
            sizes: [hidden, intermediate, count],
            dtype: self.dtypes[1],
            activation: self.activation,
            weights: Weights::Stack,
            bias: false,
        };
        for (name, tensor) in experts.canonical(data) {
            prepared.input_if(name, tensor);
        }
        prepared.host.push(("experts", data.of("routes").routes([tokens, top_k, count], self.spread)));
        prepared.host.push(("weights", data.of("weights").between(DType::F32, [tokens, top_k], 0.1, 1.0)));

        let (gate_up, down) = (prepared.floats("gate_up"), prepared.floats("down"));
        let experts = reference::experts_of_stack(gate_up, down, self.activation, (hidden, intermediate));
        let op = reference::ExpertLoop {
            x: prepared.floats("x"),
            ids: prepared.ids("experts"),
            weights: prepared.floats("weights"),
            experts: &experts,
            activation: self.activation,
            weight_on: WeightOn::Output,
            tokens,
            hidden,
            intermediate,
            top_k,
        };
        let (y, _) = reference::expert_loop(&op);
        let config =
            LayerConfig { activation: self.activation, ..LayerConfig::new(hidden, intermediate, count, top_k) };
        let layer = reference::Layer { gate_up, down, ..Default::default() };
        let input = reference::Input { x: op.x, tokens, ..Default::default() };
        let whole = reference::forward_from_routes(&config, &layer, &input, op.ids, op.weights);
        // the sum is stored after each of the K steps
        let part = tolerance::layer(hidden + intermediate, DType::F32, 0.0) + top_k as f64 * self.dtypes[2].epsilon();
        let errors = bound::of(&config, &layer, &input, &whole, part);
        prepared.output(Output::floats("out", self.dtypes[2], [tokens, hidden], [y, errors]));
        prepared.output(Output::scratch("hidden", DType::F32, [2, intermediate]));
        prepared.output(Output::scratch("y", DType::F32, [1, hidden]));
        prepared.status = Status::OK;
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, operands: Operands<'_, B>) -> Result<(), B::Error> {
        let [.., hidden, intermediate, count] = self.sizes;
        let (gate_up, down) = (operands.input("gate_up")?, operands.input("down")?);
        let mut experts = Vec::with_capacity(count);
        for e in 0..count {
            let rows = self.activation.gate_up_rows(intermediate);
            let gated = rows - intermediate;
            let gate = (gated > 0).then(|| gate_up.row_range(e * rows, gated)).transpose()?;
            experts.push((
                gate,
                gate_up.row_range(e * rows + gated, intermediate)?,
                down.row_range(e * hidden, hidden)?,
            ));
        }
        let find = |id: u32| {
            let &(gate, up, down) = experts.get(id as usize)?;
            Some(Expert { gate, up, down, gate_bias: None, up_bias: None, down_bias: None })
        };
        let weights: Vec<f32> = operands.host("weights")?.as_floats().iter().map(|&w| w as f32).collect();
        let mut operands = operands.shorten();
        let operands = operation::ExpertLoop {
            x: operands.input("x")?,
            experts: operands.host("experts")?.as_ids(),
            weights: &weights,
            find: &find,
            activation: self.activation,
            scratch: (operands.output("hidden")?, operands.output("y")?),
            out: operands.output("out")?,
        };
        operation::expert_loop(backend, stream, operands)
    }
}

/// The cases of the expert loop.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut sizes = vec![
        ([0, 2, 16, 8, 4], Spread::Even),
        ([1, 1, 1, 1, 1], Spread::Even),
        ([1, 8, 48, 24, 8], Spread::Even),
        ([5, 3, 17, 13, 12], Spread::Skewed),
        ([7, 2, 33, 19, 6], Spread::Holes),
        ([7, 2, 33, 19, 6], Spread::Bad),
        ([5, 2, 24, 12, 6], Spread::Nowhere),
    ];
    if scale == Scale::Full {
        sizes.push(([9, 4, 256, 128, 16], Spread::Even));
    }
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain([[bf16, f16, f32], [f32, bf16, f32]]) {
        for (sizes, spread) in &sizes {
            for (kind, activation) in ACTIVATIONS {
                let first = activation == ACTIVATIONS[0].1;
                if !first && *spread != Spread::Skewed {
                    continue;
                }
                let [t, k, h, i, e] = *sizes;
                let name = format!("{kind} {spread:?} T={t} K={k} H={h} I={i} E={e}");
                let case = ExpertLoop { sizes: *sizes, spread: *spread, dtypes, activation };
                let (dtype, operation) = (dtype_name(dtypes), Operation::ExpertLoop(case));
                let case = Case { stage: Stage::ExpertLoop, name, dtype, placement: Default::default(), operation };
                if first && *spread == Spread::Skewed {
                    cases.push(case.clone().strided());
                }
                cases.push(case);
            }
        }
    }
    cases
}
