//! The bits of a step do not depend on the threads.

use crate::step::{Step, config};
use fused_moe_core::{Backend, Stream};
use fused_moe_cpu::Cpu;

/// What two steps leave: y, the gradient of x, the weights.
fn steps(threads: usize, sizes: [usize; 4], tokens: usize) -> Vec<Vec<u32>> {
    let cpu = Cpu::with_threads(threads).unwrap();
    let stream = cpu.stream().unwrap();
    let mut step = Step::new(&cpu, &config(sizes), tokens);
    (0..2).for_each(|_| step.run(&cpu, &stream, tokens));
    assert!(stream.status().unwrap().is_ok());
    let bits = |values: &Vec<f32>| values.iter().map(|value| value.to_bits()).collect();
    [&step.y, &step.d_x].into_iter().chain(&step.weights).map(bits).collect()
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // few experts with many rows are cut in rows, many with few in columns
    for (sizes, tokens) in [([72, 40, 3, 2], 500), ([300, 17, 24, 4], 61), ([40, 130, 8, 1], 1)] {
        let one = steps(1, sizes, tokens);
        assert!(one.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()), "{sizes:?}");
        for threads in [1, 2, 3, 7] {
            assert!(steps(threads, sizes, tokens) == one, "{sizes:?}, {threads} threads");
        }
    }
}
