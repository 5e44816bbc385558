//! A layer that is trained: forward and backward over the weights where an optimizer updates them, written once for every
//! backend that has the gradients of the single operations.
//!
//! Between the two passes a token keeps x, the pre-activation of its K slots (and of the shared expert), and its routes;
//! [`TrainingLayer::activation_bytes`] tells how much that is. The logits, the activations and the normalised tokens are
//! made once more; the experts' outputs are needed by nobody.
//!
//! What lies between two operations of a call is f32, or narrower where the backend wants that
//! ([`BackendBackward::between`]); sums are f32 on every backend.

mod backward;
mod forward;
mod workspace;

pub use workspace::TrainingWorkspace;

use crate::backend::{Backend, BackendBackward, In, shorten, shorten_mut};
use crate::config::{LayerConfig, Norms};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::operation::*;
use crate::routing::Permutation;
use crate::tensor::View;

/// A layer without weights of its own: every call names them.
///
/// ```text
/// let layer         = TrainingLayer::new(&config)?;
/// let mut workspace = layer.workspace(&backend, max_tokens)?;          // the only allocation
/// layer.forward(&backend, &stream, ForwardSaving { .. }, &mut workspace)?;
/// layer.backward(&backend, &stream, LayerBackward { .. }, &mut workspace)?;
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingLayer {
    config: LayerConfig,
}

impl TrainingLayer {
    /// A layer of this description. Experts without weights, a capacity, latent experts, norms around the experts and a
    /// router MLP have no gradients here.
    ///
    /// Errors: `Value`, naming what lies outside its range, or the part that has no gradient.
    pub fn new(config: &LayerConfig) -> Result<Self> {
        config.check()?;
        for (parameter, given) in [
            ("zero_experts", config.zero_experts.is_some()),
            ("capacity", config.capacity.is_some()),
            ("latent", config.latent.is_some()),
            ("norms", config.norms != Norms::default()),
            ("router_mlp", config.router_mlp.is_some()),
        ] {
            if given {
                let (expected, actual) = ("none in a layer that is trained", "one".into());
                return Err(Error::Value { operation: "training_layer", parameter, expected, actual });
            }
        }
        Ok(Self { config: config.clone() })
    }

    /// What it computes.
    pub fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// Bytes that `tokens` tokens keep from the forward pass to the backward one besides x, with pre-activations in a
    /// format: for each token `K * N` of these (`N` = 2I, or I without gate), an id and a weight of 4 bytes for each of the
    /// K slots, and the shared expert's 2S or S.
    pub fn activation_bytes(&self, tokens: usize, pre_activation: DType) -> usize {
        let config = &self.config;
        let shared = config.shared.map_or(0, |shared| shared.activation.gate_up_rows(shared.intermediate));
        let numbers = config.top_k.saturating_mul(config.gate_up_rows()).saturating_add(shared);
        let token = numbers.saturating_mul(pre_activation.size()).saturating_add(config.top_k.saturating_mul(8));
        tokens.saturating_mul(token)
    }

    /// A workspace for calls with up to `max_tokens` tokens, forward and backward.
    ///
    /// Errors: `Value` when that is no number of bytes; what the backend says where it makes memory.
    pub fn workspace<B: Backend>(&self, backend: &B, max_tokens: usize) -> Result<TrainingWorkspace<B>, B::Error> {
        TrainingWorkspace::new(backend, &self.config, max_tokens)
    }

    /// The formats of what lies between the operations of a call.
    fn formats<B: BackendBackward>(&self, backend: &B, x: DType, parameters: &LayerParameters<'_, B>) -> Formats {
        Formats::of(backend, x, [parameters.gate_up.dtype(), parameters.down.dtype()])
    }

    /// Whether the experts read the norm of x.
    fn norm_feeds(&self) -> bool {
        self.config.gate.norm.is_some_and(|norm| norm.feeds_experts)
    }

