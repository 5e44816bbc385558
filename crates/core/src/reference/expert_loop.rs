//! The experts one after the other, each from its own matrices: no permutation, no grouping.

use super::{Linear, PreActivation, activation, linear};
use crate::config::{Activation, WeightOn};
use crate::{NO_EXPERT, Status};

/// One expert's matrices.
#[derive(Clone, Copy, Debug)]
pub struct Expert<'a> {
    /// `[I, H]`; absent for an activation without gate.
    pub gate: Option<&'a [f64]>,
    /// `[I, H]`.
    pub up: &'a [f64],
    /// `[H, I]`.
    pub down: &'a [f64],
    /// `[I]`, or absent for zeros.
    pub gate_bias: Option<&'a [f64]>,
    /// `[I]`, or absent for zeros.
    pub up_bias: Option<&'a [f64]>,
    /// `[H]`, or absent for zeros.
    pub down_bias: Option<&'a [f64]>,
}

/// Operands of [`expert_loop`].
#[derive(Clone, Copy, Debug)]
pub struct ExpertLoop<'a> {
    /// `[T, H]`.
    pub x: &'a [f64],
    /// `[T, K]`.
    pub ids: &'a [u32],
    /// `[T, K]`.
    pub weights: &'a [f64],
    /// E experts.
    pub experts: &'a [Expert<'a>],
    /// Between the first matrix and the second.
    pub activation: Activation,
    /// What a weight multiplies.
    pub weight_on: WeightOn,
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// K.
    pub top_k: usize,
}

/// `y[t] = sum_k w[t,k] * Expert_e(x[t])`, `e = ids[t,k]`, where `Expert_e(x) = Down_e( act(Gate_e x, Up_e x) )`; with
/// [`WeightOn::Input`], `y[t] = sum_k Expert_e(w[t,k] * x[t])`. Returns `[T, H]`, what [`permute`](fn@super::permute),
/// [`gate_up`](fn@super::gate_up), [`activation`](fn@super::activation()), [`down`](fn@super::down) and
/// [`combine`](fn@super::combine) give together.
///
/// A slot whose id is [`NO_EXPERT`] or `>= E` contributes nothing; the latter raises [`Status::EXPERT_OUT_OF_RANGE`].
///
/// ```
/// use fused_moe_core::{config::*, reference::{Expert, ExpertLoop, expert_loop}};
/// let expert = |up| Expert { gate: None, up, down: &[1.0], gate_bias: None, up_bias: None, down_bias: None };
/// let (y, status) = expert_loop(&ExpertLoop {
///     x: &[2.0], ids: &[1, 0], weights: &[0.5, 1.0], experts: &[expert(&[10.0]), expert(&[100.0])],
///     activation: Activation::Plain(Function::Identity), weight_on: WeightOn::Output,
///     tokens: 1, hidden: 1, intermediate: 1, top_k: 2,
/// });
/// assert!(y == [120.0] && status.is_ok());
/// ```
pub fn expert_loop(op: &ExpertLoop<'_>) -> (Vec<f64>, Status) {
    let mut y = vec![f64::NAN; op.tokens * op.hidden];
    let mut status = Status::OK;
    zero(&mut y);
    for t in 0..op.tokens {
        let token = t * op.hidden..(t + 1) * op.hidden;
        for slot in t * op.top_k..(t + 1) * op.top_k {
            let Some(expert) = op.experts.get(op.ids[slot] as usize) else {
                if op.ids[slot] != NO_EXPERT {
                    status |= Status::EXPERT_OUT_OF_RANGE;
                }
                continue;
            };
            let (input_weight, output_weight) = match op.weight_on {
                WeightOn::Input => (op.weights[slot], 1.0),
                WeightOn::Output => (1.0, op.weights[slot]),
            };
            let x: Vec<f64> = op.x[token.clone()].iter().map(|x| input_weight * x).collect();
            accumulate(&mut y[token.clone()], output_weight, &one_expert(&x, expert, op));
        }
    }
    (y, status)
}

fn one_expert(x: &[f64], expert: &Expert<'_>, op: &ExpertLoop<'_>) -> Vec<f64> {
    let (hidden, intermediate) = (op.hidden, op.intermediate);
    let into = |weight, bias| linear(&Linear { x, weight, bias, rows: 1, inputs: hidden, outputs: intermediate });
    let gate = expert.gate.map_or(Vec::new(), |gate| into(gate, expert.gate_bias));
    let up = into(expert.up, expert.up_bias);
    let a = activation(op.activation, PreActivation::Separate { gate: &gate, up: &up }, 1, intermediate);
    let (weight, bias) = (expert.down, expert.down_bias);
    linear(&Linear { x: &a, weight, bias, rows: 1, inputs: intermediate, outputs: hidden })
}

