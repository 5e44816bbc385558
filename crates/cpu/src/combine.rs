//! From the experts' rows back to tokens; and the two operations of the plain expert loop, zero and accumulate.

use crate::Cpu;
use crate::arch::Kernels;
use crate::error::Result;
use crate::plan::{CHUNK, COMBINE_COLUMNS as KEPT, RowsPlan};
use crate::rows::{Floats, FloatsMut, Part, norm_factor, share_rows};
use fused_moe_core::Rows;
use fused_moe_core::operation::{Accumulate, Combine, Copies, Factor, NextNorm, Residual, Shared, SlotRows, Zero};
use std::ops::Range;

/// The operands that are read.
struct Sum<'a> {
    kernels: Kernels,
    top_k: usize,
    y: Floats<'a>,
    slot_row: Option<&'a [u32]>,
    copies: Option<CopyRows<'a>>,
    weights: Option<Rows<'a, f32>>,
    routed_scale: f32,
    shared: Option<SharedRows<'a>>,
    residual: Option<Floats<'a>>,
    in_place: bool,
}

/// Slots of these experts take the token itself.
struct CopyRows<'a> {
    x: Floats<'a>,
    experts: Rows<'a, u32>,
    copying: Range<usize>,
}

/// `scale * s[t] * y[t]`.
struct SharedRows<'a> {
    y: Floats<'a>,
    factor: Option<Floats<'a>>,
    logit: Option<Floats<'a>>,
    scale: f32,
}

/// The next norm, but for its output.
struct Norm<'a> {
    weight: Option<Floats<'a>>,
    eps: f32,
}

/// One pass without a norm. With one, two passes over each token:
/// ```text
/// for each part of the row:  row = unrounded sum;  squares += sum(row^2)
/// for each part of the row:  out = row;  normed = row / sqrt(squares / H + eps) * weight
/// ```
pub(crate) fn combine(cpu: &Cpu, operands: Combine<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let Combine { rows, weights, copies, routed_scale, shared, residual, norm, out } = operands;
    let kernels = cpu.kernels;
    let (y, slot_row) = match rows {
        SlotRows::Slots(y) => (Floats::new(&y)?, None),
        SlotRows::Permuted { y, slot_row } => (Floats::new(&y)?, Some(slot_row.typed::<u32>()?.row(0))),
    };
    let (residual, in_place) = match residual {
        Some(Residual::Of(residual)) => (Some(Floats::new(&residual)?), false),
        Some(Residual::InPlace) => (None, true),
        None => (None, false),
    };
    let weights = weights.map(|weights| weights.typed()).transpose()?;
    let shared = shared.map(SharedRows::new).transpose()?;
    let copies = copies.map(CopyRows::new).transpose()?;
    let top_k = problem.top_k;
    let sum = Sum { kernels, top_k, y, slot_row, copies, weights, routed_scale, shared, residual, in_place };
    let (norm, normed) = match norm {
        Some(NextNorm { weight, eps, out }) => {
            (Some(Norm { weight: Floats::optional(&weight)?, eps }), Some(FloatsMut::new(out)?))
        }
        None => (None, None),
    };
    let hidden = problem.hidden;
    if hidden == 0 {
        return Ok(());
    }
    let plan = RowsPlan::combine(hidden, top_k);
    share_rows(&cpu.pool, (FloatsMut::new(out)?, normed), problem.tokens, plan, |range, (mut out, mut normed)| {
        let mut row = [0.0; KEPT];
        for (i, t) in range.enumerate() {
            let mut factor = 0.0;
            if let Some(norm) = &norm {
                let mut squares = 0.0;
                for col in (0..hidden).step_by(KEPT) {
                    let row = &mut row[..KEPT.min(hidden - col)];
                    sum.row(t, col, (&mut out, i), row);
                    squares += row.chunks(CHUNK).map(|chunk| f64::from(kernels.sum_squares(chunk))).sum::<f64>();
                }
                factor = norm_factor(squares, hidden, norm.eps);
            }
            for col in (0..hidden).step_by(KEPT) {
                let row = &mut row[..KEPT.min(hidden - col)];
                if norm.is_none() || hidden > KEPT {
                    sum.row(t, col, (&mut out, i), row);
                }
                out.store(kernels, i, col, row);
                if let (Some(norm), Some(normed)) = (&norm, &mut normed) {
                    norm.store(kernels, (normed, i), col, (row, factor));
                }
            }
        }
    });
    Ok(())
}

impl<'a> CopyRows<'a> {
    fn new(copies: Copies<'a, Cpu>) -> Result<Self> {
        let Copies { x, experts, first, end } = copies;
        Ok(Self { x: Floats::new(&x)?, experts: experts.typed()?, copying: first..end })
    }

    fn has(&self, t: usize, k: usize) -> bool {
        self.experts.row(t).get(k).is_some_and(|&id| self.copying.contains(&(id as usize)))
    }
}

impl<'a> SharedRows<'a> {
    fn new(shared: Shared<'a, Cpu>) -> Result<Self> {
        let Shared { y, factor, logit, scale } = shared;
        Ok(Self { y: Floats::new(&y)?, factor: Floats::optional(&factor)?, logit: Floats::optional(&logit)?, scale })
    }

