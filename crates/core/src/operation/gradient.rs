use crate::backend::{Backend, Out};

/// Where a gradient goes, and whether it replaces what is there or is added to it.
///
/// A gradient is formed in f32 whatever the format of the view, and rounded once when it is stored.
pub struct Gradient<'a, B: Backend> {
    /// Written; read before where the mode is [`GradientMode::Accumulate`].
    pub view: Out<'a, B>,
    /// How.
    pub mode: GradientMode,
}

/// What becomes of what was there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GradientMode {
    /// It is replaced; an expert without rows gets zeros.
    #[default]
    Assign,
    /// The gradient is added to it; an expert without rows is left alone.
    Accumulate,
}

impl<'a, B: Backend> Gradient<'a, B> {
    /// Replaces what is there.
    pub fn assign(view: Out<'a, B>) -> Self {
        Self { view, mode: GradientMode::Assign }
    }

    /// Is added to what is there.
    pub fn accumulate(view: Out<'a, B>) -> Self {
        Self { view, mode: GradientMode::Accumulate }
    }
}
