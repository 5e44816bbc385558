use super::super::{Isa, Kernels, PAIR_STEPS, PANEL, PanelGroup, PanelSums, group};
use super::{Numbers, all, bits};
use bytemuck::cast_slice_mut;
use fused_moe_core::dtype::Float;
use half::{bf16, f16};
use std::ops::Range;

const COLUMNS: [usize; 2] = [16, 128];
const WIDTH: usize = 16;
/// From a row of x to the next: more than is used.
const STRIDE: usize = 256 + 16;
const BLANK: PanelSums = [0.5; _];

/// Rows of pairs as kernels read them: `steps` of each, row after row or in tiles.
fn pairs(kernels: Kernels, x: &[[u32; STRIDE]], steps: usize) -> Vec<u32> {
    if !kernels.isa().has_tiles() {
        return x.as_flattened().to_vec();
    }
    let pair = |first: usize, n: usize, k: usize| if first + k < steps { x[n][first + k] } else { 0 };
    let tile = |first: usize| (0..x.len()).flat_map(move |n| (0..PAIR_STEPS).map(move |k| pair(first, n, k)));
    (0..steps).step_by(PAIR_STEPS).flat_map(tile).collect()
}

/// Panels of rows of W, and rows of x.
struct Operands<W> {
    panels: Vec<Vec<W>>,
    x: Vec<[u32; STRIDE]>,
    pairs: bool,
}

impl<W: Float> Operands<W> {
    fn new([panels, steps, rows]: [usize; 3], pairs: bool) -> Self {
        let mut numbers = Numbers((steps * 64 + rows) as u64);
        let panels = (0..panels).map(|_| numbers.vec(steps * PANEL * group(W::DTYPE))).collect();
        let mut x = vec![[0; STRIDE]; rows];
        for row in &mut x {
            let width = group(W::DTYPE) * steps;
            match pairs {
                true => cast_slice_mut::<u32, bf16>(row)[..width].copy_from_slice(&numbers.vec(width)),
                false => cast_slice_mut::<u32, f32>(row)[..width].copy_from_slice(&numbers.vec(width)),
            }
        }
        Self { panels, x, pairs }
    }

    /// Element k of row n.
    fn x(&self, n: usize, k: usize) -> f64 {
        match self.pairs {
            true => f64::from(bytemuck::cast_slice::<u32, bf16>(&self.x[n])[k].to_f32()),
            false => f64::from(f32::from_bits(self.x[n][k])),
        }
    }

    fn steps(&self) -> usize {
        self.panels[0].len() / (PANEL * group(W::DTYPE))
    }

    /// Some lines of each panel.
    fn parts(&self, steps: Range<usize>) -> Vec<&[W]> {
        let line = PANEL * group(W::DTYPE);
        self.panels.iter().map(|panel| &panel[steps.start * line..steps.end * line]).collect()
    }

    /// Sums of rows `first..`, in one call.
    fn sums(&self, kernels: Kernels, first: usize) -> Vec<PanelSums> {
        let mut sums = vec![BLANK; self.x.len() - first];
        self.add(kernels, &self.parts(0..self.steps()), COLUMNS, &self.x[first..], &mut sums);
        sums
    }

    /// Adds to sums, with and without requests of memory, which change no bit.
    fn add(
        &self,
        kernels: Kernels,
        weights: &[&[W]],
        columns: [usize; 2],
        x: &[[u32; STRIDE]],
        sums: &mut [PanelSums],
    ) {
        let (next, stride, width, mut after) = (weights, STRIDE, WIDTH, Vec::new());
        for unaided in [0, 4] {
            let mut now = sums.to_vec();
            match self.pairs {
                true => {
                    let weights: Vec<&[bf16]> = weights.iter().map(|weights| bytemuck::cast_slice(weights)).collect();
                    let (x, next, sums) = (pairs(kernels, x, weights[0].len() / (2 * PANEL)), &weights, &mut now);
                    let (weights, x) = (&weights, &x);
                    kernels.pair_panels(PanelGroup { weights, next, x, stride, sums, columns, width, unaided });
                }
                false => {
                    let (x, sums) = (x.as_flattened(), &mut now);
                    kernels.panels(PanelGroup { weights, next, x, stride, sums, columns, width, unaided });
                }
            }
            assert!(unaided == 0 || bits(now.as_flattened()) == bits(after.as_flattened()), "{kernels:?}");
            after = now;
        }
        sums.copy_from_slice(&after);
    }

