use super::{ACTIVATION, Check, MAX_EXPERTS};
use crate::backend::Backend;
use crate::config::Activation;
use crate::dtype::DType;
use crate::error::Result;
use crate::operation::{Activate, ActivationOperands, Down, GateUp, GateUpOutput, Linear, Matrices, RowSource};

/// A checked [`GateUp`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateUpProblem {
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// E.
    pub experts: usize,
    /// Format of x.
    pub x: DType,
    /// Format of a stack of weights; `None`: packed, and checked when it was.
    pub stack: Option<DType>,
    /// Format of the output.
    pub out: DType,
    /// The activation.
    pub activation: Activation,
    /// Whether it is applied.
    pub output: GateUpOutput,
}

/// A checked [`Down`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DownProblem {
    /// R.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// E.
    pub experts: usize,
    /// Format of the rows.
    pub a: DType,
    /// Format of a stack of weights; `None`: packed, and checked when it was.
    pub stack: Option<DType>,
    /// Format of the output.
    pub out: DType,
}

/// A checked [`Linear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearProblem {
    /// T.
    pub rows: usize,
    /// C.
    pub inner: usize,
    /// N.
    pub outer: usize,
    /// Format of x.
    pub x: DType,
    /// Format of the weight.
    pub weight: DType,
    /// Format of the output.
    pub out: DType,
}

/// A checked [`Activate`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActivationProblem {
    /// Rows.
    pub rows: usize,
    /// I.
    pub intermediate: usize,
    /// How gate and up lie.
    pub arrangement: Arrangement,
    /// The activation.
    pub activation: Activation,
}

/// How gate and up lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// Two buffers.
    Separate,
    /// One after the other.
    Halves,
    /// In turn.
    Interleaved,
    /// No gate.
    Plain,
}

impl<B: Backend> GateUp<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<GateUpProblem> {
        let check = Check("gate_up");
        let rows = self.permutation.row_slot.cols();
        let hidden = self.x.cols();
        let x = check.float("x", &self.x)?;
        check.value(hidden > 0, "H", "a size above zero", hidden)?;
        let experts = self.permutation.offsets.cols().saturating_sub(1);
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        check.only("permutation.row_slot", &self.permutation.row_slot, DType::U32)?;
        check.shape("permutation.row_slot", &self.permutation.row_slot, "[R]", [rows])?;
        check.only("permutation.offsets", &self.permutation.offsets, DType::U32)?;
        check.shape("permutation.offsets", &self.permutation.offsets, "[E+1]", [experts + 1])?;
        match self.rows {
            RowSource::Tokens { top_k } => {
                check.value(top_k > 0, "rows.top_k", "at least 1", top_k)?;
                let slots = check.slots(self.x.rows(), top_k)?;
                check.value(slots == rows, "rows.top_k", "K with R = T*K", format_args!("{top_k} for R = {rows}"))?;
            }
            RowSource::Rows => check.rows("x", &self.x, "[R, H]", [rows, hidden])?,
        }
        let activated = self.output == GateUpOutput::Activated;
        let halves = if self.activation.is_gated() { 2 } else { 1 };
        let width = self.out.cols();
        let intermediate = if activated { width } else { width / halves };
        check.value(intermediate > 0, "I", "a size above zero", intermediate)?;
        let layout = if activated || halves == 1 { "[R, I]" } else { "[R, 2I]" };
        let out = check.float("out", &self.out)?;
        let outer = self.activation.gate_up_rows(intermediate);
        let expected = if activated { intermediate } else { outer };
        check.rows("out", &self.out, layout, [rows, expected])?;
        check.activation(ACTIVATION, self.activation)?;
        if let Some(weights) = &self.input_weights {
            check.only("input_weights", weights, DType::F32)?;
            let slots = weights.rows().saturating_mul(weights.cols());
            check.value(slots == rows, "input_weights", "one for each of the R slots", slots)?;
        }
        let stack = match &self.matrices {
            Matrices::Stack(view) => {
                let layout = if halves == 2 { "[E, 2I, H]" } else { "[E, I, H]" };
                check.shape("matrices", view, layout, [experts, outer, hidden])?;
                Some(check.float("matrices", view)?)
            }
            Matrices::Packed(_) => {
                check.absent("bias", &self.bias, "packed experts bring their own")?;
                None
            }
        };
        if let Some(bias) = &self.bias {
            check.float("bias", bias)?;
            check.shape("bias", bias, if halves == 2 { "[E, 2I]" } else { "[E, I]" }, [experts, outer])?;
        }
        Ok(GateUpProblem {
            rows,
            hidden,
            intermediate,
            experts,
            x,
            stack,
            out,
            activation: self.activation,
            output: self.output,
        })
    }
}

