//! Rows as a gradient reads them.

use crate::arch::Kernels;
use crate::error::Result;
use crate::grouped::Gather;
use crate::plan::backward::BLOCK_COLUMNS;
use crate::rows::Floats;
use bytemuck::cast_slice_mut;
use fused_moe_core::{HostView, Rows};
use half::bf16;
use std::ops::Range;

/// Rows, found through a gather and multiplied by factors.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) rows: Floats<'a>,
    pub(crate) gather: Gather<'a>,
    /// R, above every slot.
    pub(crate) slots: usize,
    /// One for each slot, in row-major order.
    pub(crate) weights: Option<Rows<'a, f32>>,
    pub(crate) scale: f32,
    /// What a soft-cap gave, and its limit: `d * (1 - (y / limit)^2)`.
    pub(crate) softcap: Option<(Rows<'a, f32>, f32)>,
}

/// What stands for a row that is not there.
static ZEROS: [bf16; BLOCK_COLUMNS] = [bf16::ZERO; BLOCK_COLUMNS];

impl<'a> Source<'a> {
    /// The rows as they are.
    pub(crate) fn new(view: &HostView<'a>, gather: Gather<'a>, slots: usize) -> Result<Self> {
        Ok(Self { rows: Floats::new(view)?, gather, slots, weights: None, scale: 1.0, softcap: None })
    }

    /// Whether these are rows of bf16 that no factor changes.
    pub(super) fn plain_bf16(&self) -> bool {
        let factors = self.weights.is_some() || self.softcap.is_some() || self.scale != 1.0;
        matches!(self.rows, Floats::BF16(_)) && !factors
    }

    /// Row r from column `col` on; zeros where its slot does not exist.
    pub(super) fn load(&self, kernels: Kernels, [r, col]: [usize; 2], to: &mut [f32]) {
        let Some((source, weight)) = self.find(r) else { return to.fill(0.0) };
        if weight == 1.0 {
            self.rows.load(kernels, source, col, to);
        } else {
            self.rows.scale(kernels, [source, col], weight, None, to);
        }
        if let Some((capped, limit)) = self.softcap {
            for (d, y) in to.iter_mut().zip(capped.row(source).get(col..).unwrap_or_default()) {
                let y = y / limit;
                *d *= 1.0 - y * y;
            }
        }
    }

    /// Row r from column `col` on, as pairs; [`plain_bf16`](Self::plain_bf16) rows alone. Zeros where there is nothing.
    pub(super) fn pairs(&self, [r, col]: [usize; 2], to: &mut [u32]) {
        let to: &mut [bf16] = cast_slice_mut(to);
        let from = self.part(r, col, to.len());
        let count = from.len().min(to.len());
        to[..count].copy_from_slice(&from[..count]);
        to[count..].fill(bf16::ZERO);
    }

    /// Pairs of one element each of a row and the next, from column `col` on, at most `BLOCK_COLUMNS`; zeros for what is
    /// past the end of `rows` or does not exist. [`plain_bf16`](Self::plain_bf16) rows alone.
    pub(super) fn pairs_of_rows(&self, kernels: Kernels, rows: Range<usize>, col: usize, to: &mut [u32]) {
        let count = to.len();
        let row = |r: usize| match self.part(r, col, count) {
            part if rows.contains(&r) && part.len() >= count => &part[..count],
            _ => ZEROS.get(..count).unwrap_or_default(),
        };
        kernels.interleave(row(rows.start), row(rows.start + 1), to);
    }

    /// Up to `count` elements of row r, as far as it goes; none where its slot does not exist.
    fn part(&self, r: usize, col: usize, count: usize) -> &'a [bf16] {
        match (self.rows, self.find(r)) {
            (Floats::BF16(rows), Some((source, _))) => {
                let rest = rows.row(source).get(col..).unwrap_or_default();
                rest.get(..count).unwrap_or(rest)
            }
            _ => &[],
        }
    }

    fn find(&self, r: usize) -> Option<(usize, f32)> {
        let (source, slot) = match self.gather {
            Gather::Rows => (r, r),
            Gather::Tokens { row_slot, top_k } => {
                let slot = *row_slot.get(r)? as usize;
                (slot.checked_div(top_k)?, slot)
            }
        };
        if slot >= self.slots {
            return None;
        }
        let weight = match self.weights {
            None => 1.0,
            Some(weights) => {
                let (row, col) = (slot.checked_div(weights.cols())?, slot.checked_rem(weights.cols())?);
                *weights.row(row).get(col)?
            }
        };
        Some((source, self.scale * weight))
    }
}
