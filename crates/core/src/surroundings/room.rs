//! Where what lies between the operations goes.

use crate::backend::{Backend, In, Out};
use crate::config::{LayerConfig, Norms};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::{Shape, View};

/// How many buffers a call takes.
pub const BUFFERS: usize = 16;

/// Elements of the buffers of a call with `tokens` tokens, up to 4 bytes each; none for parts that the layer has not. Nothing
/// where that is no number.
pub fn buffers(config: &LayerConfig, tokens: usize) -> Option<[usize; BUFFERS]> {
    if !config.has_surroundings() {
        return Some([0; BUFFERS]);
    }
    let (hidden, width) = (config.hidden, config.expert_width());
    let latent = config.latent.is_some();
    let router = config.router_mlp.map_or(0, |mlp| mlp.width);
    let (gate_up, inner, shared, gate) = match config.shared {
        Some(shared) => {
            let inner = shared.intermediate;
            (shared.activation.gate_up_rows(inner), inner, hidden, usize::from(shared.gated))
        }
        None => (0, 0, 0, 0),
    };
    let Norms { experts_in, expert_out: _, routed_out, shared_in, shared_out, out } = config.norms;
    let normed = [experts_in, routed_out, shared_in, shared_out, out].iter().any(Option::is_some);
    let if_there = |there: bool, width: usize| if there { width } else { 0 };
    let widths = [
        router,
        router,
        router,
        if_there(latent, width),
        if_there(experts_in.is_some(), width),
        width,
        if_there(latent, hidden),
        if_there(routed_out.is_some(), hidden),
        if_there(shared_in.is_some(), hidden),
        gate_up,
        inner,
        shared,
        if_there(shared_out.is_some(), hidden),
        gate,
        if_there(out.is_some(), hidden),
        if_there(normed, width.max(hidden)),
    ];
    let mut elements = [0; BUFFERS];
    for (elements, width) in elements.iter_mut().zip(widths) {
        *elements = tokens.checked_mul(width)?;
    }
    Some(elements)
}

/// A buffer, for rows of any format and width that it has room for.
pub(super) struct Room<'s, B: Backend> {
    storage: B::Mut<'s>,
    offset: usize,
}

impl<'s, B: Backend> Room<'s, B> {
    pub(super) fn new(view: Out<'s, B>) -> Self {
        let offset = view.offset();
        Self { storage: view.into_storage(), offset }
    }

    pub(super) fn read(&self, dtype: DType, shape: impl Into<Shape>) -> Result<In<'_, B>> {
        View::new(B::share(&self.storage), dtype, self.offset, shape)
    }

    pub(super) fn write(&mut self, dtype: DType, shape: impl Into<Shape>) -> Result<Out<'_, B>> {
        View::new(B::reborrow(&mut self.storage), dtype, self.offset, shape)
    }
}

/// The buffers of a call.
pub(super) struct Rooms<'s, B: Backend> {
    /// f32 `[T, M]`.
    pub(super) state: Room<'s, B>,
    /// f32 `[T, M]`.
    pub(super) router_a: Room<'s, B>,
    /// f32 `[T, M]`.
    pub(super) router_b: Room<'s, B>,
    /// `[T, L]`: x, projected.
    pub(super) projected: Room<'s, B>,
    /// `[T, L]` or `[T, H]`: what the experts read, normed.
    pub(super) read: Room<'s, B>,
    /// `[T, L]` or `[T, H]`: the routed sum.
    pub(super) sum: Room<'s, B>,
    /// `[T, H]`: the sum, projected.
    pub(super) unfolded: Room<'s, B>,
    /// `[T, H]`: the same, normed.
    pub(super) routed: Room<'s, B>,
    /// `[T, H]`: what the shared expert reads, normed.
    pub(super) shared_read: Room<'s, B>,
    /// `[T, 2S]`.
    pub(super) shared_gate_up: Room<'s, B>,
    /// `[T, S]`.
    pub(super) shared_a: Room<'s, B>,
    /// `[T, H]`.
    pub(super) shared_y: Room<'s, B>,
    /// `[T, H]`.
    pub(super) shared_normed: Room<'s, B>,
    /// f32 `[T]`.
    pub(super) logit: Room<'s, B>,
    /// `[T, H]`: routed and shared experts, normed.
    pub(super) together: Room<'s, B>,
    /// `[T, L]` or `[T, H]`: what a norm is of, which nobody reads again.
    pub(super) spare: Room<'s, B>,
}

impl<'s, B: Backend> Rooms<'s, B> {
    /// In the order of [`buffers`].
    pub(super) fn new(scratch: [Out<'s, B>; BUFFERS]) -> Self {
        let [
            state,
            router_a,
            router_b,
            projected,
            read,
            sum,
            unfolded,
            routed,
            shared_read,
            shared_gate_up,
            shared_a,
            shared_y,
            shared_normed,
            logit,
            together,
            spare,
        ] = scratch.map(Room::new);
        Self {
            state,
            router_a,
            router_b,
            projected,
            read,
            sum,
            unfolded,
            routed,
            shared_read,
            shared_gate_up,
            shared_a,
            shared_y,
            shared_normed,
            logit,
            together,
            spare,
        }
    }
}
