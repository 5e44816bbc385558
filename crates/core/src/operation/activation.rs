use crate::backend::{Backend, In, Out};
use crate::config::Activation;

/// `act(g) * u`, or `act(u)`, for any number of rows: `[I]`, `[R, I]`, `[T, K, I]`.
pub struct Activate<'a, B: Backend> {
    /// Which one.
    pub activation: Activation,
    /// Where gate and up lie and where the result goes.
    pub operands: ActivationOperands<'a, B>,
}

/// Where gate and up lie and where the result goes.
pub enum ActivationOperands<'a, B: Backend> {
    /// Two buffers.
    Separate {
        /// `[.., I]`.
        gate: In<'a, B>,
        /// `[.., I]`.
        up: In<'a, B>,
        /// Written: `[.., I]`.
        out: Out<'a, B>,
    },
    /// Two buffers; the result replaces the gate.
    SeparateInPlace {
        /// Read, then written: `[.., I]`.
        gate: Out<'a, B>,
        /// `[.., I]`.
        up: In<'a, B>,
    },
    /// `[.., 2I]`: I gate values, then I up values.
    Halves {
        /// `[.., 2I]`.
        gate_up: In<'a, B>,
        /// Written: `[.., I]`.
        out: Out<'a, B>,
    },
    /// The same; the result replaces the gate half, the up half is left alone.
    HalvesInPlace {
        /// Read, then written: `[.., 2I]`.
        gate_up: Out<'a, B>,
    },
    /// `[.., 2I]`: g0, u0, g1, u1, ...
    Interleaved {
        /// `[.., 2I]`.
        gate_up: In<'a, B>,
        /// Written: `[.., I]`.
        out: Out<'a, B>,
    },
    /// Up alone, for an activation without gate.
    Plain {
        /// `[.., I]`.
        up: In<'a, B>,
        /// Written: `[.., I]`.
        out: Out<'a, B>,
    },
    /// Up alone; the result replaces it.
    PlainInPlace {
        /// Read, then written: `[.., I]`.
        up: Out<'a, B>,
    },
}
