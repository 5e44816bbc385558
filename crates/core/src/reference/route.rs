//! From logits to experts and weights.

pub(super) mod score;
pub(super) mod select;
mod weigh;

use super::gate::{Gate, Gated, gate};
use crate::config::{RoutingRule, SelectBy, Selection, WeightValue};
use crate::{NO_EXPERT, Status};

/// Operands of [`route`] besides the logits.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    /// Score, selection, weight rule.
    pub rule: RoutingRule,
    /// `[E - A]`, A experts being always chosen; added to the keys if the selection says so; absent for zeros.
    pub correction_bias: Option<&'a [f64]>,
    /// `[E]`, multiplies the weights if the weight rule says so; absent for ones.
    pub expert_scale: Option<&'a [f64]>,
    /// Where [`Selection::Table`] reads; no token id is in range of an absent one.
    pub table: Option<Table<'a>>,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
}

/// Experts by token id.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// Expert ids `[V, K]`. An entry may occur twice in a row.
    pub experts: &'a [u32],
    /// `[T]`, each below V.
    pub token_ids: &'a [u32],
}

/// What [`route`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    /// `[T, K]`, descending by key within a token (table order for a table).
    pub experts: Vec<u32>,
    /// `[T, K]`.
    pub weights: Vec<f64>,
    /// `[T]`: how close each choice was.
    pub witness: Vec<Witness>,
    /// What was noticed.
    pub status: Status,
}

/// The last expert chosen for a token and the first one not chosen. Keys that differ by less than the rounding of a
/// number format make a near-tie, which an implementation in that format may decide the other way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Witness {
    /// (K-A)-th in the order of the choice, A experts being always chosen.
    pub last: Candidate,
    /// (K-A+1)-th in the order of the choice; [`Candidate::NONE`] if K = E.
    pub next: Candidate,
}

/// An expert and the key that it was compared by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub expert: u32,
    /// Its key, after groups were masked.
    pub key: f64,
}

impl Candidate {
    /// There is none: [`NO_EXPERT`] with key -inf.
    pub const NONE: Self = Self { expert: NO_EXPERT, key: f64::NEG_INFINITY };
}

