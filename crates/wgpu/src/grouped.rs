//! The grouped product, which gate_up, down and the shared expert are: its kernels, and how they are launched.

use crate::error::{Error, Result};
use crate::kernel::{ActivationKind, Kernel, size};
use crate::launch::{self, Operand, Tensor, launch, params, tensor};
use crate::memory::{Mut, Ref};
use crate::pack::{Piece, Table};
use crate::plan::grouped as plan;
use crate::plan::pieces;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use std::ops::Range;

params! {
    GroupedParams {
        x: Tensor, gate: Tensor, up: Tensor, bias: Tensor, out: Tensor, input_weights: Tensor,
        expert_stride: u32, inner: u32, pairs: u32, first_pair: u32, end: u32, outputs: u32, first: u32, here: u32,
        rows: u32, row_begin: u32, row_end: u32, x_begin: u32, x_rows: u32, top_k: u32, input_columns: u32,
        groups: u32, row_slot: u32, limit: f32, alpha: f32,
    }
}

/// Which product a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) stage: Stage,
    /// Whether matrices are gate rows, then up rows.
    pub(crate) gated: bool,
    /// What is applied before storing.
    pub(crate) activation: Option<ActivationKind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    GateUp,
    Down,
}

impl Product {
    pub(crate) const DOWN: Self = Self { stage: Stage::Down, gated: false, activation: None };
}

/// How a workgroup finds its rows, and what the operand `groups` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Find {
    One,
    Slots,
    Experts,
    Rows,
    Tiles,
}

/// A kernel of the grouped product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum GroupedKernel {
    Dot { product: Product, find: Find, rows: u32 },
    Tiled { product: Product, find: Find },
}

/// Rows that are grouped by expert.
pub(crate) const GROUPS: &str = include_str!("include/groups.wgsl");
/// Their tiles.
pub(crate) const TILES: &str = include_str!("include/tiles.wgsl");
const GROUPED: &str = include_str!("include/grouped.wgsl");

impl GroupedKernel {
    fn product(self) -> (Product, Find) {
        match self {
            Self::Dot { product, find, .. } | Self::Tiled { product, find } => (product, find),
        }
    }

    /// The name of its entry and of its file.
    pub(crate) fn entry(self) -> &'static str {
        match (self.product().0.stage, self) {
            (Stage::GateUp, Self::Dot { .. }) => "gate_up_dot",
            (Stage::GateUp, Self::Tiled { .. }) => "gate_up",
            (Stage::Down, Self::Dot { .. }) => "down_dot",
            (Stage::Down, Self::Tiled { .. }) => "down",
        }
    }

    /// The parts of its text that follow the functions of activations.
    pub(crate) fn parts(self) -> Vec<&'static str> {
        let mut parts = vec![GROUPS, GROUPED];
        parts.extend(match self {
            Self::Dot { .. } => &[include_str!("include/grouped_dot.wgsl")][..],
            Self::Tiled { .. } => &[TILES, include_str!("include/grouped_tiled.wgsl")],
        });
        parts.push(match (self.product().0.stage, self) {
            (Stage::GateUp, Self::Dot { .. }) => include_str!("gate_up_dot.wgsl"),
            (Stage::GateUp, Self::Tiled { .. }) => include_str!("gate_up.wgsl"),
            (Stage::Down, Self::Dot { .. }) => include_str!("down_dot.wgsl"),
            (Stage::Down, Self::Tiled { .. }) => include_str!("down.wgsl"),
        });
        parts
    }

    /// Constants that its text reads.
    pub(crate) fn constants(self) -> Vec<(&'static str, String)> {
        let (Product { gated, activation, .. }, find) = self.product();
        let none = ActivationKind { form: "FORM_PLAIN", function: "FUNCTION_IDENTITY" };
        let ActivationKind { form, function } = activation.unwrap_or(none);
        let find = match find {
            Find::One => "FIND_ONE",
            Find::Slots => "FIND_SLOTS",
            Find::Experts => "FIND_EXPERTS",
            Find::Rows => "FIND_ROWS",
            Find::Tiles => "FIND_TILES",
        };
        let mut constants = vec![
            ("GATED", gated.to_string()),
            ("ACTIVATE", activation.is_some().to_string()),
            ("FORM", form.to_owned()),
            ("FUNCTION", function.to_owned()),
            ("FIND", find.to_owned()),
        ];
        match self {
            Self::Dot { rows, .. } => constants.push(("ROWS", format!("{rows}u"))),
            Self::Tiled { .. } => {
                constants.extend([size("TILE", plan::TILE), size("PAIRS", plan::PAIRS)]);
            }
        }
        constants
    }
}

