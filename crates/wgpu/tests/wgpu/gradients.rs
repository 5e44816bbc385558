//! Gradients: what a layer that is trained records, and operands that no binding holds.

use crate::products::devices;
use fused_moe_core::config::{LayerConfig, Normalize};
use fused_moe_core::operation::{
    DownBackward, ForwardSaving, Gradient, GradientMode, LayerBackward, LayerGradients, LayerParameters, RoutesFrom,
    RoutesOut, RowSource, Source,
};
use fused_moe_core::training::TrainingLayer;
use fused_moe_core::{Backend, BackendBackward, DType, Permutation, Routing, Shape, Stream, View};
use fused_moe_wgpu::{Memory, Mut, Ref, Result, Wgpu, WgpuStream};
use half::bf16;

/// Whole numbers from -2 to 2 that look random: their sums are exact.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        ((state >> 16) % 5) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

fn upload<T: bytemuck::Pod>(wgpu: &Wgpu, data: &[T]) -> Memory {
    let mut memory = wgpu.allocate(size_of_val(data)).unwrap();
    wgpu.upload(bytemuck::cast_slice(data), &mut memory).unwrap();
    memory
}

fn download<T: bytemuck::Pod>(wgpu: &Wgpu, stream: &WgpuStream, memory: &Memory, count: usize) -> Vec<T> {
    let mut data = vec![T::zeroed(); count];
    wgpu.download(stream, memory, bytemuck::cast_slice_mut(&mut data)).unwrap();
    data
}

fn read(memory: &Memory, dtype: DType, shape: impl Into<Shape>) -> View<Ref<'_>> {
    View::new(memory.read(), dtype, 0, shape).unwrap()
}

fn write(memory: &mut Memory, dtype: DType, shape: impl Into<Shape>) -> View<Mut<'_>> {
    View::new(memory.write(), dtype, 0, shape).unwrap()
}

const T: usize = 9;
const H: usize = 24;
const I: usize = 10;
const E: usize = 5;
const K: usize = 2;
const F32: DType = DType::F32;