impl<B: Backend> Down<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<DownProblem> {
        let check = Check("down");
        let (rows, intermediate, hidden) = (self.a.rows(), self.a.cols(), self.out.cols());
        let experts = self.offsets.cols().saturating_sub(1);
        check.value((1..=MAX_EXPERTS).contains(&experts), "E", "1 to 4096 experts", experts)?;
        check.value(intermediate > 0, "I", "a size above zero", intermediate)?;
        check.value(hidden > 0, "H", "a size above zero", hidden)?;
        check.slots(rows, 1)?;
        let a = check.float("a", &self.a)?;
        check.only("offsets", &self.offsets, DType::U32)?;
        check.shape("offsets", &self.offsets, "[E+1]", [experts + 1])?;
        let out = check.float("out", &self.out)?;
        check.rows("out", &self.out, "[R, H]", [rows, hidden])?;
        let stack = match &self.matrices {
            Matrices::Stack(view) => {
                check.shape("matrices", view, "[E, H, I]", [experts, hidden, intermediate])?;
                Some(check.float("matrices", view)?)
            }
            Matrices::Packed(_) => {
                check.absent("bias", &self.bias, "packed experts bring their own")?;
                None
            }
        };
        if let Some(bias) = &self.bias {
            check.float("bias", bias)?;
            check.shape("bias", bias, "[E, H]", [experts, hidden])?;
        }
        Ok(DownProblem { rows, hidden, intermediate, experts, a, stack, out })
    }
}

impl<B: Backend> Linear<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<LinearProblem> {
        let check = Check("linear");
        let (rows, inner, outer) = (self.x.rows(), self.x.cols(), self.weight.rows());
        let x = check.float("x", &self.x)?;
        let weight = check.float("weight", &self.weight)?;
        let out = check.float("out", &self.out)?;
        check.shape("weight", &self.weight, "[N, C]", [outer, inner])?;
        check.value(inner > 0, "C", "a size above zero", inner)?;
        if let Some(bias) = &self.bias {
            check.vector("bias", bias, "[N]", outer)?;
        }
        if outer == 1 && self.out.shape().dims() == [rows] {
            return Ok(LinearProblem { rows, inner, outer, x, weight, out });
        }
        check.rows("out", &self.out, "[T, N]", [rows, outer])?;
        Ok(LinearProblem { rows, inner, outer, x, weight, out })
    }
}

impl<B: Backend> Activate<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<ActivationProblem> {
        let check = Check("activation");
        check.activation(ACTIVATION, self.activation)?;
        let (rows, intermediate, arrangement) = match &self.operands {
            ActivationOperands::Separate { gate, up, out } => {
                check.float("gate", gate)?;
                check.float("up", up)?;
                check.float("out", out)?;
                check.rows("up", up, "[.., I]", [gate.rows(), gate.cols()])?;
                check.rows("out", out, "[.., I]", [gate.rows(), gate.cols()])?;
                (gate.rows(), gate.cols(), Arrangement::Separate)
            }
            ActivationOperands::SeparateInPlace { gate, up } => {
                check.float("gate", gate)?;
                check.float("up", up)?;
                check.rows("up", up, "[.., I]", [gate.rows(), gate.cols()])?;
                (gate.rows(), gate.cols(), Arrangement::Separate)
            }
            ActivationOperands::Halves { gate_up, out } | ActivationOperands::Interleaved { gate_up, out } => {
                check.float("gate_up", gate_up)?;
                check.float("out", out)?;
                check.rows("gate_up", gate_up, "[.., 2I]", [out.rows(), out.cols().saturating_mul(2)])?;
                let halves = matches!(self.operands, ActivationOperands::Halves { .. });
                let arrangement = if halves { Arrangement::Halves } else { Arrangement::Interleaved };
                (out.rows(), out.cols(), arrangement)
            }
            ActivationOperands::HalvesInPlace { gate_up } => {
                check.float("gate_up", gate_up)?;
                let even = gate_up.cols() % 2 == 0;
                check.value(even, "gate_up columns", "2I, an even number", gate_up.cols())?;
                (gate_up.rows(), gate_up.cols() / 2, Arrangement::Halves)
            }
            ActivationOperands::Plain { up, out } => {
                check.float("up", up)?;
                check.float("out", out)?;
                check.rows("out", out, "[.., I]", [up.rows(), up.cols()])?;
                (up.rows(), up.cols(), Arrangement::Plain)
            }
            ActivationOperands::PlainInPlace { up } => {
                check.float("up", up)?;
                (up.rows(), up.cols(), Arrangement::Plain)
            }
        };
        let fits = self.activation.is_gated() == (arrangement != Arrangement::Plain);
        check.value(
            fits,
            "operands",
            "gate and up for a gated activation, up alone for another",
            format_args!("{:?}", self.activation),
        )?;
        Ok(ActivationProblem { rows, intermediate, arrangement, activation: self.activation })
    }
}