/// Chooses K experts for every token and weighs them. Each token is treated alone.
///
/// - `logits`: `[T, E]`
///
/// **Score** `s[e]` of the logit `l[e]`, as [`Score`](crate::config::Score) has it. A NaN logit has score 0 and is left
/// out of the softmax's sum. In a softmax the terms are `exp(l[e] - max)`, and 1 where `l[e] = max`, so that logits of
/// +inf share the weight equally and all others get 0.
///
/// **Selection.** For [`Selection::TopK`] every expert has a key, and the K largest are chosen, in descending order;
/// equal keys go to the lower expert.
/// - By score, without bias and without groups: the key is the *logit*. Every score is monotonic in the logit, so this
///   is the same choice in exact arithmetic; but scores that underflow or saturate do not make ties.
/// - Otherwise by score: `s[e] + bias[e]`; by logit: `l[e] + bias[e]`; without bias the sum is the first term.
/// - The key of a NaN logit, and a key that is itself NaN, is -inf.
/// - [`Groups`](crate::config::Groups): expert e is in group `e / (E / count)`. The worth of a group is the sum of its
///   two largest keys or its largest key (a sum that is NaN: -inf); the `keep` groups of largest worth stay, equal worth
///   goes to the lower group. The keys of the others become 0 ([`Masked::Zero`](crate::config::Masked)), or -inf and are
///   then chosen only after every expert of a kept group, even one whose key is -inf too.
///
/// With [`always`](RoutingRule::always) = A only the first E - A experts take part in this, and K - A of them are chosen;
/// the last A experts follow in the last A slots, by their number.
///
/// [`Selection::SparseMixer`], made for K = 2: pass 1 chooses the largest logit `m`; its weight starts as its softmax among
/// the experts with `l[e] = m` or `m - l[e] <= 2 * jitter * max(|l[e]|, m)`. Pass 2 does the same without the first
/// expert; its weight starts as 0 if only -inf is left. NaN counts as -inf. These weights take the place of the weight
/// rule's `value`.
///
/// [`Selection::Table`]: `experts[t] = table[token_ids[t]]`, in table order. A token id out of range gives K times
/// [`NO_EXPERT`] and [`Status::TOKEN_OUT_OF_RANGE`]; an entry `>= E` gives [`NO_EXPERT`] in its slot and
/// [`Status::EXPERT_OUT_OF_RANGE`]; an entry [`NO_EXPERT`] stays and raises nothing.
///
/// **Weights**, for each token over its K slots, as [`WeightRule`](crate::config::WeightRule) has it. `v[k]` is the score
/// (without bias) or the softmax among the chosen logits (duplicates count each time; zeros if all are -inf or NaN);
/// then `v[k] *= expert_scale[e]` if before; `v[k] /= norm(v)`, 0 where the norm is 0; `v[k] *= expert_scale[e]` if
/// after; `w[k] = v[k] * scale`. Slots with [`NO_EXPERT`] have weight 0 and take no part in sums.
///
/// **No finite logit.** A token all of whose logits are NaN or infinite gets experts `0..K` with weights NaN, and
/// [`Status::NO_FINITE_SCORE`], whatever the selection; a table is not read for it.
///
/// **Witness**: (K-A)-th and (K-A+1)-th expert of the order of the choice, with keys as compared (for the sparse mixer,
/// logits). [`Candidate::NONE`] twice for a table and for a token without finite logit.
///
/// ```
/// use fused_moe_core::{config::*, reference::{Route, route}};
/// let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
/// let rule = RoutingRule { score: Score::Sigmoid, weights, ..RoutingRule::default() };
/// let routes = route(&[0.0, -1.0, 0.0, -2.0], &Route { rule, correction_bias: None, expert_scale: None, table: None,
///                                                      tokens: 1, experts: 4, top_k: 2 });
/// assert_eq!(routes.experts, [0, 2]);
/// assert_eq!(routes.weights, [0.5, 0.5]);
/// assert_eq!(routes.witness[0].next.expert, 1);
/// ```
pub fn route(logits: &[f64], op: &Route<'_>) -> Routes {
    let mut routes = Routes { experts: vec![], weights: vec![], witness: vec![], status: Status::OK };
    for t in 0..op.tokens {
        let logits = &logits[t * op.experts..(t + 1) * op.experts];
        let choice = if logits.iter().any(|l| l.is_finite()) { choose(t, logits, op) } else { no_choice(op.top_k) };
        routes.experts.extend(choice.experts);
        routes.weights.extend(choice.weights);
        routes.witness.push(choice.witness);
        routes.status |= choice.status;
    }
    routes
}

/// One token's part of [`Routes`].
struct Choice {
    experts: Vec<u32>,
    weights: Vec<f64>,
    witness: Witness,
    status: Status,
}

const NO_WITNESS: Witness = Witness { last: Candidate::NONE, next: Candidate::NONE };

fn no_choice(top_k: usize) -> Choice {
    Choice {
        experts: (0..top_k as u32).collect(),
        weights: vec![f64::NAN; top_k],
        witness: NO_WITNESS,
        status: Status::NO_FINITE_SCORE,
    }
}

