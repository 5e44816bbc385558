//! The model families: one entry each, nothing but data, by the kinship of their routing; what they share is in
//! `parts`.

mod logits;
mod sigmoid;
mod softmax;

use super::family::Family;

/// All of them.
pub(super) fn all() -> impl Iterator<Item = &'static Family> {
    [softmax::FAMILIES, sigmoid::FAMILIES, logits::FAMILIES].into_iter().flatten()
}
