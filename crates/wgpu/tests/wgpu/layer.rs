//! A whole layer: what a call records, on whose device, in pieces, alone and in a batch, with operands that cannot be bound.

use fused_moe_core::config::{GateNorm, LayerConfig, Normalize, RoutingRule, SharedConfig, WeightRule};
use fused_moe_core::operation::{Forward, NextNorm, Residual, RoutesOut};
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, LayerWeights, Matrix, SharedWeights, StackLayout};
use fused_moe_core::{Backend, DType, Layer, Numerics, Options, Stream, View};
use fused_moe_wgpu::{Error, Memory, Mut, Ref, Result, Wgpu, WgpuLayer, WgpuStream};
use half::bf16;
use wgpu::{BufferUsages, Features, Limits};

const H: usize = 64;
const I: usize = 48;
const E: usize = 12;
const K: usize = 3;
const S: usize = 40;
const STORAGE: BufferUsages = BufferUsages::STORAGE.union(BufferUsages::COPY_SRC).union(BufferUsages::COPY_DST);

/// Two devices of the host program's, whose handlers of errors panic, with no more than every device offers.
fn two_foreign(limits: Limits) -> Result<[Wgpu; 2]> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    let adapter = adapters.first().ok_or(Error::NoAdapter)?;
    let limits = Limits { max_immediate_size: 128, ..limits };
    let device = || {
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            required_features: Features::IMMEDIATES,
            required_limits: limits.clone(),
            ..Default::default()
        });
        let (device, queue) = pollster::block_on(request).unwrap();
        Wgpu::from_device(device, queue)
    };
    Ok([device()?, device()?])
}

fn foreign(limits: Limits) -> Result<Wgpu> {
    two_foreign(limits).map(|[device, _]| device)
}

/// Numbers in -1 .. 1 that differ with the seed.
fn numbers(count: usize, seed: u32) -> Vec<bf16> {
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

fn prepare(wgpu: &Wgpu, numerics: Numerics, seed: u32) -> Result<WgpuLayer> {
    let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
    let mut config = LayerConfig {
        routing: RoutingRule { weights, ..RoutingRule::default() },
        shared: Some(SharedConfig { intermediate: S, activation: Default::default(), gated: true, scale: 1.0 }),
        ..LayerConfig::new(H, I, E, K)
    };
    config.gate.norm = Some(GateNorm { eps: 1e-6, feeds_experts: true });
    let numbers = |count, n| numbers(count, seed + n);
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
    wgpu.prepare(&config, &weights, &Options { numerics, ..Options::default() })
}

fn upload(wgpu: &Wgpu, data: &[bf16]) -> Memory {
    let mut memory = wgpu.allocate(2 * data.len()).unwrap();
    wgpu.upload(bytemuck::cast_slice(data), &mut memory).unwrap();
    memory
}

fn download(wgpu: &Wgpu, stream: &WgpuStream, memory: &Memory, count: usize) -> Vec<bf16> {
    let mut data = vec![bf16::ZERO; count];
    wgpu.download(stream, memory, bytemuck::cast_slice_mut(&mut data)).unwrap();
    data
}

fn bits(data: &[bf16]) -> Vec<u16> {
    data.iter().map(|y| y.to_bits()).collect()
}

fn read(memory: &Memory, shape: [usize; 2]) -> View<Ref<'_>> {
    View::new(memory.read(), DType::BF16, 0, shape).unwrap()
}

fn write(memory: &mut Memory, shape: [usize; 2]) -> View<Mut<'_>> {
    View::new(memory.write(), DType::BF16, 0, shape).unwrap()
}

