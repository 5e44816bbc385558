//! The grouped matrix product with packed matrices.
//!
//! ```text
//! for each (expert with rows, block of its panels), shared by the threads
//!     for each pass over some of the expert's rows
//!         for each part of the columns
//!             x = that part of the rows, gathered, in the format that the kernel takes
//!             sums += x . that part of the block's panels         one kernel call, f32
//!         out = epilogue(input_weight * sums + bias)              rounded once, when stored
//! ```
//! A block comes from memory once a call, in the order in which it lies there; what further passes need of it is in the
//! caches. A sum's order is fixed, ascending by steps or, of tiles, by 16 of them, and columns are cut between: so its bits do
//! not depend on blocks, passes, threads or other rows.

use crate::Cpu;
use crate::arch::{Kernels, PAIR_STEPS, PANEL, PANEL_BLOCK, PanelGroup, PanelSums, group};
use crate::error::Result;
use crate::grouped::{Busy, Epilogue, Grouped, Groups, Inputs};
use crate::plan::{FEW_ROWS, FEW_WORDS, PASS_ROWS, PASS_WORDS, PanelPlan, Share, TILES_ROWS, TILES_WORDS, streams};
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
        plan,
        pairs: plan.pairs,
        tiles: plan.tiles(),
        sizes,
        weights: bytemuck::try_cast_slice(panels.bytes).unwrap_or_default(),
        bias: panels.bias,
        inputs: Inputs::new(rows, gather, input_weights)?,
        x: Floats::new(&x)?,
        epilogue,
        stream: streams(out.extent()),
        out: OutRows::new(out)?,
    };
    let busy = Busy::new(groups, rows);
    let most = busy.experts().iter().map(|&e| groups.rows(usize::from(e), rows).len()).max().unwrap_or(0);
    let work = Work { cpu, plan, panels, groups, rows, busy };
    match (plan.pass_rows(most), plan.tiles()) {
        (FEW_ROWS, _) => work.run::<W, FEW_WORDS, FEW_ROWS>(product),
        (_, false) => work.run::<W, PASS_WORDS, PASS_ROWS>(product),
        (_, true) => work.run::<W, TILES_WORDS, TILES_ROWS>(product),
    }
    Ok(())
}

/// All blocks of all experts with rows.
struct Work<'a> {
    cpu: &'a Cpu,
    plan: &'a PanelPlan,
    panels: Panels<'a>,
    groups: Groups<'a>,
    rows: usize,
    busy: Busy,
}

impl Work<'_> {
    /// Shares them out among the threads, each with room for so many words of x and so many rows.
    fn run<W: Float, const WORDS: usize, const ROWS: usize>(&self, product: Product<'_, W>) {
        let (sizes, busy) = (self.panels.sizes, self.busy.experts());
        let share = self.plan.share(busy.len());
        let blocks = sizes.panels().div_ceil(share.block);
        let block = |item: usize| {
            let e = usize::from(*busy.get(item / blocks)?);
            let (&place, first) = (self.panels.places.get(e)?.as_ref()?, item % blocks * share.block);
            let panels = first..sizes.panels().min(first + share.block);
            Some((Block { place, panels }, self.groups.rows(e, self.rows)))
        };
        let Share { chunks, grain, stride, .. } = share;
        let room = || Room::<WORDS, ROWS> { x: [0; WORDS], sums: [[0.0; _]; ROWS], loaded: None };
        self.cpu.pool.for_each_with([busy.len() * blocks * chunks, grain], room, |room, item| {
            let (item, chunk) = (item / chunks, item % chunks);
            let Some((now, range)) = block(item) else { return };
            let cut = |i: usize| range.start + range.len() * i / chunks;
            // Meanwhile other threads take the blocks between.
            let next = block(item + stride).map_or(Block { place: now.place, panels: 0..0 }, |(next, _)| next);
            let Room { x, sums, loaded } = room;
            product.rows(&[now, next], cut(chunk)..cut(chunk + 1), &mut Buffers { x, sums, loaded });
        });
    }
}

/// What a thread works in.
#[repr(C, align(64))]
struct Room<const WORDS: usize, const ROWS: usize> {
    x: [u32; WORDS],
    sums: [PanelSums; ROWS],
    loaded: Option<Loaded>,
}

