//! Calls of one layer on one input: what comes out, and how long they take.

use crate::bench::weights::Numbers;
use crate::tensors::Tensor;
use anyhow::Result;
use fused_moe::backend::{shorten, shorten_mut};
use fused_moe::checkpoint::CheckpointLayer;
use fused_moe::operation::{Forward, RoutesOut};
use fused_moe::weights::{ExpertMatrices, Matrix};
use fused_moe::{Backend, DType, Layer, NO_EXPERT, Options, Status, Stream, View, Visitor};
use std::time::{Duration, Instant};

/// Timed runs, after one that warms up; fewer where they take long.
const RUNS: usize = 5;
const ENOUGH: Duration = Duration::from_secs(2);

/// What a layer did.
pub(super) struct Ran {
    pub(super) y: Vec<u8>,
    /// Slots of each expert.
    pub(super) counts: Vec<u32>,
    /// Slots that went nowhere, their expert being full.
    pub(super) dropped: usize,
    /// Slots of experts without weights.
    pub(super) weightless: usize,
    /// What the router hands on to the next one, `[T, M]`.
    pub(super) state: Option<Vec<f32>>,
    pub(super) status: Status,
    pub(super) median: Duration,
    pub(super) runs: usize,
    /// Bytes of the weights that were needed.
    pub(super) bytes: u64,
    pub(super) device: String,
}

impl Ran {
    /// In 10^9 bytes a second.
    pub(super) fn bandwidth(&self) -> f64 {
        self.bytes as f64 / self.median.as_secs_f64().max(1e-9) / 1e9
    }
}

/// Runs a layer a few times on one input.
pub(super) struct Once<'a> {
    pub(super) layer: &'a CheckpointLayer<'a>,
    pub(super) input: &'a Tensor,
    /// One for each token, where experts are chosen by them; where absent, random ones.
    pub(super) ids: Option<&'a [u32]>,
    /// What the router before hands on, `[T, M]`.
    pub(super) state: Option<&'a [f32]>,
    /// Of random token ids.
    pub(super) seed: u64,
    /// How many outputs are on the host in the end.
    pub(super) outputs_kept: usize,
    /// Bytes that x and y may have each.
    pub(super) largest: u64,
}

