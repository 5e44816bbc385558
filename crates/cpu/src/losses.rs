//! What is added to a model's loss so that the router behaves. One thread goes through the tokens in order: a few numbers a
//! token, next to nothing beside its experts.

use crate::Cpu;
use crate::error::Result;
use crate::grouped_backward::Target;
use crate::route_backward::{make_scores, put, softmax, through_scores};
use crate::rows::Floats;
use fused_moe_core::operation::{Gradient, LoadBalanceLoss, ZLoss};
use fused_moe_core::problem::{LossProblem, MAX_EXPERTS};
use std::ops::Range;

/// Where a loss and its gradient go.
struct Targets<'a> {
    loss: Option<Target<'a>>,
    d_logits: Option<Target<'a>>,
}

impl<'a> Targets<'a> {
    fn new(loss: Option<Gradient<'a, Cpu>>, d_logits: Option<Gradient<'a, Cpu>>) -> Result<Self> {
        Ok(Self { loss: loss.map(Target::new).transpose()?, d_logits: d_logits.map(Target::new).transpose()? })
    }

    fn token(&self, cpu: &Cpu, t: usize, d: &[f64]) {
        if let Some(to) = &self.d_logits {
            put(cpu.kernels, to, t, d);
        }
    }

    fn loss(&self, cpu: &Cpu, loss: f64) {
        if let Some(to) = &self.loss {
            to.put(cpu.kernels, [0, 0], &mut [loss as f32]);
        }
    }
}

pub(crate) fn load_balance_loss(cpu: &Cpu, operands: LoadBalanceLoss<'_, Cpu>) -> Result<()> {
    let LossProblem { tokens, experts, top_k, sequences } = operands.problem()?;
    let LoadBalanceLoss { logits, experts: ids, score, sequences: ends, coefficient, loss, d_logits } = operands;
    let (logits, ids, to) = (Floats::new(&logits)?, ids.typed::<u32>()?, Targets::new(loss, d_logits)?);
    let ends = ends.map(|ends| ends.typed::<u32>()).transpose()?;
    let end_of = |i: usize| match &ends {
        Some(ends) => ends.row(0).get(i).map_or(tokens, |&end| tokens.min(end as usize)),
        None if i == 0 => 0,
        None => tokens,
    };
    let (mut row, mut scores, mut d) = ([0.0; MAX_EXPERTS], [0.0; MAX_EXPERTS], [0.0; MAX_EXPERTS]);
    let (row, scores, d) = (&mut row[..experts], &mut scores[..experts], &mut d[..experts]);
    // tokens of no sequence
    d.fill(0.0);
    let mut done = if sequences == 0 { 0 } else { end_of(0) };
    (0..done).for_each(|t| to.token(cpu, t, d));
    let mut total = 0.0;
    for s in 0..sequences {
        // an end below one before it counts as that one
        let range = done..end_of(s + 1).max(done);
        done = range.end;
        let counts = counts(&ids, range.clone());
        let length = range.len() as f64;
        let factor = f64::from(coefficient) * experts as f64 / (top_k as f64 * length * length * sequences as f64);
        for t in range {
            logits.load(cpu.kernels, t, 0, row);
            make_scores(row, score, scores);
            let sum: f64 = scores.iter().sum();
            if sum == 0.0 || !row.iter().any(|l| l.is_finite()) {
                d.fill(0.0);
            } else {
                let mean = scores.iter().zip(&counts).map(|(s, &count)| s / sum * f64::from(count)).sum::<f64>();
                total += factor * mean;
                d.iter_mut().zip(&counts).for_each(|(d, &count)| *d = factor * (f64::from(count) - mean) / sum);
                through_scores(row, score, scores, d);
            }
            to.token(cpu, t, d);
        }
    }
    d.fill(0.0);
    (done..tokens).for_each(|t| to.token(cpu, t, d));
    to.loss(cpu, total);
    Ok(())
}

/// Slots of each expert.
fn counts(ids: &fused_moe_core::Rows<'_, u32>, tokens: Range<usize>) -> [u32; MAX_EXPERTS] {
    let mut counts = [0; MAX_EXPERTS];
    for t in tokens {
        for &id in ids.row(t) {
            if let Some(count) = counts.get_mut(id as usize) {
                *count += 1;
            }
        }
    }
    counts
}

pub(crate) fn z_loss(cpu: &Cpu, operands: ZLoss<'_, Cpu>) -> Result<()> {
    let LossProblem { tokens, experts, .. } = operands.problem()?;
    let ZLoss { logits, coefficient, loss, d_logits } = operands;
    let (logits, to) = (Floats::new(&logits)?, Targets::new(loss, d_logits)?);
    let (mut row, mut d) = ([0.0; MAX_EXPERTS], [0.0; MAX_EXPERTS]);
    let (row, d) = (&mut row[..experts], &mut d[..experts]);
    let mut total = 0.0;
    for t in 0..tokens {
        logits.load(cpu.kernels, t, 0, row);
        d.iter_mut().zip(&*row).for_each(|(d, &l)| *d = f64::from(l));
        if row.iter().any(|l| l.is_finite()) {
            let max = d.iter().fold(f64::NEG_INFINITY, |max, &l| if l > max { l } else { max });
            let z = max + d.iter().filter(|l| !l.is_nan()).map(|l| (l - max).exp()).sum::<f64>().ln();
            let factor = f64::from(coefficient) / tokens as f64;
            total += factor * z * z;
            softmax(d);
            d.iter_mut().for_each(|d| *d *= 2.0 * factor * z);
        } else {
            d.fill(0.0);
        }
        to.token(cpu, t, d);
    }
    to.loss(cpu, total);
    Ok(())
}