    fn factor(&self, t: usize) -> f32 {
        let s = match (&self.factor, &self.logit) {
            (Some(factor), _) => factor.element(t),
            (None, Some(logit)) => (1.0 / (1.0 + (-f64::from(logit.element(t))).exp())) as f32,
            (None, None) => 1.0,
        };
        self.scale * s
    }
}

impl<'a> Sum<'a> {
    /// The row that a slot takes, which may not exist.
    fn source(&self, t: usize, k: usize) -> (&Floats<'a>, usize) {
        if let Some(copies) = self.copies.as_ref().filter(|copies| copies.has(t, k)) {
            return (&copies.x, t);
        }
        let slot = t * self.top_k + k;
        let row = match self.slot_row {
            Some(slot_row) => slot_row.get(slot).map_or(usize::MAX, |&row| row as usize),
            None => slot,
        };
        (&self.y, row)
    }

    /// `row = out[t, col..]` before it is rounded; `out.0`'s row `out.1` is where token t's result goes.
    fn row(&self, t: usize, col: usize, out: (&mut FloatsMut<'_>, usize), row: &mut [f32]) {
        let (kernels, out, i) = (self.kernels, out.0, out.1);
        for (n, part) in row.chunks_mut(CHUNK).enumerate() {
            let col = col + n * CHUNK;
            part.fill(0.0);
            for k in 0..self.top_k {
                let (rows, row) = self.source(t, k);
                if row < rows.rows() {
                    let w = self.weights.map_or(1.0, |weights| weights.row(t).get(k).copied().unwrap_or(0.0));
                    rows.axpy(kernels, w, [row, col], part);
                }
            }
            if self.routed_scale != 1.0 {
                part.iter_mut().for_each(|x| *x *= self.routed_scale);
            }
            if let Some(shared) = &self.shared {
                shared.y.axpy(kernels, shared.factor(t), [t, col], part);
            }
            if let Some(residual) = &self.residual {
                residual.axpy(kernels, 1.0, [t, col], part);
            }
            if self.in_place {
                let mut before = [0.0; CHUNK];
                let before = &mut before[..part.len()];
                out.load(kernels, i, col, before);
                kernels.axpy(1.0, before, part);
            }
        }
    }
}

impl Norm<'_> {
    /// `normed[col..] = row * factor * weight[col..]`.
    fn store(&self, kernels: Kernels, normed: (&mut FloatsMut<'_>, usize), col: usize, row: (&[f32], f32)) {
        let (mut weights, mut scaled) = ([0.0; CHUNK], [0.0; CHUNK]);
        for (n, part) in row.0.chunks(CHUNK).enumerate() {
            let (col, scaled) = (col + n * CHUNK, &mut scaled[..part.len()]);
            let weight = self.weight.as_ref().map(|weight| {
                weight.load(kernels, 0, col, &mut weights[..part.len()]);
                &weights[..part.len()]
            });
            kernels.scale(part, row.1, weight, scaled);
            normed.0.store(kernels, normed.1, col, scaled);
        }
    }
}

pub(crate) fn zero(cpu: &Cpu, operands: Zero<'_, Cpu>) -> Result<()> {
    operands.problem()?;
    let out = operands.out;
    let (rows, size, extent) = (out.rows(), out.dtype().size(), out.extent());
    if extent == 0 {
        return Ok(());
    }
    let (width, stride, start) = (out.cols() * size, out.row_stride().saturating_mul(size), out.offset());
    let bytes = out.into_storage().get_mut(start..start + extent).unwrap_or_default();
    share_rows(&cpu.pool, Part::of_bytes(bytes, width, stride), rows, RowsPlan::zero(width), |range, mut out| {
        (0..range.len()).for_each(|i| out.row(i).fill(0));
    });
    Ok(())
}

pub(crate) fn accumulate(cpu: &Cpu, operands: Accumulate<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let y = Floats::new(&operands.y)?;
    let (value, per_row, per_column) = match operands.weight {
        Factor::Value(value) => (value, None, None),
        Factor::PerRow(weights) => (0.0, Some(Floats::new(&weights)?), None),
        Factor::PerColumn(weights) => (0.0, None, Some(weights.typed::<f32>()?.row(0))),
    };
    let (kernels, hidden) = (cpu.kernels, problem.hidden);
    if hidden == 0 {
        return Ok(());
    }
    share_rows(&cpu.pool, FloatsMut::new(operands.acc)?, problem.rows, RowsPlan::elements(hidden), |range, mut acc| {
        let (mut sum, mut part) = ([0.0; CHUNK], [0.0; CHUNK]);
        for (i, t) in range.enumerate() {
            let w = per_row.as_ref().map_or(value, |weights| weights.element(t));
            for col in (0..hidden).step_by(CHUNK) {
                let sum = &mut sum[..CHUNK.min(hidden - col)];
                acc.load(kernels, i, col, sum);
                match per_column.and_then(|weights| weights.get(col..col + sum.len())) {
                    None => y.axpy(kernels, w, [t, col], sum),
                    Some(weights) => {
                        let part = &mut part[..sum.len()];
                        y.load(kernels, t, col, part);
                        for ((sum, y), w) in sum.iter_mut().zip(part).zip(weights) {
                            *sum += *y * w;
                        }
                    }
                }
                acc.store(kernels, i, col, sum);
            }
        }
    });
    Ok(())
}