/// Forward and backward of a layer in one command buffer, or in as many as the stream makes; y and the gradients of x, of
/// both stacks and of the router.
fn trained(wgpu: &Wgpu, at_once: bool) -> Vec<Vec<f32>> {
    let mut config = LayerConfig::new(H, I, E, K);
    config.routing.weights.normalize = Normalize::Sum { eps: 0.0 };
    let layer = TrainingLayer::new(&config).unwrap();
    let mut workspace = layer.workspace(wgpu, T).unwrap();
    let small = |count, seed| -> Vec<f32> { numbers(count, seed).into_iter().map(|x| x * 0.2).collect() };
    let [x, d_y] = [1, 2].map(|seed| upload(wgpu, &small(T * H, seed)));
    let [router, gate_up, down] =
        [(E * H, 3), (E * 2 * I * H, 4), (E * H * I, 5)].map(|(count, seed)| upload(wgpu, &small(count, seed)));
    let of = |memory, shape: [usize; 3]| read(memory, F32, shape);
    let parameters = LayerParameters {
        router: Some(read(&router, F32, [E, H])),
        router_bias: None,
        router_norm: None,
        correction_bias: None,
        expert_scale: None,
        table: None,
        gate_up: of(&gate_up, [E, 2 * I, H]),
        gate_up_bias: None,
        down: of(&down, [E, H, I]),
        down_bias: None,
        shared: None,
    };
    let results = [T * H, T * H, E * 2 * I * H, E * H * I, E * H];
    let mut outputs = results.map(|count| upload(wgpu, &vec![f32::NAN; count]));
    let [mut z, mut experts, mut weights] =
        [T * K * 2 * I, T * K, T * K].map(|count| wgpu.allocate(4 * count).unwrap());
    let (stream, other) = (wgpu.stream().unwrap(), wgpu.stream().unwrap());
    let (device, queue) = wgpu.handles();
    if at_once {
        stream.lend(device.create_command_encoder(&Default::default())).unwrap();
    }
    let [y, d_x, d_gate_up, d_down, d_router] = &mut outputs;
    let forward = ForwardSaving {
        x: read(&x, F32, [T, H]),
        parameters: &parameters,
        source: Source::Router,
        token_ids: None,
        residual: None,
        norm: None,
        pre_activation: write(&mut z, F32, [T * K, 2 * I]),
        shared_pre_activation: None,
        routes: Some(RoutesOut {
            experts: write(&mut experts, DType::U32, [T, K]),
            weights: write(&mut weights, F32, [T, K]),
        }),
        y: write(y, F32, [T, H]),
    };
    layer.forward(wgpu, &stream, forward, &mut workspace).unwrap();
    let gradients = LayerGradients {
        x: Some(Gradient::assign(write(d_x, F32, [T, H]))),
        gate_up: Some(Gradient::assign(write(d_gate_up, F32, [E, 2 * I, H]))),
        down: Some(Gradient::assign(write(d_down, F32, [E, H, I]))),
        router: Some(Gradient::assign(write(d_router, F32, [E, H]))),
        ..LayerGradients::default()
    };
    let backward = LayerBackward {
        d_y: read(&d_y, F32, [T, H]),
        d_logits: None,
        x: read(&x, F32, [T, H]),
        parameters: &parameters,
        source: RoutesFrom::Router,
        routing: Routing { experts: read(&experts, DType::U32, [T, K]), weights: read(&weights, F32, [T, K]) },
        pre_activation: read(&z, F32, [T * K, 2 * I]),
        shared_pre_activation: None,
        gradients,
    };
    layer.backward(wgpu, &stream, backward, &mut workspace).unwrap();
    if at_once {
        let encoder = stream.take().unwrap();
        for (memory, count) in outputs.iter().zip(results) {
            assert!(download::<f32>(wgpu, &other, memory, count).iter().all(|x| x.is_nan()));
        }
        queue.submit([encoder.finish()]);
    }
    assert!(stream.status().unwrap().is_ok());
    outputs.iter().zip(results).map(|(memory, count)| download(wgpu, &other, memory, count)).collect()
}

pub(super) fn a_layer_is_trained_in_one_submission() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    let [once, again] = [true, false].map(|at_once| trained(&wgpu, at_once));
    assert!(once == again);
    for values in once {
        assert!(values.iter().all(|x| x.is_finite()) && values.iter().any(|&x| x != 0.0));
    }
    Ok(())
}

/// Operands of one expert's down_backward: R, H, I.
struct OneExpert {
    sizes: [usize; 3],
    d_out: Vec<f32>,
    a: Vec<f32>,
    down: Vec<f32>,
}

impl OneExpert {
    fn new([rows, hidden, intermediate]: [usize; 3]) -> Self {
        let (d_out, a, down) =
            (numbers(rows * hidden, 1), numbers(rows * intermediate, 2), numbers(hidden * intermediate, 3));
        Self { sizes: [rows, hidden, intermediate], d_out, a, down }
    }

