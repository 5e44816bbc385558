//! How experts are chosen: shared by route and gate_route.

use crate::data::{Data, Spread, Tensor, Values};
use crate::operands::{Expected, Operands, Output, Prepared};
use crate::tolerance;
use fused_moe_core::config::*;
use fused_moe_core::{Backend, DType, NO_EXPERT, operation, reference};

/// How experts are chosen.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The rule.
    pub rule: RoutingRule,
    /// Format of correction bias and expert scale.
    pub dtype: DType,
    /// Whether all correction biases are the same.
    pub flat_bias: bool,
    /// Whether every third expert's scale is NaN.
    pub nan_scale: bool,
    /// Whether the table holds ids that do not exist, and token ids lie outside of it.
    pub bad_table: bool,
    /// Whether the witness is asked for.
    pub witness: bool,
}

impl Choice {
    /// By this rule.
    pub fn new(rule: RoutingRule) -> Self {
        Self { rule, dtype: DType::F32, flat_bias: false, nan_scale: false, bad_table: false, witness: false }
    }

    /// Adds the operands of the choice to a case.
    pub(super) fn operands(&self, data: Data, [tokens, experts, top_k]: [usize; 3], prepared: &mut Prepared) {
        if matches!(self.rule.selection, Selection::TopK { bias: true, .. }) {
            let competing = experts - self.rule.always;
            let bias = data.of("correction_bias").normal(self.dtype, [competing], 0.3);
            let flat = Tensor::floats(self.dtype, [competing], vec![0.25; competing]);
            prepared.input("correction_bias", if self.flat_bias { flat } else { bias });
        }
        if self.rule.weights.expert_scale.is_some() {
            let scale = data.of("expert_scale").between(self.dtype, [experts], 0.25, 2.0);
            let with_nan = scale.as_floats().iter().enumerate().map(|(e, &s)| if e % 3 == 1 { f64::NAN } else { s });
            let with_nan = Tensor::floats(self.dtype, [experts], with_nan);
            prepared.input("expert_scale", if self.nan_scale { with_nan } else { scale });
        }
        if self.rule.selection == Selection::Table {
            let vocabulary = 13;
            let mut table = data.of("table").routes([vocabulary, top_k, experts], Spread::Even);
            let ids = data.of("token_ids");
            let mut ids: Vec<u32> = (0..tokens).map(|t| ids.below(t as u64, vocabulary) as u32).collect();
            if self.bad_table {
                let mut entries = table.as_ids().to_vec();
                for (i, entry) in entries.iter_mut().enumerate() {
                    match i % 7 {
                        2 => *entry = (experts + i) as u32,
                        4 => *entry = NO_EXPERT,
                        _ => {}
                    }
                }
                table = Tensor::ids([vocabulary, top_k], entries);
                for (t, id) in ids.iter_mut().enumerate() {
                    match t % 5 {
                        1 => *id = vocabulary as u32,
                        3 => *id = u32::MAX - t as u32,
                        _ => {}
                    }
                }
            }
            prepared.input("token_ids", Tensor::ids([tokens], ids)).input("table", table);
        }
    }

