use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::plan::{pieces, route as plan};
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::config::{
    ExpertScale, GroupScore, Masked, Normalize, RoutingRule, Score, SelectBy, Selection, WeightValue,
};
use fused_moe_core::operation::{GatherWeights, Route};
use fused_moe_core::problem::ChoiceProblem;

params! {
    RouteParams {
        logits: Tensor, bias: Tensor, scale: Tensor, experts: Tensor, weights: Tensor, keys: Tensor, witness: Tensor,
        token_ids: Tensor, table: Tensor, tokens: u32, experts_total: u32, top_k: u32, always: u32,
        vocabulary: u32, groups: u32, groups_kept: u32, jitter: f32, normalize_by: f32, weight_scale: f32, not_a_number: f32,
    }
}

params! {
    GatherWeightsParams {
        scores: Tensor, experts: Tensor, scale: Tensor, weights: Tensor, tokens: u32, experts_total: u32, top_k: u32,
    }
}

/// A routing rule without its numbers, as the kernel's text calls its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RuleKind {
    score: &'static str,
    selection: &'static str,
    by_logit: bool,
    groups: &'static str,
    masked_to_zero: bool,
    of_chosen: bool,
    scale_when: &'static str,
    normalize: &'static str,
}

impl From<&RoutingRule> for RuleKind {
    fn from(rule: &RoutingRule) -> Self {
        let groups = match rule.selection {
            Selection::TopK { groups, .. } => groups,
            Selection::SparseMixer { .. } | Selection::Table => None,
        };
        Self {
            score: score_constant(rule.score),
            selection: match rule.selection {
                Selection::TopK { .. } => "SELECT_TOP_K",
                Selection::SparseMixer { .. } => "SELECT_SPARSE_MIXER",
                Selection::Table => "SELECT_TABLE",
            },
            by_logit: match rule.selection {
                Selection::TopK { by, bias, groups } => by == SelectBy::Logit || (!bias && groups.is_none()),
                Selection::SparseMixer { .. } => true,
                Selection::Table => false,
            },
            groups: match groups.map(|groups| groups.score) {
                None => "GROUPS_NONE",
                Some(GroupScore::Best) => "GROUPS_BY_BEST",
                Some(GroupScore::SumOfBestTwo) => "GROUPS_BY_BEST_TWO",
            },
            masked_to_zero: groups.is_some_and(|groups| groups.masked == Masked::Zero),
            of_chosen: rule.weights.value == WeightValue::SoftmaxOfChosen,
            scale_when: match rule.weights.expert_scale {
                None => "SCALE_NEVER",
                Some(ExpertScale::BeforeNormalize) => "SCALE_BEFORE",
                Some(ExpertScale::AfterNormalize) => "SCALE_AFTER",
            },
            normalize: match rule.weights.normalize {
                Normalize::None => "NORMALIZE_NONE",
                Normalize::Sum { .. } => "NORMALIZE_SUM",
                Normalize::SumAtLeast { .. } => "NORMALIZE_SUM_AT_LEAST",
                Normalize::Lp { .. } => "NORMALIZE_LP",
            },
        }
    }
}

/// A score, as the kernels' texts call it.
pub(crate) fn score_constant(score: Score) -> &'static str {
    match score {
        Score::Softmax => "SCORE_SOFTMAX",
        Score::Sigmoid => "SCORE_SIGMOID",
        Score::SqrtSoftplus => "SCORE_SQRT_SOFTPLUS",
        Score::Logit => "SCORE_LOGIT",
    }
}

/// The number of what weights are divided by.
pub(crate) fn normalize_by(rule: &RoutingRule) -> f32 {
    match rule.weights.normalize {
        Normalize::None => 0.0,
        Normalize::Sum { eps } => eps,
        Normalize::SumAtLeast { min } => min,
        Normalize::Lp { p } => p,
    }
}

impl RuleKind {
    pub(crate) fn by_table(&self) -> bool {
        self.selection == "SELECT_TABLE"
    }

    pub(crate) fn constants(&self) -> Vec<(&'static str, String)> {
        vec![
            ("SCORE", self.score.into()),
            ("SELECTION", self.selection.into()),
            ("BY_LOGIT", self.by_logit.to_string()),
            ("GROUPS", self.groups.into()),
            ("MASKED_TO_ZERO", self.masked_to_zero.to_string()),
            ("OF_CHOSEN", self.of_chosen.to_string()),
            ("SCALE_WHEN", self.scale_when.into()),
            ("NORMALIZE", self.normalize.into()),
        ]
    }

