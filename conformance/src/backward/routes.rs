//! The gradients of the routing: weights to logits, logits to the router, and the losses on logits.

use super::{BackwardCase, BackwardOperation, CheckBackward, MODES, gradient, output};
use crate::cases::{FLOATS, Stage, dtype_name};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Prepared};
use crate::stage::magnitudes;
use crate::tolerance;
use fused_moe_core::config::*;
use fused_moe_core::operation::{GateBackward, GradientMode, LoadBalanceLoss, RouteBackward, ZLoss};
use fused_moe_core::reference;
use fused_moe_core::{BackendBackward, DType, NO_EXPERT};

/// A case of route_backward.
#[derive(Clone, Debug)]
pub struct Route {
    /// T, E, K.
    pub sizes: [usize; 3],
    /// Format of the logits.
    pub dtype: DType,
    /// The rule.
    pub rule: RoutingRule,
    /// How the gradients are stored.
    pub mode: GradientMode,
    /// Whether some logits are not finite, and some slots have no expert or one that does not exist.
    pub odd: bool,
}

impl CheckBackward for Route {
    fn prepare(&self) -> Prepared {
        let [tokens, experts, top_k] = self.sizes;
        let data = Data::new("route_backward").of(&format!("{:?}", self.sizes));
        let normal = data.of("logits").normal(self.dtype, [tokens, experts], 1.5);
        let odd = |(i, &l): (usize, &f64)| match (self.odd, i / experts.max(1) % 4, i % 3) {
            (true, 1, _) => f64::NAN,
            (true, 2, 0) => f64::NEG_INFINITY,
            (true, 3, 0) => f64::NAN,
            _ => l,
        };
        let logits: Vec<f64> = normal.as_floats().iter().enumerate().map(odd).collect();
        let logits = Tensor::floats(self.dtype, [tokens, experts], logits);
        let scaled = self.rule.weights.expert_scale.is_some();
        let scale = scaled.then(|| data.of("scale").between(DType::F32, [experts], 0.4, 2.0));
        let d_weights = data.of("d_weights").normal(DType::F32, [tokens, top_k], 0.8);
        let (correction_bias, expert_scale) = (None, scale.as_ref().map(Tensor::as_floats));
        let choice = RoutingRule { selection: chosen_by(self.rule.selection), ..self.rule };
        let op = reference::Route { rule: choice, correction_bias, expert_scale, table: None, tokens, experts, top_k };
        let mut ids = reference::route(logits.as_floats(), &op).experts;
        if self.odd {
            ids.iter_mut().skip(1).step_by(5).for_each(|id| *id = NO_EXPERT);
            ids.iter_mut().skip(2).step_by(7).for_each(|id| *id = id.saturating_add(experts as u32));
        }
        let of = |d_weights: &[f64]| {
            let (logits, ids, rule) = (logits.as_floats(), &ids[..], self.rule);
            let op = reference::RouteBackward { logits, ids, d_weights, rule, expert_scale, tokens, experts, top_k };
            reference::route_backward(&op)
        };
        let found = of(d_weights.as_floats());
        // The gradient is linear in d_weights: the largest share of each slot, added up.
        let range = logits.as_floats().iter().filter(|l| l.is_finite()).fold(0.0f64, |m, l| m.max(l.abs()));
        let relative = tolerance::weight(experts, 2.0 * range, 0.0);
        let (mut token, mut scales) = (vec![0.0; tokens], vec![0.0; experts]);
        for k in 0..top_k {
            let share: Vec<f64> = (0..tokens * top_k)
                .map(|slot| if slot % top_k == k { d_weights.as_floats()[slot] } else { 0.0 })
                .collect();
            let share = of(&share);
            for (token, d) in token.iter_mut().zip(share.logits.chunks_exact(experts)) {
                *token += d.iter().fold(0.0f64, |m, d| m.max(d.abs()));
            }
            scales.iter_mut().zip(&share.expert_scale).for_each(|(m, d)| *m += d.abs());
        }
        let largest = scales.iter().fold(0.0f64, |m, s| m.max(*s));
        // where all of it cancels, what the reference expects is its own rounding in f64
        let rounding = |t: usize| {
            let d = &d_weights.as_floats()[t * top_k..(t + 1) * top_k];
            16.0 * f64::EPSILON * f64::from(self.rule.weights.scale) * d.iter().map(|d| d.abs()).sum::<f64>()
        };
        let errors = (0..tokens * experts).map(|i| relative * token[i / experts] + rounding(i / experts)).collect();
        let scale_errors = vec![relative * largest * (tokens as f64).sqrt(); experts];
        let mut prepared = Prepared::default();
        let to = (DType::F32, self.mode);
        prepared.output(output("d_logits", to, [tokens, experts], [found.logits, errors]));
        if scaled {
            prepared.output(output("d_expert_scale", to, [experts], [found.expert_scale, scale_errors]));
        }
        prepared.input("logits", logits).input("d_weights", d_weights).input_if("expert_scale", scale);
        prepared.input("experts", Tensor::ids([tokens, top_k], ids));
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        let d_logits = gradient(&mut operands, "d_logits", self.mode);
        let d_expert_scale = gradient(&mut operands, "d_expert_scale", self.mode);
        let operands = RouteBackward {
            logits: operands.input("logits")?,
            experts: operands.input("experts")?,
            d_weights: operands.input("d_weights")?,
            rule: self.rule,
            expert_scale: operands.input_if("expert_scale"),
            d_logits,
            d_expert_scale,
        };
        backend.route_backward(stream, operands)
    }
}

