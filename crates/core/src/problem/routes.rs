use super::{Check, MAX_EXPERTS};
use crate::backend::Backend;
use crate::config::{Capacity, CapacityOrder, RoutingRule, Selection};
use crate::dtype::DType;
use crate::error::Result;
use crate::operation::{Choice, DropOverflow, Gate, GateRoute, GatherWeights, Permute, Route, TileSchedule};
use crate::routing::Permutation;
use crate::tensor::View;

/// A checked [`Gate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateProblem {
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// E.
    pub experts: usize,
    /// Format of x.
    pub x: DType,
    /// Format of the router.
    pub router: DType,
}

/// A checked [`Route`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChoiceProblem {
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// Format of the logits.
    pub logits: DType,
    /// V, where experts are chosen by token id.
    pub vocabulary: usize,
    /// The rule.
    pub rule: RoutingRule,
}

/// A checked [`GatherWeights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherWeightsProblem {
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// Format of the scores.
    pub scores: DType,
}

/// A checked [`Permute`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermuteProblem {
    /// R = T * K.
    pub slots: usize,
    /// E.
    pub experts: usize,
    /// First expert that gets rows.
    pub first: usize,
    /// One past the last.
    pub end: usize,
}

/// A checked [`DropOverflow`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropOverflowProblem {
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// E.
    pub experts: usize,
    /// N, the number of sequences.
    pub sequences: usize,
    /// The rule.
    pub capacity: Capacity,
}

impl<B: Backend> Gate<'_, B> {
    /// Checks shapes, formats and numbers.
    pub fn problem(&self) -> Result<GateProblem> {
        let check = Check("gate");
        let (tokens, hidden, experts) = (self.x.rows(), self.x.cols(), self.router.rows());
        let x = check.float("x", &self.x)?;
        let router = check.float("router", &self.router)?;
        check.shape("router", &self.router, "[E, H]", [experts, hidden])?;
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        check.value(hidden > 0, "H", "a size above zero", hidden)?;
        if let Some(bias) = &self.bias {
            check.vector("bias", bias, "[E]", experts)?;
        }
        if let Some(weight) = &self.norm_weight {
            check.present("config.norm", self.config.norm, "norm_weight is given")?;
            check.vector("norm_weight", weight, "[H]", hidden)?;
        }
        if let Some(normed) = &self.normed {
            check.present("config.norm", self.config.norm, "normed is asked for")?;
            check.float("normed", normed)?;
            check.rows("normed", normed, "[T, H]", [tokens, hidden])?;
        }
        if let Some(norm) = self.config.norm {
            check.not_negative("config.norm.eps", norm.eps)?;
        }
        if let Some(softcap) = self.config.softcap {
            check.positive("config.softcap", softcap)?;
        }
        check.finite("config.scale", self.config.scale)?;
        check.only("logits", &self.logits, DType::F32)?;
        check.rows("logits", &self.logits, "[T, E]", [tokens, experts])?;
        Ok(GateProblem { tokens, hidden, experts, x, router })
    }
}