    /// The reference's operands.
    pub(super) fn reference<'a>(
        &self,
        [tokens, experts, top_k]: [usize; 3],
        prepared: &'a Prepared,
    ) -> reference::Route<'a> {
        let table = (self.rule.selection == Selection::Table)
            .then(|| reference::Table { experts: prepared.ids("table"), token_ids: prepared.ids("token_ids") });
        reference::Route {
            rule: self.rule,
            correction_bias: prepared.floats_if("correction_bias"),
            expert_scale: prepared.floats_if("expert_scale"),
            table,
            tokens,
            experts,
            top_k,
        }
    }

    /// Adds the outputs to a case: what the reference makes of logits that a backend has within `errors`.
    pub(crate) fn outputs(&self, sizes: [usize; 3], [logits, errors]: [&[f64]; 2], prepared: &mut Prepared) {
        let [tokens, experts, top_k] = sizes;
        let routes = reference::route(logits, &self.reference(sizes, prepared));
        let mut weight_errors = Vec::new();
        for t in 0..tokens {
            let relative = relative_error(&logits[t * experts..][..experts], &errors[t * experts..][..experts]);
            weight_errors.extend(routes.weights[t * top_k..][..top_k].iter().map(|w| relative * w.abs()));
        }
        prepared.status |= routes.status;
        prepared.output(Output::ids("experts", [tokens, top_k], routes.experts));
        prepared.output(Output::floats("weights", DType::F32, [tokens, top_k], [routes.weights, weight_errors]));
        if self.witness {
            let pairs = || routes.witness.iter().flat_map(|w| [w.last, w.next]);
            let keys: Vec<f64> = pairs().map(|c| c.key).collect();
            let key_errors = keys.iter().enumerate().map(|(i, key)| {
                let token = i / 2 * experts;
                let (logits, errors) = (&logits[token..][..experts], &errors[token..][..experts]);
                if key.is_finite() { self.key_error(logits, errors, prepared) } else { 0.0 }
            });
            let key_errors = key_errors.collect();
            prepared.output(Output::floats("keys", DType::F32, [tokens, 2], [keys, key_errors]));
            prepared.output(Output::ids("witness", [tokens, 2], pairs().map(|c| c.expert).collect()));
        }
    }

    /// What a key of a token may be off by.
    pub(super) fn key_error(&self, logits: &[f64], errors: &[f64], prepared: &Prepared) -> f64 {
        let logit_error = errors.iter().fold(0.0f64, |m, &e| m.max(e));
        let bias = prepared.floats("correction_bias").iter().fold(0.0f64, |m, b| m.max(b.abs()));
        let largest = logits.iter().filter(|l| l.is_finite()).fold(0.0f64, |m, l| m.max(l.abs()));
        let given = |by, bias: bool, grouped: bool| by == SelectBy::Logit || !(bias || grouped);
        match self.rule.selection {
            Selection::TopK { by, bias: false, groups } if given(by, false, groups.is_some()) => logit_error,
            Selection::TopK { by: SelectBy::Logit, .. } => logit_error + 2.0 * DType::F32.epsilon() * (largest + bias),
            Selection::TopK { .. } => {
                let score = match self.rule.score {
                    Score::Softmax | Score::Sigmoid => 1.0,
                    Score::SqrtSoftplus => (largest + 1.0).sqrt(),
                    _ => largest,
                };
                relative_error(logits, errors) * score + 2.0 * DType::F32.epsilon() * (score + bias)
            }
            _ => logit_error,
        }
    }

    /// Accepts other routes than the reference's where keys are nearly tied, with the weights that belong to them.
    pub(crate) fn resolve(
        &self,
        sizes: [usize; 3],
        [logits, errors]: [&[f64]; 2],
        prepared: &mut Prepared,
        found: &[(&'static str, Values)],
    ) {
        if !matches!(self.rule.selection, Selection::TopK { .. } | Selection::SparseMixer { .. }) {
            return;
        }
        for (name, per_token) in [("experts", sizes[2]), ("witness", 2)] {
            let Some((_, Values::Ids(ids))) = found.iter().find(|(n, _)| *n == name) else { continue };
            let Some(Expected::Ids(expected)) = prepared.expected(name) else { continue };
            let mut accepted = expected.clone();
            for t in 0..sizes[0] {
                let row = t * per_token..(t + 1) * per_token;
                if accepted[row.clone()] != ids[row.clone()]
                    && self.explained(sizes, t, [logits, errors], prepared, (name, &ids[row.clone()]))
                {
                    accepted[row.clone()].copy_from_slice(&ids[row]);
                }
            }
            if name == "experts" {
                self.reweigh(sizes, [logits, errors], prepared, &accepted);
            }
            if let Some(Expected::Ids(expected)) = prepared.expected(name) {
                *expected = accepted;
            }
        }
    }

    /// Whether every id of a token stands where its key, or a key nearly tied with it, belongs.
    fn explained(
        &self,
        [_, experts, top_k]: [usize; 3],
        t: usize,
        [logits, errors]: [&[f64]; 2],
        prepared: &Prepared,
        (name, found): (&str, &[u32]),
    ) -> bool {
        let (logits, errors) = (&logits[t * experts..][..experts], &errors[t * experts..][..experts]);
        let threshold = tolerance::near_tie(self.key_error(logits, errors, prepared), 1.0);
        let always = self.rule.always;
        let (competing, chosen) = (experts - always, top_k - always);
        // the order of all that compete, from the witness of every K
        let order: Vec<reference::Candidate> = (always + 1..=experts)
            .map(|k| {
                let op = reference::Route { tokens: 1, top_k: k, ..self.reference([1, experts, k], prepared) };
                reference::route(logits, &op).witness[0].last
            })
            .collect();
        let tied = |a: usize, b: usize| {
            let (first, last) = (a.min(b), a.max(b));
            order[first..=last].windows(2).all(|pair| pair[0].key - pair[1].key <= threshold)
        };
        let places = |i: usize| if name == "witness" { chosen - 1 + i } else { i };
        let (compared, besides) = found.split_at(if name == "witness" { 2 } else { chosen });
        let distinct = compared.iter().enumerate().all(|(i, id)| !compared[..i].contains(id));
        distinct
            && besides.iter().enumerate().all(|(i, &id)| id as usize == competing + i)
            && compared.iter().enumerate().all(|(i, &id)| match order.iter().position(|c| c.expert == id) {
                Some(place) => places(i) < competing && tied(place, places(i)),
                None => id == NO_EXPERT && places(i) >= competing,
            })
    }

    /// The weights of the routes that were taken.
    fn reweigh(&self, sizes: [usize; 3], [logits, errors]: [&[f64]; 2], prepared: &mut Prepared, ids: &[u32]) {
        let [tokens, experts, top_k] = sizes;
        if !matches!(self.rule.selection, Selection::TopK { .. }) {
            return;
        }
        let token_ids: Vec<u32> = (0..tokens as u32).collect();
        let weights = {
            let rule = RoutingRule { selection: Selection::Table, ..self.rule };
            let table = Some(reference::Table { experts: ids, token_ids: &token_ids });
            let op = reference::Route { rule, table, ..self.reference(sizes, prepared) };
            reference::route(logits, &op).weights
        };
        let mut weight_errors = Vec::new();
        for t in 0..tokens {
            let relative = relative_error(&logits[t * experts..][..experts], &errors[t * experts..][..experts]);
            weight_errors.extend(weights[t * top_k..][..top_k].iter().map(|w| relative * w.abs()));
        }
        if let Some(expected) = prepared.expected("weights") {
            *expected = Output::floats("weights", DType::F32, [tokens, top_k], [weights, weight_errors]).expected;
        }
    }

    /// What the operation is called with.
    pub(super) fn call_with<'a, B: Backend>(
        &self,
        operands: &mut Operands<'a, B>,
    ) -> fused_moe_core::Result<operation::Choice<'a, B>> {
        let table = match (operands.input_if("token_ids"), operands.input_if("table")) {
            (Some(token_ids), Some(experts)) => Some(operation::TokenTable { token_ids, experts }),
            _ => None,
        };
        let witness = match (operands.output_if("keys"), operands.output_if("witness")) {
            (Some(keys), Some(experts)) => Some(operation::Witness { keys, experts }),
            _ => None,
        };
        Ok(operation::Choice {
            rule: self.rule,
            correction_bias: operands.input_if("correction_bias"),
            expert_scale: operands.input_if("expert_scale"),
            table,
            experts: operands.output("experts")?,
            weights: operands.output("weights")?,
            witness,
        })
    }
}

/// What a token's weights may be off by, as a part of each.
pub(super) fn relative_error(logits: &[f64], errors: &[f64]) -> f64 {
    let finite = || logits.iter().copied().filter(|l| l.is_finite());
    let range = finite().fold(f64::NEG_INFINITY, f64::max) - finite().fold(f64::INFINITY, f64::min);
    let logit_error = errors.iter().fold(0.0f64, |m, &e| m.max(e));
    tolerance::weight(logits.len(), if range.is_finite() { range } else { 0.0 }, logit_error)
}
