//! What a layer is: sizes, gate, routing rule, activation, shared expert.
//!
//! Everything here is plain data, named after the mathematics and never after a model.
//! Legend: `T` tokens, `H` hidden size, `I` expert intermediate size, `E` experts,
//! `K` experts per token, `S` shared-expert intermediate size.

mod parts;

pub use parts::{Capacity, CapacityLimit, CapacityOrder, Norms, RmsNorm, RouterMlp, ZeroExperts, ZeroOutput};

/// One Mixture-of-Experts layer.
///
/// ```text
/// y[t] = residual[t] + routed_scale * sum_k w[t,k] * Down_e( act(Gate_e x[t]) * Up_e x[t] ),  e = experts[t,k]
///      + shared_scale * shared_gate[t] * Shared(x[t])
/// ```
///
/// What may stand around the experts, all of it absent by default:
///
/// ```text
/// read    = experts_in( latent_down . x )                       what the routed experts read
/// routed  = routed_out( latent_up . (routed_scale * sum_k w[t,k] * expert_out( Expert_e(read) )) )
/// shared  = shared_scale * shared_gate * shared_out( Shared( shared_in(x) ) )
/// y       = residual + out( routed + shared )
/// ```
///
/// with the six [`Norms`] by their names, and the projections of [`latent`](Self::latent).
///
/// ```
/// use fused_moe_core::config::*;
/// let mixtral = LayerConfig {
///     routing: RoutingRule { weights: WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() },
///                            ..RoutingRule::default() },
///     ..LayerConfig::new(4096, 14336, 8, 2)
/// };
/// assert_eq!(mixtral.gate_up_rows(), 2 * 14336);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// H, the width of a token.
    pub hidden: usize,
    /// I, the width inside an expert.
    pub intermediate: usize,
    /// E, how many routed experts there are (at most 4096).
    pub experts: usize,
    /// K, how many experts a token goes to, `1 <= K <= E` (those without weights counted).
    pub top_k: usize,
    /// How x becomes router logits.
    pub gate: GateConfig,
    /// How logits become experts and weights.
    pub routing: RoutingRule,
    /// What happens between gate_up and down.
    pub activation: Activation,
    /// Where a routing weight is applied.
    pub weight_on: WeightOn,
    /// Factor on the sum over the routed experts, applied after it is formed.
    pub routed_scale: f32,
    /// The expert that every token goes to, if there is one.
    pub shared: Option<SharedConfig>,
    /// Experts without weights, which the router chooses like the others.
    pub zero_experts: Option<ZeroExperts>,
    /// How many slots an expert takes; without it, all of them.
    pub capacity: Option<Capacity>,
    /// L, the width that the routed experts work in, between a projection `[L, H]` before them and one `[H, L]` behind
    /// their sum (latent experts); without it they work in H. Router and shared expert read x itself.
    pub latent: Option<usize>,
    /// Norms around the experts.
    pub norms: Norms,
    /// What x passes through before the router's matrix.
    pub router_mlp: Option<RouterMlp>,
}

impl LayerConfig {
    /// A layer with softmax top-K routing, unnormalised weights and gated SiLU experts; H, I, E, K in this order.
    pub fn new(hidden: usize, intermediate: usize, experts: usize, top_k: usize) -> Self {
        Self {
            hidden,
            intermediate,
            experts,
            top_k,
            gate: GateConfig::default(),
            routing: RoutingRule::default(),
            activation: Activation::default(),
            weight_on: WeightOn::Output,
            routed_scale: 1.0,
            shared: None,
            zero_experts: None,
            capacity: None,
            latent: None,
            norms: Norms::default(),
            router_mlp: None,
        }
    }

    /// What the router chooses among: the E experts, and those without weights behind them.
    pub fn choices(&self) -> usize {
        self.experts.saturating_add(self.zero_experts.map_or(0, |zero| zero.count))
    }

    /// The width that the routed experts read and write: L, or H.
    pub fn expert_width(&self) -> usize {
        self.latent.unwrap_or(self.hidden)
    }

