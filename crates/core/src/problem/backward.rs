use super::{Check, MAX_EXPERTS};
use crate::backend::{Backend, In};
use crate::config::Activation;
use crate::dtype::DType;
use crate::error::Result;
use crate::operation::*;
use crate::problem::{ACTIVATION, Arrangement};
use crate::routing::Permutation;
use crate::tensor::Shape;

/// A checked [`DownBackward`] or [`GateUpBackward`]: the gradient that comes in has `outputs` columns, what went in has
/// `inputs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedBackwardProblem {
    /// R.
    pub rows: usize,
    /// E.
    pub experts: usize,
    /// Rows of a matrix: H for down, 2I or I for gate_up.
    pub outputs: usize,
    /// Columns of a matrix: I for down, H for gate_up.
    pub inputs: usize,
    /// Format of the matrices.
    pub matrices: DType,
}

/// A checked [`ActivationBackward`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActivationBackwardProblem {
    /// Rows.
    pub rows: usize,
    /// I.
    pub intermediate: usize,
    /// How gate and up lie.
    pub arrangement: Arrangement,
    /// The activation.
    pub activation: Activation,
}

/// A checked [`CombineBackward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineBackwardProblem {
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// H.
    pub hidden: usize,
    /// I, where the weights' gradient is made from the intermediate; else 0.
    pub intermediate: usize,
    /// E, where a bias of down is given; else 0.
    pub experts: usize,
}

impl Check {
    pub(super) fn gradient<B: Backend>(
        self,
        operand: &'static str,
        gradient: &Option<Gradient<'_, B>>,
        layout: &'static str,
        dims: impl Into<Shape>,
    ) -> Result<()> {
        let Some(Gradient { view, .. }) = gradient else { return Ok(()) };
        self.float(operand, view)?;
        self.shape(operand, view, layout, dims)
    }

    /// One that other operations read as f32: logits, weights.
    pub(super) fn gradient_f32<B: Backend>(
        self,
        operand: &'static str,
        gradient: &Option<Gradient<'_, B>>,
        layout: &'static str,
        dims: [usize; 2],
    ) -> Result<()> {
        let Some(Gradient { view, .. }) = gradient else { return Ok(()) };
        self.only(operand, view, DType::F32)?;
        self.rows(operand, view, layout, dims)
    }

    /// R and E.
    fn permutation<B: Backend>(self, permutation: &Permutation<'_, B>) -> Result<[usize; 2]> {
        let rows = permutation.row_slot.cols();
        let experts = permutation.offsets.cols().saturating_sub(1);
        self.slots(rows, 1)?;
        self.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        self.only("permutation.row_slot", &permutation.row_slot, DType::U32)?;
        self.shape("permutation.row_slot", &permutation.row_slot, "[R]", [rows])?;
        self.only("permutation.offsets", &permutation.offsets, DType::U32)?;
        self.shape("permutation.offsets", &permutation.offsets, "[E+1]", [experts + 1])?;
        Ok([rows, experts])
    }

    fn source<B: Backend>(
        self,
        operand: &'static str,
        view: &In<'_, B>,
        source: RowSource,
        [rows, cols]: [usize; 2],
    ) -> Result<()> {
        self.float(operand, view)?;
        match source {
            RowSource::Tokens { top_k } => {
                self.value(top_k > 0, "rows.top_k", "at least 1", top_k)?;
                let slots = self.slots(view.rows(), top_k)?;
                self.value(slots == rows, "rows.top_k", "K with R = T*K", format_args!("{top_k} for R = {rows}"))?;
                self.rows(operand, view, "[T, H]", [view.rows(), cols])
            }
            RowSource::Rows => self.rows(operand, view, "[R, H]", [rows, cols]),
        }
    }

    fn slot_weights<B: Backend>(self, operand: &'static str, weights: &In<'_, B>, rows: usize) -> Result<()> {
        self.only(operand, weights, DType::F32)?;
        let slots = weights.rows().saturating_mul(weights.cols());
        self.value(slots == rows, operand, "one for each of the R slots", slots)
    }
}

