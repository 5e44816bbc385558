//! A whole layer: captured, alone and in a batch, larger than 4 GiB, too large for the device.

use fused_moe_core::config::{GateNorm, LayerConfig, Normalize, RoutingRule, SharedConfig, WeightRule};
use fused_moe_core::operation::Forward;
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, LayerWeights, Matrix, SharedWeights, StackLayout};
use fused_moe_core::{Backend, DType, Layer, Numerics, Options, Stream, View};
use fused_moe_cuda::{Cuda, CudaLayer, CudaStream, Error, Graph, Memory, Result};
use half::bf16;

pub(crate) const H: usize = 64;
pub(crate) const I: usize = 48;
pub(crate) const E: usize = 12;
pub(crate) const K: usize = 3;
pub(crate) const S: usize = 40;

/// Numbers in -1 .. 1 that differ with the seed.
pub(crate) fn numbers(count: usize, seed: u32) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(2654435761) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            bf16::from_f32(state as f32 / u32::MAX as f32 * 2.0 - 1.0)
        })
        .collect()
}

pub(crate) fn prepare(cuda: &Cuda, numerics: Numerics) -> Result<CudaLayer> {
    let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
    let mut config = LayerConfig {
        routing: RoutingRule { weights, ..RoutingRule::default() },
        shared: Some(SharedConfig { intermediate: S, activation: Default::default(), gated: true, scale: 1.0 }),
        ..LayerConfig::new(H, I, E, K)
    };
    config.gate.norm = Some(GateNorm { eps: 1e-6, feeds_experts: true });
    let (router, gate_up, down) = (numbers(E * H, 1), numbers(E * 2 * I * H, 2), numbers(E * H * I, 3));
    let (gate, up, shared_down, factor) = (numbers(S * H, 4), numbers(S * H, 5), numbers(H * S, 6), numbers(H, 7));
    let stack = ExpertWeights::stacked(
        View::of(&gate_up, [E, 2 * I, H])?,
        View::of(&down, [E, H, I])?,
        StackLayout::default(),
    )?;
    let matrix = |data, shape: [usize; 2]| Matrix::new(View::of(data, shape)?, Default::default());
    let matrices =
        ExpertMatrices::new(Some(matrix(&gate, [S, H])?), matrix(&up, [S, H])?, matrix(&shared_down, [H, S])?);
    let weights = LayerWeights {
        shared: Some(SharedWeights { matrices, gate: Some(View::of(&factor, [H])?) }),
        ..LayerWeights::new(View::of(&router, [E, H])?, stack)
    };
    cuda.prepare(&config, &weights, &Options { numerics, ..Options::default() })
}

fn upload(cuda: &Cuda, data: &[bf16]) -> Memory {
    let mut memory = cuda.allocate(2 * data.len()).unwrap();
    cuda.upload(bytemuck::cast_slice(data), &mut memory).unwrap();
    memory
}

fn download(cuda: &Cuda, stream: &CudaStream, memory: &Memory, count: usize) -> Vec<u16> {
    let mut bits = vec![0u16; count];
    cuda.download(stream, memory, bytemuck::cast_slice_mut(&mut bits)).unwrap();
    bits
}

/// The bits of y for tokens `x`.
pub(crate) fn direct(cuda: &Cuda, layer: &CudaLayer, stream: &CudaStream, x: &[bf16]) -> Vec<u16> {
    let tokens = x.len() / H;
    let mut workspace = layer.workspace(tokens).unwrap();
    let (x, mut y) = (upload(cuda, x), upload(cuda, &vec![bf16::NAN; tokens * H]));
    let from = View::new(x.read(), DType::BF16, 0, [tokens, H]).unwrap();
    let to = View::new(y.write(), DType::BF16, 0, [tokens, H]).unwrap();
    layer.forward(stream, from, to, &mut workspace).unwrap();
    assert!(stream.status().unwrap().is_ok());
    download(cuda, stream, &y, tokens * H)
}

pub(crate) fn a_captured_layer_replays_with_new_tokens_and_allocates_nothing() -> Result<()> {
    let cuda = Cuda::new(0)?;
    replays_with_new_tokens(&cuda, &prepare(&cuda, Numerics::Fast)?);
    Ok(())
}

/// Captured before anything ran, and replayed without allocating, with the bits of calls that are not captured.
pub(crate) fn replays_with_new_tokens(cuda: &Cuda, layer: &CudaLayer) {
    for tokens in [1, 2, 5, 40, 300, 3000] {
        let stream = cuda.stream().unwrap();
        let mut workspace = layer.workspace(tokens).unwrap();
        let (mut x, mut y) = (upload(cuda, &numbers(tokens * H, 8)), upload(cuda, &vec![bf16::NAN; tokens * H]));
        // nothing ran before: a workspace is all that a capture needs
        let graph = {
            let from = View::new(x.read(), DType::BF16, 0, [tokens, H]).unwrap();
            let to = View::new(y.write(), DType::BF16, 0, [tokens, H]).unwrap();
            // SAFETY: all that is captured outlives the graph, and uploads and downloads wait.
            unsafe { Graph::capture(&stream, || layer.run(&stream, Forward::new(from, to), &mut workspace)) }.unwrap()
        };
        graph.replay(&stream).unwrap();
        stream.synchronize().unwrap();
        let free = cuda.free_bytes().unwrap();
        for seed in [20, 21] {
            let fresh = numbers(tokens * H, seed);
            cuda.upload(bytemuck::cast_slice(&fresh), &mut x).unwrap();
            graph.replay(&stream).unwrap();
            let replayed = download(cuda, &stream, &y, tokens * H);
            assert_eq!(cuda.free_bytes().unwrap(), free);
            assert!(replayed == direct(cuda, layer, &stream, &fresh), "{tokens} tokens");
        }
    }
}

