//! A few rows of a result, computed again in f64 from the weights as they were made.

use super::weights::Source;
use crate::tensors;
use anyhow::{Result, bail, ensure};
use fused_moe::HostView;
use fused_moe::config::LayerConfig;
use fused_moe::reference::{Gate, PreActivation, Route, activation, gate, route};
use fused_moe::weights::Matrix;
use fused_moe_conformance::tolerance;
use rayon::prelude::*;

/// What a call returned, on the host.
#[derive(Debug)]
pub(crate) struct Returned<'a> {
    /// `[T, H]`.
    pub(crate) x: HostView<'a>,
    /// `[T, H]`.
    pub(crate) y: HostView<'a>,
    /// `[T, K]`.
    pub(crate) experts: &'a [u32],
    /// `[T, K]`.
    pub(crate) weights: &'a [f32],
}

/// What the check found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verified {
    /// Rows that were computed again.
    pub(crate) rows: usize,
    /// The largest error of y, relative to the largest value of its row.
    pub(crate) error: f64,
    /// What it may be.
    pub(crate) tolerance: f64,
}

/// Rows that are computed again.
const ROWS: usize = 3;

/// Errors when a row is wrong: its experts, their weights, or y.
pub(crate) fn verify(config: &LayerConfig, source: &Source, returned: &Returned<'_>) -> Result<Verified> {
    let LayerConfig { hidden, intermediate, top_k, .. } = *config;
    let (tokens, dtype) = (returned.x.rows(), returned.x.dtype());
    let rounding = tolerance::layer(hidden + intermediate + top_k, dtype, 0.0);
    let mut verified = Verified { rows: 0, error: 0.0, tolerance: rounding };
    let mut chosen: Vec<usize> = (0..ROWS).map(|i| i * tokens.saturating_sub(1) / (ROWS - 1)).collect();
    chosen.dedup();
    for token in chosen {
        let slots = token * top_k..(token + 1) * top_k;
        let (Some(experts), Some(weights)) = (returned.experts.get(slots.clone()), returned.weights.get(slots)) else {
            bail!("the routes are shorter than {tokens} tokens");
        };
        let x = floats(&returned.x, token);
        check_routes(config, source, &x, experts, weights)?;
        let expected = row(config, source, &x, experts, weights)?;
        let actual = floats(&returned.y, token);
        let largest = expected.iter().fold(f64::MIN_POSITIVE, |m, y| m.max(y.abs()));
        for (actual, expected) in actual.iter().zip(&expected) {
            let error = (actual - expected).abs() / largest;
            ensure!(
                error <= rounding,
                "token {token}: y is off by {error:.2e} of its largest value, {rounding:.2e} is allowed"
            );
            verified.error = verified.error.max(error);
        }
        verified.rows += 1;
    }
    Ok(verified)
}

fn check_routes(config: &LayerConfig, source: &Source, x: &[f64], experts: &[u32], weights: &[f32]) -> Result<()> {
    let LayerConfig { hidden, experts: count, top_k, .. } = *config;
    let router = source.router();
    let bias: Option<Vec<f64>> = source.bias().map(|bias| bias.iter().copied().map(f64::from).collect());
    let gated = gate(&Gate {
        x,
        router: &router,
        bias: bias.as_deref(),
        norm_weight: None,
        config: config.gate,
        tokens: 1,
        hidden,
        experts: count,
    });
    let routes = route(
        &gated.logits,
        &Route {
            rule: config.routing,
            correction_bias: None,
            expert_scale: None,
            table: None,
            tokens: 1,
            experts: count,
            top_k,
        },
    );
    let largest = gated.logits.iter().fold(1f64, |m, l| m.max(l.abs()));
    let near = tolerance::sum(hidden, largest);
    for (k, (&id, &weight)) in experts.iter().zip(weights).enumerate() {
        let Some(&logit) = gated.logits.get(id as usize) else { bail!("expert {id} of {count}") };
        let wanted = gated.logits[routes.experts[k] as usize];
        ensure!((logit - wanted).abs() <= near, "expert {id} was chosen, {} has a larger score", routes.experts[k]);
        let error = (f64::from(weight) - routes.weights[k]).abs();
        ensure!(error <= 4.0 * near + 1e-5, "the weight of expert {id} is {weight}, expected {}", routes.weights[k]);
    }
    Ok(())
}

/// `routed_scale * sum_k w[k] * Expert(x)`.
fn row(config: &LayerConfig, source: &Source, x: &[f64], experts: &[u32], weights: &[f32]) -> Result<Vec<f64>> {
    let mut y = vec![0f64; config.hidden];
    for (&expert, &weight) in experts.iter().zip(weights) {
        let matrices = source.expert(0, expert as usize)?;
        let gate = matrices.gate.map_or(Vec::new(), |gate| product(&gate, x));
        let up = product(&matrices.up, x);
        let pre = PreActivation::Separate { gate: &gate, up: &up };
        let a = activation(config.activation, pre, 1, config.intermediate);
        let scale = f64::from(config.routed_scale) * f64::from(weight);
        y.iter_mut().zip(product(&matrices.down, &a)).for_each(|(y, down)| *y += scale * down);
    }
    Ok(y)
}

/// `matrix x` in f64.
fn product(matrix: &Matrix<'_>, x: &[f64]) -> Vec<f64> {
    let bytes = matrix.cols() * matrix.dtype().size();
    let dot = |buffer: &mut Vec<u8>, row| {
        matrix.copy_row(row, buffer);
        tensors::floats(matrix.dtype(), buffer).zip(x).map(|(w, x)| w * x).sum()
    };
    (0..matrix.rows()).into_par_iter().map_init(|| vec![0; bytes], dot).collect()
}

/// Row `row` of a view.
fn floats(view: &HostView<'_>, row: usize) -> Vec<f64> {
    let first = view.offset() + row * view.row_stride() * view.dtype().size();
    let bytes = view.storage().get(first..first + view.cols() * view.dtype().size()).unwrap_or(&[]);
    tensors::floats(view.dtype(), bytes).collect()
}