/// y for tokens `x`.
fn direct(wgpu: &Wgpu, layer: &WgpuLayer, x: &[bf16]) -> Vec<bf16> {
    let (tokens, stream) = (x.len() / H, wgpu.stream().unwrap());
    let mut workspace = layer.workspace(tokens).unwrap();
    let (x, mut y) = (upload(wgpu, x), upload(wgpu, &vec![bf16::NAN; tokens * H]));
    layer.forward(&stream, read(&x, [tokens, H]), write(&mut y, [tokens, H]), &mut workspace).unwrap();
    assert!(stream.status().unwrap().is_ok());
    let y = download(wgpu, &stream, &y, tokens * H);
    assert!(y.iter().all(|y| y.is_finite()));
    y
}

pub(super) fn a_call_records_in_a_lent_encoder_and_does_nothing_else() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    let layers = [prepare(&wgpu, Numerics::Fast, 0).unwrap(), prepare(&wgpu, Numerics::Fast, 100).unwrap()];
    for tokens in [1, 5, 300] {
        let (stream, other) = (wgpu.stream().unwrap(), wgpu.stream().unwrap());
        let mut workspace = layers[0].workspace(tokens).unwrap();
        let start = numbers(tokens * H, 8);
        let x = upload(&wgpu, &start);
        let [mut between, mut y] = [0, 1].map(|_| upload(&wgpu, &vec![bf16::NAN; tokens * H]));
        let (device, queue) = wgpu.handles();
        stream.lend(device.create_command_encoder(&Default::default())).unwrap();
        let shape = [tokens, H];
        layers[0].forward(&stream, read(&x, shape), write(&mut between, shape), &mut workspace).unwrap();
        layers[1].forward(&stream, read(&between, shape), write(&mut y, shape), &mut workspace).unwrap();
        let encoder = stream.take().unwrap();
        for memory in [&between, &y] {
            assert!(download(&wgpu, &other, memory, tokens * H).iter().all(|y| y.is_nan()), "{tokens}");
        }
        queue.submit([encoder.finish()]);
        let once = direct(&wgpu, &layers[0], &start);
        assert_eq!(bits(&download(&wgpu, &other, &between, tokens * H)), bits(&once), "{tokens}");
        let twice = direct(&wgpu, &layers[1], &once);
        assert_eq!(bits(&download(&wgpu, &other, &y, tokens * H)), bits(&twice), "{tokens}");
        assert!(stream.status().unwrap().is_ok());
    }
    Ok(())
}

/// One buffer of the host program's has x, y, the norm and the workspace, at offsets of every kind.
pub(super) fn a_device_and_a_buffer_of_the_host_programs() -> Result<()> {
    let (wgpu, own) = (foreign(Limits::default())?, Wgpu::new(0)?);
    let layer = prepare(&wgpu, Numerics::Fast, 0).unwrap();
    let own_layer = prepare(&own, Numerics::Fast, 0).unwrap();
    for tokens in [1, 7, 130] {
        let start = numbers(tokens * H, 9);
        let (x_at, y_at) = (1030, 1030 + 2 * tokens * H + 34);
        let mut image = vec![bf16::from_f32(7.0); y_at / 2 + tokens * H + 101];
        image[x_at / 2..][..tokens * H].copy_from_slice(&start);
        image.resize(image.len().next_multiple_of(2), bf16::ZERO);
        let (device, queue) = wgpu.handles();
        let descriptor = wgpu::BufferDescriptor {
            label: None,
            size: 2 * image.len() as u64,
            usage: STORAGE,
            mapped_at_creation: false,
        };
        let buffer = device.create_buffer(&descriptor);
        queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&image));
        let scratch = wgpu::BufferDescriptor { size: layer.workspace_bytes(tokens).unwrap() as u64, ..descriptor };
        let scratch = Memory::from_buffer(device.create_buffer(&scratch));
        let mut workspace = layer.workspace_in(scratch, tokens).unwrap();
        let stream = wgpu.stream().unwrap();
        let x = View::new(Ref::of(&buffer), DType::BF16, x_at, [tokens, H]).unwrap();
        let y = View::new(Mut::of(&buffer), DType::BF16, y_at, [tokens, H]).unwrap();
        layer.forward(&stream, x, y, &mut workspace).unwrap();
        let after = download(&wgpu, &stream, &Memory::from_buffer(buffer), image.len());
        let written = y_at / 2..y_at / 2 + tokens * H;
        for (i, y) in direct(&own, &own_layer, &start).into_iter().enumerate() {
            let (y, ours) = (y.to_f32(), after[y_at / 2 + i].to_f32());
            assert!((y - ours).abs() <= 0.01 * y.abs() + 0.01, "{tokens} tokens, {i}: {ours}, {y} expected");
        }
        let outside = (0..image.len()).filter(|i| !written.contains(i));
        assert!(outside.into_iter().all(|i| after[i].to_bits() == image[i].to_bits()), "{tokens}");
    }
    Ok(())
}