impl<B: Backend> DownBackward<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<GroupedBackwardProblem> {
        let check = Check("down_backward");
        let [rows, experts] = check.permutation(&self.permutation)?;
        let matrices = check.float("matrices", &self.matrices)?;
        let (hidden, intermediate) = (self.matrices.rows() / experts, self.matrices.cols());
        check.value(hidden > 0, "H", "a size above zero", hidden)?;
        check.value(intermediate > 0, "I", "a size above zero", intermediate)?;
        check.shape("matrices", &self.matrices, "[E, H, I]", [experts, hidden, intermediate])?;
        check.source::<B>("d_out", &self.d_out, self.rows, [rows, hidden])?;
        if let Some(RowWeights { weights, row_slot, scale }) = &self.row_weights {
            if let Some(weights) = weights {
                check.slot_weights::<B>("row_weights.weights", weights, rows)?;
            }
            check.absent("row_weights.row_slot", row_slot, "the permutation has it")?;
            check.finite("row_weights.scale", *scale)?;
        }
        if let Some(a) = &self.a {
            check.float("a", a)?;
            check.rows("a", a, "[R, I]", [rows, intermediate])?;
        }
        if self.d_down.is_some() {
            check.present("a", self.a.as_ref(), "d_down is asked for")?;
        }
        if let Some(d_a) = &self.d_a {
            check.float("d_a", d_a)?;
            check.rows("d_a", d_a, "[R, I]", [rows, intermediate])?;
        }
        check.gradient("d_down", &self.d_down, "[E, H, I]", [experts, hidden, intermediate])?;
        check.gradient("d_bias", &self.d_bias, "[E, H]", [experts, hidden])?;
        Ok(GroupedBackwardProblem { rows, experts, outputs: hidden, inputs: intermediate, matrices })
    }
}

impl<B: Backend> GateUpBackward<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<GroupedBackwardProblem> {
        let check = Check("gate_up_backward");
        let [rows, experts] = check.permutation(&self.permutation)?;
        let matrices = check.float("matrices", &self.matrices)?;
        let (outputs, hidden) = (self.matrices.rows() / experts, self.matrices.cols());
        check.value(outputs > 0, "N", "a size above zero", outputs)?;
        check.value(hidden > 0, "H", "a size above zero", hidden)?;
        check.shape("matrices", &self.matrices, "[E, N, H]", [experts, outputs, hidden])?;
        check.float("d_z", &self.d_z)?;
        check.rows("d_z", &self.d_z, "[R, N]", [rows, outputs])?;
        if let Some(x) = &self.x {
            check.source::<B>("x", x, self.rows, [rows, hidden])?;
        }
        if self.d_gate_up.is_some() {
            check.present("x", self.x.as_ref(), "d_gate_up is asked for")?;
        }
        if let Some(weights) = &self.input_weights {
            check.slot_weights::<B>("input_weights", weights, rows)?;
        }
        if let Some(d_rows) = &self.d_rows {
            check.float("d_rows", d_rows)?;
            check.rows("d_rows", d_rows, "[R, H]", [rows, hidden])?;
        }
        check.gradient("d_gate_up", &self.d_gate_up, "[E, N, H]", [experts, outputs, hidden])?;
        check.gradient("d_bias", &self.d_bias, "[E, N]", [experts, outputs])?;
        Ok(GroupedBackwardProblem { rows, experts, outputs, inputs: hidden, matrices })
    }
}

