//! A forward allocates nothing, and neither does a step of training.
#![allow(clippy::unwrap_used)]

#[path = "training/step.rs"]
mod step;

use fused_moe_core::config::*;
use fused_moe_core::weights::{
    ExpertMatrices, ExpertWeights, LatentWeights, LayerWeights, Matrix, Orientation, RouterMlpWeights, SharedWeights,
    StackLayout,
};
use fused_moe_core::{Backend, Layer, Options, View};
use fused_moe_cpu::Cpu;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller vouches.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller vouches.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZES: [usize; 4] = [64, 32, 8, 3];

/// The fewest allocations of a round, of several: from outside the pool, rayon's queue of work that comes from there grows
/// now and then, and inside it the threads reclaim their queues when they meet. Neither is the layer's, and neither happens
/// in every round.
fn fewest(mut round: impl FnMut()) -> usize {
    let mut count = || {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        round();
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    (0..20).map(|_| count()).min().unwrap_or(usize::MAX)
}

/// One test: allocations are counted over the whole process.
#[test]
fn nothing_is_allocated() {
    forward_allocates_nothing();
    training_allocates_nothing();
}

fn training_allocates_nothing() {
    let most = 40;
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    let cpu = Cpu::with_pool(pool.clone()).unwrap();
    let (stream, mut step) = (cpu.stream().unwrap(), step::Step::new(&cpu, &step::config(SIZES), most));
    assert_eq!(pool.install(|| fewest(|| (0..=most).step_by(4).for_each(|tokens| step.run(&cpu, &stream, tokens)))), 0);
}

fn forward_allocates_nothing() {
    let [h, i, e, k] = SIZES;
    let config = LayerConfig {
        shared: Some(SharedConfig { intermediate: i, activation: Activation::default(), gated: true, scale: 1.0 }),
        ..LayerConfig::new(h, i, e, k)
    };
    let norm = Some(RmsNorm { eps: 1e-6, unit_offset: true, scaled_first: false });
    let (experts_in, expert_out, routed_out, shared_in, shared_out, out) = (norm, norm, norm, norm, norm, norm);
    let rare = LayerConfig {
        latent: Some(40),
        zero_experts: Some(ZeroExperts { count: 2, output: ZeroOutput::Copy }),
        capacity: Some(Capacity {
            limit: CapacityLimit::Slots(4),
            order: CapacityOrder::Score,
            renormalize: Some(0.0),
        }),
        norms: Norms { experts_in, expert_out, routed_out, shared_in, shared_out, out },
        router_mlp: Some(RouterMlp { width: 24, eps: 1e-6, function: Function::GeluErf }),
        ..config.clone()
    };
    let gate = GateConfig { norm: Some(GateNorm { eps: 1e-6, feeds_experts: true }), ..GateConfig::default() };
    assert_eq!([LayerConfig { gate, ..config }, rare].map(|config| allocations(&config)), [0, 0]);
}

/// Allocations of calls with any number of tokens.
fn allocations(config: &LayerConfig) -> usize {
    let ([h, i, e, _], most, width) = (SIZES, 50, config.expert_width());
    let numbers: Vec<f32> = (0..e * 2 * i * h).map(|n| (n % 97) as f32 / 97.0 - 0.5).collect();
    let view = |shape: [usize; 3]| View::of(&numbers, shape).unwrap();
    let experts = ExpertWeights::stacked(view([e, 2 * i, width]), view([e, width, i]), StackLayout::default()).unwrap();
    let matrix = |rows, cols| Matrix::new(View::of(&numbers, [rows, cols]).unwrap(), Orientation::OutIn).unwrap();
    let matrices = ExpertMatrices::new(Some(matrix(i, h)), matrix(i, h), matrix(h, i));
    let gate = Some(View::of(&numbers, [h]).unwrap());
    let plane = |rows, cols| View::of(&numbers, [rows, cols]).unwrap();
    let weights = LayerWeights {
        shared: Some(SharedWeights { matrices, gate }),
        latent: config.latent.map(|width| LatentWeights { down: plane(width, h), up: plane(h, width) }),
        router_mlp: config.router_mlp.map(|RouterMlp { width, .. }| RouterMlpWeights {
            down: plane(width, h),
            down_bias: None,
            state_scale: None,
            norm: None,
            fc1: plane(width, width),
            fc1_bias: None,
            fc2: plane(width, width),
            fc2_bias: None,
        }),
        ..LayerWeights::new(plane(config.choices(), config.router_width()), experts)
    };
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    let cpu = Cpu::with_pool(pool.clone()).unwrap();
    let layer = cpu.prepare(config, &weights, &Options::default()).unwrap();
    let (stream, mut workspace, mut y) = (cpu.stream().unwrap(), layer.workspace(most).unwrap(), vec![0f32; most * h]);
    pool.install(|| {
        fewest(|| {
            for tokens in 0..=most {
                let out = View::of_mut(&mut y, [tokens, h]).unwrap();
                layer.forward(&stream, View::of(&numbers, [tokens, h]).unwrap(), out, &mut workspace).unwrap();
            }
        })
    })
}
