use crate::backend::{Backend, In, Out};
use crate::config::Capacity;
use crate::routing::Permutation;
use std::ops::Range;

/// Groups the R = T*K slots by expert: a stable counting sort, as [`Permutation`](crate::Permutation) pictures it.
///
/// Slots of `NO_EXPERT` and of experts outside `local` get no row; ids of `experts_total` and above raise the status too.
pub struct Permute<'a, B: Backend> {
    /// u32 `[T, K]`.
    pub experts: In<'a, B>,
    /// E.
    pub experts_total: usize,
    /// The experts whose slots get rows.
    pub local: Range<usize>,
    /// Written: u32 `[R]`.
    pub row_slot: Out<'a, B>,
    /// Written: u32 `[R]`.
    pub slot_row: Out<'a, B>,
    /// Written: u32 `[E+1]`.
    pub offsets: Out<'a, B>,
}

/// The rows of each expert in tiles of at most `tile_rows`, expert by expert; no tile crosses experts.
pub struct TileSchedule<'a, B: Backend> {
    /// u32 `[E+1]`, of a permutation.
    pub offsets: In<'a, B>,
    /// Rows a tile, at least 1.
    pub tile_rows: usize,
    /// Written: u32 `[M, 3]`: expert, first row, rows. M must suffice: `R / tile_rows + min(E, R)`; more is left alone.
    pub tiles: Out<'a, B>,
    /// Written: u32 `[1]`, how many tiles were written: all there are, or M where that is less.
    pub count: Out<'a, B>,
}

/// Takes the slots that overflow their expert's capacity out of the routes: `experts = NO_EXPERT`, `weights = 0`.
///
/// The others keep their expert; their weights are divided as [`Capacity::renormalize`] says. Slots without a row are left
/// alone, but for that division.
pub struct DropOverflow<'a, B: Backend> {
    /// The rule.
    pub capacity: Capacity,
    /// Of the routes as they came: of all experts, whichever are here.
    pub permutation: Permutation<'a, B>,
    /// f32 `[T]`: tokens with more of it come first, equal ones by position; for
    /// [`CapacityOrder::Score`](crate::config::CapacityOrder).
    pub importance: Option<In<'a, B>>,
    /// u32 `[N+1]`, see [`Forward::sequences`](super::Forward::sequences).
    pub sequences: Option<In<'a, B>>,
    /// Read, then written: u32 `[T, K]`.
    pub experts: Out<'a, B>,
    /// Read, then written: f32 `[T, K]`.
    pub weights: Out<'a, B>,
}
