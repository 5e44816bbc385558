//! What a call of a layer takes and launches.

use super::*;
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
    let Ok(wgpu) = Wgpu::new(0) else { return };
    let config = LayerConfig {
        zero_experts: Some(ZeroExperts { count: Z, output: ZeroOutput::Copy }),
        shared: Some(SharedConfig { intermediate: I, activation: Default::default(), gated: true, scale: 1.0 }),
        ..LayerConfig::new(H, I, E, K)
    };
    let layer = prepare(&wgpu, &config, Numerics::Fast);
    let stream = wgpu.stream().unwrap();
    for tokens in [1, 5] {
        let mut workspace = layer.workspace(tokens).unwrap();
        let mut memory = [(); 4].map(|()| upload(&wgpu, &vec![0x3f; 4 * tokens * H]).unwrap());
        let [x, residual, y, normed] = &mut memory;
        let shape = [tokens, H];
        let call = Forward {
            residual: Some(Residual::Of(View::new(residual.read(), F32, 0, shape).unwrap())),
            norm: Some(NextNorm { weight: None, eps: 1e-3, out: View::new(normed.write(), F32, 0, shape).unwrap() }),
            ..Forward::new(View::new(x.read(), F32, 0, shape).unwrap(), View::new(y.write(), F32, 0, shape).unwrap())
        };
        layer.run(&stream, call, &mut workspace).unwrap();
        let mut result = vec![0.0_f32; tokens * H];
        wgpu.download(&stream, normed, bytemuck::cast_slice_mut(&mut result)).unwrap();
        let squares = result[..H].iter().map(|y| y * y).sum::<f32>() / H as f32;
        assert!((squares - 1.0).abs() < 0.01, "{squares}");
    }
    assert!(!stream.has_scratch() && !layer.idle.has_scratch());
}

#[test]
fn products_around_an_invariant_layer_take_any_number_of_rows() {
    let Ok(wgpu) = Wgpu::new(0) else { return };
    let config = LayerConfig { latent: Some(8), ..LayerConfig::new(H, I, E, K) };
    let layer = prepare(&wgpu, &config, Numerics::BatchInvariant);
    for tokens in [1, 17, 300] {
        let linear = launches(&layer, tokens).into_iter().filter(|entry| entry == "linear").count();
        assert_eq!(linear, 2, "{}", layer.explain(tokens));
    }
}

#[test]
fn what_is_scaled_before_its_norm_takes_one_launch() {
    let Ok(wgpu) = Wgpu::new(0) else { return };
    let norm = RmsNorm { eps: 1e-6, unit_offset: false, scaled_first: true };
    let norms = Norms { expert_out: Some(norm), ..Norms::default() };
    let layer = prepare(&wgpu, &LayerConfig { norms, ..LayerConfig::new(H, I, E, K) }, Numerics::Fast);
    let launches = launches(&layer, 5);
    assert!(launches.ends_with(&["accumulate", "combine", "combine"].map(String::from)), "{launches:?}");
    assert!(!launches.contains(&"zero".to_owned()));
}
