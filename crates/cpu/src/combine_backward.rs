//! From tokens back to the experts' rows: each thread takes some tokens, and with them their slots.

use crate::Cpu;
use crate::arch::Kernels;
use crate::error::Result;
use crate::grouped_backward::Target;
use crate::plan::{CHUNK, RowsPlan};
use crate::rows::Floats;
use crate::table::OutRows;
use fused_moe_core::Rows;
use fused_moe_core::operation::{
    CombineBackward, RowsGradient, SharedBackward, SlotRows, WeightsFrom, WeightsGradient,
};

pub(crate) fn combine_backward(cpu: &Cpu, operands: CombineBackward<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let CombineBackward { d_out, top_k, weights, routed_scale, d_rows, d_weights, shared } = operands;
    let (kernels, hidden, d_out) = (cpu.kernels, problem.hidden, Floats::new(&d_out)?);
    let weights = weights.map(|weights| weights.typed::<f32>()).transpose()?;
    let d_rows = d_rows.map(RowsOut::new).transpose()?;
    let d_weights = d_weights.map(Weights::new).transpose()?;
    let shared = shared.map(Shared::new).transpose()?;
    let grain = RowsPlan::combine(hidden.max(problem.intermediate), top_k).grain;
    cpu.pool.for_each(problem.tokens, grain, |t| {
        for k in 0..top_k {
            let slot = t * top_k + k;
            if let Some(to) = &d_rows {
                let w = weights.map_or(1.0, |weights| weights.row(t).get(k).copied().unwrap_or(0.0));
                to.put(kernels, slot, (d_out, t), routed_scale * w, hidden);
            }
            if let Some(weights) = &d_weights {
                let sum = weights.sum(kernels, (d_out, t), [slot, k], hidden);
                weights.out.put(kernels, [t, k], &mut [routed_scale * sum]);
            }
        }
        if let Some(shared) = &shared {
            shared.put(kernels, d_out, t, hidden);
        }
    });
    Ok(())
}

/// The row of a slot; `usize::MAX` where there is none.
fn row_of(slot_row: Option<&[u32]>, slot: usize) -> usize {
    match slot_row {
        Some(slot_row) => slot_row.get(slot).map_or(usize::MAX, |&row| row as usize),
        None => slot,
    }
}

/// `sum_i a[i] * b[i]` over the first `width` elements of two rows, added part by part.
fn dot(kernels: Kernels, (a, i): (Floats<'_>, usize), (b, j): (Floats<'_>, usize), width: usize) -> f32 {
    let (mut x, mut y, mut sum) = ([0.0; CHUNK], [0.0; CHUNK], 0.0);
    for col in (0..width).step_by(CHUNK) {
        let n = CHUNK.min(width - col);
        let (x, y, mut part) = (&mut x[..n], &mut y[..n], [0.0]);
        a.load(kernels, i, col, x);
        b.load(kernels, j, col, y);
        kernels.dot_tile(&[&*x], &[&*y], &mut part);
        sum += part[0];
    }
    sum
}

