//! Goldens, and a checkpoint's layer through the specification.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

pub(crate) mod model;

use fused_moe::checkpoint::{Checkpoint, CheckpointLayer, write_safetensors};
use fused_moe::cpu::Cpu;
use fused_moe::operation::{Forward, RoutesOut};
use fused_moe::reference::{self, Input, Latent, NormVectors, Output, RouterMlp, SharedExpert};
use fused_moe::weights::{ExpertMatrices, Matrix};
use fused_moe::{Backend, DType, HostView, Layer, Options, Stream, View};
use std::path::PathBuf;

/// The directory of a golden.
pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// The names of all goldens.
pub(crate) fn goldens() -> Vec<String> {
    let entries = std::fs::read_dir(path("")).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    folders.map(|folder| folder.file_name().into_string().unwrap()).collect()
}

/// One input of a golden and what the layer makes of it.
pub(crate) struct Case {
    pub(crate) tokens: usize,
    pub(crate) x: Vec<f32>,
    pub(crate) token_ids: Option<Vec<u32>>,
    pub(crate) sequences: Vec<u32>,
    pub(crate) y: Vec<f64>,
    pub(crate) experts: Vec<u32>,
    pub(crate) weights: Vec<f64>,
}

/// What some layers read besides x.
#[derive(Clone, Copy, Default)]
pub(crate) struct Extra<'a> {
    /// Where experts are chosen by them.
    pub(crate) token_ids: Option<&'a [u32]>,
    /// Where there is a capacity.
    pub(crate) sequences: Option<&'a [u32]>,
    /// Where the router has layers of its own.
    pub(crate) router_state: Option<&'a [f32]>,
}

