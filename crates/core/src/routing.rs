//! Where tokens go: routes, and the permutation that brings the tokens of an expert together.

use crate::backend::{Backend, In};

/// The routes of T tokens: `experts [T, K]` u32 and `weights [T, K]` f32.
///
/// Slot `r = t*K + k` is token t's k-th route. [`NO_EXPERT`](crate::NO_EXPERT) marks a slot that goes nowhere.
pub struct Routing<'a, B: Backend> {
    /// Expert ids, u32 `[T, K]`.
    pub experts: In<'a, B>,
    /// What each expert's output is multiplied by, f32 `[T, K]`.
    pub weights: In<'a, B>,
}

/// The R = T*K slots, grouped by expert, in slot order within an expert.
///
/// ```text
/// T = 3, K = 2, E = 4          slot     0  1  2  3  4  5
/// experts = [[2, 0],           expert   2  0  2  3  0  2
///            [2, 3],
///            [0, 2]]           row      0  1  2  3  4  5
///                              expert   0  0  2  2  2  3
/// row_slot = [1, 4, 0, 2, 5, 3]         which slot the row holds
/// slot_row = [2, 0, 3, 5, 1, 4]         where the slot went
/// offsets  = [0, 2, 2, 5, 6]            rows of expert e: offsets[e] .. offsets[e+1]
/// ```
/// A slot without a row has `slot_row = NO_ROW`; rows past `offsets[E]` have `row_slot = NO_ROW`.
pub struct Permutation<'a, B: Backend> {
    /// Row to slot, u32 `[R]`.
    pub row_slot: In<'a, B>,
    /// Slot to row, u32 `[R]`.
    pub slot_row: In<'a, B>,
    /// First row of each expert and the end, u32 `[E+1]`.
    pub offsets: In<'a, B>,
}

impl<B: Backend> Clone for Routing<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Routing<'_, B> {}
impl<B: Backend> Clone for Permutation<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Permutation<'_, B> {}