impl<B: Backend> ActivationBackward<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<ActivationBackwardProblem> {
        use ActivationBackwardOperands as Operands;
        let check = Check("activation_backward");
        check.activation(ACTIVATION, self.activation)?;
        let (rows, intermediate) = (self.d_a.rows(), self.d_a.cols());
        let one = [rows, intermediate];
        let two = [rows, intermediate.saturating_mul(2)];
        check.float("d_a", &self.d_a)?;
        let arrangement = match &self.operands {
            Operands::Separate { gate, up, d_gate, d_up } => {
                for (operand, view) in [("gate", gate), ("up", up)] {
                    check.float(operand, view)?;
                    check.rows(operand, view, "[.., I]", one)?;
                }
                for (operand, view) in [("d_gate", d_gate), ("d_up", d_up)] {
                    check.float(operand, view)?;
                    check.rows(operand, view, "[.., I]", one)?;
                }
                Arrangement::Separate
            }
            Operands::Halves { gate_up, d_gate_up } | Operands::Interleaved { gate_up, d_gate_up } => {
                check.float("gate_up", gate_up)?;
                check.rows("gate_up", gate_up, "[.., 2I]", two)?;
                check.float("d_gate_up", d_gate_up)?;
                check.rows("d_gate_up", d_gate_up, "[.., 2I]", two)?;
                let halves = matches!(self.operands, Operands::Halves { .. });
                if halves { Arrangement::Halves } else { Arrangement::Interleaved }
            }
            Operands::Plain { up, d_up } => {
                check.float("up", up)?;
                check.rows("up", up, "[.., I]", one)?;
                check.float("d_up", d_up)?;
                check.rows("d_up", d_up, "[.., I]", one)?;
                Arrangement::Plain
            }
        };
        let fits = self.activation.is_gated() == (arrangement != Arrangement::Plain);
        let expected = "gate and up for a gated activation, up alone for another";
        check.value(fits, "operands", expected, format_args!("{:?}", self.activation))?;
        if let Some(RowWeights { weights, row_slot, scale }) = &self.row_weights {
            if let Some(weights) = weights {
                check.slot_weights::<B>("row_weights.weights", weights, rows)?;
            }
            check.finite("row_weights.scale", *scale)?;
            if let Some(row_slot) = row_slot {
                check.only("row_weights.row_slot", row_slot, DType::U32)?;
                check.shape("row_weights.row_slot", row_slot, "[R]", [rows])?;
            }
        }
        if let Some(a) = &self.a {
            check.float("a", a)?;
            check.rows("a", a, "[.., I]", one)?;
        }
        Ok(ActivationBackwardProblem { rows, intermediate, arrangement, activation: self.activation })
    }
}

impl<B: Backend> ActivationWeightsBackward<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<ActivationBackwardProblem> {
        let check = Check("activation_weights_backward");
        let problem = self.activation.problem()?;
        let row_weights =
            check.present("row_weights", self.activation.row_weights.as_ref(), "d_weights is asked for")?;
        check.present("row_weights.row_slot", row_weights.row_slot.as_ref(), "d_weights is asked for")?;
        check.present("a", self.activation.a.as_ref(), "d_weights is asked for")?;
        check.only("slot_row", &self.slot_row, DType::U32)?;
        check.shape("slot_row", &self.slot_row, "[R]", [problem.rows])?;
        check.only("d_weights", &self.d_weights, DType::F32)?;
        let (tokens, top_k) = (self.d_weights.rows(), self.d_weights.cols());
        check.value(tokens * top_k == problem.rows, "d_weights", "an element a slot", tokens * top_k)?;
        Ok(problem)
    }
}