/// The same, of any size.
struct Buffers<'a> {
    /// Some columns of the rows of a pass.
    x: &'a mut [u32],
    sums: &'a mut [PanelSums],
    /// What x has, where these are all columns.
    loaded: &'a mut Option<Loaded>,
}

/// The first and the last row of a pass, and how many it has.
type Loaded = [usize; 3];

/// Some panels of an expert's matrix.
struct Block {
    place: usize,
    panels: Range<usize>,
}

/// Some rows of an expert.
struct Pass {
    /// Rows, where they come from and what they are multiplied by.
    rows: [(usize, usize, f32); TILES_ROWS],
    len: usize,
}

/// A part of the columns of a pass's rows, and from a row to the next.
struct Part<'a> {
    x: &'a [u32],
    stride: usize,
}

/// Everything that the blocks have in common.
struct Product<'a, W> {
    kernels: Kernels,
    plan: &'a PanelPlan,
    /// Whether x is multiplied in bf16, and in tiles.
    pairs: bool,
    tiles: bool,
    sizes: PanelSizes,
    weights: &'a [W],
    bias: Option<&'a [f32]>,
    inputs: Inputs<'a>,
    x: Floats<'a>,
    epilogue: Epilogue,
    /// Whether the output is so large that it goes past the caches.
    stream: bool,
    out: OutRows<'a>,
}

/// Numbers of 4 bytes in a line of the cache.
const LINE_WORDS: usize = 16;
const _: () = assert!(LINE_WORDS == PAIR_STEPS, "columns are cut at whole lines");
/// Where the sums of the gate rows end, and those of the up rows begin.
const HALF: usize = PANEL_BLOCK * PANEL / 2;

