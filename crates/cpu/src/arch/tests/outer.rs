use super::{Numbers, all};
use crate::arch::{OUTER_COLUMNS, Outer, Place, SharedSlice};
use bytemuck::cast_slice;
use fused_moe_core::dtype::Float;
use half::bf16;

fn matrix(numbers: &mut Numbers, rows: usize) -> Vec<[f32; OUTER_COLUMNS]> {
    (0..rows).map(|_| std::array::from_fn(|_| numbers.next())).collect()
}

/// On from c, to c, all columns.
fn outer<'a>(
    (a, steps): (&'a [u32], [usize; 2]),
    b: &'a [[u32; OUTER_COLUMNS]],
    c: &'a mut [[f32; OUTER_COLUMNS]],
) -> Outer<'a, f32> {
    Outer { a, steps, b, c, fresh: false, to: None, columns: OUTER_COLUMNS, ahead: &[] }
}

fn words(matrix: &[[f32; OUTER_COLUMNS]]) -> Vec<[u32; OUTER_COLUMNS]> {
    matrix.iter().map(|row| row.map(f32::to_bits)).collect()
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
                    kernels.outer(Outer {
                        columns,
                        ahead: &[&[0; 100], &[]],
                        ..outer((cast_slice(&a), steps), &words(&b), &mut c)
                    });
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
        kernels.outer(outer((cast_slice(&a), [depth, 1]), &words(&b), &mut whole));
        for m in 0..rows {
            let mut row = [start[m]];
            for k in 0..depth {
                let a = cast_slice(&a[m * depth + k..]);
                kernels.outer(outer((a, [depth, 1]), &words(&b[k..k + 1]), &mut row));
            }
            assert_eq!(row[0].map(f32::to_bits), whole[m].map(f32::to_bits), "{:?}", kernels.isa());
        }
    }
}

#[test]
fn too_short_operands_change_nothing() {
    for kernels in all() {
        let (b, mut c) = ([[1; OUTER_COLUMNS]; 4], [[2.0; OUTER_COLUMNS]; 3]);
        kernels.outer(outer((&[1; 11], [4, 1]), &b, &mut c));
        kernels.outer(outer((&[1; 12], [usize::MAX, 1]), &b, &mut c));
        assert_eq!(c, [[2.0; OUTER_COLUMNS]; 3]);
    }
}

#[test]
fn sums_of_pairs_are_close_to_f64_and_do_not_depend_on_how_k_is_cut() {
    for kernels in all().into_iter().filter(|kernels| kernels.isa().has_bf16_products()) {
        let mut numbers = Numbers(11);
        let (rows, depth) = (15, 29);
        let mut pairs = |count: usize| -> Vec<[bf16; 2]> {
            (0..count).map(|_| [(); 2].map(|()| bf16::from_f32(numbers.next()))).collect()
        };
        let (a, b) = (pairs(rows * depth), pairs(depth * OUTER_COLUMNS));
        let b_words: Vec<[u32; OUTER_COLUMNS]> = cast_slice::<_, u32>(&b).as_chunks().0.to_vec();
        for steps in [[depth, 1], [1, rows]] {
            let (mut whole, mut cut) = ([[0.5; OUTER_COLUMNS]; 15], [[0.5; OUTER_COLUMNS]; 15]);
            kernels.pair_outer(outer((cast_slice(&a), steps), &b_words, &mut whole));
            for k in 0..depth {
                let a = cast_slice(&a[k * steps[1]..]);
                kernels.pair_outer(outer((a, steps), &b_words[k..k + 1], &mut cut));
            }
            for m in 0..rows {
                assert_eq!(whole[m].map(f32::to_bits), cut[m].map(f32::to_bits), "{m}");
                for n in 0..OUTER_COLUMNS {
                    let product = |k: usize| -> f64 {
                        let (a, b) = (a[m * steps[0] + k * steps[1]], b[k * OUTER_COLUMNS + n]);
                        a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
                    };
                    let expected = 0.5 + (0..depth).map(product).sum::<f64>();
                    assert!((f64::from(whole[m][n]) - expected).abs() < 2e-5, "{m} {n}");
                }
            }
        }
    }
}

#[test]
fn lines_are_interleaved() {
    for kernels in all() {
        for count in [0, 1, 15, 64, 77] {
            let line = |from: usize| (from..from + count).map(|n| bf16::from_bits(n as u16)).collect::<Vec<_>>();
            let mut to = vec![0u32; count];
            kernels.interleave(&line(1), &line(1000), &mut to);
            assert!(to.iter().zip(1u32..).all(|(&pair, n)| pair == n | ((n + 999) << 16)), "{:?}", kernels.isa());
        }
    }
}

/// Results that end in a place of a format, past the caches or not, are those of c in that format; nothing else is written.
fn ends<Y: Float>(start: usize, stride: usize) {
    for kernels in all() {
        let mut numbers = Numbers(17);
        let (rows, depth) = (15, 7);
        let (a, b): (Vec<f32>, _) = (numbers.vec(rows * depth), words(&matrix(&mut numbers, depth)));
        let mut c = vec![[0.0; OUTER_COLUMNS]; rows];
        kernels.outer(outer((cast_slice(&a), [depth, 1]), &b, &mut c));
        for stream in [false, true] {
            let mut unread = vec![[f32::NAN; OUTER_COLUMNS]; rows];
            // from a line of the cache on, as only whole ones are stored past it
            let length = start + rows * stride + 64;
            let mut memory = vec![Y::from_f32(-1.5); length + 64];
            let first = memory.as_ptr().align_offset(64);
            let memory = &mut memory[first..first + length];
            let cells = SharedSlice::new(memory);
            let Outer { a, steps, b, columns, ahead, .. } = outer((cast_slice(&a), [depth, 1]), &b, &mut []);
            let place = Place { cells, start, stride, stream };
            kernels.outer(Outer { a, steps, b, c: &mut unread, fresh: true, to: Some(place), columns, ahead });
            let none = Place { start: start + stride + 1, ..place };
            kernels.outer(Outer { a, steps, b, c: &mut unread, fresh: true, to: Some(none), columns, ahead });
            kernels.settle();
            for (i, found) in memory.iter().enumerate() {
                let (m, n) = (i.saturating_sub(start) / stride, i.saturating_sub(start) % stride);
                let inside = i >= start && m < rows && n < OUTER_COLUMNS;
                let expected = if inside { Y::from_f32(c[m][n]) } else { Y::from_f32(-1.5) };
                assert_eq!(found.to_f32().to_bits(), expected.to_f32().to_bits(), "{:?} {i}", kernels.isa());
            }
        }
    }
}

#[test]
fn sums_end_where_they_go() {
    for (start, stride) in [(0, 64), (64, 128), (5, 77)] {
        ends::<f32>(start, stride);
        ends::<bf16>(start, stride);
        ends::<half::f16>(start, stride);
    }
}