impl<B: Backend> Choice<'_, B> {
    fn problem(&self, check: Check, tokens: usize, experts: usize, logits: DType) -> Result<ChoiceProblem> {
        let top_k = self.experts.cols();
        check.slots(tokens, top_k)?;
        check.rule(&self.rule, experts, top_k)?;
        check.only("experts", &self.experts, DType::U32)?;
        check.rows("experts", &self.experts, "[T, K]", [tokens, top_k])?;
        check.only("weights", &self.weights, DType::F32)?;
        check.rows("weights", &self.weights, "[T, K]", [tokens, top_k])?;
        let biased = matches!(self.rule.selection, Selection::TopK { bias: true, .. });
        check.matches("correction_bias", &self.correction_bias, biased, BIAS_REASONS)?;
        let scaled = self.rule.weights.expert_scale.is_some();
        check.matches("expert_scale", &self.expert_scale, scaled, SCALE_REASONS)?;
        let competing = experts - self.rule.always;
        for (operand, view, length) in
            [("correction_bias", &self.correction_bias, competing), ("expert_scale", &self.expert_scale, experts)]
        {
            if let Some(view) = view {
                check.vector(operand, view, "[E]", length)?;
            }
        }
        check.matches("table", &self.table, self.rule.selection == Selection::Table, TABLE_REASONS)?;
        let mut vocabulary = 0;
        if let Some(table) = &self.table {
            vocabulary = table.experts.rows();
            check.only("table.token_ids", &table.token_ids, DType::U32)?;
            check.shape("table.token_ids", &table.token_ids, "[T]", [tokens])?;
            check.only("table.experts", &table.experts, DType::U32)?;
            check.shape("table.experts", &table.experts, "[V, K]", [vocabulary, top_k])?;
        }
        if let Some(witness) = &self.witness {
            let top = matches!(self.rule.selection, Selection::TopK { .. });
            check.value(top, "witness", "a top-K selection", format_args!("{:?}", self.rule.selection))?;
            check.only("witness.keys", &witness.keys, DType::F32)?;
            check.rows("witness.keys", &witness.keys, "[T, 2]", [tokens, 2])?;
            check.only("witness.experts", &witness.experts, DType::U32)?;
            check.rows("witness.experts", &witness.experts, "[T, 2]", [tokens, 2])?;
        }
        Ok(ChoiceProblem { tokens, experts, top_k, logits, vocabulary, rule: self.rule })
    }
}

pub(super) const BIAS_REASONS: [&str; 2] =
    ["the selection adds a correction bias", "the selection adds no correction bias"];
pub(super) const SCALE_REASONS: [&str; 2] =
    ["the weight rule has a per-expert scale", "the weight rule has no per-expert scale"];
pub(super) const TABLE_REASONS: [&str; 2] = ["experts are chosen by token id", "experts are not chosen by token id"];

impl<B: Backend> Route<'_, B> {
    /// Checks shapes, formats and the rule.
    pub fn problem(&self) -> Result<ChoiceProblem> {
        let check = Check("route");
        let logits = check.float("logits", &self.logits)?;
        self.choice.problem(check, self.logits.rows(), self.logits.cols(), logits)
    }
}

impl<B: Backend> GateRoute<'_, B> {
    /// Checks both parts.
    pub fn problem(&self) -> Result<(GateProblem, ChoiceProblem)> {
        let gate = self.gate.problem()?;
        let choice = self.choice.problem(Check("gate_route"), gate.tokens, gate.experts, DType::F32)?;
        Ok((gate, choice))
    }
}

impl<B: Backend> GatherWeights<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<GatherWeightsProblem> {
        let check = Check("gather_weights");
        let (tokens, experts, top_k) = (self.scores.rows(), self.scores.cols(), self.experts.cols());
        let scores = check.float("scores", &self.scores)?;
        check.slots(tokens, top_k)?;
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        check.value(top_k > 0, "K", "at least 1", top_k)?;
        check.only("experts", &self.experts, DType::U32)?;
        check.rows("experts", &self.experts, "[T, K]", [tokens, top_k])?;
        if let Some(scale) = &self.expert_scale {
            check.vector("expert_scale", scale, "[E]", experts)?;
        }
        check.only("weights", &self.weights, DType::F32)?;
        check.rows("weights", &self.weights, "[T, K]", [tokens, top_k])?;
        Ok(GatherWeightsProblem { tokens, experts, top_k, scores })
    }
}

impl<B: Backend> Permute<'_, B> {
    /// Checks shapes, formats and the local range.
    pub fn problem(&self) -> Result<PermuteProblem> {
        let check = Check("permute");
        let experts = self.experts_total;
        let slots = check.slots(self.experts.rows(), self.experts.cols())?;
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        let (first, end) = (self.local.start, self.local.end);
        check.value(first <= end && end <= experts, "local", "a range within 0..E", format_args!("{first}..{end}"))?;
        check.only("experts", &self.experts, DType::U32)?;
        check.only("row_slot", &self.row_slot, DType::U32)?;
        check.shape("row_slot", &self.row_slot, "[R]", [slots])?;
        check.only("slot_row", &self.slot_row, DType::U32)?;
        check.shape("slot_row", &self.slot_row, "[R]", [slots])?;
        check.only("offsets", &self.offsets, DType::U32)?;
        check.shape("offsets", &self.offsets, "[E+1]", [experts + 1])?;
        Ok(PermuteProblem { slots, experts, first, end })
    }
}

