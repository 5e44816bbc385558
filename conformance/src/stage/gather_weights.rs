//! Weights of given routes.

use super::Check;
use crate::cases::{Case, FLOATS, Operation, Scale, Stage};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::{Backend, DType, operation, reference};

/// A case of gather_weights.
#[derive(Clone, Debug)]
pub struct GatherWeights {
    /// T, E, K.
    pub sizes: [usize; 3],
    /// Format of the scores and the scale.
    pub dtype: DType,
    /// How the ids spread.
    pub spread: Spread,
    /// Whether there is a scale.
    pub scale: bool,
    /// Whether every other token has scores of zero, and every third a NaN.
    pub odd: bool,
}

impl Check for GatherWeights {
    fn prepare(&self) -> Prepared {
        let [tokens, experts, top_k] = self.sizes;
        let data = Data::new("gather_weights").of(&format!("{:?}", self.sizes));
        let mut prepared = Prepared::default();
        let mut scores = data.of("scores").between(self.dtype, [tokens, experts], 0.01, 1.0);
        if self.odd {
            let values = scores.as_floats().iter().enumerate().map(|(i, &s)| match i / experts {
                t if t % 2 == 1 => 0.0,
                t if t % 3 == 2 && i % 2 == 0 => f64::NAN,
                _ => s,
            });
            scores = Tensor::floats(self.dtype, [tokens, experts], values.collect::<Vec<_>>());
        }
        prepared.input("scores", scores);
        prepared.input("experts", data.of("experts").routes([tokens, top_k, experts], self.spread));
        prepared.input_if(
            "expert_scale",
            self.scale.then(|| data.of("expert_scale").between(self.dtype, [experts], 0.25, 2.0)),
        );
        let (weights, status) = reference::gather_weights(&reference::GatherWeights {
            scores: prepared.floats("scores"),
            ids: prepared.ids("experts"),
            expert_scale: prepared.floats_if("expert_scale"),
            tokens,
            experts,
            top_k,
        });
        let errors = weights.iter().map(|w| tolerance::sum(top_k, w.abs())).collect();
        prepared.output(Output::floats("weights", DType::F32, [tokens, top_k], [weights, errors]));
        prepared.status = status;
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = operation::GatherWeights {
            scores: operands.input("scores")?,
            experts: operands.input("experts")?,
            expert_scale: operands.input_if("expert_scale"),
            weights: operands.output("weights")?,
        };
        backend.gather_weights(stream, operands)
    }
}

/// The cases of gather_weights.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut sizes = vec![[0, 8, 2], [1, 1, 1], [1, 8, 8], [7, 12, 3], [33, 61, 5], [4, 512, 10], [2, 4096, 40]];
    if scale == Scale::Full {
        sizes.extend([[1000, 128, 8], [257, 384, 6]]);
    }
    let spreads = [
        ("", Spread::Even),
        ("one expert", Spread::One(0)),
        ("holes", Spread::Holes),
        ("bad ids", Spread::Bad),
        ("nowhere", Spread::Nowhere),
    ];
    for dtype in FLOATS {
        for &sizes in &sizes {
            for (name, spread) in spreads {
                for (scale, odd) in [(false, false), (true, false), (true, true)] {
                    let [t, e, k] = sizes;
                    let scaled = if scale { " scale" } else { "" };
                    let kind = if odd { " zeros and NaN" } else { "" };
                    let name = format!("{name}{scaled}{kind} T={t} E={e} K={k}").trim_start().to_string();
                    let operation = Operation::GatherWeights(GatherWeights { sizes, dtype, spread, scale, odd });
                    let dtype = dtype.to_string();
                    let case =
                        Case { stage: Stage::GatherWeights, name, dtype, placement: Default::default(), operation };
                    if t == 7 {
                        cases.push(case.clone().strided());
                    }
                    cases.push(case);
                }
            }
        }
    }
    cases
}