    /// Kinds that stand for all: every part has each of its values.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let top = |by_logit, groups, masked_to_zero| ("SELECT_TOP_K", by_logit, groups, masked_to_zero);
        let selections = [
            top(true, "GROUPS_NONE", false),
            top(false, "GROUPS_NONE", false),
            top(false, "GROUPS_BY_BEST_TWO", false),
            top(true, "GROUPS_BY_BEST", true),
            ("SELECT_SPARSE_MIXER", true, "GROUPS_NONE", false),
            ("SELECT_TABLE", false, "GROUPS_NONE", false),
        ];
        let scores = ["SCORE_SOFTMAX", "SCORE_SIGMOID", "SCORE_SQRT_SOFTPLUS", "SCORE_LOGIT"];
        let scales = ["SCALE_NEVER", "SCALE_BEFORE", "SCALE_AFTER"];
        let norms = ["NORMALIZE_NONE", "NORMALIZE_SUM", "NORMALIZE_SUM_AT_LEAST", "NORMALIZE_LP"];
        let mut all = Vec::new();
        for (i, (selection, by_logit, groups, masked_to_zero)) in selections.into_iter().enumerate() {
            for (j, score) in scores.into_iter().enumerate() {
                let (scale_when, normalize, of_chosen) = (scales[(i + j) % 3], norms[(i + j) % 4], (i + j) % 2 == 1);
                all.push(Self { score, selection, by_logit, groups, masked_to_zero, of_chosen, scale_when, normalize });
            }
        }
        all
    }
}

impl RouteParams {
    /// The numbers of a rule; operands are not placed yet.
    fn new(problem: &ChoiceProblem) -> Self {
        let rule = &problem.rule;
        let (groups, groups_kept, jitter) = match rule.selection {
            Selection::TopK { groups: Some(groups), .. } => (groups.count as u32, groups.keep as u32, 0.0),
            Selection::SparseMixer { jitter } => (0, 0, jitter),
            Selection::TopK { groups: None, .. } | Selection::Table => (0, 0, 0.0),
        };
        Self {
            experts_total: problem.experts as u32,
            top_k: problem.top_k as u32,
            always: rule.always as u32,
            vocabulary: u32::try_from(problem.vocabulary).unwrap_or(u32::MAX),
            groups,
            groups_kept,
            jitter,
            normalize_by: normalize_by(rule),
            weight_scale: rule.weights.scale,
            not_a_number: f32::NAN,
            ..Self::default()
        }
    }
}

/// Bytes from row to row.
fn row_bytes<S>(view: &View<S>) -> usize {
    view.row_stride() * view.dtype().size()
}

pub(crate) fn route(wgpu: &Wgpu, stream: &WgpuStream, operands: Route<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "route";
    let (problem, device) = (operands.problem()?, wgpu.device());
    let Route { logits, choice } = &operands;
    let bias = Operand::maybe(device, NAME, choice.correction_bias.as_ref())?;
    let scale = Operand::maybe(device, NAME, choice.expert_scale.as_ref())?;
    let table = Operand::maybe(device, NAME, choice.table.as_ref().map(|table| &table.experts))?;
    let token_ids = choice.table.as_ref().map(|table| Operand::column(device, NAME, &table.token_ids)).transpose()?;
    let (keys, witness) = choice.witness.as_ref().map(|witness| (&witness.keys, &witness.experts)).unzip();
    let largest = [row_bytes(logits), row_bytes(&choice.experts), row_bytes(&choice.weights)]
        .into_iter()
        .chain([keys.map_or(0, row_bytes), witness.map_or(0, row_bytes)])
        .fold(0, usize::max);
    let (kernel, why) = plan(&problem);
    for rows in pieces(wgpu, problem.tokens, largest) {
        let logits = Operand::rows(device, NAME, logits, rows.clone())?;
        let experts = Operand::rows(device, NAME, &choice.experts, rows.clone())?;
        let weights = Operand::rows(device, NAME, &choice.weights, rows.clone())?;
        let keys = keys.map(|view| Operand::rows(device, NAME, view, rows.clone())).transpose()?;
        let witness = witness.map(|view| Operand::rows(device, NAME, view, rows.clone())).transpose()?;
        let mut ids = tensor(&token_ids);
        ids.offset += rows.start as u32 * ids.stride;
        let params = RouteParams {
            logits: logits.tensor,
            bias: tensor(&bias),
            scale: tensor(&scale),
            experts: experts.tensor,
            weights: weights.tensor,
            keys: tensor(&keys),
            witness: tensor(&witness),
            token_ids: ids,
            table: tensor(&table),
            tokens: rows.len() as u32,
            ..RouteParams::new(&problem)
        };
        let status = Some(Operand::whole(stream.status_buffer()));
        let bound = [Some(logits), bias, scale, Some(experts), Some(weights), keys, witness, status];
        let from_table = [Some(logits), token_ids, table, scale, Some(experts), Some(weights), status];
        let bound = if table.is_some() { &from_table[..] } else { &bound };
        if let Some(recorder) = wgpu.recorder() {
            recorder.explain(why);
        }
        launch(wgpu, stream, kernel, bound, (Groups::Line(rows.len() as u64), &params))?;
    }
    Ok(())
}