/// A selection that needs neither a bias nor a table, to make ids with.
fn chosen_by(selection: Selection) -> Selection {
    match selection {
        Selection::Table => Selection::default(),
        Selection::TopK { by, groups, .. } => Selection::TopK { by, bias: false, groups },
        mixer => mixer,
    }
}

/// A case of gate_backward.
#[derive(Clone, Debug)]
pub struct Gate {
    /// T, H, E.
    pub sizes: [usize; 3],
    /// Formats of n, of the router, of the gradients.
    pub dtypes: [DType; 3],
    /// c of the soft-cap.
    pub softcap: Option<f32>,
    /// How the gradients are stored.
    pub mode: GradientMode,
}

const GATE_SCALE: f32 = 1.25;

impl CheckBackward for Gate {
    fn prepare(&self) -> Prepared {
        let [tokens, hidden, experts] = self.sizes;
        let data = Data::new("gate_backward").of(&format!("{:?}", self.sizes));
        let x = data.of("n").tokens(self.dtypes[0], [tokens, hidden]);
        let router = data.of("router").normal(self.dtypes[1], [experts, hidden], 1.0 / (hidden as f64).sqrt());
        let d_logits = data.of("d_logits").normal(DType::F32, [tokens, experts], 0.7);
        let config = GateConfig { norm: None, scale: GATE_SCALE, softcap: self.softcap };
        let (x_floats, bias, norm_weight) = (x.as_floats(), None, None);
        let op = |d_logits, x, router, config| {
            let d_normed = None;
            reference::gate_backward(&reference::GateBackward {
                d_logits,
                d_normed,
                x,
                router,
                bias,
                norm_weight,
                config,
                tokens,
                hidden,
                experts,
            })
        };
        let found = op(d_logits.as_floats(), x_floats, router.as_floats(), config);
        let m = [d_logits.as_floats(), x_floats, router.as_floats()].map(magnitudes);
        let m = op(&m[0], &m[1], &m[2], GateConfig { softcap: None, ..config });
        // the slope of the soft-cap is one less a square of a logit that was rounded
        let capped = if self.softcap.is_some() { 16.0 * DType::F32.epsilon() } else { 0.0 };
        let errors = |n: usize, m: &[f64]| m.iter().map(|&m| tolerance::sum(n, m) + capped * m).collect();
        let (to, mut prepared) = ((self.dtypes[2], self.mode), Prepared::default());
        prepared.output(output("d_n", to, [tokens, hidden], [found.x, errors(experts, &m.x)]));
        prepared.output(output("d_router", to, [experts, hidden], [found.router, errors(tokens, &m.router)]));
        prepared.output(output("d_bias", to, [experts], [found.bias, errors(tokens, &m.bias)]));
        if self.softcap.is_some() {
            let (x, router) = (x_floats, router.as_floats());
            let op = reference::Gate { x, router, bias, norm_weight, config, tokens, hidden, experts };
            let logits = reference::gate(&op).logits;
            prepared.input("logits", Tensor::floats(DType::F32, [tokens, experts], logits));
        }
        prepared.input("d_logits", d_logits).input("n", x).input("router", router);
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        let d_n = gradient(&mut operands, "d_n", self.mode);
        let d_router = gradient(&mut operands, "d_router", self.mode);
        let d_bias = gradient(&mut operands, "d_bias", self.mode);
        let operands = GateBackward {
            d_logits: operands.input("d_logits")?,
            logits: operands.input_if("logits"),
            softcap: self.softcap,
            scale: GATE_SCALE,
            n: Some(operands.input("n")?),
            router: operands.input("router")?,
            d_n,
            d_router,
            d_bias,
        };
        backend.gate_backward(stream, operands)
    }
}

