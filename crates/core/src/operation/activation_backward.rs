use crate::backend::{Backend, In, Out};
use crate::config::Activation;

/// `d_gate = d_a * da/dg`, `d_up = d_a * da/du`, from the saved pre-activation, in one launch;
/// [`activate_backward`](crate::reference::activate_backward) has the derivatives and what they are at kinks.
pub struct ActivationBackward<'a, B: Backend> {
    /// Which one.
    pub activation: Activation,
    /// The pre-activation and its gradient, which lies as it does.
    pub operands: ActivationBackwardOperands<'a, B>,
    /// The gradient of the activation's result, `[.., I]`.
    pub d_a: In<'a, B>,
    /// What each row of `d_a` is multiplied by first.
    pub row_weights: Option<RowWeights<'a, B>>,
    /// Written if asked for: the activation's result once more, `[.., I]`, not multiplied by `row_weights`. The gradients
    /// of down and of the routing weights read it.
    pub a: Option<Out<'a, B>>,
}

/// Where gate and up lie, and their gradients.
pub enum ActivationBackwardOperands<'a, B: Backend> {
    /// Two buffers.
    Separate {
        /// `[.., I]`.
        gate: In<'a, B>,
        /// `[.., I]`.
        up: In<'a, B>,
        /// Written: `[.., I]`.
        d_gate: Out<'a, B>,
        /// Written: `[.., I]`.
        d_up: Out<'a, B>,
    },
    /// I gate values, then I up values.
    Halves {
        /// `[.., 2I]`.
        gate_up: In<'a, B>,
        /// Written: `[.., 2I]`.
        d_gate_up: Out<'a, B>,
    },
    /// g0, u0, g1, u1, ...
    Interleaved {
        /// `[.., 2I]`.
        gate_up: In<'a, B>,
        /// Written: `[.., 2I]`.
        d_gate_up: Out<'a, B>,
    },
    /// Up alone, for an activation without gate.
    Plain {
        /// `[.., I]`.
        up: In<'a, B>,
        /// Written: `[.., I]`.
        d_up: Out<'a, B>,
    },
}

/// An [`ActivationBackward`] and, of the same numbers, the gradient of the routing weights:
/// `d_weights[slot] = scale * sum_i a[row, i] * d_a[row, i]`, 0 where a slot has no row; `scale` and the slots are those of
/// `row_weights`. What is written of `a` is multiplied by `row_weights`, as the gradient of down's matrices wants it.
pub struct ActivationWeightsBackward<'a, B: Backend> {
    /// With `row_weights`, their slots, and `a`.
    pub activation: ActivationBackward<'a, B>,
    /// u32 `[R]`: the row of a slot.
    pub slot_row: In<'a, B>,
    /// Written: f32 `[T, K]`.
    pub d_weights: Out<'a, B>,
}

/// A factor for each row: `scale * weights[slot]`.
pub struct RowWeights<'a, B: Backend> {
    /// f32 `[T, K]`, or `[R]`; ones if absent.
    pub weights: Option<In<'a, B>>,
    /// u32 `[R]`: the slot of a row. Absent: row r is slot r. A row whose slot does not exist has factor 0.
    pub row_slot: Option<In<'a, B>>,
    /// A constant factor.
    pub scale: f32,
}

impl<B: Backend> Clone for RowWeights<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for RowWeights<'_, B> {}
