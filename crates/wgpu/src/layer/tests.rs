//! What a call of a layer takes and launches.

use super::*;
use crate::first_adapter;
use fused_moe_core::Shape;
use fused_moe_core::config::{Norms, RmsNorm, SharedConfig, ZeroExperts, ZeroOutput};
use fused_moe_core::weights::{
    ExpertMatrices, ExpertWeights, LatentWeights, Matrix, NormWeights, SharedWeights, StackLayout,
};

const H: usize = 24;
const I: usize = 16;
const E: usize = 6;
const Z: usize = 2;
const K: usize = 3;

fn prepare(wgpu: &Wgpu, config: &LayerConfig, numerics: Numerics) -> WgpuLayer {
    let width = config.expert_width();
    // one matrix is as good as another
    let numbers: Vec<f32> = (0..E * 2 * I * H).map(|i| ((i * 37) % 101) as f32 / 101.0 - 0.5).collect();
    fn view(numbers: &[f32], shape: impl Into<Shape>) -> HostView<'_> {
        let shape = shape.into();
        View::of(&numbers[..shape.rows() * shape.cols()], shape).unwrap()
    }
    let matrix = |rows, columns| Matrix::new(view(&numbers, [rows, columns]), Default::default()).unwrap();
    let stack = ExpertWeights::stacked(
        view(&numbers, [E, 2 * I, width]),
        view(&numbers, [E, width, I]),
        StackLayout::default(),
    );
    let shared = ExpertMatrices::new(Some(matrix(I, H)), matrix(I, H), matrix(H, I));
    let norm = config.norms.expert_out.map(|_| view(&numbers, [width]));
    let weights = LayerWeights {
        shared: config.shared.map(|_| SharedWeights { matrices: shared, gate: Some(view(&numbers, [H])) }),
        latent: config.latent.map(|l| LatentWeights { down: view(&numbers, [l, H]), up: view(&numbers, [H, l]) }),
        norms: NormWeights { expert_out: norm, ..NormWeights::default() },
        ..LayerWeights::new(view(&numbers, [config.choices(), H]), stack.unwrap())
    };
    wgpu.prepare(config, &weights, &Options { numerics, ..Options::default() }).unwrap()
}

/// The launches of a call, in order.
fn launches(layer: &WgpuLayer, tokens: usize) -> Vec<String> {
    let text = layer.explain(tokens);
    text.lines().skip(1).filter_map(|line| line.split(':').next().map(str::to_owned)).collect()
}

#[test]
fn what_lies_between_two_launches_of_combine_is_in_the_workspace() {
    let Some(wgpu) = first_adapter() else { return };
    let config = LayerConfig {
        zero_experts: Some(ZeroExperts { count: Z, output: ZeroOutput::Copy }),
        shared: Some(SharedConfig { intermediate: I, activation: Default::default(), gated: true, scale: 1.0 }),
        ..LayerConfig::new(H, I, E, K)
    };
    let layer = prepare(&wgpu, &config, Numerics::Fast);
    let stream = wgpu.stream().unwrap();
    for tokens in [1, 5] {
        let mut workspace = layer.workspace(tokens).unwrap();
        let numbers =
            |seed: usize| -> Vec<f32> { (0..tokens * H).map(|i| ((i * 29 + seed) % 97) as f32 / 97.0 - 0.4).collect() };
        let (of_residual, nothing) = (numbers(5), vec![f32::NAN; tokens * H]);
        let mut memory = [&numbers(3), &of_residual, &nothing, &nothing, &nothing]
            .map(|floats| upload(&wgpu, bytemuck::cast_slice(floats)).unwrap());
        let [x, residual, y, normed, alone] = &mut memory;
        let shape = [tokens, H];
        let read = |memory| View::new(Memory::read(memory), F32, 0, shape).unwrap();
        let write = |memory| View::new(Memory::write(memory), F32, 0, shape).unwrap();
        let call = Forward {
            residual: Some(Residual::Of(read(residual))),
            norm: Some(NextNorm { weight: None, eps: 1e-3, out: write(normed) }),
            ..Forward::new(read(x), write(y))
        };
        layer.run(&stream, call, &mut workspace).unwrap();
        // few enough operands for one launch
        layer.run(&stream, Forward::new(read(x), write(alone)), &mut workspace).unwrap();
        let [y, normed, alone] = [y, normed, alone].map(|memory| {
            let mut result = vec![0.0_f32; tokens * H];
            wgpu.download(&stream, memory, bytemuck::cast_slice_mut(&mut result)).unwrap();
            result
        });
        let sums: Vec<f32> = alone.iter().zip(&of_residual).map(|(y, residual)| y + residual).collect();
        assert!(alone.iter().any(|y| y.abs() > 0.1));
        for (row, sums) in sums.chunks_exact(H).enumerate() {
            let length = (sums.iter().map(|y| y * y).sum::<f32>() / H as f32 + 1e-3).sqrt();
            for (h, sum) in sums.iter().enumerate() {
                let (y, normed) = (y[row * H + h], normed[row * H + h]);
                assert!((y - sum).abs() < 1e-5 * (1.0 + length), "{tokens} tokens: {y}, {sum} expected");
                assert!((normed - sum / length).abs() < 1e-4, "{tokens} tokens: {normed}, {} expected", sum / length);
            }
        }
    }
    assert!(!stream.has_scratch() && !layer.idle.has_scratch());
}

#[test]
fn products_around_an_invariant_layer_take_any_number_of_rows() {
    let Some(wgpu) = first_adapter() else { return };
    let config = LayerConfig { latent: Some(8), ..LayerConfig::new(H, I, E, K) };
    let layer = prepare(&wgpu, &config, Numerics::BatchInvariant);
    for tokens in [1, 17, 300] {
        let linear = launches(&layer, tokens).into_iter().filter(|entry| entry == "linear").count();
        assert_eq!(linear, 2, "{}", layer.explain(tokens));
    }
}

#[test]
fn what_is_scaled_before_its_norm_takes_one_launch() {
    let Some(wgpu) = first_adapter() else { return };
    let norm = RmsNorm { eps: 1e-6, unit_offset: false, scaled_first: true };
    let norms = Norms { expert_out: Some(norm), ..Norms::default() };
    let layer = prepare(&wgpu, &LayerConfig { norms, ..LayerConfig::new(H, I, E, K) }, Numerics::Fast);
    let launches = launches(&layer, 5);
    assert!(launches.ends_with(&["accumulate", "combine", "combine"].map(String::from)), "{launches:?}");
    assert!(!launches.contains(&"zero".to_owned()));
}
