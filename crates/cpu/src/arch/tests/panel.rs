use super::super::{Isa, Kernels, PANEL, PANEL_WORDS, Panel, PanelRow, PanelSums, group};
use super::{Numbers, all, bits};
use bytemuck::cast_slice_mut;
use fused_moe_core::dtype::Float;
use half::{bf16, f16};

const COLUMNS: [usize; 2] = [16, 128];
const BLANK: (PanelRow, PanelSums) = ([0; _], [0.5; _]);

/// Rows of W in panel order, and rows of x.
struct Operands<W> {
    weights: Vec<W>,
    x: Vec<PanelRow>,
    pairs: bool,
}

impl<W: Float> Operands<W> {
    fn new(steps: usize, rows: usize, pairs: bool) -> Self {
        let mut numbers = Numbers((steps * 64 + rows) as u64);
        let weights = numbers.vec(steps * PANEL * group(W::DTYPE));
        let mut x = vec![BLANK.0; rows];
        for row in &mut x {
            let width = group(W::DTYPE) * steps;
            match pairs {
                true => cast_slice_mut::<u32, bf16>(row)[..width].copy_from_slice(&numbers.vec(width)),
                false => cast_slice_mut::<u32, f32>(row)[..width].copy_from_slice(&numbers.vec(width)),
            }
        }
        Self { weights, x, pairs }
    }

    /// Element k of row n.
    fn x(&self, n: usize, k: usize) -> f64 {
        match self.pairs {
            true => f64::from(bytemuck::cast_slice::<u32, bf16>(&self.x[n])[k].to_f32()),
            false => f64::from(f32::from_bits(self.x[n][k])),
        }
    }

    /// Sums of rows `first..`, in one call.
    fn sums(&self, kernels: Kernels, first: usize) -> Vec<PanelSums> {
        let mut sums = vec![BLANK.1; self.x.len() - first];
        self.add(kernels, &self.weights, &self.x[first..], &mut sums);
        sums
    }

    fn add(&self, kernels: Kernels, weights: &[W], x: &[PanelRow], sums: &mut [PanelSums]) {
        match self.pairs {
            true => {
                let weights = bytemuck::cast_slice(weights);
                kernels.pair_panel(Panel { weights, next: weights, x, sums, columns: COLUMNS });
            }
            false => kernels.panel(Panel { weights, next: weights, x, sums, columns: COLUMNS }),
        }
    }

    fn check(&self, kernels: Kernels) {
        let steps = self.weights.len() / (PANEL * group(W::DTYPE));
        for (n, sums) in self.sums(kernels, 0).iter().enumerate() {
            let mut expected = [[0.5f64; 2]; size_of::<PanelSums>() / size_of::<f32>()];
            for i in 0..PANEL {
                let terms = (0..steps * group(W::DTYPE)).map(|k| {
                    let (step, part) = (k / group(W::DTYPE), k % group(W::DTYPE));
                    let w = self.weights[(step * PANEL + i) * group(W::DTYPE) + part];
                    f64::from(w.to_f32()) * self.x(n, k)
                });
                let sums = terms.fold([0.5, 0.5], |[sum, size], term| [sum + term, size + term.abs()]);
                expected[COLUMNS[i / 16] + i % 16] = sums;
            }
            for (i, (got, [value, size])) in sums.iter().zip(expected).enumerate() {
                let bound = size * (steps as f64 / 2.0 + 8.0) * f64::from(f32::EPSILON);
                let error = (f64::from(*got) - value).abs();
                let untouched = !COLUMNS.iter().any(|column| (*column..column + 16).contains(&i));
                assert!(
                    error <= if untouched { 0.0 } else { bound },
                    "{kernels:?} {steps} [{n}, {i}]: {got} not {value}"
                );
            }
        }
    }

    /// Neither the tile that a row is in nor the calls that its columns are cut into change a bit.
    fn check_bits(&self, kernels: Kernels) {
        let whole = self.sums(kernels, 0);
        for first in 0..self.x.len() {
            for (a, b) in self.sums(kernels, first).iter().zip(&whole[first..]) {
                assert_eq!(bits(a), bits(b), "{kernels:?} from row {first}");
            }
        }
        let (line, words) = (PANEL * group(W::DTYPE), if self.pairs { 1 } else { group(W::DTYPE) });
        let cut = self.weights.len() / line / 3;
        let (left, right) = self.weights.split_at(cut * line);
        let mut sums = vec![BLANK.1; self.x.len()];
        self.add(kernels, left, &self.x, &mut sums);
        let mut shifted = self.x.clone();
        shifted.iter_mut().for_each(|row| row.copy_within(cut * words.., 0));
        self.add(kernels, right, &shifted, &mut sums);
        assert!(sums == whole, "{kernels:?}, columns cut");
    }
}

fn each(kernels: Kernels, steps: usize, rows: usize) {
    let check = |pairs: bool| {
        let operands = Operands::<bf16>::new(steps, rows, pairs);
        operands.check(kernels);
        operands.check_bits(kernels);
    };
    check(false);
    if kernels.isa().has_bf16_products() {
        check(true);
    }
    let (f16s, f32s) = (Operands::<f16>::new(steps, rows, false), Operands::<f32>::new(steps, rows, false));
    f16s.check(kernels);
    f16s.check_bits(kernels);
    f32s.check(kernels);
    f32s.check_bits(kernels);
}

#[test]
fn panels_are_close_to_f64_with_the_same_bits_in_every_tile() {
    for kernels in all() {
        for rows in 1..=14 {
            each(kernels, 19, rows);
        }
        for steps in [0, 1, 2, 7, 8, 9, 64, PANEL_WORDS / 2] {
            each(kernels, steps, 5);
        }
        let long = Operands::<f32>::new(PANEL_WORDS, 25, false);
        long.check(kernels);
    }
}

#[test]
fn panels_keep_what_is_not_finite() {
    for kernels in all() {
        for pairs in [false, true] {
            if pairs && !kernels.isa().has_bf16_products() {
                continue;
            }
            let mut operands = Operands::<bf16>::new(9, 2, pairs);
            operands.weights.fill(bf16::ONE);
            operands.weights[4 * 2 * PANEL + 6] = bf16::NAN;
            operands.weights[5 * 2 * PANEL + 41] = bf16::INFINITY;
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
    let mut sums = [BLANK.1; 2];
    let weights = [1f32; 3 * PANEL + 5];
    for columns in [[0, 241], [usize::MAX, 0]] {
        kernels.panel(Panel { weights: &weights, next: &[], x: &[BLANK.0], sums: &mut sums, columns });
        assert_eq!(sums, [BLANK.1; 2]);
    }
    kernels.panel(Panel { weights: &weights[..5], next: &[], x: &[BLANK.0; 3], sums: &mut sums, columns: COLUMNS });
    assert_eq!(sums, [BLANK.1; 2]);
    let long = vec![1f32; 2 * PANEL_WORDS * PANEL];
    kernels.panel(Panel { weights: &long, next: &[], x: &[[0; _]; 3], sums: &mut sums, columns: COLUMNS });
    assert_eq!(sums, [BLANK.1; 2]);
    let scalar = Kernels::new(Isa::Scalar).unwrap();
    scalar.pair_panel(Panel { weights: &[bf16::ONE; 64], next: &[], x: &[BLANK.0], sums: &mut sums, columns: COLUMNS });
    assert_eq!(sums, [BLANK.1; 2]);
}
