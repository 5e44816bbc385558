//! The gradients of the router's product, and of an RMSNorm.

use crate::Cpu;
use crate::error::Result;
use crate::grouped::{Gather, Groups};
use crate::grouped_backward::{GroupedBackward, Source, Target, grouped_backward};
use crate::plan::backward::{NORM_COLUMNS, NORM_ROWS};
use crate::plan::{CHUNK, RowsPlan};
use crate::rows::{Floats, norm_factor};
use fused_moe_core::operation::{GateBackward, NormBackward};
use fused_moe_core::problem::{GateBackwardProblem, GroupedBackwardProblem};

/// The grouped product with one expert.
pub(crate) fn gate_backward(cpu: &Cpu, operands: GateBackward<'_, Cpu>) -> Result<()> {
    let GateBackwardProblem { tokens: rows, hidden, experts } = operands.problem()?;
    let mut d = Source::new(&operands.d_logits, Gather::Rows, rows)?;
    d.scale = operands.scale;
    if let (Some(limit), Some(logits)) = (operands.softcap, &operands.logits) {
        d.softcap = Some((logits.typed()?, limit));
    }
    let x = operands.n.map(|n| Source::new(&n, Gather::Rows, rows)).transpose()?;
    let problem = GroupedBackwardProblem {
        rows,
        experts: 1,
        outputs: experts,
        inputs: hidden,
        matrices: operands.router.dtype(),
    };
    let product = |d, d_rows, d_matrices, d_bias| GroupedBackward {
        problem,
        groups: Groups::One,
        d,
        x,
        matrices: operands.router,
        d_rows,
        d_matrices,
        d_bias,
    };
    // The bias is added after the scale.
    let unscaled = Source { scale: 1.0, ..d };
    let d_bias = match operands.d_bias {
        Some(mut bias) => {
            bias.view = bias.view.reshape([1, experts])?;
            Some(bias)
        }
        None => None,
    };
    if d_bias.is_some() {
        grouped_backward(cpu, product(unscaled, None, None, d_bias))?;
    }
    grouped_backward(cpu, product(d, operands.d_n, operands.d_router, None))
}

/// What both gradients of a norm read.
struct Norm<'a> {
    x: Floats<'a>,
    d_n: Floats<'a>,
    weight: Option<Floats<'a>>,
    eps: f32,
    hidden: usize,
}

pub(crate) fn norm_backward(cpu: &Cpu, operands: NormBackward<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let NormBackward { x, weight, eps, d_n, d_x, d_weight } = operands;
    let (x, d_n, weight) = (Floats::new(&x)?, Floats::new(&d_n)?, Floats::optional(&weight)?);
    let norm = Norm { x, d_n, weight, eps, hidden: problem.hidden };
    let (d_x, d_weight) = (d_x.map(Target::new).transpose()?, d_weight.map(Target::new).transpose()?);
    if let Some(to) = d_x {
        let grain = RowsPlan::elements(problem.hidden).grain;
        cpu.pool.for_each(problem.tokens, grain, |t| norm.row(cpu, t, &to));
    }
    if let Some(to) = d_weight {
        let parts = problem.hidden.div_ceil(NORM_COLUMNS);
        cpu.pool.for_each(parts, 1, |part| norm.weights(cpu, part * NORM_COLUMNS, problem.tokens, &to));
    }
    Ok(())
}

impl Norm<'_> {
    fn factor(&self, cpu: &Cpu, t: usize) -> f32 {
        norm_factor(self.x.sum_squares(cpu.kernels, t), self.hidden, self.eps)
    }

    /// `d_n * weight` and x from column `col` on.
    fn load(&self, cpu: &Cpu, [t, col]: [usize; 2], d: &mut [f32], x: &mut [f32]) {
        self.x.load(cpu.kernels, t, col, x);
        match &self.weight {
            None => self.d_n.load(cpu.kernels, t, col, d),
            Some(weight) => {
                let mut weights = [0.0; CHUNK];
                let weights = &mut weights[..d.len()];
                weight.load(cpu.kernels, 0, col, weights);
                self.d_n.scale(cpu.kernels, [t, col], 1.0, Some(weights), d);
            }
        }
    }

    /// One token's `d_x`.
    fn row(&self, cpu: &Cpu, t: usize, to: &Target<'_>) {
        let (mut d, mut x) = ([0.0; CHUNK], [0.0; CHUNK]);
        let parts = || (0..self.hidden).step_by(CHUNK).map(|col| (col, CHUNK.min(self.hidden - col)));
        let mut along = 0.0;
        for (col, n) in parts() {
            let (d, x) = (&mut d[..n], &mut x[..n]);
            self.load(cpu, [t, col], d, x);
            let mut sum = [0.0];
            cpu.kernels.dot_tile(&[&*d], &[&*x], &mut sum);
            along += f64::from(sum[0]);
        }
        let factor = self.factor(cpu, t);
        let back = -(f64::from(factor) * f64::from(factor) * along / self.hidden as f64) as f32;
        for (col, n) in parts() {
            let (d, x) = (&mut d[..n], &mut x[..n]);
            self.load(cpu, [t, col], d, x);
            cpu.kernels.axpy(back, x, d);
            d.iter_mut().for_each(|d| *d *= factor);
            to.put(cpu.kernels, [t, col], d);
        }
    }

    /// `d_weight` from column `first` on.
    fn weights(&self, cpu: &Cpu, first: usize, tokens: usize, to: &Target<'_>) {
        let width = NORM_COLUMNS.min(self.hidden - first);
        let (mut sum, mut d, mut x) = ([0.0; NORM_COLUMNS], [0.0; NORM_COLUMNS], [0.0; NORM_COLUMNS]);
        let (sum, d, x) = (&mut sum[..width], &mut d[..width], &mut x[..width]);
        let mut factors = [0.0; NORM_ROWS];
        for start in (0..tokens).step_by(NORM_ROWS) {
            let factors = &mut factors[..NORM_ROWS.min(tokens - start)];
            factors.iter_mut().enumerate().for_each(|(i, factor)| *factor = self.factor(cpu, start + i));
            for (t, &factor) in (start..).zip(&*factors) {
                self.d_n.load(cpu.kernels, t, first, d);
                self.x.scale(cpu.kernels, [t, first], factor, Some(d), x);
                cpu.kernels.axpy(1.0, x, sum);
            }
        }
        to.put(cpu.kernels, [0, first], sum);
    }
}