    /// A row a token.
    fn tokens(&self) -> RowSource {
        RowSource::Tokens { top_k: self.config.top_k }
    }
}

/// The formats of what lies between two operations.
#[derive(Clone, Copy)]
struct Formats {
    /// Of activations and their gradients.
    between: DType,
    /// Of the experts' outputs and of the gradients of what they read: f16 has too small a range for them.
    outputs: DType,
}

impl Formats {
    fn of<B: BackendBackward>(backend: &B, x: DType, [gate_up, down]: [DType; 2]) -> Self {
        let between = if gate_up == down { backend.between(x, gate_up) } else { DType::F32 };
        Self { between, outputs: if between == DType::F16 { DType::F32 } else { between } }
    }
}

/// RMSNorm of rows alone: combine of no experts.
fn norm<B: Backend>(
    backend: &B,
    stream: &B::Stream,
    (x, weight, eps): (In<'_, B>, Option<In<'_, B>>, f32),
    (sum, out): (crate::backend::Out<'_, B>, crate::backend::Out<'_, B>),
) -> Result<(), B::Error> {
    let nothing = shorten::<B>(x).row_range(0, 0)?;
    let norm = NextNorm { weight: weight.map(shorten::<B>), eps, out: shorten_mut::<B>(out) };
    let of = Residual::Of(shorten::<B>(x));
    backend.combine(stream, Combine::residual_alone(nothing, of, Some(norm), shorten_mut::<B>(sum)))
}

/// Adds a finished gradient to where it goes, or puts it there.
fn deliver<B: Backend>(
    backend: &B,
    stream: &B::Stream,
    from: In<'_, B>,
    to: Option<Gradient<'_, B>>,
) -> Result<(), B::Error> {
    let Some(Gradient { view, mode }) = to else { return Ok(()) };
    let (view, from) = (shorten_mut::<B>(view), shorten::<B>(from));
    if mode == GradientMode::Accumulate {
        return backend.accumulate(stream, Accumulate { acc: view, weight: Factor::Value(1.0), y: from });
    }
    let nothing = shorten::<B>(from).row_range(0, 0)?;
    backend.combine(stream, Combine::residual_alone(nothing, Residual::Of(from), None, view))
}

/// The matrices of one expert as a stack of one.
fn stack<B: Backend>(view: In<'_, B>) -> Result<In<'_, B>> {
    let [rows, cols] = [view.rows(), view.cols()];
    view.reshape([1, rows, cols])
}

/// A vector as `[1, n]`.
fn row<B: Backend>(view: In<'_, B>) -> Result<In<'_, B>> {
    let n = view.cols();
    view.reshape([1, n])
}

/// The gradient of one expert's matrix as that of a stack of one.
fn stack_gradient<B: Backend>(gradient: Option<Gradient<'_, B>>) -> Result<Option<Gradient<'_, B>>> {
    let Some(Gradient { view, mode }) = gradient else { return Ok(None) };
    let [rows, cols] = [view.rows(), view.cols()];
    Ok(Some(Gradient { view: view.reshape([1, rows, cols])?, mode }))
}

/// The gradient of a vector as `[1, n]`.
fn row_gradient<B: Backend>(gradient: Option<Gradient<'_, B>>) -> Result<Option<Gradient<'_, B>>> {
    let Some(Gradient { view, mode }) = gradient else { return Ok(None) };
    let n = view.cols();
    Ok(Some(Gradient { view: view.reshape([1, n])?, mode }))
}

/// A gradient for a shorter while.
fn shorter<'short, 'long: 'short, B: Backend>(gradient: Option<Gradient<'long, B>>) -> Option<Gradient<'short, B>> {
    gradient.map(|Gradient { view, mode }| Gradient { view: shorten_mut::<B>(view), mode })
}

/// Operands of an [`ActivationBackward`] whose gate and up lie side by side.
struct Activations<'a, B: Backend> {
    activation: crate::config::Activation,
    z: In<'a, B>,
    d_a: In<'a, B>,
    row_weights: Option<RowWeights<'a, B>>,
    a: crate::backend::Out<'a, B>,
    d_z: crate::backend::Out<'a, B>,
}

impl<'a, B: Backend> Activations<'a, B> {
    fn operands(self) -> ActivationBackward<'a, B> {
        let Self { activation, z, d_a, row_weights, a, d_z } = self;
        let operands = if activation.is_gated() {
            ActivationBackwardOperands::Halves { gate_up: z, d_gate_up: d_z }
        } else {
            ActivationBackwardOperands::Plain { up: z, d_up: d_z }
        };
        ActivationBackward { activation, operands, d_a, row_weights, a: Some(a) }
    }
}