/// Everything that a call can be asked for.
struct Results {
    y: Vec<bf16>,
    normed: Vec<bf16>,
    experts: Vec<u32>,
    weights: Vec<f32>,
    counts: Vec<u32>,
}

fn everything(wgpu: &Wgpu, tokens: usize) -> Results {
    let layer = prepare(wgpu, Numerics::Fast, 0).unwrap();
    let stream = wgpu.stream().unwrap();
    let mut workspace = layer.workspace(tokens).unwrap();
    let x = upload(wgpu, &numbers(tokens * H, 10));
    let [mut y, mut normed] = [11, 12].map(|seed| upload(wgpu, &numbers(tokens * H, seed)));
    let [mut experts, mut weights, mut counts] = [tokens * K, tokens * K, E].map(|n| wgpu.allocate(4 * n).unwrap());
    wgpu.upload(&[0xff; 4 * E], &mut counts).unwrap();
    let shape = [tokens, H];
    let call = Forward {
        residual: Some(Residual::InPlace),
        norm: Some(NextNorm { weight: None, eps: 1e-3, out: write(&mut normed, shape) }),
        routes: Some(RoutesOut {
            experts: View::new(experts.write(), DType::U32, 0, [tokens, K]).unwrap(),
            weights: View::new(weights.write(), DType::F32, 0, [tokens, K]).unwrap(),
        }),
        counts: Some(View::new(counts.write(), DType::U32, 0, [E]).unwrap()),
        ..Forward::new(read(&x, shape), write(&mut y, shape))
    };
    layer.run(&stream, call, &mut workspace).unwrap();
    let mut results = Results {
        y: download(wgpu, &stream, &y, tokens * H),
        normed: download(wgpu, &stream, &normed, tokens * H),
        experts: vec![0; tokens * K],
        weights: vec![0.0; tokens * K],
        counts: vec![0; E],
    };
    wgpu.download(&stream, &experts, bytemuck::cast_slice_mut(&mut results.experts)).unwrap();
    wgpu.download(&stream, &weights, bytemuck::cast_slice_mut(&mut results.weights)).unwrap();
    wgpu.download(&stream, &counts, bytemuck::cast_slice_mut(&mut results.counts)).unwrap();
    assert!(stream.status().unwrap().is_ok());
    results
}

pub(super) fn many_tokens_go_in_pieces() -> Result<()> {
    let limits = Limits { max_buffer_size: 300 << 10, ..Limits::default() };
    let (small, large) = (foreign(limits)?, Wgpu::new(0)?);
    let tokens = 500;
    let layer = prepare(&small, Numerics::Fast, 0).unwrap();
    assert!(layer.explain(tokens).contains("in pieces of"));
    assert!(layer.workspace_bytes(1 << 40).unwrap() <= 300 << 10);
    let [pieces, whole] = [small, large].map(|wgpu| everything(&wgpu, tokens));
    assert_eq!(pieces.experts, whole.experts);
    assert_eq!(pieces.counts, whole.counts);
    assert_eq!(pieces.counts.iter().sum::<u32>() as usize, tokens * K);
    let near = |a: f32, b: f32| (a - b).abs() <= 0.01 * b.abs() + 0.01;
    assert!(pieces.weights.iter().zip(&whole.weights).all(|(a, b)| near(*a, *b)));
    let floats = |a: &[bf16], b: &[bf16]| a.iter().zip(b).all(|(a, b)| near(a.to_f32(), b.to_f32()));
    assert!(floats(&pieces.y, &whole.y) && floats(&pieces.normed, &whole.normed));
    Ok(())
}

