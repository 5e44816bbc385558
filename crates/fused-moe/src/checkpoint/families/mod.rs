//! The model families: one entry each, nothing but data, by the kinship of their routing; what they share is in
//! `parts`. Those that no layer can be made of yet are in `refused`.

mod logits;
mod refused;
mod sigmoid;
mod softmax;

pub(super) use refused::REFUSED;

use super::family::Family;

/// All of them.
pub(super) fn all() -> impl Iterator<Item = &'static Family> {
    [softmax::FAMILIES, sigmoid::FAMILIES, logits::FAMILIES].into_iter().flatten()
}