/// A case of a loss on logits.
#[derive(Clone, Debug)]
pub struct Loss {
    /// T, E, K.
    pub sizes: [usize; 3],
    /// Format of the logits.
    pub dtype: DType,
    /// The score of a load-balancing loss; none for the z-loss.
    pub score: Option<Score>,
    /// Where sequences begin and end; none: one sequence.
    pub sequences: Option<Vec<u32>>,
    /// How loss and gradient are stored.
    pub mode: GradientMode,
}

const COEFFICIENT: f32 = 0.35;

impl CheckBackward for Loss {
    fn prepare(&self) -> Prepared {
        let [tokens, experts, top_k] = self.sizes;
        let data = Data::new("loss").of(&format!("{:?}", self.sizes));
        let logits = data.of("logits").normal(self.dtype, [tokens, experts], 1.5);
        let ids = data.of("routes").routes([tokens, top_k, experts], Spread::Skewed);
        let coefficient = f64::from(COEFFICIENT);
        let found = match self.score {
            Some(score) => {
                let (logits, ids, sequences) = (logits.as_floats(), ids.as_ids(), self.sequences.as_deref());
                let op = reference::LoadBalance { logits, ids, score, sequences, coefficient, tokens, experts, top_k };
                reference::load_balance_loss(&op)
            }
            None => reference::z_loss(logits.as_floats(), experts, coefficient),
        };
        let relative = tolerance::weight(experts, 12.0, 0.0);
        let largest = found.logits.iter().fold(0.0f64, |m, d| m.max(d.abs()));
        // where all of it cancels, what the reference expects is its own rounding in f64
        let errors = vec![relative * largest + 16.0 * f64::EPSILON * found.value.abs(); tokens * experts];
        let (to, mut prepared) = ((DType::F32, self.mode), Prepared::default());
        prepared.output(output("d_logits", to, [tokens, experts], [found.logits, errors]));
        prepared.output(output("loss", to, [1], [vec![found.value], vec![relative * found.value.abs()]]));
        prepared.input("logits", logits);
        if self.score.is_some() {
            prepared.input("experts", ids);
        }
        prepared.input_if("sequences", self.sequences.clone().map(|ends| Tensor::ids([ends.len()], ends)));
        prepared
    }

    fn call<B: BackendBackward>(
        &self,
        backend: &B,
        stream: &B::Stream,
        mut operands: Operands<'_, B>,
    ) -> Result<(), B::Error> {
        let loss = gradient(&mut operands, "loss", self.mode);
        let d_logits = gradient(&mut operands, "d_logits", self.mode);
        let (logits, coefficient) = (operands.input("logits")?, COEFFICIENT);
        let Some(score) = self.score else {
            return backend.z_loss(stream, ZLoss { logits, coefficient, loss, d_logits });
        };
        let (experts, sequences) = (operands.input("experts")?, operands.input_if("sequences"));
        backend.load_balance_loss(
            stream,
            LoadBalanceLoss { logits, experts, score, sequences, coefficient, loss, d_logits },
        )
    }
}