impl Visitor for Once<'_> {
    type Output = Result<Ran>;

    fn visit<B: Backend>(self, backend: &B) -> Result<Ran> {
        let layer = self.layer.prepare(backend, &Options::default())?;
        let (dtype, shape, experts) = (self.input.dtype, self.input.shape, layer.config().experts);
        let (top_k, width) = (layer.config().top_k, layer.config().router_mlp.map(|mlp| mlp.width));
        let routes_asked = layer.config().capacity.is_some() || layer.config().zero_experts.is_some();
        if backend.name() == "cpu" {
            // x and y of the backend, routes and states
            let besides = if routes_asked { top_k * 8 } else { 0 } + width.unwrap_or(0) * 8;
            let needed = |tokens: usize| layer.workspace_bytes(tokens).ok()?.checked_add(tokens.checked_mul(besides)?);
            self.input.check_memory(self.outputs_kept + 2, self.largest, needed)?;
        } else {
            self.input.check_memory(self.outputs_kept, self.largest, |_| Some(0))?;
        }
        let stream = backend.stream()?;
        let mut workspace = layer.workspace(shape.rows())?;
        let mut x = backend.allocate(self.input.bytes().len())?;
        backend.upload(self.input.bytes(), &mut x)?;
        let mut y = backend.allocate(self.input.bytes().len())?;
        let uploaded = |bytes: &[u8]| -> Result<B::Memory> {
            let mut memory = backend.allocate(bytes.len())?;
            backend.upload(bytes, &mut memory)?;
            Ok(memory)
        };
        let ids = match (&self.layer.weights.table, self.ids) {
            (None, _) => None,
            (Some(_), Some(ids)) => Some(uploaded(bytemuck::cast_slice(ids))?),
            (Some(table), None) => {
                Some(uploaded(bytemuck::cast_slice(&random_ids(shape.rows(), table.vocabulary, self.seed)))?)
            }
        };
        let (previous, mut next) = match width {
            Some(width) => {
                let previous = self.state.map(|state| uploaded(bytemuck::cast_slice(state))).transpose()?;
                (previous, Some((backend.allocate(shape.rows() * width * size_of::<f32>())?, width)))
            }
            None => (None, None),
        };
        let slots = shape.rows() * top_k;
        let mut routes = match routes_asked {
            true => Some([backend.allocate(slots * 4)?, backend.allocate(slots * 4)?]),
            false => None,
        };
        let ends = match shape.dims() {
            &[sequences, tokens, _] if self.layer.by_sequence => {
                let ends: Vec<u32> = (0..=sequences).map(|n| (n * tokens) as u32).collect();
                Some((uploaded(bytemuck::cast_slice(&ends))?, ends.len())).filter(|_| sequences > 0)
            }
            _ => None,
        };
        let mut counts = backend.allocate(experts * size_of::<u32>())?;
        let mut status = Status::OK;
        let mut times = Vec::new();
        let begin = Instant::now();
        for run in 0..=RUNS {
            if run > 1 && begin.elapsed() > ENOUGH {
                break;
            }
            let mut call = Forward::<B>::new(
                shorten::<B>(View::new(B::read(&x), dtype, 0, shape)?),
                shorten_mut::<B>(View::new(B::write(&mut y), dtype, 0, shape)?),
            );
            if let Some(ids) = &ids {
                call.token_ids = Some(shorten::<B>(View::new(B::read(ids), DType::U32, 0, [shape.rows()])?));
            }
            if let Some((ends, count)) = &ends {
                call.sequences = Some(shorten::<B>(View::new(B::read(ends), DType::U32, 0, [*count])?));
            }
            if let Some(previous) = &previous {
                let shape = [shape.rows(), width.unwrap_or(0)];
                call.router_state.previous = Some(shorten::<B>(View::new(B::read(previous), DType::F32, 0, shape)?));
            }
            if let Some((next, width)) = &mut next {
                let shape = [shape.rows(), *width];
                call.router_state.next = Some(shorten_mut::<B>(View::new(B::write(next), DType::F32, 0, shape)?));
            }
            if let (0, Some([experts, weights])) = (run, &mut routes) {
                let shape = [shape.rows(), top_k];
                call.routes = Some(RoutesOut {
                    experts: shorten_mut::<B>(View::new(B::write(experts), DType::U32, 0, shape)?),
                    weights: shorten_mut::<B>(View::new(B::write(weights), DType::F32, 0, shape)?),
                });
            }
            call.counts = Some(shorten_mut::<B>(View::new(B::write(&mut counts), DType::U32, 0, [experts])?));
            let start = Instant::now();
            layer.run(&stream, call, &mut workspace)?;
            status |= stream.status()?;
            if run > 0 {
                times.push(start.elapsed());
            }
        }
        times.sort_unstable();
        let mut ran = Ran {
            y: vec![0; self.input.bytes().len()],
            counts: vec![0; experts],
            dropped: 0,
            weightless: 0,
            state: next.as_ref().map(|(_, width)| vec![0.0; shape.rows() * width]),
            status,
            median: times.get(times.len() / 2).copied().unwrap_or_default(),
            runs: times.len(),
            bytes: 0,
            device: format!("{}: {}", backend.name(), backend.describe()),
        };
        backend.download(&stream, &y, &mut ran.y)?;
        backend.download(&stream, &counts, bytemuck::cast_slice_mut(&mut ran.counts))?;
        if let (Some((next, _)), Some(state)) = (&next, &mut ran.state) {
            backend.download(&stream, next, bytemuck::cast_slice_mut(state))?;
        }
        if let Some([chosen, _]) = &routes {
            let mut ids = vec![0u32; slots];
            backend.download(&stream, chosen, bytemuck::cast_slice_mut(&mut ids))?;
            ran.dropped = ids.iter().filter(|&&id| id == NO_EXPERT).count();
            ran.weightless = ids.iter().filter(|&&id| id != NO_EXPERT && id as usize >= experts).count();
        }
        ran.bytes = weight_bytes(self.layer, &ran.counts);
        Ok(ran)
    }
}

fn random_ids(tokens: usize, vocabulary: usize, seed: u64) -> Vec<u32> {
    let mut ids = Numbers::new(DType::F32, tokens, 1.0, seed).into_words();
    ids.truncate(tokens);
    // the numbers are f32, whose low bits are mostly 0
    let mixed = |bits: u32| u64::from(bits).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    ids.iter_mut().for_each(|id| *id = (mixed(*id) % vocabulary.max(1) as u64) as u32);
    ids
}

/// Bytes of the router, the shared expert, and the experts that have tokens.
fn weight_bytes(layer: &CheckpointLayer<'_>, counts: &[u32]) -> u64 {
    let matrix = |matrix: &Matrix<'_>| (matrix.rows() * matrix.cols() * matrix.dtype().size()) as u64;
    let expert = |expert: &ExpertMatrices<'_>| {
        let optional = [&expert.gate, &expert.gate_bias, &expert.up_bias, &expert.down_bias];
        optional.into_iter().flatten().chain([&expert.up, &expert.down]).map(matrix).sum::<u64>()
    };
    let weights = &layer.weights;
    let router = weights.router.map_or(0, |router| router.extent() as u64);
    let shared = weights.shared.as_ref().map_or(0, |shared| expert(&shared.matrices));
    let used = weights.experts.iter().zip(counts).filter(|(_, count)| **count > 0);
    router + shared + used.map(|(matrices, _)| expert(matrices)).sum::<u64>()
}
