//! A block of sums, and what is multiplied for them.

use super::Target;
use crate::Cpu;
use crate::arch::{Kernels, OUTER_COLUMNS, Outer};
use crate::plan::backward::{
    CALL_DEPTH, MATRICES_DEPTH, MATRICES_STRIDE, OUTER_PANELS, OUTER_ROWS, ROWS_DEPTH, ROWS_STRIDE,
};
use std::ops::Range;

/// Some columns of some rows.
type Panel<T, const ROWS: usize> = [[T; OUTER_COLUMNS]; ROWS];

const _: () = assert!(ROWS_DEPTH <= MATRICES_DEPTH && ROWS_STRIDE * OUTER_ROWS <= MATRICES_STRIDE * MATRICES_DEPTH);

/// Operands and sums, the columns in panels. A word is a number in f32 or, where all operands are bf16, a pair of them.
pub(super) struct Block {
    pub(super) a: [u32; MATRICES_STRIDE * MATRICES_DEPTH],
    b: [Panel<u32, MATRICES_DEPTH>; OUTER_PANELS],
    c: [Panel<f32, OUTER_ROWS>; OUTER_PANELS],
}

/// A part of a product.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) kernels: Kernels,
    /// Whether words are pairs.
    pub(super) pairs: bool,
    /// Distances of a's rows and of its products.
    pub(super) steps: [usize; 2],
    /// Rows, products, columns.
    pub(super) sizes: [usize; 3],
    /// Whether the sums begin here.
    pub(super) first: bool,
    /// Where they go, if they end here, and the row and the column that they go to.
    pub(super) to: Option<(&'a Target<'a>, [usize; 2])>,
    /// What is read from memory next.
    pub(super) ahead: &'a [&'a [u8]],
}

impl Block {
    const ZERO: Self = Self {
        a: [0; MATRICES_STRIDE * MATRICES_DEPTH],
        b: [[[0; OUTER_COLUMNS]; MATRICES_DEPTH]; OUTER_PANELS],
        c: [[[0.0; OUTER_COLUMNS]; OUTER_ROWS]; OUTER_PANELS],
    };

    /// Row k of b, from what loads columns of it from one on.
    pub(super) fn load_b(&mut self, k: usize, columns: &Range<usize>, load: impl Fn(usize, &mut [u32])) {
        for (panel, first) in self.b.iter_mut().zip(columns.clone().step_by(OUTER_COLUMNS)) {
            load(first, &mut panel[k][..OUTER_COLUMNS.min(columns.end - first)]);
        }
    }

    /// `c += a * b`; finished sums go straight to where they are assigned in whole panels, else through c.
    pub(super) fn multiply(&mut self, pass: Pass<'_>) {
        let Pass { kernels, pairs, steps, sizes: [rows, depth, width], first: fresh, to, ahead } = pass;
        let calls = width.div_ceil(OUTER_COLUMNS) * depth.div_ceil(CALL_DEPTH);
        let mut ahead = ahead.chunks(ahead.len().div_ceil(calls).max(1));
        for ((b, c), first) in self.b.iter().zip(&mut self.c).zip((0..width).step_by(OUTER_COLUMNS)) {
            for k in (0..depth).step_by(CALL_DEPTH) {
                let end = depth.min(k + CALL_DEPTH);
                let (a, b, c) = (self.a.get(k * steps[1]..).unwrap_or_default(), &b[k..end], &mut c[..rows]);
                let (columns, ahead) = (width - first, ahead.next().unwrap_or_default());
                let outer = Outer { a, steps, b, c, fresh: fresh && k == 0, to: None, columns, ahead };
                match to {
                    Some((target, [row, col])) if end == depth && target.is_direct(columns) => {
                        target.outer((kernels, pairs), [row, col + first], outer);
                    }
                    _ if pairs => kernels.pair_outer(outer),
                    _ => kernels.outer(outer),
                }
            }
        }
        if let Some((target, at)) = to {
            self.flush(kernels, target, at, [rows, width]);
        }
    }

    /// Zeros, where there is nothing to multiply.
    pub(super) fn zeros(&mut self, kernels: Kernels, to: &Target<'_>, at: [usize; 2], [rows, width]: [usize; 2]) {
        for c in &mut self.c {
            c[..rows].fill([0.0; OUTER_COLUMNS]);
        }
        for (panel, first) in self.c.iter_mut().zip((0..width).step_by(OUTER_COLUMNS)) {
            put(kernels, to, [at[0], at[1] + first], (&mut panel[..rows], width - first));
        }
    }

    /// What is not where it goes yet.
    fn flush(&mut self, kernels: Kernels, to: &Target<'_>, [row, col]: [usize; 2], [rows, width]: [usize; 2]) {
        for (panel, first) in self.c.iter_mut().zip((0..width).step_by(OUTER_COLUMNS)) {
            if !to.is_direct(width - first) {
                put(kernels, to, [row, col + first], (&mut panel[..rows], width - first));
            }
        }
    }
}

/// Stores rows of sums from `[row, column]` on.
fn put(kernels: Kernels, to: &Target<'_>, [row, col]: [usize; 2], (rows, width): (&mut [[f32; OUTER_COLUMNS]], usize)) {
    for (m, sums) in rows.iter_mut().enumerate() {
        to.put(kernels, [row + m, col], &mut sums[..width.min(OUTER_COLUMNS)]);
    }
}

/// `work(block, i)` for every i below `count`, `grain` successive ones with one block.
pub(super) fn each_block(cpu: &Cpu, count: usize, grain: usize, work: impl Fn(&mut Block, usize) + Sync) {
    let grain = grain.max(1);
    cpu.pool.for_each(count.div_ceil(grain), 1, |part| {
        let mut block = Block::ZERO;
        (part * grain..count.min((part + 1) * grain)).for_each(|i| work(&mut block, i));
        cpu.kernels.settle();
    });
}
