use super::{Numbers, all, bits};
use fused_moe_core::dtype::Float;
use half::{bf16, f16};

/// Lengths around every number of lanes.
const LENGTHS: [usize; 12] = [0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 100];

fn same_number(got: f32, expected: f32) -> bool {
    got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan()
}

fn widens<X: Float>(number: fn(u16) -> X) {
    let from: Vec<X> = (0..=u16::MAX).map(number).collect();
    for kernels in all() {
        let mut to = vec![0.0; from.len()];
        kernels.to_f32(&from, &mut to);
        for (got, x) in to.iter().zip(&from) {
            assert!(same_number(*got, x.to_f32()), "{kernels:?}: {x:?} became {got}");
        }
    }
}

#[test]
fn all_16_bit_numbers_widen() {
    widens(f16::from_bits);
    widens(bf16::from_bits);
}

fn narrows<Y: Float>() {
    // Every exponent, with mantissas around the ties of both formats, and a walk over everything.
    let edges =
        [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_7fff, 0x1_8000, 0x7f_ffff];
    let edges = (0..512).flat_map(|exponent| edges.map(|mantissa| f32::from_bits(exponent << 23 | mantissa)));
    let walk = (0..u32::MAX / 10_007).map(|i| f32::from_bits(i * 10_007));
    let from: Vec<f32> = edges.chain(walk).chain([65_519.99, 65_520.0, 3.39e38]).collect();
    for kernels in all() {
        let mut to = vec![Y::from_f32(0.0); from.len()];
        kernels.from_f32(&from, &mut to);
        for (got, x) in to.iter().zip(&from) {
            assert!(same_number(got.to_f32(), Y::from_f32(*x).to_f32()), "{kernels:?}: {x:e} became {got:?}");
        }
    }
}

#[test]
fn f32_narrows_to_nearest_even() {
    narrows::<f16>();
    narrows::<bf16>();
    narrows::<f32>();
}

fn stays_inside<Y: Float>() {
    for kernels in all() {
        for length in LENGTHS {
            let from: Vec<f32> = Numbers(1).vec(length);
            let sentinel = Y::from_f32(7.0);
            let mut to = vec![sentinel; length + 2];
            kernels.from_f32(&from, &mut to[1..=length]);
            assert_eq!((to[0], to[length + 1]), (sentinel, sentinel));
            let mut back = vec![7.0; length + 2];
            kernels.to_f32(&to[1..=length], &mut back[1..=length]);
            assert_eq!((back[0], back[length + 1]), (7.0, 7.0));
            for (x, y) in from.iter().zip(&back[1..]) {
                assert_eq!(Y::from_f32(*x).to_f32(), *y);
            }
        }
    }
}

#[test]
fn conversions_stay_inside() {
    stays_inside::<f32>();
    stays_inside::<f16>();
    stays_inside::<bf16>();
}

#[test]
fn axpy_and_scale_do_not_depend_on_position() {
    for kernels in all() {
        let x: Vec<bf16> = Numbers(2).vec(100);
        let start: Vec<f32> = Numbers(3).vec(100);
        let weight: Vec<f32> = Numbers(4).vec(100);
        let mut whole = start.clone();
        kernels.axpy(0.37, &x, &mut whole);
        let (mut scaled, mut plain) = (vec![0.0; 100], vec![0.0; 100]);
        kernels.scale(&x, 0.37, Some(&weight), &mut scaled);
        kernels.scale(&x, 0.37, None, &mut plain);
        for i in 0..100 {
            let exact = f64::from(x[i].to_f32()) * f64::from(0.37f32);
            assert!((f64::from(whole[i]) - f64::from(start[i]) - exact).abs() < 2e-7);
            assert_eq!(plain[i], x[i].to_f32() * 0.37);
            assert_eq!(scaled[i], plain[i] * weight[i]);
        }
        for length in LENGTHS {
            for at in [0, 100 - length] {
                let range = at..at + length;
                let mut acc = start[range.clone()].to_vec();
                kernels.axpy(0.37, &x[range.clone()], &mut acc);
                assert_eq!(bits(&acc), bits(&whole[range.clone()]));
                let mut out = vec![0.0; length];
                kernels.scale(&x[range.clone()], 0.37, Some(&weight[range.clone()]), &mut out);
                assert_eq!(bits(&out), bits(&scaled[range]));
            }
        }
    }
}

#[test]
fn sums_of_squares() {
    for kernels in all() {
        for length in LENGTHS {
            let x: Vec<f16> = Numbers(5).vec(length);
            let expected: f64 = x.iter().map(|x| x.to_f64() * x.to_f64()).sum();
            let got = f64::from(kernels.sum_squares(&x));
            assert!((got - expected).abs() <= expected * 1e-6, "{kernels:?} length {length}: {got} not {expected}");
        }
    }
}

#[test]
fn sums_of_exponentials() {
    for kernels in all() {
        for length in LENGTHS {
            let from: Vec<f32> = Numbers(6).vec::<f32>(length).iter().map(|x| x * 50.0).collect();
            let max = from.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut x = from.clone();
            let sum = f64::from(kernels.exp_sum(&mut x, max));
            let exact: Vec<f64> = from.iter().map(|x| f64::from(x - max).exp()).collect();
            for (got, expected) in x.iter().zip(&exact) {
                assert!((f64::from(*got) - expected).abs() <= expected * 2e-7 + 1e-45);
            }
            let expected: f64 = exact.iter().sum();
            assert!((sum - expected).abs() <= expected * 1e-6);
        }
    }
}

#[test]
fn exponentials_over_the_whole_range() {
    for kernels in all() {
        let from: Vec<f32> = (-110_000..=90_000).map(|i| i as f32 / 1000.0).collect();
        let mut x = from.clone();
        kernels.exp_sum(&mut x, 0.0);
        let mut worst = 0.0f64;
        for (got, from) in x.iter().zip(&from) {
            let expected = f64::from(*from).exp();
            if expected > f64::from(f32::MAX) {
                assert_eq!(*got, f32::INFINITY);
            } else if expected < f64::from(f32::MIN_POSITIVE) {
                assert!((f64::from(*got) - expected).abs() < 1.5e-45, "{kernels:?}: exp({from}) became {got:e}");
            } else {
                worst = worst.max((f64::from(*got) - expected).abs() / expected);
            }
        }
        assert!(worst < 1.2e-7, "{kernels:?}: relative error {worst:e}");
        let mut special = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -0.0, f32::MIN, f32::MAX];
        kernels.exp_sum(&mut special, 0.0);
        assert_eq!((special[0], special[1], special[3], special[4]), (0.0, f32::INFINITY, 1.0, 1.0));
        assert!(special[2].is_nan());
        assert_eq!((special[5], special[6]), (0.0, f32::INFINITY));
    }
}