    /// The width that the router's matrix reads: that of its MLP, or H.
    pub fn router_width(&self) -> usize {
        self.router_mlp.map_or(self.hidden, |mlp| mlp.width)
    }

    /// Rows of one expert's gate_up matrix: 2I when the activation is gated, I when it is not.
    pub fn gate_up_rows(&self) -> usize {
        self.activation.gate_up_rows(self.intermediate)
    }
}

/// How the router logits are made: `n = rmsnorm(x) or x`, `logits = softcap(scale * (n . router^T) + bias)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateConfig {
    /// RMSNorm before the router.
    pub norm: Option<GateNorm>,
    /// Scalar factor on the product.
    pub scale: f32,
    /// `c` of `c * tanh(logit / c)`.
    pub softcap: Option<f32>,
}

impl Default for GateConfig {
    fn default() -> Self {
        Self { norm: None, scale: 1.0, softcap: None }
    }
}

/// `n = x * rsqrt(mean(x^2) + eps) * weight`; the weight is the layer's `router_norm`, ones where that is absent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateNorm {
    /// Added to the mean square.
    pub eps: f32,
    /// Whether the experts read the normalised token too, or the token as it came.
    pub feeds_experts: bool,
}

/// Logits to experts and weights: a score, a selection, a weight rule.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoutingRule {
    /// What a logit becomes.
    pub score: Score,
    /// Which K experts are chosen.
    pub selection: Selection,
    /// What weight each of them gets.
    pub weights: WeightRule,
    /// How many experts every token goes to besides: the last `always` of the E, in the last slots, by their number. Top-K
    /// then chooses the other K - always among the other E - always (which are those that a correction bias and groups
    /// speak of); score and weights treat all alike. For top-K selection only.
    pub always: usize,
}

/// The score `s[e]` of a logit `l[e]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Score {
    /// `exp(l[e]) / sum_j exp(l[j])` over all E.
    #[default]
    Softmax,
    /// `1 / (1 + exp(-l[e]))`.
    Sigmoid,
    /// `sqrt(ln(1 + exp(l[e])))`.
    SqrtSoftplus,
    /// `l[e]` itself.
    Logit,
}

/// Which experts a token goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Selection {
    /// The K largest keys; equal keys go to the lower expert.
    TopK {
        /// What is compared.
        by: SelectBy,
        /// Whether a per-expert correction is added to the key (for the choice only).
        bias: bool,
        /// Restricts the choice to the best groups of experts.
        groups: Option<Groups>,
    },
    /// Two masked passes for K = 2 (Liu et al., GRIN, arXiv:2409.12136). Pass 1 takes the largest logit; the weight is its
    /// softmax among the logits with `(max - l) <= 2 * jitter * max(|l|, max)`. Pass 2 does the same without the first.
    /// Score and weight value are this rule's own.
    SparseMixer {
        /// Half the relative width of the mask.
        jitter: f32,
    },
    /// `experts[t] = table[token_ids[t]]`: the ids come from a table `[V, K]`.
    Table,
}

impl Default for Selection {
    fn default() -> Self {
        Self::TopK { by: SelectBy::Score, bias: false, groups: None }
    }
}

/// What top-K compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelectBy {
    /// The score, plus the correction bias if there is one.
    Score,
    /// The logit, plus the correction bias if there is one.
    Logit,
}

/// Group-limited choice: E experts in `count` equal groups, the best `keep` of them stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many groups; divides E.
    pub count: usize,
    /// How many are kept, `1 <= keep <= count`.
    pub keep: usize,
    /// What a group is worth.
    pub score: GroupScore,
    /// What the keys of the other groups become.
    pub masked: Masked,
}

/// The worth of a group, from its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Sum of its two largest keys (the largest alone in a group of one).
    SumOfBestTwo,
    /// Its largest key.
    Best,
}

/// The key of an expert whose group was not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masked {
    /// Never chosen while a kept expert is left.
    NegInfinity,
    /// Competes with key 0, so it can beat a negative key.
    Zero,
}