    fn check(&self, kernels: Kernels) {
        let steps = self.steps();
        for (n, sums) in self.sums(kernels, 0).iter().enumerate() {
            let mut expected = [[0.5f64; 2]; size_of::<PanelSums>() / size_of::<f32>()];
            let mut untouched = [true; size_of::<PanelSums>() / size_of::<f32>()];
            for (p, panel) in self.panels.iter().enumerate() {
                for i in 0..PANEL {
                    let terms = (0..steps * group(W::DTYPE)).map(|k| {
                        let (step, part) = (k / group(W::DTYPE), k % group(W::DTYPE));
                        f64::from(panel[(step * PANEL + i) * group(W::DTYPE) + part].to_f32()) * self.x(n, k)
                    });
                    let column = COLUMNS[i / 16] + p * WIDTH + i % 16;
                    expected[column] = terms.fold([0.5, 0.5], |[sum, size], term| [sum + term, size + term.abs()]);
                    untouched[column] = false;
                }
            }
            for (i, (got, [value, size])) in sums.iter().zip(expected).enumerate() {
                let bound = size * (steps as f64 / 2.0 + 8.0) * f64::from(f32::EPSILON);
                let error = (f64::from(*got) - value).abs();
                assert!(
                    error <= if untouched[i] { 0.0 } else { bound },
                    "{kernels:?} {steps} [{n}, {i}]: {got} not {value}"
                );
            }
        }
    }

    /// Neither the tile that a row is in, nor the panels beside its own, nor the calls that its columns are cut into (those of
    /// tiles where it is allowed) change a bit.
    fn check_bits(&self, kernels: Kernels) {
        let whole = self.sums(kernels, 0);
        for first in 0..self.x.len() {
            for (a, b) in self.sums(kernels, first).iter().zip(&whole[first..]) {
                assert_eq!(bits(a), bits(b), "{kernels:?} from row {first}");
            }
        }
        let mut sums = vec![BLANK; self.x.len()];
        for (p, panel) in self.parts(0..self.steps()).iter().enumerate() {
            self.add(kernels, &[panel], COLUMNS.map(|column| column + p * WIDTH), &self.x, &mut sums);
        }
        assert!(sums == whole, "{kernels:?}, one panel after another");
        let unit = if self.pairs && kernels.isa() == Isa::Amx { PAIR_STEPS } else { 1 };
        let (cut, words) = (self.steps() / 3 / unit * unit, if self.pairs { 1 } else { group(W::DTYPE) });
        let mut sums = vec![BLANK; self.x.len()];
        self.add(kernels, &self.parts(0..cut), COLUMNS, &self.x, &mut sums);
        let mut shifted = self.x.clone();
        shifted.iter_mut().for_each(|row| row.copy_within(cut * words.., 0));
        self.add(kernels, &self.parts(cut..self.steps()), COLUMNS, &shifted, &mut sums);
        assert!(sums == whole, "{kernels:?}, columns cut");
    }
}

fn each(kernels: Kernels, sizes: [usize; 3]) {
    let check = |pairs: bool| {
        let operands = Operands::<bf16>::new(sizes, pairs);
        operands.check(kernels);
        operands.check_bits(kernels);
    };
    check(false);
    if kernels.isa().has_bf16_products() {
        check(true);
    }
    let (f16s, f32s) = (Operands::<f16>::new(sizes, false), Operands::<f32>::new(sizes, false));
    f16s.check(kernels);
    f16s.check_bits(kernels);
    f32s.check(kernels);
    f32s.check_bits(kernels);
}

