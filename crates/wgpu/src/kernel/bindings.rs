//! The longer lists of operands, in the order of their bindings.

use super::{Binding, STATUS, reads, reads_integers, writes, writes_integers};

pub(super) const ROUTE_BY_KEY: &[Binding] = &[
    reads("logits"),
    reads("bias"),
    reads("scale"),
    writes_integers("experts"),
    writes("weights"),
    writes("keys"),
    writes_integers("witness"),
    STATUS,
];
pub(super) const ROUTE_BY_TABLE: &[Binding] = &[
    reads("logits"),
    reads_integers("token_ids"),
    reads_integers("table"),
    reads("scale"),
    writes_integers("experts"),
    writes("weights"),
    STATUS,
];
pub(super) const PERMUTE_SLOTS: &[Binding] = &[
    reads_integers("experts"),
    writes_integers("row_slot"),
    writes_integers("slot_row"),
    writes_integers("offsets"),
    STATUS,
];
pub(super) const DOWN_COMBINE: &[Binding] = &[
    reads("a"),
    reads("down"),
    reads("bias"),
    reads_integers("experts"),
    reads("weights"),
    reads("shared_y"),
    reads("gate"),
    reads("residual"),
    writes("out"),
];
pub(super) const DROP_OVERFLOW: &[Binding] = &[
    reads_integers("row_slot"),
    reads_integers("slot_row"),
    reads_integers("offsets"),
    reads("importance"),
    reads_integers("sequences"),
    writes_integers("experts"),
    writes("weights"),
];
pub(super) const COMBINE: &[Binding] = &[
    reads("y"),
    reads_integers("slot_row"),
    reads("weights"),
    reads("x"),
    reads_integers("experts"),
    reads("shared_y"),
    reads("gate"),
    reads("residual"),
    reads("norm_weight"),
    writes("normed"),
    writes("out"),
];
pub(super) const TILE_SCHEDULE: &[Binding] =
    &[reads_integers("offsets"), writes_integers("tiles"), writes_integers("count"), writes_integers("arguments")];
