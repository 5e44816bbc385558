use super::Gradient;
use crate::backend::{Backend, In};
use crate::config::Score;

/// The load-balancing loss, over the batch or over each sequence of it;
/// [`load_balance_loss`](crate::reference::load_balance_loss) has the formula.
pub struct LoadBalanceLoss<'a, B: Backend> {
    /// `[T, E]`.
    pub logits: In<'a, B>,
    /// u32 `[T, K]`; an id that names no expert counts for none.
    pub experts: In<'a, B>,
    /// What makes probabilities of the logits: any but [`Score::Logit`], which may be negative.
    pub score: Score,
    /// u32 `[N+1]`, ascending: the tokens of sequence s are `sequences[s] .. sequences[s+1]`; those before the first end and
    /// behind the last are of none. An end below one before it counts as that one, an end above T as T. Absent: all tokens
    /// are one sequence.
    pub sequences: Option<In<'a, B>>,
    /// Factor on the loss.
    pub coefficient: f32,
    /// f32 `[1]`.
    pub loss: Option<Gradient<'a, B>>,
    /// f32 `[T, E]`.
    pub d_logits: Option<Gradient<'a, B>>,
}

/// The router z-loss; [`z_loss`](crate::reference::z_loss) has the formula.
pub struct ZLoss<'a, B: Backend> {
    /// `[T, E]`.
    pub logits: In<'a, B>,
    /// Factor on the loss.
    pub coefficient: f32,
    /// f32 `[1]`.
    pub loss: Option<Gradient<'a, B>>,
    /// f32 `[T, E]`.
    pub d_logits: Option<Gradient<'a, B>>,
}