/// The slots by expert; `ids` `[T, K]`.
fn permute<B: Backend>(
    backend: &B,
    stream: &B::Stream,
    (ids, experts): (In<'_, B>, usize),
    scratch: &mut workspace::PermutationScratch<B>,
) -> Result<(), B::Error> {
    let slots = ids.rows() * ids.cols();
    let workspace::PermutationScratch { row_slot, slot_row, offsets } = scratch;
    backend.permute(
        stream,
        Permute {
            experts: shorten::<B>(ids),
            experts_total: experts,
            local: 0..experts,
            row_slot: View::new(B::write(row_slot), DType::U32, 0, [slots])?,
            slot_row: View::new(B::write(slot_row), DType::U32, 0, [slots])?,
            offsets: View::new(B::write(offsets), DType::U32, 0, [experts + 1])?,
        },
    )
}

/// The same for a shorter while.
fn again<'s, B: Backend>(permutation: &'s Permutation<'_, B>) -> Permutation<'s, B> {
    Permutation {
        row_slot: shorten::<B>(permutation.row_slot),
        slot_row: shorten::<B>(permutation.slot_row),
        offsets: shorten::<B>(permutation.offsets),
    }
}

/// What [`permute`] left.
fn permutation<B: Backend>(
    scratch: &workspace::PermutationScratch<B>,
    [slots, experts]: [usize; 2],
) -> Result<Permutation<'_, B>> {
    Ok(Permutation {
        row_slot: View::new(B::read(&scratch.row_slot), DType::U32, 0, [slots])?,
        slot_row: View::new(B::read(&scratch.slot_row), DType::U32, 0, [slots])?,
        offsets: View::new(B::read(&scratch.offsets), DType::U32, 0, [experts + 1])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::*;

    #[test]
    fn parts_without_gradient_are_refused() {
        let plain = LayerConfig::new(8, 4, 6, 2);
        let zero_experts = ZeroExperts { count: 2, output: ZeroOutput::Zero };
        let capacity = Capacity { limit: CapacityLimit::Slots(3), order: CapacityOrder::Position, renormalize: None };
        let norms =
            Norms { out: Some(RmsNorm { eps: 1e-6, unit_offset: false, scaled_first: false }), ..Norms::default() };
        let router_mlp = RouterMlp { width: 3, eps: 1e-6, function: Function::GeluErf };
        for (part, config) in [
            ("zero_experts", LayerConfig { zero_experts: Some(zero_experts), ..plain.clone() }),
            ("capacity", LayerConfig { capacity: Some(capacity), ..plain.clone() }),
            ("latent", LayerConfig { latent: Some(4), ..plain.clone() }),
            ("norms", LayerConfig { norms, ..plain.clone() }),
            ("router_mlp", LayerConfig { router_mlp: Some(router_mlp), ..plain.clone() }),
        ] {
            match TrainingLayer::new(&config) {
                Err(Error::Value { parameter, .. }) => assert_eq!(parameter, part),
                other => panic!("{part}: {other:?}"),
            }
        }
        let routing = RoutingRule { always: 1, ..RoutingRule::default() };
        assert!(TrainingLayer::new(&LayerConfig { routing, ..plain }).is_ok());
    }
}