pub(super) fn a_token_alone_has_the_bits_it_has_in_a_batch() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    let layer = prepare(&wgpu, Numerics::BatchInvariant, 0).unwrap();
    let x = numbers(37 * H, 9);
    let all = bits(&direct(&wgpu, &layer, &x));
    for (first, count) in [(0, 1), (1, 1), (36, 1), (7, 5), (3, 33)] {
        let some = direct(&wgpu, &layer, &x[first * H..(first + count) * H]);
        assert_eq!(bits(&some), all[first * H..(first + count) * H], "{count} tokens from {first}");
    }
    Ok(())
}

/// Enough tiles for a list of them, and dispatches of as many workgroups as the device finds: the same bits as without.
pub(super) fn many_tiles_are_listed_on_the_device() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    let (hidden, intermediate, experts, top_k, tokens) = (16, 512, 512, 8, 1600);
    let config = LayerConfig::new(hidden, intermediate, experts, top_k);
    let (router, gate_up, down) = (
        numbers(experts * hidden, 1),
        numbers(experts * 2 * intermediate * hidden, 2),
        numbers(experts * hidden * intermediate, 3),
    );
    let gate_up = View::of(&gate_up, [experts, 2 * intermediate, hidden]).unwrap();
    let down = View::of(&down, [experts, hidden, intermediate]).unwrap();
    let stack = ExpertWeights::stacked(gate_up, down, StackLayout::default()).unwrap();
    let weights = LayerWeights::new(View::of(&router, [experts, hidden]).unwrap(), stack);
    let options = Options { numerics: Numerics::BatchInvariant, ..Options::default() };
    let layer = wgpu.prepare(&config, &weights, &options).unwrap();
    let listed = |tokens| layer.explain(tokens).contains("as many workgroups as there are tiles");
    assert!(listed(tokens) && !listed(100));
    let stream = wgpu.stream().unwrap();
    let mut workspace = layer.workspace(tokens).unwrap();
    let x = upload(&wgpu, &numbers(tokens * hidden, 4));
    let results = [tokens, 100].map(|step| {
        let mut y = upload(&wgpu, &vec![bf16::NAN; tokens * hidden]);
        for first in (0..tokens).step_by(step) {
            let x = read(&x, [tokens, hidden]).row_range(first, step).unwrap();
            let y = write(&mut y, [tokens, hidden]).row_range(first, step).unwrap();
            layer.forward(&stream, x, y, &mut workspace).unwrap();
        }
        download(&wgpu, &stream, &y, tokens * hidden)
    });
    assert!(results[0].iter().all(|y| y.is_finite()));
    assert!(bits(&results[0]) == bits(&results[1]));
    Ok(())
}

pub(super) fn one_token_takes_few_launches() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    let text = prepare(&wgpu, Numerics::Fast, 0).unwrap().explain(1);
    let entries: Vec<&str> = text.lines().skip(1).filter_map(|line| line.split(':').next()).collect();
    // the shared expert's, its gate's, and what the experts' down and combine are together
    let expected = ["gate", "route", "gate_up_dot", "gate_up_dot", "down_dot", "linear", "down_combine"];
    assert_eq!(entries, expected, "{text}");
    Ok(())
}

