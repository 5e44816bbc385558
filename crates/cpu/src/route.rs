//! Logits to experts and weights.

mod score;
mod select;
mod weigh;

use crate::arch::Kernels;
use crate::error::Result;
use crate::plan::{FEW_EXPERTS as FEW, RoutePlan, RowsPlan};
use crate::rows::{Floats, Part, share_rows};
use crate::{Cpu, CpuStream};
use fused_moe_core::backend::share;
use fused_moe_core::config::{Score, SelectBy, Selection, WeightValue};
use fused_moe_core::operation::{Choice, GatherWeights, Route, TokenTable, Witness};
use fused_moe_core::problem::{ChoiceProblem, MAX_EXPERTS};
use fused_moe_core::{NO_EXPERT, Rows, Status};
use score::Softmax;
pub(crate) use select::descending;
use std::ops::Range;

/// What every token reads.
struct Router<'a> {
    kernels: Kernels,
    problem: ChoiceProblem,
    logits: Floats<'a>,
    correction_bias: Option<Floats<'a>>,
    expert_scale: Option<Floats<'a>>,
    table: Option<(&'a [u32], Rows<'a, u32>)>,
}

/// What is written, row by row.
type Outputs<'a> = ((Part<'a, u32>, Part<'a, f32>), Option<(Part<'a, f32>, Part<'a, u32>)>);

/// A token's scratch: N is E at least.
struct Scratch<const N: usize> {
    logits: [f32; N],
    keys: [f32; N],
    ranks: [u64; N],
    values: [f64; N],
}

/// What one token has: slices of E or K elements.
struct Token<'a> {
    logits: &'a [f32],
    keys: &'a mut [f32],
    ranks: &'a mut [u64],
    values: &'a mut [f64],
    experts: &'a mut [u32],
    weights: &'a mut [f32],
    witness: Option<(&'a mut [f32], &'a mut [u32])>,
}

pub(crate) fn route(cpu: &Cpu, stream: &CpuStream, operands: Route<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    choose(cpu, stream, problem, Floats::new(&operands.logits)?, operands.choice)
}

/// The errors that [`choose`] would come to, for callers that write before.
pub(crate) fn check_alignment(choice: &Choice<'_, Cpu>) -> Result<()> {
    Floats::optional(&choice.correction_bias)?;
    Floats::optional(&choice.expert_scale)?;
    if let Some(TokenTable { token_ids, experts }) = &choice.table {
        token_ids.typed::<u32>()?;
        experts.typed::<u32>()?;
    }
    if let Some(Witness { keys, experts }) = &choice.witness {
        share::<Cpu>(keys).typed::<f32>()?;
        share::<Cpu>(experts).typed::<u32>()?;
    }
    share::<Cpu>(&choice.experts).typed::<u32>()?;
    share::<Cpu>(&choice.weights).typed::<f32>()?;
    Ok(())
}

/// [`route`] of checked operands.
pub(crate) fn choose(
    cpu: &Cpu,
    stream: &CpuStream,
    problem: ChoiceProblem,
    logits: Floats<'_>,
    choice: Choice<'_, Cpu>,
) -> Result<()> {
    let table = match choice.table {
        Some(TokenTable { token_ids, experts }) => Some((token_ids.typed()?.row(0), experts.typed()?)),
        None => None,
    };
    let router = Router {
        kernels: cpu.kernels,
        problem,
        logits,
        correction_bias: Floats::optional(&choice.correction_bias)?,
        expert_scale: Floats::optional(&choice.expert_scale)?,
        table,
    };
    let witness = match choice.witness {
        Some(Witness { keys, experts }) => Some((Part::new(keys)?, Part::new(experts)?)),
        None => None,
    };
    let plan = RoutePlan::new(problem.experts, problem.top_k);
    let outputs = ((Part::new(choice.experts)?, Part::new(choice.weights)?), witness);
    share_rows(&cpu.pool, outputs, problem.tokens, plan.rows, |range, outputs| {
        stream.raise(match plan.few_experts {
            true => router.tokens::<FEW>(range, outputs),
            false => router.tokens::<MAX_EXPERTS>(range, outputs),
        });
    });
    Ok(())
}