impl Case {
    /// What the layer reads of it besides x.
    pub(crate) fn extra(&self, layer: &CheckpointLayer<'_>) -> Extra<'_> {
        let sequences = layer.by_sequence.then_some(&self.sequences[..]);
        Extra { token_ids: self.token_ids.as_deref(), sequences, router_state: None }
    }
}

/// A golden: the layer's number and its cases.
pub(crate) struct Golden {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) layer: usize,
    pub(crate) cases: Vec<Case>,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let meta: serde_json::Value =
            serde_json::from_slice(&std::fs::read(path(name).join("meta.json")).unwrap()).unwrap();
        let bytes = std::fs::read(path(name).join("golden.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |key: &str, i: usize| file.tensor(&format!("{key}.{i}")).unwrap();
        let f64s = |key, i| -> Vec<f64> {
            tensor(key, i).data().as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()
        };
        let checkpoint = Checkpoint::open(path(name)).unwrap();
        let layer = meta["layer"].as_u64().unwrap() as usize;
        let whole = meta["note"].as_str().is_some_and(|note| note.starts_with("output = whole decoder layer"));
        let factor = whole.then(|| layer_scalar(name, &checkpoint.layer(layer).unwrap().name));
        let case = |i| {
            let x: Vec<f32> = chunks(tensor("input", i).data()).map(f32::from_le_bytes).collect();
            let [batch, length] = [0, 1].map(|d| tensor("input", i).shape()[d] as u32);
            let mut y = f64s("output_f64", i);
            if let Some(factor) = factor {
                // the output is (x + y) * factor
                y.iter_mut().zip(&x).for_each(|(y, &x)| *y = *y / factor - f64::from(x));
            }
            let token_ids = file.tensor(&format!("input_ids.{i}")).ok();
            Case {
                tokens: tensor("topk_ids", i).shape()[0],
                x,
                token_ids: token_ids.map(|ids| chunks(ids.data()).map(u32::from_le_bytes).collect()),
                sequences: (0..=batch).map(|n| n * length).collect(),
                y,
                experts: chunks(tensor("topk_ids", i).data()).map(u32::from_le_bytes).collect(),
                weights: f64s("topk_weights_f64", i),
            }
        };
        let cases = (0..2).map(case).collect();
        Self { checkpoint, layer, cases }
    }
}

/// The number that a whole decoder layer's output is multiplied by.
fn layer_scalar(name: &str, block: &str) -> f64 {
    let bytes = std::fs::read(path(name).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(&format!("{block}.layer_scalar")).unwrap();
    chunks(tensor.data()).map(f32::from_le_bytes).next().unwrap().into()
}

fn chunks(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    bytes.as_chunks().0.iter().copied()
}

/// The specification's answer to x.
pub(crate) fn specified(layer: &CheckpointLayer<'_>, x: &[f32], extra: Extra<'_>) -> Output {
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let (x, router_state) = (wide(x), extra.router_state.map(wide));
    let weights = &layer.weights;
    let config = &layer.config;
    let vector = |view: &Option<HostView<'_>>| view.as_ref().map(numbers);
    let router = vector(&weights.router).unwrap();
    let (router_bias, router_norm) = (vector(&weights.router_bias), vector(&weights.router_norm));
    let (correction_bias, expert_scale) = (vector(&weights.correction_bias), vector(&weights.expert_scale));
    let (mut gate_up, mut gate_up_bias, mut down, mut down_bias) = (vec![], vec![], vec![], vec![]);
    for expert in weights.experts.iter() {
        joint(expert, &mut gate_up, &mut down);
        for bias in [expert.gate_bias, expert.up_bias].iter().flatten() {
            gate_up_bias.extend(elements(bias));
        }
        down_bias.extend(expert.down_bias.iter().flat_map(elements));
    }
    let shared = weights.shared.as_ref().map(|shared| {
        let (mut gate_up, mut down) = (vec![], vec![]);
        joint(&shared.matrices, &mut gate_up, &mut down);
        (gate_up, down, vector(&shared.gate))
    });
    let latent = weights.latent.map(|latent| (numbers(&latent.down), numbers(&latent.up)));
    let norms = [
        vector(&weights.norms.experts_in),
        vector(&weights.norms.expert_out),
        vector(&weights.norms.routed_out),
        vector(&weights.norms.shared_in),
        vector(&weights.norms.shared_out),
        vector(&weights.norms.out),
    ];
    let [experts_in, expert_out, routed_out, shared_in, shared_out, out] = norms.each_ref().map(Option::as_deref);
    let mlp = weights.router_mlp.map(|mlp| {
        let matrices = [numbers(&mlp.down), numbers(&mlp.fc1), numbers(&mlp.fc2)];
        let biases = [vector(&mlp.down_bias), vector(&mlp.fc1_bias), vector(&mlp.fc2_bias)];
        (matrices, biases, vector(&mlp.norm), vector(&mlp.state_scale))
    });
    let some = |bias: &'_ [f64]| !bias.is_empty();
    let layer = reference::Layer {
        router: &router,
        router_bias: router_bias.as_deref(),
        router_norm: router_norm.as_deref(),
        correction_bias: correction_bias.as_deref(),
        expert_scale: expert_scale.as_deref(),
        table: weights.table.as_ref().map(|table| &table.experts[..]),
        gate_up: &gate_up,
        gate_up_bias: Some(&gate_up_bias[..]).filter(|bias| some(bias)),
        down: &down,
        down_bias: Some(&down_bias[..]).filter(|bias| some(bias)),
        shared: shared.as_ref().map(|(gate_up, down, gate)| SharedExpert {
            gate_up,
            gate_up_bias: None,
            down,
            down_bias: None,
            gate: gate.as_deref(),
        }),
        latent: latent.as_ref().map(|(down, up)| Latent { down, up }),
        norms: NormVectors { experts_in, expert_out, routed_out, shared_in, shared_out, out },
        router_mlp: mlp.as_ref().map(|([down, fc1, fc2], [down_bias, fc1_bias, fc2_bias], norm, scale)| RouterMlp {
            down,
            down_bias: down_bias.as_deref(),
            state_scale: scale.as_deref(),
            norm: norm.as_deref(),
            fc1,
            fc1_bias: fc1_bias.as_deref(),
            fc2,
            fc2_bias: fc2_bias.as_deref(),
        }),
    };
    let (token_ids, sequences) = (extra.token_ids, extra.sequences);
    let (tokens, router_state) = (x.len() / config.hidden, router_state.as_deref());
    let input = Input { x: &x, tokens, token_ids, sequences, router_state, ..Default::default() };
    reference::forward(config, &layer, &input)
}

pub(crate) fn joint(expert: &ExpertMatrices<'_>, gate_up: &mut Vec<f64>, down: &mut Vec<f64>) {
    for matrix in [expert.gate, Some(expert.up)].iter().flatten() {
        gate_up.extend(elements(matrix));
    }
    down.extend(elements(&expert.down));
}

pub(crate) fn elements(matrix: &Matrix<'_>) -> Vec<f64> {
    let mut row = vec![0; matrix.cols() * matrix.dtype().size()];
    (0..matrix.rows())
        .flat_map(|r| {
            matrix.copy_row(r, &mut row);
            decode(&row, matrix.dtype())
        })
        .collect()
}

pub(crate) fn numbers(view: &HostView<'_>) -> Vec<f64> {
    assert!(view.is_contiguous());
    decode(&view.storage()[view.offset()..view.offset() + view.extent()], view.dtype())
}

fn decode(bytes: &[u8], dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F32 => chunks(bytes).map(|bytes| f32::from_le_bytes(bytes).into()).collect(),
        DType::BF16 => bytes.as_chunks().0.iter().map(|&bytes| half::bf16::from_le_bytes(bytes).into()).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|&bytes| half::f16::from_le_bytes(bytes).into()).collect(),
        other => panic!("{other}"),
    }
}