impl<B: Backend> CombineBackward<'_, B> {
    /// Checks shapes, formats and numbers.
    pub fn problem(&self) -> Result<CombineBackwardProblem> {
        let check = Check("combine_backward");
        let (tokens, hidden, top_k) = (self.d_out.rows(), self.d_out.cols(), self.top_k);
        let slots = check.slots(tokens, top_k)?;
        check.float("d_out", &self.d_out)?;
        check.finite("routed_scale", self.routed_scale)?;
        if let Some(weights) = &self.weights {
            check.only("weights", weights, DType::F32)?;
            check.rows("weights", weights, "[T, K]", [tokens, top_k])?;
        }
        match &self.d_rows {
            Some(RowsGradient::Slots(d_y)) => {
                check.float("d_rows", d_y)?;
                check.rows("d_rows", d_y, "[T, K, H]", [slots, hidden])?;
            }
            Some(RowsGradient::Permuted { d_y, slot_row }) => {
                check.float("d_rows.d_y", d_y)?;
                check.rows("d_rows.d_y", d_y, "[R, H]", [slots, hidden])?;
                self.slot_row(check, slot_row, slots)?;
            }
            None => {}
        }
        let (mut intermediate, mut experts) = (0, 0);
        if let Some(WeightsGradient { from, out }) = &self.d_weights {
            check.only("d_weights.out", &out.view, DType::F32)?;
            check.rows("d_weights.out", &out.view, "[T, K]", [tokens, top_k])?;
            match from {
                WeightsFrom::Rows(SlotRows::Slots(y)) => {
                    check.float("d_weights.y", y)?;
                    check.rows("d_weights.y", y, "[T, K, H]", [slots, hidden])?;
                }
                WeightsFrom::Rows(SlotRows::Permuted { y, slot_row }) => {
                    check.float("d_weights.y", y)?;
                    check.rows("d_weights.y", y, "[R, H]", [slots, hidden])?;
                    self.slot_row(check, slot_row, slots)?;
                }
                WeightsFrom::Intermediate { a, d_a, slot_row, bias } => {
                    intermediate = a.cols();
                    check.float("d_weights.a", a)?;
                    check.rows("d_weights.a", a, "[R, I]", [slots, intermediate])?;
                    check.float("d_weights.d_a", d_a)?;
                    check.rows("d_weights.d_a", d_a, "[R, I]", [slots, intermediate])?;
                    self.slot_row(check, slot_row, slots)?;
                    if let Some(bias) = bias {
                        experts = bias.bias.rows();
                        check.float("d_weights.bias", &bias.bias)?;
                        check.shape("d_weights.bias", &bias.bias, "[E, H]", [experts, hidden])?;
                        check.only("d_weights.experts", &bias.experts, DType::U32)?;
                        check.rows("d_weights.experts", &bias.experts, "[T, K]", [tokens, top_k])?;
                    }
                }
            }
        }
        if let Some(shared) = &self.shared {
            shared.check(check, [tokens, hidden])?;
        }
        Ok(CombineBackwardProblem { tokens, top_k, hidden, intermediate, experts })
    }

    fn slot_row(&self, check: Check, slot_row: &In<'_, B>, slots: usize) -> Result<()> {
        check.only("slot_row", slot_row, DType::U32)?;
        check.shape("slot_row", slot_row, "[R]", [slots])
    }
}

impl<B: Backend> SharedBackward<'_, B> {
    fn check(&self, check: Check, [tokens, hidden]: [usize; 2]) -> Result<()> {
        check.finite("shared.scale", self.scale)?;
        if self.factor.is_some() {
            check.absent("shared.logit", &self.logit, "shared.factor is given already")?;
        }
        for (operand, view) in [("shared.factor", &self.factor), ("shared.logit", &self.logit)] {
            if let Some(view) = view {
                check.column(operand, view, "[T]", tokens)?;
            }
        }
        if let Some(y) = &self.y {
            check.float("shared.y", y)?;
            check.rows("shared.y", y, "[T, H]", [tokens, hidden])?;
        }
        if let Some(d_y) = &self.d_y {
            check.float("shared.d_y", d_y)?;
            check.rows("shared.d_y", d_y, "[T, H]", [tokens, hidden])?;
        }
        if let Some(gate) = &self.d_gate {
            check.present("shared.y", self.y.as_ref(), "shared.d_gate is asked for")?;
            let given = self.factor.as_ref().or(self.logit.as_ref());
            check.present("shared.factor", given, "shared.d_gate is asked for")?;
            check.only("shared.d_gate", &gate.view, DType::F32)?;
            check.column("shared.d_gate", &gate.view, "[T]", tokens)?;
        }
        Ok(())
    }
}
