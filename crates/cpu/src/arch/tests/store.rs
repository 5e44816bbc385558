use super::super::SharedSlice;
use super::{Numbers, all};
use fused_moe_core::dtype::Float;
use half::{bf16, f16};

/// Any length at any place is written, as the nearest numbers, and nothing beside it, past the caches or not.
fn check<Y: Float>() {
    let values = Numbers(3).vec::<f32>(70);
    for kernels in all() {
        for stream in [false, true] {
            for start in [0, 1, 8, 16, 32, 33] {
                for count in [0, 1, 15, 16, 17, 32, 64, 70] {
                    // from a line of the cache on, so that whole vectors are aligned at some of the starts
                    let mut memory = [Y::from_f32(0.5); 33 + 70 + 1 + 64];
                    let first = memory.as_ptr().align_offset(64);
                    let to = &mut memory[first..first + 33 + 70 + 1];
                    kernels.store(&values[..count], (SharedSlice::new(to), start), stream);
                    kernels.settle();
                    for (i, to) in to.iter().enumerate() {
                        let value = i.checked_sub(start).and_then(|i| values[..count].get(i));
                        let expected = Y::from_f32(value.copied().unwrap_or(0.5));
                        assert_eq!(to.to_f32(), expected.to_f32(), "{kernels:?} {start} {count} [{i}]");
                    }
                }
            }
        }
    }
}

#[test]
fn stores_write_what_they_are_given() {
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn what_does_not_fit_is_left_out() {
    for kernels in all() {
        for stream in [false, true] {
            for start in [0, 3] {
                let mut memory = [0f32; 20 + 64];
                let first = memory.as_ptr().align_offset(64);
                let to = &mut memory[first..first + 20];
                kernels.store(&[1.0; 32], (SharedSlice::new(to), start), stream);
                kernels.store(&[2.0; 32], (SharedSlice::new(to), 20), stream);
                kernels.store(&[2.0; 32], (SharedSlice::new(to), usize::MAX), stream);
                kernels.settle();
                let expected: [f32; 20] = std::array::from_fn(|i| if i < start { 0.0 } else { 1.0 });
                assert_eq!(to, expected, "{kernels:?}");
                assert!(memory[first + 20..].iter().all(|&beside| beside == 0.0), "{kernels:?}");
            }
        }
    }
}