pub(super) fn too_small_a_workspace_says_how_much() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    let layer = prepare(&wgpu, Numerics::Fast, 0).unwrap();
    let needed = layer.workspace_bytes(9).unwrap();
    let check = |error: Error| match error {
        Error::Contract(fused_moe_core::Error::Workspace { tokens, expected, .. }) => {
            assert_eq!((tokens, expected), (9, needed));
        }
        other => panic!("{other}"),
    };
    check(layer.workspace_in(wgpu.allocate(needed - 4).unwrap(), 9).unwrap_err());
    let mut workspace = layer.workspace(8).unwrap();
    let stream = wgpu.stream().unwrap();
    let (x, mut y) = (upload(&wgpu, &numbers(9 * H, 1)), upload(&wgpu, &numbers(9 * H, 2)));
    check(layer.forward(&stream, read(&x, [9, H]), write(&mut y, [9, H]), &mut workspace).unwrap_err());
    assert!(stream.take().is_none());
    Ok(())
}

/// On a device whose handler of errors panics.
pub(super) fn operands_that_cannot_be_bound_are_errors() -> Result<()> {
    let [wgpu, other] = two_foreign(Limits::default())?;
    let layer = prepare(&wgpu, Numerics::Fast, 0).unwrap();
    let mut workspace = layer.workspace(2).unwrap();
    let stream = wgpu.stream().unwrap();
    let good = upload(&wgpu, &numbers(2 * H, 1));
    let buffer = |wgpu: &Wgpu, size: usize, usage| {
        wgpu.handles().0.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: size as u64,
            usage,
            mapped_at_creation: false,
        })
    };
    let bytes = 4 * H;
    let unusable = buffer(&wgpu, bytes, BufferUsages::COPY_DST);
    let foreign = buffer(&other, bytes, STORAGE);
    // the last element cannot be bound
    let odd = buffer(&wgpu, bytes + 2, STORAGE);
    for (i, (bad, offset)) in [(&unusable, 0), (&foreign, 0), (&odd, 2)].into_iter().enumerate() {
        let bad_x = View::new(Ref::of(bad), DType::BF16, offset, [2, H]).unwrap();
        let bad_y = View::new(Mut::of(bad), DType::BF16, offset, [2, H]).unwrap();
        let mut y = upload(&wgpu, &numbers(2 * H, 2));
        let x = layer.forward(&stream, bad_x, write(&mut y, [2, H]), &mut workspace);
        let y = layer.forward(&stream, read(&good, [2, H]), bad_y, &mut workspace);
        for (operand, result) in [("x", x), ("y", y)] {
            let Err(error) = result else { panic!("buffer {i} as {operand} was bound") };
            match i {
                0 => assert!(matches!(error, Error::Usage { missing: "STORAGE", .. }), "{error}"),
                1 => assert!(matches!(error, Error::Device { .. }), "{error}"),
                _ => assert!(matches!(error, Error::Unbindable { .. }), "{error}"),
            }
        }
    }
    let misaligned = View::new(good.read(), DType::BF16, 1, [1, H]);
    assert!(matches!(misaligned, Err(fused_moe_core::Error::Misaligned { .. })));
    // what was recorded meanwhile is sound
    stream.submit().unwrap();
    let memory = Memory::from_buffer(buffer(&wgpu, layer.workspace_bytes(2).unwrap(), BufferUsages::COPY_DST));
    assert!(matches!(layer.workspace_in(memory, 2), Err(Error::Usage { .. })));
    Ok(())
}

/// Each of them gets an answer, and no error of wgpu's.
pub(super) fn several_threads_ask_for_the_status() -> Result<()> {
    let wgpu = Wgpu::new(0)?;
    let stream = wgpu.stream()?;
    let status = || -> Result<bool> { (0..20).try_fold(true, |ok, _| Ok(ok & stream.status()?.is_ok())) };
    std::thread::scope(|scope| {
        let threads = [(); 4].map(|()| scope.spawn(status));
        threads.into_iter().try_for_each(|thread| thread.join().unwrap().map(|ok| assert!(ok)))
    })
}