#[test]
fn panels_are_close_to_f64_with_the_same_bits_in_every_tile() {
    for kernels in all() {
        for rows in 1..=14 {
            each(kernels, [1 + rows % 7, 19, rows]);
        }
        for panels in 1..=7 {
            for rows in [1, 2, 4] {
                each(kernels, [panels, 37, rows]);
            }
        }
        for steps in [0, 1, 2, 7, 8, 9, 64, 128] {
            each(kernels, [3, steps, 5]);
        }
        let long = Operands::<f32>::new([2, 256, 25], false);
        long.check(kernels);
    }
}

#[test]
fn pairs_of_any_number_are_close_to_f64_with_the_same_bits_in_every_tile() {
    for kernels in all().into_iter().filter(|kernels| kernels.isa().has_bf16_products()) {
        // one to four of AMX's tiles
        for rows in (15..=49).chain(64..=97) {
            let operands = Operands::<bf16>::new([1 + rows % 3, 2 * rows - 13, rows], true);
            operands.check(kernels);
            operands.check_bits(kernels);
        }
        for steps in 1..=100 {
            let operands = Operands::<bf16>::new([2, steps, [1, 16, 17, 32, 33][steps % 5]], true);
            operands.check(kernels);
            operands.check_bits(kernels);
        }
    }
}

#[test]
fn panels_keep_what_is_not_finite() {
    for kernels in all() {
        for pairs in [false, true] {
            if pairs && !kernels.isa().has_bf16_products() {
                continue;
            }
            let mut operands = Operands::<bf16>::new([1, 9, 2], pairs);
            operands.panels[0].fill(bf16::ONE);
            operands.panels[0][4 * 2 * PANEL + 6] = bf16::NAN;
            operands.panels[0][5 * 2 * PANEL + 41] = bf16::INFINITY;
            operands.x.iter_mut().for_each(|row| row.fill(if pairs { 0x3f80_3f80 } else { 1f32.to_bits() }));
            for sums in operands.sums(kernels, 0) {
                let of = |i: usize| sums[COLUMNS[i / 16] + i % 16];
                assert!(of(3).is_nan() && of(20) == f32::INFINITY && of(4) == 18.5, "{kernels:?}");
            }
        }
    }
}

#[test]
fn panels_of_the_wrong_length_stay_within_bounds() {
    let kernels = Kernels::best();
    let mut sums = [BLANK; 2];
    let weights = [1f32; 3 * PANEL + 5];
    let x = [1f32.to_bits(); 2 * STRIDE];
    let mut call = |weights: &[&[f32]], x: &[u32], columns| {
        let (sums, stride, width, unaided) = (&mut sums, STRIDE, WIDTH, 4);
        kernels.panels(PanelGroup { weights, next: &[], x, stride, sums, columns, width, unaided });
        assert_eq!(*sums, [BLANK; 2]);
    };
    for columns in [[0, 241], [usize::MAX, 0]] {
        call(&[&weights], &x, columns);
    }
    call(&[&weights, &weights, &weights], &x, [0, 224]);
    call(&[&weights[..5]], &x, COLUMNS);
    call(&[&weights, &weights[..5]], &x, COLUMNS);
    call(&[&weights], &x[..STRIDE], COLUMNS);
    call(&[], &x, COLUMNS);
    call(&[&vec![1f32; 2 * STRIDE * PANEL]], &[0; 2 * STRIDE], COLUMNS);
    let weights = [bf16::ONE; 32 * PANEL + 5];
    for kernels in all() {
        let mut call = |weights: &[&[bf16]], x: &[u32], columns| {
            let (sums, stride, width, unaided) = (&mut sums, STRIDE, WIDTH, 4);
            kernels.pair_panels(PanelGroup { weights, next: &[], x, stride, sums, columns, width, unaided });
            assert_eq!(*sums, [BLANK; 2], "{kernels:?}");
        };
        if !kernels.isa().has_bf16_products() {
            call(&[&weights], &x, COLUMNS);
        }
        for columns in [[0, 241], [usize::MAX, 0]] {
            call(&[&weights], &x, columns);
        }
        call(&[&weights, &weights, &weights], &x, [0, 224]);
        call(&[&weights, &weights[..63]], &x, COLUMNS);
        call(&[&weights], &x[..15], COLUMNS);
        call(&[], &x, COLUMNS);
    }
}
