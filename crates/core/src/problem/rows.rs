use super::{Check, MAX_EXPERTS};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::Result;
use crate::operation::{Accumulate, Combine, Factor, NextNorm, Residual, SlotRows, Zero};

/// A checked [`Combine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineProblem {
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// H.
    pub hidden: usize,
    /// Format of the experts' outputs.
    pub y: DType,
    /// Format of the result.
    pub out: DType,
}

/// A checked [`Accumulate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccumulateProblem {
    /// T.
    pub rows: usize,
    /// H.
    pub hidden: usize,
    /// Format of the sum.
    pub acc: DType,
    /// Format of what is added.
    pub y: DType,
}

/// A checked [`Zero`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroProblem {
    /// Rows.
    pub rows: usize,
    /// Length of a row.
    pub width: usize,
    /// Format of the zeros.
    pub out: DType,
}

impl<B: Backend> Combine<'_, B> {
    /// Checks shapes, formats and numbers.
    pub fn problem(&self) -> Result<CombineProblem> {
        let check = Check("combine");
        let (tokens, hidden) = (self.out.rows(), self.out.cols());
        let out = check.float("out", &self.out)?;
        let (y, slots) = match &self.rows {
            SlotRows::Slots(y) => {
                check.float("rows", y)?;
                check.value(y.cols() == hidden, "rows", "rows of H elements", y.shape())?;
                (y.dtype(), y.rows())
            }
            SlotRows::Permuted { y, slot_row } => {
                check.float("rows.y", y)?;
                check.only("rows.slot_row", slot_row, DType::U32)?;
                check.shape("rows.slot_row", slot_row, "[R]", [slot_row.cols()])?;
                check.rows("rows.y", y, "[R, H]", [slot_row.cols(), hidden])?;
                (y.dtype(), slot_row.cols())
            }
        };
        let top_k = match (&self.weights, &self.copies) {
            (Some(weights), _) => weights.cols(),
            (None, Some(copies)) => copies.experts.cols(),
            (None, None) => slots.checked_div(tokens).unwrap_or(0),
        };
        check.value(
            check.slots(tokens, top_k)? == slots,
            "rows",
            "T*K rows",
            format_args!("{slots} for T = {tokens}, K = {top_k}"),
        )?;
        if let Some(weights) = &self.weights {
            check.only("weights", weights, DType::F32)?;
            check.rows("weights", weights, "[T, K]", [tokens, top_k])?;
        }
        check.finite("routed_scale", self.routed_scale)?;
        if let Some(copies) = &self.copies {
            check.float("copies.x", &copies.x)?;
            check.rows("copies.x", &copies.x, "[T, H]", [tokens, hidden])?;
            check.only("copies.experts", &copies.experts, DType::U32)?;
            check.rows("copies.experts", &copies.experts, "[T, K]", [tokens, top_k])?;
            let range = copies.first <= copies.end && copies.end <= MAX_EXPERTS;
            check.value(range, "copies.end", "first to 4096", format_args!("{}..{}", copies.first, copies.end))?;
        }
        if let Some(shared) = &self.shared {
            check.float("shared.y", &shared.y)?;
            check.rows("shared.y", &shared.y, "[T, H]", [tokens, hidden])?;
            check.finite("shared.scale", shared.scale)?;
            if shared.factor.is_some() {
                check.absent("shared.logit", &shared.logit, "shared.factor is given already")?;
            }
            for (operand, view) in [("shared.factor", &shared.factor), ("shared.logit", &shared.logit)] {
                if let Some(view) = view {
                    check.column(operand, view, "[T]", tokens)?;
                }
            }
        }
        tail(check, self.residual.as_ref(), self.norm.as_ref(), [tokens, hidden])?;
        Ok(CombineProblem { tokens, top_k, hidden, y, out })
    }
}

/// What combine and a whole layer end with.
pub(super) fn tail<B: Backend>(
    check: Check,
    residual: Option<&Residual<'_, B>>,
    norm: Option<&NextNorm<'_, B>>,
    [tokens, hidden]: [usize; 2],
) -> Result<()> {
    if let Some(Residual::Of(residual)) = residual {
        check.float("residual", residual)?;
        check.rows("residual", residual, "[T, H]", [tokens, hidden])?;
    }
    if let Some(norm) = norm {
        check.not_negative("norm.eps", norm.eps)?;
        check.float("norm.out", &norm.out)?;
        check.rows("norm.out", &norm.out, "[T, H]", [tokens, hidden])?;
        if let Some(weight) = &norm.weight {
            check.vector("norm.weight", weight, "[H]", hidden)?;
        }
    }
    Ok(())
}

impl<B: Backend> Accumulate<'_, B> {
    /// Checks shapes and formats.
    pub fn problem(&self) -> Result<AccumulateProblem> {
        let check = Check("accumulate");
        let (rows, hidden) = (self.acc.rows(), self.acc.cols());
        let acc = check.float("acc", &self.acc)?;
        let y = check.float("y", &self.y)?;
        check.rows("y", &self.y, "[T, H]", [rows, hidden])?;
        match &self.weight {
            Factor::Value(_) => {}
            Factor::PerRow(weights) => {
                check.only("weight", weights, DType::F32)?;
                check.column("weight", weights, "[T]", rows)?;
            }
            Factor::PerColumn(weights) => {
                check.only("weight", weights, DType::F32)?;
                check.vector("weight", weights, "[H]", hidden)?;
            }
        }
        Ok(AccumulateProblem { rows, hidden, acc, y })
    }
}

impl<B: Backend> Zero<'_, B> {
    /// Any shape and any format will do.
    pub fn problem(&self) -> Result<ZeroProblem> {
        Ok(ZeroProblem { rows: self.out.rows(), width: self.out.cols(), out: self.out.dtype() })
    }
}
