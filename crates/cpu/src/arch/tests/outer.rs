use super::{Numbers, all};
use crate::arch::OUTER_COLUMNS;

fn matrix(numbers: &mut Numbers, rows: usize) -> Vec<[f32; OUTER_COLUMNS]> {
    (0..rows).map(|_| std::array::from_fn(|_| numbers.next())).collect()
}

#[test]
fn sums_are_close_to_f64_for_any_sizes_and_both_orders() {
    for kernels in all() {
        let mut numbers = Numbers(3);
        for (rows, depth) in [(1, 1), (2, 3), (6, 128), (7, 5), (13, 31), (96, 17), (0, 4), (4, 0)] {
            for columns in [1, 15, 16, 17, 33, OUTER_COLUMNS] {
                let (b, start) = (matrix(&mut numbers, depth), matrix(&mut numbers, rows));
                let a: Vec<f32> = numbers.vec(rows * depth);
                for steps in [[depth, 1], [1, rows]] {
                    let mut c = start.clone();
                    kernels.outer((&a, steps), &b, &mut c, columns, &[&[0; 100], &[]]);
                    for m in 0..rows {
                        for n in 0..columns {
                            let product = |k: usize| f64::from(a[m * steps[0] + k * steps[1]]) * f64::from(b[k][n]);
                            let expected = f64::from(start[m][n]) + (0..depth).map(product).sum::<f64>();
                            let off = (f64::from(c[m][n]) - expected).abs();
                            assert!(off < 2e-6 * (1.0 + depth as f64).sqrt(), "{:?} {m} {n}", kernels.isa());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_tiles_or_on_how_k_is_cut() {
    for kernels in all() {
        let mut numbers = Numbers(5);
        let (rows, depth) = (13, 37);
        let (a, b): (Vec<f32>, _) = (numbers.vec(rows * depth), matrix(&mut numbers, depth));
        let mut whole = matrix(&mut numbers, rows);
        let start = whole.clone();
        kernels.outer((&a, [depth, 1]), &b, &mut whole, OUTER_COLUMNS, &[]);
        for m in 0..rows {
            let mut row = [start[m]];
            for k in 0..depth {
                kernels.outer((&a[m * depth + k..], [depth, 1]), &b[k..k + 1], &mut row, OUTER_COLUMNS, &[]);
            }
            assert_eq!(row[0].map(f32::to_bits), whole[m].map(f32::to_bits), "{:?}", kernels.isa());
        }
    }
}

#[test]
fn too_short_operands_change_nothing() {
    for kernels in all() {
        let (b, mut c) = ([[1.0; OUTER_COLUMNS]; 4], [[2.0; OUTER_COLUMNS]; 3]);
        kernels.outer((&[1.0; 11], [4, 1]), &b, &mut c, OUTER_COLUMNS, &[]);
        kernels.outer((&[1.0; 12], [usize::MAX, 1]), &b, &mut c, OUTER_COLUMNS, &[]);
        assert_eq!(c, [[2.0; OUTER_COLUMNS]; 3]);
    }
}
