use super::Matrices;
use crate::backend::{Backend, In, Out};

/// Each row times its expert's down: `y[r] = down[e] a[r] + bias[e]`.
pub struct Down<'a, B: Backend> {
    /// `[R, I]`, grouped by expert.
    pub a: In<'a, B>,
    /// u32 `[E+1]`: rows of expert e are `offsets[e] .. offsets[e+1]`.
    pub offsets: In<'a, B>,
    /// `[E, H, I]`.
    pub matrices: Matrices<'a, B>,
    /// `[E, H]`.
    pub bias: Option<In<'a, B>>,
    /// Written: `[R, H]`, grouped by expert; rows past the last expert's are left alone.
    pub out: Out<'a, B>,
}