impl<W: Float> Product<'_, W> {
    /// The outputs of the first block for the rows `rows`, all of one expert; the other comes next.
    fn rows(&self, blocks: &[Block; 2], rows: Range<usize>, buffers: &mut Buffers<'_>) {
        let most = rows.len().div_ceil(rows.len().div_ceil(buffers.sums.len()).max(1));
        let mut pass = Pass { rows: [(0, 0, 0.0); TILES_ROWS], len: 0 };
        for row in rows {
            let Some((source, weight)) = self.inputs.find(row) else { continue };
            pass.rows[pass.len] = (row, source, weight);
            pass.len += 1;
            if pass.len == most {
                self.pass(blocks, &pass, buffers);
                pass.len = 0;
            }
        }
        if pass.len > 0 {
            self.pass(blocks, &pass, buffers);
        }
        if self.stream {
            // Who reads it may be another thread.
            self.kernels.settle();
        }
    }

    /// Columns are cut where the rows' part of x ends: the fewer rows, the longer they are.
    fn pass(&self, [now, next]: &[Block; 2], pass: &Pass, buffers: &mut Buffers<'_>) {
        let Buffers { x, sums, loaded } = buffers;
        let (steps, words) = (self.sizes.steps(), if self.pairs { 1 } else { group(W::DTYPE) });
        let sums = &mut sums[..pass.len];
        sums.fill([0.0; _]);
        let lines = self.plan.words(pass.len, x.len()).min(steps * words + 2 * LINE_WORDS) / LINE_WORDS;
        // An odd number of lines keeps rows that are read together out of each other's places in the cache.
        let stride = if self.tiles { lines } else { lines.saturating_sub(1) | 1 } * LINE_WORDS;
        let chunk = stride / words;
        let row = |i: usize| pass.rows.get(i).map_or(0, |row| row.0);
        let all = (chunk >= steps).then(|| [row(0), row(pass.len.saturating_sub(1)), pass.len]);
        for first in (0..steps).step_by(chunk) {
            let part = |first: usize| first..steps.min(first + chunk);
            // The thread's last block may have had the same rows.
            if all.is_none() || **loaded != all {
                self.load(pass, part(first), x, stride);
                **loaded = all;
            }
            let weights = self.parts(now, part(first));
            let next =
                if first + chunk < steps { self.parts(now, part(first + chunk)) } else { self.parts(next, part(0)) };
            let used = if self.tiles { part(first).len().next_multiple_of(LINE_WORDS) } else { stride };
            let x = Part { x: &x[..pass.len * used], stride };
            self.multiply([&weights[..now.panels.len()], &next], x, sums);
        }
        self.finish(now, pass, sums);
    }

    fn multiply(&self, [weights, next]: [&[&[W]]; 2], part: Part<'_>, sums: &mut [PanelSums]) {
        let (width, Part { x, stride }) = (self.sizes.width(), part);
        let columns = if self.sizes.gated { [0, HALF] } else { [0, PANEL / 2] };
        let unaided = self.plan.unaided();
        if !self.pairs {
            return self.kernels.panels(PanelGroup { weights, next, x, stride, sums, columns, width, unaided });
        }
        let mut pairs: [[&[bf16]; PANEL_BLOCK]; 2] = [[&[]; PANEL_BLOCK]; 2];
        for (pairs, parts) in pairs.iter_mut().zip([weights, next]) {
            for (pairs, part) in pairs.iter_mut().zip(parts) {
                *pairs = bytemuck::try_cast_slice(part).unwrap_or_default();
            }
        }
        let [now, next] = &pairs;
        let weights = &now[..weights.len()];
        self.kernels.pair_panels(PanelGroup { weights, next, x, stride, sums, columns, width, unaided });
    }

    /// The lines `steps` of a block's panels.
    fn parts(&self, block: &Block, steps: Range<usize>) -> [&[W]; PANEL_BLOCK] {
        let mut parts: [&[W]; PANEL_BLOCK] = [&[]; PANEL_BLOCK];
        for (part, panel) in parts.iter_mut().zip(block.panels.clone()) {
            *part = self.part(block.place, panel, steps.clone());
        }
        parts
    }

    /// Lines of a panel.
    fn part(&self, place: usize, panel: usize, steps: Range<usize>) -> &[W] {
        let line = PANEL * group(W::DTYPE);
        let first = (place * self.sizes.panels() + panel) * self.sizes.steps();
        self.weights.get((first + steps.start) * line..(first + steps.end) * line).unwrap_or_default()
    }

    /// The steps `steps` of a pass's rows as the kernel reads them: `stride` numbers a row; of tiles 16 of each row, then the
    /// next 16.
    fn load(&self, pass: &Pass, steps: Range<usize>, x: &mut [u32], stride: usize) {
        let rows = &pass.rows[..pass.len];
        if self.pairs {
            let (row, line) = if self.tiles { (1, pass.len) } else { (stride / LINE_WORDS, 1) };
            let lines = x.as_chunks_mut::<LINE_WORDS>().0;
            for (n, &(_, source, _)) in rows.iter().enumerate() {
                self.load_pairs(source, steps.clone(), lines.iter_mut().skip(n * row).step_by(line));
            }
            return;
        }
        let col = steps.start * group(W::DTYPE);
        for (to, &(_, source, _)) in x.chunks_exact_mut(stride).zip(rows) {
            let to: &mut [f32] = cast_slice_mut(&mut to[..steps.len() * group(W::DTYPE)]);
            let count = self.sizes.inner.saturating_sub(col).min(to.len());
            self.x.load(self.kernels, source, col, &mut to[..count]);
            to[count..].fill(0.0);
        }
    }

    /// Pairs of a row, and zeros to the end of the last line that has some.
    fn load_pairs<'l>(&self, row: usize, steps: Range<usize>, lines: impl Iterator<Item = &'l mut [u32; LINE_WORDS]>) {
        let Floats::BF16(x) = self.x else { return };
        let from = x.row(row).get(2 * steps.start..).unwrap_or_default();
        let mut from = from[..from.len().min(2 * steps.len())].chunks(2 * LINE_WORDS);
        for to in lines.take(steps.len().div_ceil(LINE_WORDS)) {
            let (to, from): (&mut [bf16], _) = (cast_slice_mut(to), from.next().unwrap_or_default());
            match <&[bf16; 2 * LINE_WORDS]>::try_from(from) {
                Ok(from) => to.copy_from_slice(from),
                Err(_) => {
                    to.fill(bf16::ZERO);
                    to[..from.len()].copy_from_slice(from);
                }
            }
        }
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
        let store = |row: usize, col: usize, values: &[f32]| {
            self.out.store(self.kernels, [row, col], values, self.stream);
        };
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

/// `values = weight * values + bias`.
fn scale_and_add(values: &mut [f32], weight: f32, bias: Option<&[f32]>) {
    if weight != 1.0 {
        values.iter_mut().for_each(|value| *value *= weight);
    }
    for (value, bias) in values.iter_mut().zip(bias.unwrap_or_default()) {
        *value += bias;
    }
}
