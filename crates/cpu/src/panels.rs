//! The grouped matrix product with packed matrices.
//!
//! ```text
//! for each (expert with rows, block of its panels), shared by the threads
//!     for each pass over some of the expert's rows
//!         for each part of the columns
//!             x = that part of the rows, gathered, in the format that the kernel takes
//!             for each panel of the block
//!                 sums += x . that part of the panel              one kernel call, f32
//!         out = epilogue(input_weight * sums + bias)              rounded once, when stored
//! ```
//! A block comes from memory once a call, in the order in which it lies there; what further passes need of it is in the
//! caches. Each sum is one chain in ascending order, so its bits do not depend on blocks, passes, threads or other rows.

use crate::Cpu;
use crate::arch::{Kernels, PANEL, PANEL_BLOCK, PANEL_WORDS, Panel, PanelRow, PanelSums, group};
use crate::error::Result;
use crate::grouped::{Busy, Epilogue, Grouped, Inputs};
use crate::plan::{FEW_ROWS, PASS_ROWS, PanelPlan};
use crate::rows::Floats;
use crate::table::OutRows;
use bytemuck::cast_slice_mut;
use fused_moe_core::DType;
use fused_moe_core::dtype::Float;
use half::{bf16, f16};
use std::ops::Range;

/// What a packed matrix is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PanelSizes {
    pub(crate) outputs: usize,
    pub(crate) inner: usize,
    /// Whether an output has a gate row and an up row, which are in the two halves of one panel.
    pub(crate) gated: bool,
    pub(crate) dtype: DType,
}

impl PanelSizes {
    /// Outputs of a panel.
    pub(crate) fn width(&self) -> usize {
        if self.gated { PANEL / 2 } else { PANEL }
    }

    /// Panels of a matrix.
    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(self.width())
    }

    /// Lines of a panel.
    pub(crate) fn steps(&self) -> usize {
        self.inner.div_ceil(group(self.dtype))
    }

    /// Bytes that a row has in a line.
    pub(crate) fn element_bytes(&self) -> usize {
        group(self.dtype) * self.dtype.size()
    }

    pub(crate) fn panel_bytes(&self) -> usize {
        self.steps().saturating_mul(PANEL * self.element_bytes())
    }

    pub(crate) fn matrix_bytes(&self) -> usize {
        self.panels().saturating_mul(self.panel_bytes())
    }

    /// Of row i of a panel: whether it is an up row of a gated matrix, and its output.
    pub(crate) fn output(&self, panel: usize, i: usize) -> (bool, usize) {
        (!self.gated || i >= PANEL / 2, panel * self.width() + i % self.width())
    }
}

/// The packed matrices of the experts, and which is whose: the only way from an expert to its panels.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    /// Matrix after matrix.
    pub(crate) bytes: &'a [u8],
    pub(crate) sizes: PanelSizes,
    /// The place of each expert's matrix, where it has one.
    pub(crate) places: &'a [Option<usize>],
    /// `[places, rows]`, gate rows first.
    pub(crate) bias: Option<&'a [f32]>,
}

impl Panels<'_> {
    pub(crate) fn dtype(&self) -> DType {
        self.sizes.dtype
    }
}

/// Carries out a [`Grouped`] with packed matrices.
pub(crate) fn grouped_panels(cpu: &Cpu, plan: &PanelPlan, panels: Panels<'_>, operands: Grouped<'_>) -> Result<()> {
    match panels.sizes.dtype {
        DType::BF16 => typed::<bf16>(cpu, plan, panels, operands),
        DType::F16 => typed::<f16>(cpu, plan, panels, operands),
        _ => typed::<f32>(cpu, plan, panels, operands),
    }
}