/// One token's second launch waits beside the first; those of several streams come in between and must not hold each other
/// up.
pub(crate) fn a_token_on_each_of_several_streams() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let layer = prepare(&cuda, Numerics::Fast)?;
    let tokens: Vec<Vec<bf16>> = (0..4).map(|seed| numbers(H, 30 + seed)).collect();
    let mut calls = Vec::new();
    for x in &tokens {
        calls.push((cuda.stream()?, layer.workspace(1)?, upload(&cuda, x), upload(&cuda, &[bf16::NAN; H])));
    }
    let mut graphs = Vec::new();
    for (stream, workspace, x, y) in &mut calls {
        let calls = || {
            for _ in 0..16 {
                let from = View::new(x.read(), DType::BF16, 0, [1, H])?;
                layer.forward(stream, from, View::new(y.write(), DType::BF16, 0, [1, H])?, workspace)?;
            }
            Ok(())
        };
        // SAFETY: all that is captured outlives the graph, which alone uses it.
        graphs.push(unsafe { Graph::capture(stream, calls) }?);
    }
    for _ in 0..50 {
        for (graph, (stream, ..)) in graphs.iter().zip(&calls) {
            graph.replay(stream)?;
        }
    }
    for (x, (stream, _, _, y)) in tokens.iter().zip(&calls) {
        assert!(stream.status()?.is_ok());
        assert!(download(&cuda, stream, y, H) == direct(&cuda, &layer, stream, x));
    }
    Ok(())
}

pub(crate) fn a_token_alone_has_the_bits_it_has_in_a_batch() -> Result<()> {
    let cuda = Cuda::new(0)?;
    invariant_in_any_batch(&cuda, &prepare(&cuda, Numerics::BatchInvariant)?);
    Ok(())
}

/// Some of 2000 tokens have the bits that they have among all.
pub(crate) fn invariant_in_any_batch(cuda: &Cuda, layer: &CudaLayer) {
    let stream = cuda.stream().unwrap();
    let x = numbers(2000 * H, 9);
    let all = direct(cuda, layer, &stream, &x);
    for (first, count) in [(0, 1), (1, 1), (7, 5), (100, 33), (500, 700)] {
        let some = direct(cuda, layer, &stream, &x[first * H..(first + count) * H]);
        assert!(some == all[first * H..(first + count) * H], "{count} tokens from {first}");
    }
}

pub(crate) fn too_much_says_how_much() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let layer = prepare(&cuda, Numerics::Fast).unwrap();
    let tokens = 1 << 30;
    match layer.workspace(tokens) {
        Err(Error::OutOfMemory { needed, free }) => {
            assert!(needed == layer.workspace_bytes(tokens).unwrap() && free < needed);
        }
        other => panic!("{other:?}"),
    }
    Ok(())
}

/// The last experts of a stack over 4 GiB give what the same matrices give in a stack of their own.
pub(crate) fn experts_beyond_4_gib() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let (hidden, intermediate, experts) = (4096, 2048, 160);
    let config = LayerConfig::new(hidden, intermediate, experts, 1);
    let gate_up = numbers(2 * intermediate * hidden, 10);
    let down = numbers(hidden * intermediate, 11);
    let matrix = |data, shape: [usize; 2]| Matrix::new(View::of(data, shape).unwrap(), Default::default()).unwrap();
    let both = matrix(&gate_up, [2 * intermediate, hidden]);
    let expert = ExpertMatrices::new(
        Some(both.row_range(0, intermediate).unwrap()),
        both.row_range(intermediate, intermediate).unwrap(),
        matrix(&down, [hidden, intermediate]),
    );
    let router = vec![bf16::ZERO; experts * hidden];
    let weights = LayerWeights::new(
        View::of(&router, [experts, hidden]).unwrap(),
        ExpertWeights::per_expert(vec![expert; experts]),
    );
    let layer = cuda.prepare(&config, &weights, &Options::default()).unwrap();
    assert!(layer.weight_bytes() > 6 << 30);
    for tokens in [1, 8, 20, 640] {
        let stream = cuda.stream().unwrap();
        let x = upload(&cuda, &numbers(tokens * hidden, 12));
        let mut workspace = layer.workspace(tokens).unwrap();
        let mut run = |expert: usize| {
            let mut logits = vec![0f32; tokens * experts];
            logits.chunks_mut(experts).for_each(|row| row[expert] = 30.0);
            let mut memory = cuda.allocate(4 * logits.len()).unwrap();
            cuda.upload(bytemuck::cast_slice(&logits), &mut memory).unwrap();
            let mut y = upload(&cuda, &vec![bf16::NAN; tokens * hidden]);
            let call = Forward {
                source: fused_moe_core::operation::Source::Logits(
                    View::new(memory.read(), DType::F32, 0, [tokens, experts]).unwrap(),
                ),
                ..Forward::new(
                    View::new(x.read(), DType::BF16, 0, [tokens, hidden]).unwrap(),
                    View::new(y.write(), DType::BF16, 0, [tokens, hidden]).unwrap(),
                )
            };
            layer.run(&stream, call, &mut workspace).unwrap();
            download(&cuda, &stream, &y, tokens * hidden)
        };
        let first = run(0);
        assert!(first.iter().all(|&y| bf16::from_bits(y).is_finite()));
        assert!(run(experts - 1) == first && run(experts / 2 + 7) == first, "{tokens} tokens");
    }
    Ok(())
}