/// `row = factor * d_out[t]`.
fn store(
    kernels: Kernels,
    (d_out, t): (Floats<'_>, usize),
    factor: f32,
    (to, row): (&OutRows<'_>, usize),
    width: usize,
) {
    let mut scaled = [0.0; CHUNK];
    for col in (0..width).step_by(CHUNK) {
        let scaled = &mut scaled[..CHUNK.min(width - col)];
        d_out.scale(kernels, [t, col], factor, None, scaled);
        to.store(kernels, [row, col], scaled, false);
    }
}

/// Where the gradients of the experts' rows go.
struct RowsOut<'a> {
    out: OutRows<'a>,
    rows: usize,
    slot_row: Option<&'a [u32]>,
}

impl<'a> RowsOut<'a> {
    fn new(rows: RowsGradient<'a, Cpu>) -> Result<Self> {
        let (view, slot_row) = match rows {
            RowsGradient::Slots(view) => (view, None),
            RowsGradient::Permuted { d_y, slot_row } => (d_y, Some(slot_row.typed()?.row(0))),
        };
        Ok(Self { rows: view.rows(), out: OutRows::new(view)?, slot_row })
    }

    fn put(&self, kernels: Kernels, slot: usize, d_out: (Floats<'_>, usize), factor: f32, hidden: usize) {
        let row = row_of(self.slot_row, slot);
        if row < self.rows {
            store(kernels, d_out, factor, (&self.out, row), hidden);
        }
    }
}

/// What the weights' gradient is made from, and where it goes.
struct Weights<'a> {
    y: Floats<'a>,
    /// Where y is what went into down: its gradient, and I.
    d_a: Option<(Floats<'a>, usize)>,
    slot_row: Option<&'a [u32]>,
    /// Of down, and the experts of the slots.
    bias: Option<(Floats<'a>, Rows<'a, u32>)>,
    out: Target<'a>,
}

impl<'a> Weights<'a> {
    fn new(weights: WeightsGradient<'a, Cpu>) -> Result<Self> {
        let out = Target::new(weights.out)?;
        Ok(match weights.from {
            WeightsFrom::Rows(SlotRows::Slots(y)) => {
                Self { y: Floats::new(&y)?, d_a: None, slot_row: None, bias: None, out }
            }
            WeightsFrom::Rows(SlotRows::Permuted { y, slot_row }) => {
                let slot_row = Some(slot_row.typed()?.row(0));
                Self { y: Floats::new(&y)?, d_a: None, slot_row, bias: None, out }
            }
            WeightsFrom::Intermediate { a, d_a, slot_row, bias } => {
                let bias = match bias {
                    Some(bias) => Some((Floats::new(&bias.bias)?, bias.experts.typed()?)),
                    None => None,
                };
                let d_a = Some((Floats::new(&d_a)?, a.cols()));
                Self { y: Floats::new(&a)?, d_a, slot_row: Some(slot_row.typed()?.row(0)), bias, out }
            }
        })
    }

    /// Of slot `slot`, the k-th of its token.
    fn sum(&self, kernels: Kernels, d_out: (Floats<'_>, usize), [slot, k]: [usize; 2], hidden: usize) -> f32 {
        let row = row_of(self.slot_row, slot);
        if row >= self.y.rows() {
            return 0.0;
        }
        let Some((d_a, intermediate)) = self.d_a else {
            return dot(kernels, (self.y, row), d_out, hidden);
        };
        let mut sum = dot(kernels, (self.y, row), (d_a, row), intermediate);
        if let Some((bias, experts)) = &self.bias {
            let expert = experts.row(d_out.1).get(k).map_or(usize::MAX, |&expert| expert as usize);
            if expert < bias.rows() {
                sum += dot(kernels, (*bias, expert), d_out, hidden);
            }
        }
        sum
    }
}

/// The shared expert's part.
struct Shared<'a> {
    y: Option<Floats<'a>>,
    factor: Option<Floats<'a>>,
    logit: Option<Floats<'a>>,
    scale: f32,
    d_y: Option<OutRows<'a>>,
    d_gate: Option<(Target<'a>, bool)>,
}

impl<'a> Shared<'a> {
    fn new(shared: SharedBackward<'a, Cpu>) -> Result<Self> {
        let SharedBackward { y, factor, logit, scale, d_y, d_gate } = shared;
        let d_gate = match d_gate {
            Some(gate) => {
                let column = gate.view.cols() == 1;
                Some((Target::new(gate)?, column))
            }
            None => None,
        };
        let (y, factor, logit) = (Floats::optional(&y)?, Floats::optional(&factor)?, Floats::optional(&logit)?);
        Ok(Self { y, factor, logit, scale, d_y: d_y.map(OutRows::new).transpose()?, d_gate })
    }

    fn put(&self, kernels: Kernels, d_out: Floats<'_>, t: usize, hidden: usize) {
        let (factor, slope) = match (&self.factor, &self.logit) {
            (Some(factor), _) => (factor.element(t), 1.0),
            (None, Some(logit)) => {
                let e = (-f64::from(logit.element(t)).abs()).exp();
                let (large, small) = (1.0 / (1.0 + e), e / (1.0 + e));
                let s = if logit.element(t) < 0.0 { small } else { large };
                (s as f32, (large * small) as f32)
            }
            (None, None) => (1.0, 0.0),
        };
        if let Some(d_y) = &self.d_y {
            store(kernels, (d_out, t), self.scale * factor, (d_y, t), hidden);
        }
        if let (Some((to, column)), Some(y)) = (&self.d_gate, self.y) {
            let at = if *column { [t, 0] } else { [0, t] };
            let sum = dot(kernels, (y, t), (d_out, t), hidden);
            to.put(kernels, at, &mut [self.scale * slope * sum]);
        }
    }
}