/// Which rows are whose.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Groups<'a> {
    /// All of them the first expert's.
    One,
    /// Grouped by expert, as offsets `[E+1]` say; a row's slot is `row_slot[r]` where rows are gathered.
    Offsets { offsets: Operand<'a>, row_slot: Option<Operand<'a>>, schedule: Option<Schedule<'a>> },
    /// The slots themselves, for which experts `[R]` are given, each in range.
    Slots { experts: Operand<'a> },
}

/// The tiles of the rows, listed on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule<'a> {
    /// u32 `[M, 3]`, contiguous: expert, first row, rows, of which there are at most [`plan::TILE`].
    pub(crate) tiles: Operand<'a>,
    /// Where three u32 lie, in a buffer made with `INDIRECT`: the column tiles of all pairs of this product's matrices
    /// ([`plan::column_tiles`]), how many tiles there are (at most 65535), 1.
    pub(crate) groups: (&'a wgpu::Buffer, u64),
}

/// Operands of [`grouped`].
pub(crate) struct Grouped<'a> {
    pub(crate) product: Product,
    pub(crate) groups: Groups<'a>,
    /// `[R, C]`, or `[T, C]` to gather from.
    pub(crate) x: &'a View<Ref<'a>>,
    /// K, where rows are gathered.
    pub(crate) top_k: Option<usize>,
    /// f32, one a slot (a row without gather), in rows of so many: multiplies the row of x, by linearity the product.
    pub(crate) input_weights: Option<(Operand<'a>, usize)>,
    pub(crate) table: Table<'a>,
    /// The activation's limit and alpha.
    pub(crate) constants: (f32, f32),
    /// `[R, outputs]`, or both halves without an activation.
    pub(crate) out: &'a View<Mut<'a>>,
    /// Whether a row's bits must not depend on the others.
    pub(crate) invariant: bool,
}

/// Enqueues a grouped product: a launch for each window of the weights, of the rows of x and of the output.
pub(crate) fn grouped(wgpu: &Wgpu, stream: &WgpuStream, operands: &Grouped<'_>) -> Result<()> {
    let Grouped { product, groups, x, top_k, table, out, .. } = operands;
    let rows = out.rows();
    let (grouping, list, row_slot) = match *groups {
        Groups::One => (plan::Grouping::One, None, None),
        Groups::Slots { experts } => (plan::Grouping::Slots, Some(experts), None),
        Groups::Offsets { offsets, row_slot, schedule } => match schedule {
            Some(_) => (plan::Grouping::Tiles, Some(offsets), row_slot),
            None => (plan::Grouping::Offsets, Some(offsets), row_slot),
        },
    };
    let sizes =
        plan::Sizes { product: *product, rows, experts: table.experts, grouping, invariant: operands.invariant };
    let plan = plan::grouped(&sizes);
    if let Some(recorder) = wgpu.recorder() {
        recorder.explain(plan.why);
    }
    let row_slot = row_slot.filter(|_| top_k.is_some());
    let launch = Launch { operands, kernel: plan.kernel, list, row_slot };
    let x_bytes = x.row_stride().max(1) * x.dtype().size();
    let out_bytes = out.row_stride().max(1) * out.dtype().size();
    let one = matches!(groups, Groups::One);
    for piece in table.pieces.iter().filter(|piece| !one || piece.experts.start == 0) {
        if top_k.is_some() {
            for written in pieces(wgpu, rows, out_bytes) {
                for read in pieces(wgpu, x.rows(), x_bytes) {
                    launch.window(wgpu, stream, piece, (written.clone(), read))?;
                }
            }
        } else {
            for rows in pieces(wgpu, rows, out_bytes.max(x_bytes)) {
                launch.window(wgpu, stream, piece, (rows.clone(), rows))?;
            }
        }
    }
    Ok(())
}

/// What the launches of a product share.
struct Launch<'a> {
    operands: &'a Grouped<'a>,
    kernel: GroupedKernel,
    /// What `groups` holds, unless it is tiles.
    list: Option<Operand<'a>>,
    row_slot: Option<Operand<'a>>,
}