    /// Its gradients: of the rows in bf16, of the matrix and of the bias in one format.
    fn run<T: bytemuck::Pod>(
        &self,
        wgpu: &Wgpu,
        (dtype, before): (DType, T),
        mode: GradientMode,
    ) -> (Vec<bf16>, Vec<T>, Vec<T>) {
        let [rows, hidden, intermediate] = self.sizes;
        let [d_out, a, down] = [&self.d_out, &self.a, &self.down].map(|data| upload(wgpu, data));
        let slots: Vec<u32> = (0..rows as u32).collect();
        let (slots, offsets) = (upload(wgpu, &slots), upload(wgpu, &[0, rows as u32]));
        let mut d_a = upload(wgpu, &vec![bf16::NAN; rows * intermediate]);
        let mut d_down = upload(wgpu, &vec![before; hidden * intermediate]);
        let mut d_bias = upload(wgpu, &vec![before; hidden]);
        let stream = wgpu.stream().unwrap();
        let operands = DownBackward {
            d_out: read(&d_out, F32, [rows, hidden]),
            rows: RowSource::Rows,
            permutation: Permutation {
                row_slot: read(&slots, DType::U32, [rows]),
                slot_row: read(&slots, DType::U32, [rows]),
                offsets: read(&offsets, DType::U32, [2]),
            },
            row_weights: None,
            a: Some(read(&a, F32, [rows, intermediate])),
            matrices: read(&down, F32, [1, hidden, intermediate]),
            d_a: Some(write(&mut d_a, DType::BF16, [rows, intermediate])),
            d_down: Some(Gradient { view: write(&mut d_down, dtype, [1, hidden, intermediate]), mode }),
            d_bias: Some(Gradient { view: write(&mut d_bias, dtype, [1, hidden]), mode }),
        };
        wgpu.down_backward(&stream, operands).unwrap();
        assert!(stream.status().unwrap().is_ok());
        (
            download(wgpu, &stream, &d_a, rows * intermediate),
            download(wgpu, &stream, &d_down, hidden * intermediate),
            download(wgpu, &stream, &d_bias, hidden),
        )
    }

    /// All exact.
    fn expected(&self) -> [Vec<f32>; 3] {
        let [rows, hidden, intermediate] = self.sizes;
        let mut all = [rows * intermediate, hidden * intermediate, hidden].map(|count| vec![0f32; count]);
        let [d_a, d_down, d_bias] = &mut all;
        for r in 0..rows {
            let (a, d_a) = (&self.a[r * intermediate..][..intermediate], &mut d_a[r * intermediate..][..intermediate]);
            for (h, (&d, d_bias)) in self.d_out[r * hidden..].iter().zip(d_bias.iter_mut()).enumerate() {
                *d_bias += d;
                let matrix = h * intermediate..(h + 1) * intermediate;
                for (((sum, w), d_w), a) in
                    d_a.iter_mut().zip(&self.down[matrix.clone()]).zip(&mut d_down[matrix]).zip(a)
                {
                    *sum += d * w;
                    *d_w += d * a;
                }
            }
        }
        all
    }
}

pub(super) fn sums_that_no_binding_holds_are_rounded_once() -> Result<()> {
    let [_, wgpu] = devices()?;
    let narrow =
        |values: &[f32], before: f32| -> Vec<bf16> { values.iter().map(|x| bf16::from_f32(x + before)).collect() };
    // a matrix that is cut, and its gradient: sums over its rows go from launch to launch
    let wide = OneExpert::new([3, 1100, 32768]);
    let [d_a, d_down, d_bias] = wide.expected();
    let (rows, matrix, bias) = wide.run(&wgpu, (F32, 1000f32), GradientMode::Accumulate);
    assert!(rows == narrow(&d_a, 0.0));
    assert!(matrix.iter().zip(&d_down).all(|(found, d)| *found == d + 1000.0));
    assert!(bias.iter().zip(&d_bias).all(|(found, d)| *found == d + 1000.0));
    drop((rows, matrix, bias, d_a, d_down, d_bias, wide));
    // rows that are cut: sums over them go from launch to launch
    let tall = OneExpert::new([1100, 32768, 2]);
    let [d_a, d_down, d_bias] = tall.expected();
    for (mode, before) in [(GradientMode::Assign, 0.0), (GradientMode::Accumulate, 1001.0f32)] {
        let (rows, matrix, bias) = tall.run(&wgpu, (DType::BF16, bf16::from_f32(before)), mode);
        let before = bf16::from_f32(before).to_f32();
        assert!(rows == narrow(&d_a, 0.0));
        assert!(matrix == narrow(&d_down, before) && bias == narrow(&d_bias, before), "{mode:?}");
    }
    Ok(())
}