/// The weights of the chosen experts.
///
/// ```text
/// v[k]  = value;  v[k] *= expert_scale[e] if BeforeNormalize
/// v[k]  = v[k] / norm(v);  v[k] *= expert_scale[e] if AfterNormalize
/// w[k]  = v[k] * scale
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightRule {
    /// What a weight starts as.
    pub value: WeightValue,
    /// When the per-expert scale is applied; `None`: there is no such scale.
    pub expert_scale: Option<ExpertScale>,
    /// What the weights of a token are divided by.
    pub normalize: Normalize,
    /// Last factor.
    pub scale: f32,
}

impl Default for WeightRule {
    fn default() -> Self {
        Self { value: WeightValue::Score, expert_scale: None, normalize: Normalize::None, scale: 1.0 }
    }
}

/// What a weight starts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightValue {
    /// The score of the chosen expert, without correction bias.
    Score,
    /// `exp(l[e_k]) / sum_j exp(l[e_j])` over the K chosen.
    SoftmaxOfChosen,
}

/// When `expert_scale[e]` multiplies a weight. Both orders are in use and give different numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertScale {
    /// Scaled, then normalised.
    BeforeNormalize,
    /// Normalised, then scaled, and not normalised again.
    AfterNormalize,
}

/// What the weights of a token are divided by. A zero divisor gives zero weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normalize {
    /// Nothing.
    None,
    /// `sum_k v[k] + eps`.
    Sum {
        /// Added to the sum.
        eps: f32,
    },
    /// `max(sum_k v[k], min)`.
    SumAtLeast {
        /// Lower bound of the sum.
        min: f32,
    },
    /// `(sum_k |v[k]|^p)^(1/p)`.
    Lp {
        /// The exponent, positive.
        p: f32,
    },
}

/// Where a routing weight multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightOn {
    /// The expert's output, when the outputs are combined.
    Output,
    /// The expert's input: `Expert_e(w * x)`, outputs summed with weight one.
    Input,
}

/// What happens to the pre-activation: gate `g` and up `u`, or `u` alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `act(g) * u`.
    Gated(Function),
    /// `silu(min(g, limit)) * clamp(u, -limit, limit)`.
    ClampedSilu {
        /// Positive.
        limit: f32,
    },
    /// `(clamp(u, -limit, limit) + 1) * min(g, limit) * sigmoid(alpha * min(g, limit))`.
    ClampedSwish {
        /// Slope inside the sigmoid.
        alpha: f32,
        /// Positive.
        limit: f32,
    },
    /// `min(silu(g), limit) * clamp(u, -limit, limit)`.
    SiluThenClamp {
        /// Positive.
        limit: f32,
    },
    /// `cap(g, gate_cap) * sigmoid(g) * cap(u, up_cap)` with `cap(x, c) = c * tanh(x / c)`.
    SoftcappedSilu {
        /// Positive.
        gate_cap: f32,
        /// Positive.
        up_cap: f32,
    },
    /// `act(u)`, no gate: gate_up is `[E, I, H]`.
    Plain(Function),
}

impl Default for Activation {
    fn default() -> Self {
        Self::Gated(Function::Silu)
    }
}

impl Activation {
    /// Whether there is a gate beside up.
    pub fn is_gated(self) -> bool {
        !matches!(self, Self::Plain(_))
    }

    /// Rows of the gate_up matrix for `intermediate` = I: 2I or I.
    pub fn gate_up_rows(self, intermediate: usize) -> usize {
        if self.is_gated() { intermediate.saturating_mul(2) } else { intermediate }
    }
}

/// An element-wise function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// `x * sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt(2)))`.
    GeluErf,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// `x`.
    Identity,
}

/// The expert that every token goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedConfig {
    /// S, its width inside.
    pub intermediate: usize,
    /// Its activation.
    pub activation: Activation,
    /// Whether its output is multiplied by `sigmoid(shared_gate . x)`.
    pub gated: bool,
    /// Factor on its output.
    pub scale: f32,
}