/// The cases of route_backward, gate_backward and the losses.
pub(super) fn cases() -> Vec<BackwardCase> {
    let mut cases = Vec::new();
    let mut push = |stage, name: String, dtype: String, operation| {
        let case = BackwardCase { stage, name, dtype, placement: Default::default(), operation };
        let strided = case.name.contains("[7, 24, 3]") || case.name.contains("[7, 31, 24]");
        cases.extend(strided.then(|| case.clone().strided()));
        cases.push(case);
    };
    let normalizers = [
        Normalize::None,
        Normalize::Sum { eps: 0.25 },
        Normalize::SumAtLeast { min: 0.05 },
        Normalize::SumAtLeast { min: 50.0 },
        Normalize::Lp { p: 2.0 },
    ];
    let scales = [None, Some(ExpertScale::BeforeNormalize), Some(ExpertScale::AfterNormalize)];
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Logit] {
        for normalize in normalizers {
            for value in [WeightValue::Score, WeightValue::SoftmaxOfChosen] {
                for expert_scale in scales {
                    for selection in [Selection::default(), Selection::SparseMixer { jitter: 0.3 }, Selection::Table] {
                        let mixer = matches!(selection, Selection::SparseMixer { .. });
                        if mixer && (score != Score::Softmax || value != WeightValue::Score) {
                            continue;
                        }
                        let sizes = [7, 24, if mixer { 2 } else { 3 }];
                        let weights = WeightRule { value, expert_scale, normalize, scale: 1.5 };
                        let rule = RoutingRule { score, selection, always: 0, weights };
                        let name = format!("{score:?} {selection:?} {weights:?} {sizes:?}");
                        let route = Route { sizes, dtype: DType::F32, rule, mode: GradientMode::Assign, odd: false };
                        push(Stage::RouteBackward, name, "f32".into(), BackwardOperation::Route(route));
                    }
                }
            }
        }
    }
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus] {
        for value in [WeightValue::Score, WeightValue::SoftmaxOfChosen] {
            let weights = WeightRule { value, normalize: Normalize::Sum { eps: 0.25 }, ..WeightRule::default() };
            let (sizes, rule) = ([7, 24, 3], RoutingRule { score, always: 2, weights, ..RoutingRule::default() });
            let route = Route { sizes, dtype: DType::F32, rule, mode: GradientMode::Assign, odd: false };
            let name = format!("always 2 {score:?} {value:?} {sizes:?}");
            push(Stage::RouteBackward, name, "f32".into(), BackwardOperation::Route(route));
        }
    }
    let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
    for dtype in FLOATS {
        for sizes in [[0, 8, 2], [1, 1, 1], [5, 12, 12], [9, 60, 4], [300, 128, 8], [2, 4096, 40], [13, 7, 2]] {
            for (named, mode) in MODES {
                for (score, odd) in [(Score::Softmax, false), (Score::Softmax, true), (Score::Sigmoid, true)] {
                    let rule = RoutingRule { score, selection: Selection::default(), always: 0, weights };
                    let name = format!("{named}{score:?}{} {sizes:?}", if odd { " odd" } else { "" });
                    let route = Route { sizes, dtype, rule, mode, odd };
                    push(Stage::RouteBackward, name, dtype.to_string(), BackwardOperation::Route(route));
                }
                for score in [Some(Score::Softmax), Some(Score::Sigmoid), Some(Score::SqrtSoftplus), None] {
                    for sequences in [None, Some(vec![0, sizes[0] as u32 / 3, sizes[0] as u32 / 3, sizes[0] as u32])] {
                        if score.is_none() && sequences.is_some() {
                            continue;
                        }
                        let stage = if score.is_some() { Stage::LoadBalanceLoss } else { Stage::ZLoss };
                        let kind = if sequences.is_some() { " sequences" } else { "" };
                        let name = format!("{named}{score:?}{kind} {sizes:?}");
                        let loss = Loss { sizes, dtype, score, sequences, mode };
                        push(stage, name, dtype.to_string(), BackwardOperation::Loss(loss));
                    }
                }
            }
        }
    }
    for (named, mode) in MODES {
        for (selection, value, top_k) in [
            (Selection::SparseMixer { jitter: 0.3 }, WeightValue::Score, 2),
            (Selection::default(), WeightValue::SoftmaxOfChosen, 3),
        ] {
            let expert_scale = Some(ExpertScale::BeforeNormalize);
            let weights = WeightRule { value, expert_scale, normalize: Normalize::Sum { eps: 0.25 }, scale: 1.5 };
            let (sizes, rule) = ([29, 24, top_k], RoutingRule { selection, weights, ..RoutingRule::default() });
            let route = Route { sizes, dtype: DType::F32, rule, mode, odd: true };
            let name = format!("{named}{selection:?} {value:?} odd {sizes:?}");
            push(Stage::RouteBackward, name, "f32".into(), BackwardOperation::Route(route));
        }
        let odd =
            [("within", vec![1, 3, 3, 8]), ("backwards", vec![4, 6, 2, 8, 7, 8]), ("past the end", vec![0, 4, 10])];
        for (kind, sequences) in odd {
            for score in [Score::Softmax, Score::Sigmoid] {
                let sizes = [9, 60, 4];
                let (score, sequences, dtype) = (Some(score), Some(sequences.clone()), DType::F32);
                let name = format!("{named}{score:?} {kind} {sizes:?}");
                let loss = Loss { sizes, dtype, score, sequences, mode };
                push(Stage::LoadBalanceLoss, name, "f32".into(), BackwardOperation::Loss(loss));
            }
        }
    }
    let (f32, bf16) = (DType::F32, DType::BF16);
    for dtypes in FLOATS.map(|dtype| [dtype; 3]).into_iter().chain([[bf16, bf16, f32], [f32, bf16, bf16]]) {
        for sizes in [[0, 16, 8], [1, 1, 1], [7, 31, 24], [5, 67, 1], [140, 200, 130], [210, 136, 72]] {
            for (named, mode) in MODES {
                for softcap in [None, Some(1.5)] {
                    let name = format!("{named}{}{sizes:?}", if softcap.is_some() { "softcap " } else { "" });
                    let gate = Gate { sizes, dtypes, softcap, mode };
                    push(Stage::GateBackward, name, dtype_name(dtypes), BackwardOperation::Gate(gate));
                }
            }
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use crate::backward::backward_cases;
    use crate::cases::Scale;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        for scale in [Scale::Quick, Scale::Full] {
            let mut seen = HashSet::new();
            for case in backward_cases(scale) {
                assert!(seen.insert(case.id()), "{} twice", case.id());
            }
        }
    }
}