impl Router<'_> {
    fn tokens<const N: usize>(&self, range: Range<usize>, outputs: Outputs<'_>) -> Status {
        let ((mut experts, mut weights), mut witness) = outputs;
        let mut scratch = Scratch { logits: [0.0; N], keys: [0.0; N], ranks: [0; N], values: [0.0; N] };
        let (e, k) = (self.problem.experts, self.problem.top_k);
        let mut status = Status::OK;
        for (i, t) in range.enumerate() {
            let logits = &mut scratch.logits[..e];
            self.logits.load(self.kernels, t, 0, logits);
            let mut token = Token {
                logits,
                keys: &mut scratch.keys[..e],
                ranks: &mut scratch.ranks[..e],
                values: &mut scratch.values[..k],
                experts: experts.row(i),
                weights: weights.row(i),
                witness: witness.as_mut().map(|(keys, experts)| (keys.row(i), experts.row(i))),
            };
            status |= if logits.iter().fold(false, |any, l| any | l.is_finite()) {
                self.choose(t, &mut token)
            } else {
                token.nothing_finite()
            };
        }
        status
    }

    /// How many experts the choice is among: the others are always chosen.
    fn competing(&self) -> usize {
        self.problem.experts - self.problem.rule.always
    }

    fn choose(&self, t: usize, token: &mut Token<'_>) -> Status {
        let rule = &self.problem.rule;
        match rule.selection {
            Selection::TopK { by, bias, groups } => {
                let by_logit = by == SelectBy::Logit || (!bias && groups.is_none());
                let softmax = match rule.score {
                    Score::Softmax if !by_logit || rule.weights.value == WeightValue::Score => {
                        Some(Softmax::of(self.kernels, token.logits, token.keys))
                    }
                    _ => None,
                };
                match by_logit {
                    true => token.keys.copy_from_slice(token.logits),
                    false => score::scores(self.kernels, rule.score, softmax, token.logits, token.keys),
                }
                let keys = &mut token.keys[..self.competing()];
                if let Some(bias) = &self.correction_bias {
                    bias.axpy(self.kernels, 1.0, [0, 0], keys);
                }
                select::clean(token.logits, keys);
                match groups {
                    Some(groups) => select::rank_groups(keys, groups, token.ranks),
                    None => select::rank_all(keys, token.ranks),
                }
                token.take_best(self.competing());
                self.weigh(token, softmax);
                Status::OK
            }
            Selection::SparseMixer { jitter } => {
                token.keys.copy_from_slice(token.logits);
                select::clean(token.logits, token.keys);
                select::rank_all(token.keys, token.ranks);
                token.take_best(self.competing());
                for pass in 0..token.values.len() {
                    token.values[pass] = score::masked_softmax(token.logits, &token.experts[..=pass], jitter);
                }
                self.finish(token);
                Status::OK
            }
            Selection::Table => self.by_table(t, token),
        }
    }

    fn by_table(&self, t: usize, token: &mut Token<'_>) -> Status {
        let row = self.table.and_then(|(ids, table)| {
            let id = ids.get(t).map_or(usize::MAX, |&id| id as usize);
            (id < table.rows()).then(|| table.row(id))
        });
        let Some(row) = row else {
            token.experts.fill(NO_EXPERT);
            token.weights.fill(0.0);
            return Status::TOKEN_OUT_OF_RANGE;
        };
        let mut status = Status::OK;
        for (expert, &id) in token.experts.iter_mut().zip(row) {
            let valid = (id as usize) < token.logits.len();
            *expert = if valid { id } else { NO_EXPERT };
            if !valid && id != NO_EXPERT {
                status = Status::EXPERT_OUT_OF_RANGE;
            }
        }
        let rule = &self.problem.rule;
        let softmax = (rule.score == Score::Softmax && rule.weights.value == WeightValue::Score)
            .then(|| Softmax::of(self.kernels, token.logits, token.keys));
        self.weigh(token, softmax);
        status
    }

    /// Values of the chosen, then their weights.
    fn weigh(&self, token: &mut Token<'_>, softmax: Option<Softmax>) {
        let rule = &self.problem.rule;
        let logit = |expert: u32| token.logits.get(expert as usize).copied();
        match rule.weights.value {
            WeightValue::Score => {
                for (value, &expert) in token.values.iter_mut().zip(token.experts.iter()) {
                    *value = logit(expert).map_or(0.0, |logit| score::exact(rule.score, softmax, logit));
                }
            }
            WeightValue::SoftmaxOfChosen => {
                for (value, &expert) in token.values.iter_mut().zip(token.experts.iter()) {
                    *value = logit(expert).map_or(f64::NEG_INFINITY, f64::from);
                }
                score::softmax(token.values);
            }
        }
        self.finish(token);
    }

    fn finish(&self, token: &mut Token<'_>) {
        let rule = &self.problem.rule.weights;
        weigh::weigh(token.values, token.experts, rule, self.expert_scale.as_ref());
        for (weight, &value) in token.weights.iter_mut().zip(token.values.iter()) {
            *weight = value as f32;
        }
    }
}