impl Launch<'_> {
    /// Some of the weights, of the rows that are written and of the rows of x.
    fn window(
        &self,
        wgpu: &Wgpu,
        stream: &WgpuStream,
        piece: &Piece<'_>,
        (written, read): (Range<usize>, Range<usize>),
    ) -> Result<()> {
        let Grouped { product, groups, table, .. } = self.operands;
        let (device, operation) = (wgpu.device(), self.kernel.entry());
        let out = Operand::rows(device, operation, self.operands.out, written.clone())?;
        let x = widest(Operand::rows(device, operation, self.operands.x, read.clone())?, table.inner);
        let pairs = piece.pairs.len();
        let experts = if matches!(groups, Groups::One) { 1 } else { piece.experts.len() };
        let (list, dispatch) = match (self.kernel, *groups) {
            (
                GroupedKernel::Tiled { find: Find::Tiles, .. },
                Groups::Offsets { schedule: Some(Schedule { tiles, groups: (buffer, offset), .. }), .. },
            ) => (Some(tiles), launch::Groups::Indirect(buffer, offset)),
            _ => {
                let count = plan::workgroups(self.kernel, experts, written.len(), pairs);
                (self.list, launch::Groups::Line(count))
            }
        };
        let all = self.operands.out.rows();
        let mut bias = tensor(&table.bias);
        bias.offset += (piece.experts.start - table.first) as u32 * bias.stride;
        let outputs_of_pair = if product.gated { 1 } else { 2 };
        let params = GroupedParams {
            x: x.tensor,
            gate: piece.gate.tensor,
            up: piece.up.tensor,
            bias,
            out: out.tensor,
            input_weights: tensor(&self.operands.input_weights.map(|(weights, _)| weights)),
            expert_stride: piece.expert_stride,
            inner: table.inner as u32,
            pairs: pairs as u32,
            first_pair: piece.pairs.start as u32,
            end: (outputs_of_pair * piece.pairs.end).min(table.outputs) as u32,
            outputs: table.outputs as u32,
            first: piece.experts.start as u32,
            here: experts as u32,
            rows: all as u32,
            row_begin: written.start as u32,
            row_end: written.end as u32,
            x_begin: read.start as u32,
            x_rows: read.len() as u32,
            top_k: self.operands.top_k.unwrap_or(1) as u32,
            input_columns: self.operands.input_weights.map_or(1, |(_, columns)| columns.max(1)) as u32,
            groups: tensor(&list).offset,
            row_slot: tensor(&self.row_slot).offset,
            limit: self.operands.constants.0,
            alpha: self.operands.constants.1,
        };
        let bound = [
            Some(x),
            Some(piece.gate),
            Some(piece.up),
            table.bias,
            list,
            self.row_slot,
            self.operands.input_weights.map(|(weights, _)| weights),
            Some(out),
        ];
        launch(wgpu, stream, Kernel::Grouped(self.kernel), &bound, (dispatch, &params))
    }
}

/// Read by 16 bytes where each row is whole eights of elements and aligned.
pub(crate) fn widest(operand: Operand<'_>, inner: usize) -> Operand<'_> {
    if inner.is_multiple_of(8) && operand.aligned(8) { operand.widened() } else { operand }
}

/// The error of an operand no part of which fits a binding.
pub(crate) fn too_large(wgpu: &Wgpu, operation: &'static str, bytes: usize) -> Error {
    Error::Binding { operation, bytes: bytes as u64, limit: wgpu.numbers().binding_bytes }
}

#[cfg(test)]
mod tests;
