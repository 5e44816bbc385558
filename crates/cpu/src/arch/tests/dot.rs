use super::super::Kernels;
use super::{Numbers, all, bits};
use fused_moe_core::dtype::Float;
use half::{bf16, f16};

fn rows<X: Float>(numbers: &mut Numbers, count: usize, length: usize) -> Vec<Vec<X>> {
    (0..count).map(|_| numbers.vec(length)).collect()
}

fn slices<X>(rows: &[Vec<X>]) -> Vec<&[X]> {
    rows.iter().map(Vec::as_slice).collect()
}

fn close<W: Float, X: Float>((kernels, pairs): (Kernels, bool), length: usize) {
    let mut numbers = Numbers(length as u64);
    let (weights, tokens) = (rows::<W>(&mut numbers, 5, length), rows::<X>(&mut numbers, 9, length));
    let mut out = vec![f32::NAN; 5 * 9];
    match pairs {
        true => kernels.pair_dot_tile(&slices(&weights), &slices(&tokens), &mut out),
        false => kernels.dot_tile(&slices(&weights), &slices(&tokens), &mut out),
    }
    for (m, w) in weights.iter().enumerate() {
        for (n, x) in tokens.iter().enumerate() {
            let products = w.iter().zip(x).map(|(w, x)| f64::from(w.to_f32()) * f64::from(x.to_f32()));
            let (expected, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            let got = f64::from(out[m * 9 + n]);
            let bound = size * (length as f64 / 4.0 + 8.0) * f64::from(f32::EPSILON);
            assert!((got - expected).abs() <= bound, "{kernels:?} length {length} [{m}, {n}]: {got} not {expected}");
        }
    }
}

#[test]
fn dot_is_close_to_f64() {
    for each in all().into_iter().flat_map(|kernels| [(kernels, false), (kernels, true)]) {
        for length in (0..=67).chain([127, 1000, 1009]) {
            close::<f32, f32>(each, length);
            close::<bf16, f32>(each, length);
            close::<f16, f32>(each, length);
            close::<f32, bf16>(each, length);
            close::<bf16, bf16>(each, length);
            close::<f16, f16>(each, length);
            close::<f32, f16>(each, length);
            close::<bf16, f16>(each, length);
            close::<f16, bf16>(each, length);
        }
    }
}

fn same_bits<W: Float, X: Float>(kernels: Kernels, pairs: bool, length: usize) {
    let dot = |weights: &[&[W]], tokens: &[&[X]], out: &mut [f32]| match pairs {
        true => kernels.pair_dot_tile(weights, tokens, out),
        false => kernels.dot_tile(weights, tokens, out),
    };
    let mut numbers = Numbers(7);
    let (weights, tokens) = (rows::<W>(&mut numbers, 9, length), rows::<X>(&mut numbers, 14, length));
    let (weights, tokens) = (slices(&weights), slices(&tokens));
    let mut alone = vec![vec![0; 14]; 9];
    for (m, w) in weights.iter().enumerate() {
        for (n, x) in tokens.iter().enumerate() {
            let mut out = [0.0];
            dot(&[*w], &[*x], &mut out);
            alone[m][n] = out[0].to_bits();
        }
    }
    for m in 1..=9 {
        for n in 1..=14 {
            let mut out = vec![f32::NAN; m * n];
            dot(&weights[9 - m..], &tokens[14 - n..], &mut out);
            let expected: Vec<u32> = alone[9 - m..].iter().flat_map(|line| line[14 - n..].to_vec()).collect();
            assert_eq!(bits(&out), expected, "{kernels:?} length {length}, {m} rows, {n} tokens");
        }
    }
}

#[test]
fn dot_has_the_same_bits_in_every_tile() {
    for kernels in all() {
        for length in [1, 5, 16, 61, 160, 509, 2051] {
            same_bits::<f32, f32>(kernels, false, length);
            same_bits::<bf16, f32>(kernels, false, length);
            same_bits::<f16, bf16>(kernels, false, length);
            same_bits::<bf16, bf16>(kernels, true, length);
        }
    }
}

#[test]
fn dot_of_nothing() {
    for kernels in all() {
        let mut out = [7.0; 3];
        kernels.dot_tile::<f32, f32>(&[], &[&[1.0]], &mut out);
        kernels.dot_tile::<f32, f32>(&[&[1.0]], &[], &mut out);
        assert_eq!(out, [7.0; 3]);
        kernels.dot_tile::<f32, f32>(&[&[], &[]], &[&[]], &mut out);
        assert_eq!(out, [0.0, 0.0, 7.0]);
    }
}

#[test]
fn dot_cuts_to_the_shortest() {
    for kernels in all() {
        let mut out = [7.0; 3];
        let long = [1.0f32; 40];
        kernels.dot_tile(&[&long[..33], &long], &[&long[..19]], &mut out);
        assert_eq!(out, [19.0, 19.0, 7.0]);
        let ones: &[f32] = &[1.0; 3];
        kernels.dot_tile(&[ones; 6], &[ones; 2], &mut out);
        assert_eq!(out, [3.0; 3]);
    }
}

#[test]
fn dot_keeps_what_is_not_finite() {
    for kernels in all() {
        for at in 0..37 {
            let mut row = [1.0f32; 37];
            row[at] = f32::NAN;
            let mut out = [0.0];
            kernels.dot_tile(&[&row], &[&[1.0f32; 37]], &mut out);
            assert!(out[0].is_nan());
            row[at] = f32::INFINITY;
            kernels.dot_tile(&[&row], &[&[1.0f32; 37]], &mut out);
            assert_eq!(out[0], f32::INFINITY);
        }
    }
}