impl Token<'_> {
    fn nothing_finite(&mut self) -> Status {
        for (k, expert) in self.experts.iter_mut().enumerate() {
            *expert = k as u32;
        }
        self.weights.fill(f32::NAN);
        if let Some((keys, experts)) = &mut self.witness {
            keys.fill(f32::NEG_INFINITY);
            experts.fill(NO_EXPERT);
        }
        Status::NO_FINITE_SCORE
    }

    /// The best of the first `competing` of `ranks` become `experts`, and those behind them the last of these.
    fn take_best(&mut self, competing: usize) {
        let (ranks, always) = self.ranks.split_at_mut(competing);
        let k = self.experts.len() - always.len();
        let n = (k + usize::from(self.witness.is_some())).min(competing);
        select::best(ranks, n);
        let (chosen, rest) = self.experts.split_at_mut(k);
        for (expert, &rank) in chosen.iter_mut().zip(&*ranks) {
            *expert = select::expert(rank);
        }
        for (expert, id) in rest.iter_mut().zip(competing as u32..) {
            *expert = id;
        }
        if let Some((keys, experts)) = &mut self.witness {
            let last_and_next = ranks[..n].iter().skip(k.saturating_sub(1));
            let mut candidates = last_and_next.map(|&rank| (select::key(rank), select::expert(rank)));
            for (key, expert) in keys.iter_mut().zip(experts.iter_mut()) {
                (*key, *expert) = candidates.next().unwrap_or((f32::NEG_INFINITY, NO_EXPERT));
            }
        }
    }
}

pub(crate) fn gather_weights(cpu: &Cpu, stream: &CpuStream, operands: GatherWeights<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let scores = Floats::new(&operands.scores)?;
    let ids = operands.experts.typed::<u32>()?;
    let scale = Floats::optional(&operands.expert_scale)?;
    let weights = Part::<f32>::new(operands.weights)?;
    share_rows(&cpu.pool, weights, problem.tokens, RowsPlan::gather_weights(problem.top_k), |range, mut weights| {
        let exists = |id: u32| (id as usize) < problem.experts;
        for (i, t) in range.enumerate() {
            let score = |id: u32| f64::from(scores.at(t, id as usize));
            let mut sum = 0.0;
            for &id in ids.row(t) {
                if exists(id) {
                    sum += score(id);
                } else if id != NO_EXPERT {
                    stream.raise(Status::EXPERT_OUT_OF_RANGE);
                }
            }
            for (weight, &id) in weights.row(i).iter_mut().zip(ids.row(t)) {
                *weight = 0.0;
                if exists(id) && sum != 0.0 {
                    let scale = scale.as_ref().map_or(1.0, |scale| f64::from(scale.at(0, id as usize)));
                    *weight = (score(id) / sum * scale) as f32;
                }
            }
        }
    });
    Ok(())
}
