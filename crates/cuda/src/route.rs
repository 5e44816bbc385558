use crate::error::Result;
use crate::launch::{Grid, Tensor, launch, params};
use crate::{Cuda, CudaStream, kernel::Kernel, plan};
use fused_moe_core::config::{ExpertScale, GroupScore, Masked, Normalize, Score, SelectBy, Selection, WeightValue};
use fused_moe_core::operation::{Choice, GatherWeights, Route};
use fused_moe_core::problem::ChoiceProblem;

params! {
    ChoiceParams {
        experts: Tensor, weights: Tensor, bias: Tensor, scale: Tensor, token_ids: Tensor, table: Tensor,
        witness_keys: Tensor, witness_experts: Tensor, vocabulary: u64, status: u64,
        experts_total: u32, top_k: u32, always: u32, score: u32, selection: u32, by_logit: u32,
        groups: u32, groups_kept: u32, group_by_two: u32, masked_to_zero: u32,
        softmax_of_chosen: u32, scale_when: u32, normalize: u32,
        jitter: f32, normalize_by: f32, weight_scale: f32,
    }
}

params! {
    RouteParams { logits: Tensor, choice: ChoiceParams, tokens: u64 }
}

params! {
    GatherWeightsParams {
        scores: Tensor, experts: Tensor, scale: Tensor, weights: Tensor, tokens: u64, status: u64,
        experts_total: u32, top_k: u32,
    }
}

impl ChoiceParams {
    pub(crate) fn new(problem: &ChoiceProblem, operands: &Choice<'_, Cuda>, stream: &CudaStream) -> Result<Self> {
        let rule = problem.rule;
        let mut params = Self {
            experts: Tensor::of(&operands.experts)?,
            weights: Tensor::of(&operands.weights)?,
            bias: Tensor::maybe(operands.correction_bias.as_ref())?,
            scale: Tensor::maybe(operands.expert_scale.as_ref())?,
            token_ids: Tensor::maybe(operands.table.as_ref().map(|table| &table.token_ids))?,
            table: Tensor::maybe(operands.table.as_ref().map(|table| &table.experts))?,
            witness_keys: Tensor::maybe(operands.witness.as_ref().map(|witness| &witness.keys))?,
            witness_experts: Tensor::maybe(operands.witness.as_ref().map(|witness| &witness.experts))?,
            vocabulary: problem.vocabulary as u64,
            status: stream.status_address(),
            experts_total: problem.experts as u32,
            top_k: problem.top_k as u32,
            always: rule.always as u32,
            score: score_code(rule.score),
            softmax_of_chosen: (rule.weights.value == WeightValue::SoftmaxOfChosen).into(),
            scale_when: scale_code(rule.weights.expert_scale),
            weight_scale: rule.weights.scale,
            ..Self::default()
        };
        (params.normalize, params.normalize_by) = normalize_code(rule.weights.normalize);
        match rule.selection {
            Selection::TopK { by, bias, groups } => {
                params.by_logit = (by == SelectBy::Logit || (!bias && groups.is_none())).into();
                if let Some(groups) = groups {
                    params.groups = groups.count as u32;
                    params.groups_kept = groups.keep as u32;
                    params.group_by_two = (groups.score == GroupScore::SumOfBestTwo).into();
                    params.masked_to_zero = (groups.masked == Masked::Zero).into();
                }
            }
            Selection::SparseMixer { jitter } => {
                (params.selection, params.by_logit, params.jitter) = (1, 1, jitter);
            }
            Selection::Table => params.selection = 2,
        }
        Ok(params)
    }
}

/// What the kernels name a score.
pub(crate) fn score_code(score: Score) -> u32 {
    match score {
        Score::Softmax => 0,
        Score::Sigmoid => 1,
        Score::SqrtSoftplus => 2,
        Score::Logit => 3,
    }
}

/// What they name the place of a per-expert scale.
pub(crate) fn scale_code(scale: Option<ExpertScale>) -> u32 {
    match scale {
        None => 0,
        Some(ExpertScale::BeforeNormalize) => 1,
        Some(ExpertScale::AfterNormalize) => 2,
    }
}

/// What they name a norm of weights, and its number.
pub(crate) fn normalize_code(normalize: Normalize) -> (u32, f32) {
    match normalize {
        Normalize::None => (0, 0.0),
        Normalize::Sum { eps } => (1, eps),
        Normalize::SumAtLeast { min } => (2, min),
        Normalize::Lp { p } => (3, p),
    }
}

impl RouteParams {
    pub(crate) fn new(problem: &ChoiceProblem, operands: &Route<'_, Cuda>, stream: &CudaStream) -> Result<Self> {
        Ok(Self {
            logits: Tensor::of(&operands.logits)?,
            choice: ChoiceParams::new(problem, &operands.choice, stream)?,
            tokens: problem.tokens as u64,
        })
    }
}

pub(crate) fn route(cuda: &Cuda, stream: &CudaStream, operands: Route<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let params = RouteParams::new(&problem, &operands, stream)?;
    let plan = plan::route(&problem, operands.choice.witness.is_some());
    launch(cuda, stream, plan.kernel, plan.grid, &params)
}

pub(crate) fn gather_weights(cuda: &Cuda, stream: &CudaStream, operands: GatherWeights<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let params = GatherWeightsParams {
        scores: Tensor::of(&operands.scores)?,
        experts: Tensor::of(&operands.experts)?,
        scale: Tensor::maybe(operands.expert_scale.as_ref())?,
        weights: Tensor::of(&operands.weights)?,
        tokens: problem.tokens as u64,
        status: stream.status_address(),
        experts_total: problem.experts as u32,
        top_k: problem.top_k as u32,
    };
    let kernel = Kernel::GatherWeights { scores: problem.scores };
    launch(cuda, stream, kernel, Grid::line(problem.tokens.div_ceil(4), 128), &params)
}