/// `b[i] = 0`.
pub fn zero(b: &mut [f64]) {
    for b in b {
        *b = 0.0;
    }
}

/// `acc[i] += weight * y[i]`.
///
/// - `y`: as long as `acc`
pub fn accumulate(acc: &mut [f64], weight: f64, y: &[f64]) {
    for i in 0..acc.len() {
        acc[i] += weight * y[i];
    }
}

/// The experts of canonical stacks: `gate_up` `[E, 2I, H]` (`[E, I, H]` without gate), `down` `[E, H, I]`, no biases.
///
/// `sizes` is H, I.
pub fn experts_of_stack<'a>(
    gate_up: &'a [f64],
    down: &'a [f64],
    activation: Activation,
    sizes: (usize, usize),
) -> Vec<Expert<'a>> {
    let (hidden, intermediate) = sizes;
    let half = (intermediate * hidden).max(1);
    let gate_up = gate_up.chunks_exact(activation.gate_up_rows(half));
    let mut experts = Vec::new();
    for (gate_up, down) in gate_up.zip(down.chunks_exact(half)) {
        let (gate, up) =
            if activation.is_gated() { (Some(&gate_up[..half]), &gate_up[half..]) } else { (None, gate_up) };
        experts.push(Expert { gate, up, down, gate_bias: None, up_bias: None, down_bias: None });
    }
    experts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Function;

    fn op<'a>(experts: &'a [Expert<'a>]) -> ExpertLoop<'a> {
        ExpertLoop {
            x: &[1.0, 2.0],
            ids: &[1, 0],
            weights: &[2.0, 3.0],
            experts,
            activation: Activation::Gated(Function::Identity),
            weight_on: WeightOn::Output,
            tokens: 1,
            hidden: 2,
            intermediate: 1,
            top_k: 2,
        }
    }

    // expert 0: g = x0, u = x1, y = (a, -a); expert 1: g = x0 + x1, u = 1 * x0, y = (0, a)
    const GATE_UP: [f64; 8] = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0];
    const DOWN: [f64; 4] = [1.0, -1.0, 0.0, 1.0];

    #[test]
    fn by_hand() {
        let gated = Activation::Gated(Function::Identity);
        let experts = experts_of_stack(&GATE_UP, &DOWN, gated, (2, 1));
        // a = 2 with weight 3, a = 3 with weight 2
        assert_eq!(expert_loop(&op(&experts)), (vec![6.0, 0.0], Status::OK));
        // the identity is quadratic in the weight when it is applied to the input
        let input = ExpertLoop { weight_on: WeightOn::Input, ..op(&experts) };
        assert_eq!(expert_loop(&input).0, [18.0, -18.0 + 12.0]);
    }

    #[test]
    fn biases() {
        let gated = Activation::Gated(Function::Identity);
        let mut experts = experts_of_stack(&GATE_UP, &DOWN, gated, (2, 1));
        experts[0].gate_bias = Some(&[1.0]);
        experts[0].up_bias = Some(&[2.0]);
        experts[0].down_bias = Some(&[0.5, 0.25]);
        // a = 2 * 4 with weight 3
        assert_eq!(expert_loop(&op(&experts)).0, [25.5, 6.0 - 24.0 + 0.75]);
    }

    #[test]
    fn bad_ids_contribute_nothing() {
        let experts = experts_of_stack(&GATE_UP, &DOWN, Activation::default(), (2, 1));
        assert_eq!(experts.len(), 2);
        let bad = expert_loop(&ExpertLoop { ids: &[2, NO_EXPERT], ..op(&experts) });
        assert_eq!(bad, (vec![0.0, 0.0], Status::EXPERT_OUT_OF_RANGE));
        assert!(expert_loop(&ExpertLoop { ids: &[NO_EXPERT; 2], ..op(&experts) }).1.is_ok());
    }

    #[test]
    fn accumulate_adds_and_zero_assigns() {
        let mut acc = [1.0, f64::NAN];
        accumulate(&mut acc, 2.0, &[3.0, 1.0]);
        assert!(acc[0] == 7.0 && acc[1].is_nan());
        zero(&mut acc);
        assert_eq!(acc, [0.0, 0.0]);
    }
}