pub(crate) fn gather_weights(wgpu: &Wgpu, stream: &WgpuStream, operands: GatherWeights<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "gather_weights";
    let (problem, device) = (operands.problem()?, wgpu.device());
    let GatherWeights { scores, experts, expert_scale, weights } = &operands;
    let scale = Operand::maybe(device, NAME, expert_scale.as_ref())?;
    let largest = row_bytes(scores).max(row_bytes(experts)).max(row_bytes(weights));
    for rows in pieces(wgpu, problem.tokens, largest) {
        let scores = Operand::rows(device, NAME, scores, rows.clone())?;
        let experts = Operand::rows(device, NAME, experts, rows.clone())?;
        let weights = Operand::rows(device, NAME, weights, rows.clone())?;
        let params = GatherWeightsParams {
            scores: scores.tensor,
            experts: experts.tensor,
            scale: tensor(&scale),
            weights: weights.tensor,
            tokens: rows.len() as u32,
            experts_total: problem.experts as u32,
            top_k: problem.top_k as u32,
        };
        let status = Operand::whole(stream.status_buffer());
        let bound = [Some(scores), Some(experts), scale, Some(weights), Some(status)];
        launch(wgpu, stream, Kernel::GatherWeights, &bound, (Groups::Line(rows.len() as u64), &params))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::first_adapter;
    use fused_moe_core::config::{Groups as ExpertGroups, WeightRule};
    use fused_moe_core::operation::Choice;
    use fused_moe_core::{Backend, DType, reference};

    /// More keys than fit into a workgroup's memory, and more groups.
    #[test]
    fn very_many_experts() {
        let Some(wgpu) = first_adapter() else { return };
        let groups = |count, keep, score, masked| Some(ExpertGroups { count, keep, score, masked });
        for (experts, top_k, groups) in [
            (4096, 64, None),
            (4096, 65, None),
            (4096, 4096, None),
            (4093, 1000, None),
            (2000, 255, None),
            (2000, 256, None),
            (4096, 100, groups(4096, 200, GroupScore::SumOfBestTwo, Masked::NegInfinity)),
            (4096, 8, groups(2048, 7, GroupScore::SumOfBestTwo, Masked::Zero)),
            (4096, 700, groups(2, 1, GroupScore::Best, Masked::NegInfinity)),
            (4095, 30, groups(3, 2, GroupScore::SumOfBestTwo, Masked::Zero)),
        ] {
            let selection = Selection::TopK { by: SelectBy::Logit, bias: false, groups };
            let weights = WeightRule { value: WeightValue::SoftmaxOfChosen, ..WeightRule::default() };
            let rule = RoutingRule { selection, weights, ..RoutingRule::default() };
            let tokens = 2;
            // thousands of them, many alike
            let logit = |i: usize| ((i as u32).wrapping_mul(0x9e37_79b1) >> 21) as f32 / 256.0 - 6.0;
            let logits: Vec<f32> = (0..tokens * experts).map(logit).collect();
            let mut memory = [experts, top_k, top_k].map(|width| wgpu.allocate(4 * tokens * width).unwrap());
            let [input, ids, weights] = &mut memory;
            wgpu.upload(bytemuck::cast_slice(&logits), input).unwrap();
            let ids_view = View::new(ids.write(), DType::U32, 0, [tokens, top_k]).unwrap();
            let weights_view = View::new(weights.write(), DType::F32, 0, [tokens, top_k]).unwrap();
            let logits_view = View::new(input.read(), DType::F32, 0, [tokens, experts]).unwrap();
            let stream = wgpu.stream().unwrap();
            let choice = Choice::new(rule, ids_view, weights_view);
            route(&wgpu, &stream, Route { logits: logits_view, choice }).unwrap();
            let (mut found, mut weighed) = (vec![0u32; tokens * top_k], vec![0f32; tokens * top_k]);
            wgpu.download(&stream, ids, bytemuck::cast_slice_mut(&mut found)).unwrap();
            wgpu.download(&stream, weights, bytemuck::cast_slice_mut(&mut weighed)).unwrap();
            let (correction_bias, expert_scale, table) = (None, None, None);
            let op = reference::Route { rule, correction_bias, expert_scale, table, tokens, experts, top_k };
            let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
            let expected = reference::route(&logits, &op);
            assert!(found == expected.experts, "E = {experts}, K = {top_k}, {groups:?}");
            for (found, expected) in weighed.into_iter().zip(expected.weights) {
                assert!((f64::from(found) / expected - 1.0).abs() < 1e-5, "{found} {expected}");
            }
        }
    }
}
