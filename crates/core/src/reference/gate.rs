//! Router logits of every token.

use super::norm::rms_norm;
use crate::config::GateConfig;

/// Operands of [`gate`].
#[derive(Clone, Copy, Debug)]
pub struct Gate<'a> {
    /// `[T, H]`.
    pub x: &'a [f64],
    /// `[E, H]`.
    pub router: &'a [f64],
    /// `[E]`, or absent for zeros. Not multiplied by `config.scale`.
    pub bias: Option<&'a [f64]>,
    /// `[H]`, or absent for ones. Read only if `config.norm` is set.
    pub norm_weight: Option<&'a [f64]>,
    /// Norm, scale and softcap.
    pub config: GateConfig,
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// E.
    pub experts: usize,
}

/// What [`gate`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Gated {
    /// `[T, E]`.
    pub logits: Vec<f64>,
    /// `n`, `[T, H]`: the normalised tokens, or `x` itself where there is no norm.
    pub normed: Vec<f64>,
}

/// The router: `n = rmsnorm(x) or x`, `logits[t,e] = softcap(scale * sum_h n[t,h] * router[e,h] + bias[e])` with
/// `softcap(l) = c * tanh(l / c)`, or `l` where there is no softcap.
///
/// NaN and infinities follow from the arithmetic; [`route`](fn@super::route) says what they mean there.
///
/// ```
/// use fused_moe_core::{config::GateConfig, reference::{Gate, gate}};
/// let gated = gate(&Gate { x: &[1.0, 2.0], router: &[1.0, 0.0, 0.5, 0.5], bias: Some(&[0.0, 1.0]), norm_weight: None,
///                          config: GateConfig { scale: 2.0, ..GateConfig::default() }, tokens: 1, hidden: 2, experts: 2 });
/// assert_eq!(gated.logits, [2.0, 4.0]);
/// ```
pub fn gate(op: &Gate<'_>) -> Gated {
    let normed = match op.config.norm {
        Some(norm) => rms_norm(op.x, op.norm_weight, f64::from(norm.eps), op.hidden),
        None => op.x.to_vec(),
    };
    let mut logits = Vec::with_capacity(op.tokens * op.experts);
    for t in 0..op.tokens {
        for e in 0..op.experts {
            let mut sum = 0.0;
            for h in 0..op.hidden {
                sum += normed[t * op.hidden + h] * op.router[e * op.hidden + h];
            }
            let logit = f64::from(op.config.scale) * sum + op.bias.map_or(0.0, |bias| bias[e]);
            logits.push(match op.config.softcap.map(f64::from) {
                Some(cap) => cap * (logit / cap).tanh(),
                None => logit,
            });
        }
    }
    Gated { logits, normed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GateNorm;

    const PLAIN: GateConfig = GateConfig { norm: None, scale: 1.0, softcap: None };

    fn op() -> Gate<'static> {
        Gate {
            x: &[3.0, 4.0, 1.0, -1.0],
            router: &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
            bias: None,
            norm_weight: None,
            config: PLAIN,
            tokens: 2,
            hidden: 2,
            experts: 3,
        }
    }

    #[test]
    fn plain_product() {
        let gated = gate(&op());
        assert_eq!(gated.logits, [3.0, 4.0, 7.0, 1.0, -1.0, 0.0]);
        assert_eq!(gated.normed, op().x);
    }

    #[test]
    fn scale_leaves_the_bias_alone_and_the_softcap_covers_both() {
        let config = GateConfig { scale: 0.5, softcap: Some(2.0), ..PLAIN };
        let gated = gate(&Gate { bias: Some(&[1.0, -2.0, 0.0]), config, ..op() });
        assert_eq!(gated.logits[0], 2.0 * (2.5f64 / 2.0).tanh());
        assert_eq!(gated.logits[1], 0.0);
        assert_eq!(gated.logits[5], 0.0);
    }

    #[test]
    fn norm_goes_before_the_router() {
        let norm = Some(GateNorm { eps: 3.5, feeds_experts: false });
        let gated = gate(&Gate { norm_weight: Some(&[4.0, 1.0]), config: GateConfig { norm, ..PLAIN }, ..op() });
        assert_eq!(gated.normed[..2], [3.0, 1.0]);
        assert_eq!(gated.logits[..3], [3.0, 1.0, 4.0]);
        // without a norm in the configuration its weight is not read
        assert_eq!(gate(&Gate { norm_weight: Some(&[4.0, 1.0]), ..op() }), gate(&op()));
    }

    #[test]
    fn no_tokens() {
        assert!(gate(&Gate { x: &[], tokens: 0, ..op() }).logits.is_empty());
    }
}
