//! The parts of a layer that few families have.

#[cfg(doc)]
use super::LayerConfig;
use super::{Function, RoutingRule, Score};

/// Experts without weights (zero-computation experts, Jin et al., MoE++, arXiv:2410.07348): the router has `count` rows
/// behind those of the E experts, and a slot with id `E .. E + count` contributes its weight times `output`.
///
/// They are where expert E - 1 is, if the experts are shared out
/// ([`local_experts`](crate::Options::local_experts)). The correction bias and the per-expert scale have `E + count` entries
/// then, and groups divide all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroExperts {
    /// How many.
    pub count: usize,
    /// What each of them makes of a token.
    pub output: ZeroOutput,
}

/// What an expert without weights makes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroOutput {
    /// The token as the experts read it.
    Copy,
    /// Zero: the slot goes nowhere.
    Zero,
}

/// Expert capacity (Fedus et al., Switch Transformers, arXiv:2101.03961): of the slots of a sequence that chose an expert,
/// the first `limit` keep it. The others overflow: their id becomes [`NO_EXPERT`](crate::NO_EXPERT), their weight 0.
///
/// First in line are the slots of each token's first choice, in the order of the tokens, then those of the second, and so on.
/// Sequences are given with the call; without them all its tokens are one. Routes that the caller brings are left as they
/// are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// How many slots of a sequence an expert takes.
    pub limit: CapacityLimit,
    /// Which tokens come first.
    pub order: CapacityOrder,
    /// `min`, where the weights of a token's slots that stay are divided by `max(their sum, min)`.
    pub renormalize: Option<f32>,
}

impl Capacity {
    /// The rule whose one weight a token says how sure the router is: what [`CapacityOrder::Score`] goes by.
    pub fn importance() -> RoutingRule {
        RoutingRule { score: Score::Softmax, ..RoutingRule::default() }
    }
}

/// How many slots of a sequence of `L` tokens an expert takes.
///
/// ```
/// use fused_moe_core::config::CapacityLimit;
/// // 7.000000000000001, as in Python
/// assert_eq!(CapacityLimit::Fraction(0.07).slots(100, 8), 8);
/// assert_eq!(CapacityLimit::EvenShare { factor: 2 }.slots(10, 8), 4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CapacityLimit {
    /// So many.
    Slots(usize),
    /// `ceil(fraction * L)`, the product rounded to f64 as most programs have it.
    Fraction(f64),
    /// `factor * ceil(L / E)`.
    EvenShare {
        /// How many times its even share.
        factor: usize,
    },
}

impl CapacityLimit {
    /// The number for a sequence of `length` = L tokens and `experts` = E.
    pub fn slots(self, length: usize, experts: usize) -> usize {
        match self {
            Self::Slots(slots) => slots,
            Self::Fraction(fraction) => (fraction * length as f64).ceil() as usize,
            Self::EvenShare { factor } => factor.saturating_mul(length.div_ceil(experts.max(1))),
        }
    }
}

/// Which tokens of a sequence come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapacityOrder {
    /// Those before the others.
    Position,
    /// Those whose best expert has the larger softmax (batch-prioritised routing, Riquelme et al., arXiv:2106.05974); equal
    /// ones by position.
    Score,
}

/// Norms around the experts, where [`LayerConfig`] says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Norms {
    /// Of what the routed experts read, `[expert_width]`.
    pub experts_in: Option<RmsNorm>,
    /// Of the output of each routed expert before it is weighted, `[expert_width]`, the same weights for all.
    pub expert_out: Option<RmsNorm>,
    /// Of the routed sum, `[H]`.
    pub routed_out: Option<RmsNorm>,
    /// Of what the shared expert reads, `[H]`; its gate reads x.
    pub shared_in: Option<RmsNorm>,
    /// Of the shared expert's output, `[H]`.
    pub shared_out: Option<RmsNorm>,
    /// Of routed and shared experts together, `[H]`; before the residual.
    pub out: Option<RmsNorm>,
}

/// `n = x * rsqrt(mean(x^2) + eps) * weight`; without a weight it is one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f32,
    /// Whether the factor is `1 + weight`.
    pub unit_offset: bool,
    /// Whether the factor comes first: `n = z * rsqrt(mean(z^2) + eps)` with `z = x * weight`. For
    /// [`Norms::expert_out`] alone.
    pub scaled_first: bool,
}

/// A router of several layers, whose first hidden state goes on to the next block's router:
///
/// ```text
/// state  = down . x + down_bias + state_scale * previous
/// h      = rmsnorm(state)
/// h      = gelu(fc1 . h + bias1);  h = gelu(fc2 . h + bias2)
/// logits = gate(h)                                                the router's matrix is [E, width]
/// ```
///
/// What lies between its layers is f32, as logits are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterMlp {
    /// Width of its layers.
    pub width: usize,
    /// Of the norm.
    pub eps: f32,
    /// Its activation.
    pub function: Function,
}
