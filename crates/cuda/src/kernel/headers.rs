//! Texts that kernels share.

pub(super) const TYPES: &str = include_str!("../include/types.cuh");
pub(super) const REDUCE: &str = include_str!("../include/reduce.cuh");
pub(super) const DOT: &str = include_str!("../include/dot.cuh");
pub(super) const TILES: &str = include_str!("../include/tile.cuh");
pub(super) const MMA: &str = include_str!("../include/mma.cuh");
pub(super) const SPLIT: &str = include_str!("../include/split_mma.cuh");
pub(super) const GATE: &str = include_str!("../include/gate.cuh");
pub(super) const ROUTE: &str = include_str!("../include/route.cuh");
pub(super) const CLUSTER: &str = include_str!("../include/cluster.cuh");
pub(super) const PERMUTE: &str = include_str!("../include/permute.cuh");
pub(super) const PIECES: &str = include_str!("../include/pieces.cuh");
pub(super) const ACTIVATION: &str = include_str!("../include/activation.cuh");
pub(super) const DOWN_COMBINE: &str = include_str!("../include/down_combine.cuh");
pub(super) const RING: &str = include_str!("../include/ring.cuh");
pub(super) const FEW: &str = include_str!("../include/few.cuh");
