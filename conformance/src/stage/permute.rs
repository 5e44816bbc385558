//! Slots grouped by expert, and their tiles.

use super::Check;
use crate::cases::{Case, Operation, Scale, Stage};
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Output, Prepared};
use fused_moe_core::{Backend, operation, reference};
use std::ops::Range;

/// A case of permute.
#[derive(Clone, Debug)]
pub struct Permute {
    /// T, K, E.
    pub sizes: [usize; 3],
    /// How the slots spread.
    pub spread: Spread,
    /// The experts that are here.
    pub local: Range<usize>,
}

/// A case of tile_schedule.
#[derive(Clone, Debug)]
pub struct TileSchedule {
    /// The permutation it follows.
    pub permute: Permute,
    /// Rows a tile.
    pub tile_rows: usize,
    /// Room for so many tiles more than there can be; none: for half of those that there are.
    pub room: Option<usize>,
}

impl Permute {
    fn ids(&self) -> Tensor {
        Data::new("permute").of(&format!("{:?}", self.sizes)).routes(self.sizes, self.spread)
    }

    fn reference(&self, ids: &[u32]) -> reference::Permutation {
        reference::permute(&reference::Permute { ids, experts: self.sizes[2], local: self.local.clone() })
    }

    fn name(&self) -> String {
        let [t, k, e] = self.sizes;
        let local = if self.local == (0..e) { String::new() } else { format!(" local {:?}", self.local) };
        format!("{:?}{local} T={t} K={k} E={e}", self.spread)
    }
}

impl Check for Permute {
    fn prepare(&self) -> Prepared {
        let mut prepared = Prepared::default();
        prepared.input("experts", self.ids());
        let permutation = self.reference(prepared.ids("experts"));
        let slots = permutation.row_slot.len();
        prepared.status = permutation.status;
        prepared.output(Output::ids("row_slot", [slots], permutation.row_slot));
        prepared.output(Output::ids("slot_row", [slots], permutation.slot_row));
        prepared.output(Output::ids("offsets", [permutation.offsets.len()], permutation.offsets));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = operation::Permute {
            experts: operands.input("experts")?,
            experts_total: self.sizes[2],
            local: self.local.clone(),
            row_slot: operands.output("row_slot")?,
            slot_row: operands.output("slot_row")?,
            offsets: operands.output("offsets")?,
        };
        backend.permute(stream, operands)
    }
}

impl Check for TileSchedule {
    fn prepare(&self) -> Prepared {
        let permutation = self.permute.reference(self.permute.ids().as_ids());
        let tiles = reference::tile_schedule(&permutation.offsets, self.tile_rows as u32);
        let slots = permutation.row_slot.len();
        let most = slots / self.tile_rows + slots.min(self.permute.sizes[2]);
        let mut prepared = Prepared::default();
        let count = permutation.offsets.len();
        prepared.input("offsets", Tensor::ids([count], permutation.offsets));
        let room = self.room.map_or(tiles.len() / 2, |room| most + room);
        let written = tiles.len().min(room);
        let flat = tiles.iter().take(room).flat_map(|tile| [tile.expert, tile.first_row, tile.rows]).collect();
        prepared.output(Output::ids("tiles", [room, 3], flat).only(written));
        prepared.output(Output::ids("count", [1], vec![written as u32]));
        prepared
    }

    fn call<B: Backend>(&self, backend: &B, stream: &B::Stream, mut operands: Operands<'_, B>) -> Result<(), B::Error> {
        let operands = operation::TileSchedule {
            offsets: operands.input("offsets")?,
            tile_rows: self.tile_rows,
            tiles: operands.output("tiles")?,
            count: operands.output("count")?,
        };
        backend.tile_schedule(stream, operands)
    }
}

/// The cases of permute and tile_schedule.
pub(crate) fn cases(scale: Scale) -> Vec<Case> {
    let mut permutations = Vec::new();
    let mut sizes = vec![
        [0, 2, 8],
        [1, 1, 1],
        [1, 8, 8],
        [5, 3, 12],
        [33, 1, 24],
        [7, 4, 60],
        [64, 8, 128],
        [3, 6, 160],
        [257, 8, 256],
        [100, 10, 512],
        [9, 16, 4096],
        [600, 4, 3],
    ];
    if scale == Scale::Full {
        sizes.extend([[4099, 8, 128], [1024, 22, 512]]);
    }
    for [t, k, e] in sizes {
        let distinct = [Spread::Even, Spread::Skewed, Spread::Same(e / 2), Spread::Holes, Spread::Bad, Spread::Nowhere];
        for spread in distinct.into_iter().chain([Spread::One(e - 1)]) {
            permutations.push(Permute { sizes: [t, k, e], spread, local: 0..e });
        }
        for local in [0..e / 2, e / 3..e - e / 3, e - 1..e, e / 2..e / 2] {
            for spread in [Spread::Even, Spread::Bad] {
                if local != (0..e) {
                    permutations.push(Permute { sizes: [t, k, e], spread, local: local.clone() });
                }
            }
        }
    }
    let mut cases: Vec<Case> = Vec::new();
    let mut push = |stage, name, operation| {
        let case = Case { stage, name, dtype: "u32".into(), placement: Default::default(), operation };
        if !cases.iter().any(|other| other.stage == case.stage && other.name == case.name) {
            cases.push(case);
        }
    };
    for permute in permutations {
        push(Stage::Permute, permute.name(), Operation::Permute(permute.clone()));
        if matches!(permute.spread, Spread::Even | Spread::Skewed | Spread::One(_) | Spread::Nowhere) {
            for (tile_rows, room) in [(1, Some(0)), (16, Some(0)), (64, Some(3)), (1000, Some(1)), (4, None)] {
                let short = if room.is_none() { " in half the room" } else { "" };
                let name = format!("tiles of {tile_rows}{short} {}", permute.name());
                let schedule = TileSchedule { permute: permute.clone(), tile_rows, room };
                push(Stage::TileSchedule, name, Operation::TileSchedule(schedule));
            }
        }
    }
    let strided = cases.iter().filter(|case| case.name.contains("E=12")).cloned().map(Case::strided);
    let strided: Vec<Case> = strided.collect();
    cases.extend(strided);
    cases
}