fn typed<W: Float>(cpu: &Cpu, plan: &PanelPlan, panels: Panels<'_>, operands: Grouped<'_>) -> Result<()> {
    let Grouped { rows, groups, x, gather, input_weights, epilogue, out } = operands;
    let sizes = panels.sizes;
    let product = Product::<W> {
        kernels: cpu.kernels,
        pairs: plan.pairs,
        sizes,
        weights: bytemuck::try_cast_slice(panels.bytes).unwrap_or_default(),
        bias: panels.bias,
        inputs: Inputs::new(rows, gather, input_weights)?,
        x: Floats::new(&x)?,
        epilogue,
        out: OutRows::new(out)?,
    };
    let busy = Busy::new(groups, rows);
    let share = plan.share(busy.experts().len());
    let blocks = sizes.panels().div_ceil(share.block);
    cpu.pool.for_each(busy.experts().len() * blocks * share.chunks, share.grain, |item| {
        let (item, chunk) = (item / share.chunks, item % share.chunks);
        let e = usize::from(busy.experts()[item / blocks]);
        let (range, first) = (groups.rows(e, rows), item % blocks * share.block);
        let cut = |i: usize| range.start + range.len() * i / share.chunks;
        if let Some(&Some(place)) = panels.places.get(e) {
            let block = Block { place, panels: first..sizes.panels().min(first + share.block) };
            product.rows(&block, cut(chunk)..cut(chunk + 1));
        }
    });
    Ok(())
}

/// Some panels of an expert's matrix.
struct Block {
    place: usize,
    panels: Range<usize>,
}

/// Some rows of an expert.
struct Pass {
    /// Rows, where they come from and what they are multiplied by.
    rows: [(usize, usize, f32); PASS_ROWS],
    len: usize,
}

/// Everything that the blocks have in common.
struct Product<'a, W> {
    kernels: Kernels,
    pairs: bool,
    sizes: PanelSizes,
    weights: &'a [W],
    bias: Option<&'a [f32]>,
    inputs: Inputs<'a>,
    x: Floats<'a>,
    epilogue: Epilogue,
    out: OutRows<'a>,
}

/// Where the sums of the gate rows end, and those of the up rows begin.
const HALF: usize = PANEL_BLOCK * PANEL / 2;