impl<B: Backend> TileSchedule<'_, B> {
    /// Checks shapes and formats; returns E.
    pub fn problem(&self) -> Result<usize> {
        let check = Check("tile_schedule");
        let experts = self.offsets.cols().saturating_sub(1);
        check.only("offsets", &self.offsets, DType::U32)?;
        check.shape("offsets", &self.offsets, "[E+1]", [experts + 1])?;
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        check.value(self.tile_rows > 0, "tile_rows", "at least 1", self.tile_rows)?;
        check.only("tiles", &self.tiles, DType::U32)?;
        check.shape("tiles", &self.tiles, "[M, 3]", [self.tiles.rows(), 3])?;
        check.only("count", &self.count, DType::U32)?;
        check.shape("count", &self.count, "[1]", [1])?;
        Ok(experts)
    }
}

impl<B: Backend> DropOverflow<'_, B> {
    /// Checks shapes, formats and the rule.
    pub fn problem(&self) -> Result<DropOverflowProblem> {
        let check = Check("drop_overflow");
        let (tokens, top_k) = (self.experts.rows(), self.experts.cols());
        let slots = check.slots(tokens, top_k)?;
        let Permutation { row_slot, slot_row, offsets } = &self.permutation;
        let experts = offsets.cols().saturating_sub(1);
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        for (operand, view, layout, length) in [
            ("permutation.row_slot", row_slot, "[R]", slots),
            ("permutation.slot_row", slot_row, "[R]", slots),
            ("permutation.offsets", offsets, "[E+1]", experts + 1),
        ] {
            check.only(operand, view, DType::U32)?;
            check.shape(operand, view, layout, [length])?;
        }
        check.only("experts", &self.experts, DType::U32)?;
        check.only("weights", &self.weights, DType::F32)?;
        check.rows("weights", &self.weights, "[T, K]", [tokens, top_k])?;
        let by_score = self.capacity.order == CapacityOrder::Score;
        check.matches("importance", &self.importance, by_score, ORDER_REASONS)?;
        if let Some(importance) = &self.importance {
            check.only("importance", importance, DType::F32)?;
            check.column("importance", importance, "[T]", tokens)?;
        }
        if let Some(sequences) = &self.sequences {
            check.sequences(sequences)?;
        }
        check.capacity(self.capacity)?;
        let sequences = self.sequences.as_ref().map_or(1, |ends| ends.cols() - 1);
        Ok(DropOverflowProblem { tokens, top_k, experts, sequences, capacity: self.capacity })
    }
}

const ORDER_REASONS: [&str; 2] =
    ["tokens come in the order of their score", "tokens come in the order of their position"];

impl Check {
    /// u32 `[N+1]`, for one sequence at least.
    pub(super) fn sequences<S>(self, sequences: &View<S>) -> Result<()> {
        self.only("sequences", sequences, DType::U32)?;
        let n = sequences.cols();
        self.value(n >= 2, "sequences", "where each begins and the last ends", sequences.shape())?;
        self.shape("sequences", sequences, "[N+1]", [n])
    }

    /// Experts u32 and weights f32, `[T, K]` both.
    pub(super) fn routes<S>(
        self,
        names: [&'static str; 2],
        views: (&View<S>, &View<S>),
        slots: [usize; 2],
    ) -> Result<()> {
        for (operand, view, dtype) in [(names[0], views.0, DType::U32), (names[1], views.1, DType::F32)] {
            self.only(operand, view, dtype)?;
            self.rows(operand, view, "[T, K]", slots)?;
        }
        Ok(())
    }
}
