use crate::tensor::HostView;

/// The projections of experts that work in a width L of their own.
#[derive(Clone, Copy, Debug)]
pub struct LatentWeights<'a> {
    /// `[L, H]`: from x to what the experts read.
    pub down: HostView<'a>,
    /// `[H, L]`: from the experts' sum to the layer's width.
    pub up: HostView<'a>,
}

/// The weights of the norms, as [`Norms`](crate::config::Norms) names them; one that is absent is ones (zeros where the
/// factor is `1 + weight`).
#[derive(Clone, Copy, Debug, Default)]
pub struct NormWeights<'a> {
    /// `[L]` or `[H]`.
    pub experts_in: Option<HostView<'a>>,
    /// `[L]` or `[H]`.
    pub expert_out: Option<HostView<'a>>,
    /// `[H]`.
    pub routed_out: Option<HostView<'a>>,
    /// `[H]`.
    pub shared_in: Option<HostView<'a>>,
    /// `[H]`.
    pub shared_out: Option<HostView<'a>>,
    /// `[H]`.
    pub out: Option<HostView<'a>>,
}

/// The layers before the router's matrix, `M` wide.
#[derive(Clone, Copy, Debug)]
pub struct RouterMlpWeights<'a> {
    /// `[M, H]`.
    pub down: HostView<'a>,
    /// `[M]`.
    pub down_bias: Option<HostView<'a>>,
    /// `[M]` or `[1]`: what the previous block's state is multiplied by; one if absent.
    pub state_scale: Option<HostView<'a>>,
    /// `[M]`: weight of the norm.
    pub norm: Option<HostView<'a>>,
    /// `[M, M]`.
    pub fc1: HostView<'a>,
    /// `[M]`.
    pub fc1_bias: Option<HostView<'a>>,
    /// `[M, M]`.
    pub fc2: HostView<'a>,
    /// `[M]`.
    pub fc2_bias: Option<HostView<'a>>,
}