/// What came out of a layer on a device.
pub(crate) struct Ran {
    pub(crate) y: Vec<f64>,
    pub(crate) experts: Vec<u32>,
    pub(crate) weights: Vec<f64>,
}

/// The processor's answer to x, x and y in a format.
pub(crate) fn run(layer: &CheckpointLayer<'_>, x: &[f32], extra: Extra<'_>, dtype: DType) -> Ran {
    let device = Cpu::new().unwrap();
    let (hidden, top_k) = (layer.config.hidden, layer.config.top_k);
    let tokens = x.len() / hidden;
    let prepared = layer.prepare(&device, &Options::default()).unwrap();
    let mut workspace = prepared.workspace(tokens).unwrap();
    let stream = device.stream().unwrap();
    let x = encode(x, dtype);
    let mut y = vec![0u8; x.len()];
    let (mut experts, mut weights) = (vec![0u32; tokens * top_k], vec![0f32; tokens * top_k]);
    let shape = [tokens, hidden];
    let mut call =
        Forward::new(View::new(&x[..], dtype, 0, shape).unwrap(), View::new(&mut y[..], dtype, 0, shape).unwrap());
    call.token_ids = extra.token_ids.map(|ids| View::of(ids, [tokens]).unwrap());
    call.sequences = extra.sequences.map(|ends| View::of(ends, [ends.len()]).unwrap());
    call.router_state.previous =
        extra.router_state.map(|state| View::of(state, [tokens, state.len() / tokens]).unwrap());
    call.routes = Some(RoutesOut {
        experts: View::of_mut(&mut experts, [tokens, top_k]).unwrap(),
        weights: View::of_mut(&mut weights, [tokens, top_k]).unwrap(),
    });
    prepared.run(&stream, call, &mut workspace).unwrap();
    assert!(stream.status().unwrap().is_ok());
    Ran { y: decode(&y, dtype), experts, weights: weights.into_iter().map(f64::from).collect() }
}

/// The same checkpoint with every tensor rounded to bf16, but u32 where they are integers.
pub(crate) fn bf16_copy(name: &str) -> (tempfile::TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::copy(path(name).join("config.json"), directory.path().join("config.json")).unwrap();
    let bytes = std::fs::read(path(name).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = file
        .iter()
        .map(|(name, tensor)| {
            let (bytes, dtype) = if tensor.dtype() == safetensors::Dtype::I64 {
                let ids = tensor.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes) as u32);
                (ids.flat_map(u32::to_le_bytes).collect(), DType::U32)
            } else {
                let numbers: Vec<f32> = chunks(tensor.data()).map(f32::from_le_bytes).collect();
                (encode(&numbers, DType::BF16), DType::BF16)
            };
            let shape = match *tensor.shape() {
                [a] => [a].into(),
                [a, b] => [a, b].into(),
                [a, b, c] => [a, b, c].into(),
                _ => panic!("{name}"),
            };
            (name, bytes, dtype, shape)
        })
        .collect::<Vec<(&str, Vec<u8>, DType, fused_moe::Shape)>>();
    let views =
        tensors.iter().map(|(name, bytes, dtype, shape)| (*name, View::new(&bytes[..], *dtype, 0, *shape).unwrap()));
    write_safetensors(directory.path().join("model.safetensors"), views).unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    (directory, checkpoint)
}

fn encode(numbers: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => numbers.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        other => panic!("{other}"),
    }
}

/// Largest difference over the largest magnitude expected.
pub(crate) fn relative(actual: &[f64], expected: &[f64]) -> f64 {
    relative_to(expected.iter().fold(0.0f64, |m, x| m.max(x.abs())), actual, expected)
}

/// Largest difference over a magnitude; NaN is infinitely far off.
pub(crate) fn relative_to(magnitude: f64, actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let differences = actual.iter().zip(expected).map(|(a, b)| (a - b).abs() / magnitude);
    differences.fold(0.0f64, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}