impl<W: Float> Product<'_, W> {
    /// The outputs of a block for the rows `rows`, all of one expert.
    fn rows(&self, block: &Block, rows: Range<usize>) {
        let passes = rows.len().div_ceil(PASS_ROWS).max(1);
        let most = rows.len().div_ceil(passes);
        let mut pass = Pass { rows: [(0, 0, 0.0); PASS_ROWS], len: 0 };
        for row in rows {
            let Some((source, weight)) = self.inputs.find(row) else { continue };
            pass.rows[pass.len] = (row, source, weight);
            pass.len += 1;
            if pass.len == most {
                self.pass(block, &pass);
                pass.len = 0;
            }
        }
        if pass.len > 0 {
            self.pass(block, &pass);
        }
    }

    /// Buffers for no more rows than there are: clearing them takes time, and room in the cache.
    fn pass(&self, block: &Block, pass: &Pass) {
        match pass.len {
            ..=FEW_ROWS => self.pass_of::<FEW_ROWS>(block, pass),
            _ => self.pass_of::<PASS_ROWS>(block, pass),
        }
    }

    /// A pass of at most ROWS rows.
    fn pass_of<const ROWS: usize>(&self, block: &Block, pass: &Pass) {
        let (steps, words) = (self.sizes.steps(), if self.pairs { 1 } else { group(W::DTYPE) });
        let chunk = PANEL_WORDS / words;
        let mut x: [PanelRow; ROWS] = [[0; _]; ROWS];
        let mut sums: [PanelSums; ROWS] = [[0.0; _]; ROWS];
        let (x, sums) = (&mut x[..pass.len], &mut sums[..pass.len]);
        for first in (0..steps).step_by(chunk) {
            let part = first..steps.min(first + chunk);
            for (x, &(_, source, _)) in x.iter_mut().zip(&pass.rows) {
                self.load(source, part.start * group(W::DTYPE), x);
            }
            for (i, panel) in block.panels.clone().enumerate() {
                let (panels, last) = (&block.panels, part.end == steps);
                let next = match (panel + 1 < panels.end, last) {
                    (true, _) => self.part(block.place, panel + 1, part.clone()),
                    (false, false) => self.part(block.place, panels.start, part.end..steps.min(part.end + chunk)),
                    (false, true) if panels.end < self.sizes.panels() => {
                        self.part(block.place, panels.end, 0..chunk.min(steps))
                    }
                    (false, true) => &[],
                };
                let columns = if self.sizes.gated {
                    [i * PANEL / 2, HALF + i * PANEL / 2]
                } else {
                    [i * PANEL, i * PANEL + PANEL / 2]
                };
                let weights = self.part(block.place, panel, part.clone());
                self.multiply(Panel { weights, next, x, sums, columns });
            }
        }
        self.finish(block, pass, sums);
    }

    fn multiply(&self, panel: Panel<'_, W>) {
        let Panel { weights, next, x, sums, columns } = panel;
        let pairs = if self.pairs { bf16s(weights).zip(bf16s(next)) } else { None };
        match pairs {
            Some((weights, next)) => self.kernels.pair_panel(Panel { weights, next, x, sums, columns }),
            None => self.kernels.panel(Panel { weights, next, x, sums, columns }),
        }
    }

    /// Lines of a panel.
    fn part(&self, place: usize, panel: usize, steps: Range<usize>) -> &[W] {
        let line = PANEL * group(W::DTYPE);
        let first = (place * self.sizes.panels() + panel) * self.sizes.steps();
        self.weights.get((first + steps.start) * line..(first + steps.end) * line).unwrap_or_default()
    }

    /// A row of x from a column on, as the kernel reads it.
    fn load(&self, row: usize, col: usize, to: &mut PanelRow) {
        if self.pairs
            && let Floats::BF16(x) = self.x
        {
            let from = x.row(row).get(col..).unwrap_or_default();
            let to: &mut [bf16] = cast_slice_mut(&mut to[..PANEL_WORDS]);
            let count = from.len().min(to.len());
            to[..count].copy_from_slice(&from[..count]);
            to[count..].fill(bf16::ZERO);
            return;
        }
        let count = self.sizes.inner.saturating_sub(col).min(PANEL_WORDS);
        let to: &mut [f32] = cast_slice_mut(&mut to[..PANEL_WORDS]);
        self.x.load(self.kernels, row, col, &mut to[..count]);
        to[count..].fill(0.0);
    }

    /// From sums to outputs.
    fn finish(&self, block: &Block, pass: &Pass, sums: &mut [PanelSums]) {
        let outputs = self.sizes.outputs;
        let col = block.panels.start * self.sizes.width();
        let count = (block.panels.len() * self.sizes.width()).min(outputs - col);
        let bias = |up: usize| {
            let rows = if self.sizes.gated { 2 * outputs } else { outputs };
            let start = block.place * rows + up * outputs + col;
            self.bias.and_then(|bias| bias.get(start..start + count))
        };
        let store = |row: usize, col: usize, values: &[f32]| self.out.store(self.kernels, [row, col], values);
        for (sums, &(row, _, weight)) in sums.iter_mut().zip(&pass.rows) {
            if !self.sizes.gated {
                let values = &mut sums[..count];
                scale_and_add(values, weight, bias(0));
                if let Epilogue::Activate(activation) = self.epilogue {
                    self.kernels.activation_into_up(activation, &[], values);
                }
                store(row, col, values);
                continue;
            }
            let (gate, up) = sums.split_at_mut(HALF);
            let (gate, up) = (&mut gate[..count], &mut up[..count]);
            scale_and_add(gate, weight, bias(0));
            scale_and_add(up, weight, bias(1));
            match self.epilogue {
                Epilogue::Activate(activation) => {
                    self.kernels.activation_into_gate(activation, gate, up);
                    store(row, col, gate);
                }
                Epilogue::Store => {
                    store(row, col, gate);
                    store(row, outputs + col, up);
                }
            }
        }
    }
}

/// The same numbers, where they are bf16.
fn bf16s<W: Float>(numbers: &[W]) -> Option<&[bf16]> {
    if W::DTYPE == DType::BF16 { bytemuck::try_cast_slice(numbers).ok() } else { None }
}

/// `values = weight * values + bias`.
fn scale_and_add(values: &mut [f32], weight: f32, bias: Option<&[f32]>) {
    if weight != 1.0 {
        values.iter_mut().for_each(|value| *value *= weight);
    }
    for (value, bias) in values.iter_mut().zip(bias.unwrap_or_default()) {
        *value += bias;
    }
}