fn choose(t: usize, logits: &[f64], op: &Route<'_>) -> Choice {
    let scores = score::scores(logits, op.rule.score);
    let (experts, own_values, witness, status) = match op.rule.selection {
        Selection::TopK { by, bias, groups } => {
            let by_logit = by == SelectBy::Logit || (!bias && groups.is_none());
            let values = if by_logit { logits } else { &scores };
            let competing = op.experts - op.rule.always;
            let bias = op.correction_bias.filter(|_| bias);
            let mut keys = select::keys(&logits[..competing], &values[..competing], bias);
            if let Some(groups) = groups {
                select::limit_to_groups(&mut keys, groups);
            }
            let (mut experts, witness) = select::top_k(&keys, op.top_k - op.rule.always);
            experts.extend(competing as u32..op.experts as u32);
            (experts, None, witness, Status::OK)
        }
        Selection::SparseMixer { jitter } => {
            let (experts, values, witness) = select::sparse_mixer(logits, f64::from(jitter), op.top_k);
            (experts, Some(values), witness, Status::OK)
        }
        Selection::Table => match op.table.and_then(|table| table.row(t, op.top_k)) {
            Some(row) => {
                let (experts, bad) = select::from_table(row, op.experts);
                (experts, None, NO_WITNESS, if bad { Status::EXPERT_OUT_OF_RANGE } else { Status::OK })
            }
            None => (vec![NO_EXPERT; op.top_k], None, NO_WITNESS, Status::TOKEN_OUT_OF_RANGE),
        },
    };
    let values = match (own_values, op.rule.weights.value) {
        (Some(values), _) => values,
        (None, WeightValue::Score) => chosen(&scores, &experts, 0.0),
        (None, WeightValue::SoftmaxOfChosen) => score::softmax(&chosen(logits, &experts, f64::NEG_INFINITY)),
    };
    let weights = weigh::weigh(&values, &experts, &op.rule.weights, op.expert_scale);
    Choice { experts, weights, witness, status }
}

fn chosen(values: &[f64], experts: &[u32], none: f64) -> Vec<f64> {
    experts.iter().map(|&e| if e == NO_EXPERT { none } else { values[e as usize] }).collect()
}

impl<'a> Table<'a> {
    fn row(&self, t: usize, top_k: usize) -> Option<&'a [u32]> {
        let first = (self.token_ids[t] as usize).checked_mul(top_k)?;
        self.experts.get(first..first.checked_add(top_k)?)
    }
}

/// [`gate`](fn@gate), then [`route`](fn@route) of its logits. `route.tokens` and `route.experts` are those of the gate.
pub fn gate_route(gate_op: &Gate<'_>, route_op: &Route<'_>) -> (Gated, Routes) {
    let gated = gate(gate_op);
    let routes = route(&gated.logits, route_op);
    (gated, routes)
}

/// Operands of [`gather_weights`].
#[derive(Clone, Copy, Debug)]
pub struct GatherWeights<'a> {
    /// `[T, E]`.
    pub scores: &'a [f64],
    /// Chosen experts `[T, K]`.
    pub ids: &'a [u32],
    /// `[E]`, or absent for ones.
    pub expert_scale: Option<&'a [f64]>,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
}

/// Weights of experts that were chosen elsewhere: `w[t,k] = p[k] / sum_j p[j] * scale[ids[t,k]]` with
/// `p[k] = scores[t, ids[t,k]]`. Returns `[T, K]`.
///
/// A sum of zero gives zeros. An id `>= E` gets weight 0, takes no part in the sum and raises
/// [`Status::EXPERT_OUT_OF_RANGE`]; [`NO_EXPERT`] likewise, but raises nothing. NaN scores make NaN weights.
///
/// ```
/// use fused_moe_core::reference::{GatherWeights, gather_weights};
/// let (weights, status) = gather_weights(&GatherWeights { scores: &[0.1, 0.3, 0.1], ids: &[1, 0], expert_scale: None,
///                                                         tokens: 1, experts: 3, top_k: 2 });
/// assert!(weights[0] == 0.3 / 0.4 && status.is_ok());
/// ```
pub fn gather_weights(op: &GatherWeights<'_>) -> (Vec<f64>, Status) {
    let mut weights = vec![0.0; op.tokens * op.top_k];
    let mut status = Status::OK;
    for t in 0..op.tokens {
        let slots = t * op.top_k..(t + 1) * op.top_k;
        let mut sum = 0.0;
        for slot in slots.clone() {
            let id = op.ids[slot] as usize;
            if id < op.experts {
                sum += op.scores[t * op.experts + id];
            } else if op.ids[slot] != NO_EXPERT {
                status |= Status::EXPERT_OUT_OF_RANGE;
            }
        }
        for slot in slots {
            let id = op.ids[slot] as usize;
            if id < op.experts && sum != 0.0 {
                let scale = op.expert_scale.map_or(1.0, |scale| scale[id]);
                weights[slot] = op.scores[t * op.experts + id] / sum * scale;
            }
        }
    }
    (weights, status)
}

#[cfg(test)]
mod tests;
