//! Folders of golden data: what a model's own code computed, against what comes out here.

use crate::output::{checkpoint_error, remedied};
use anyhow::{Context, Result};
use fused_moe::backend::{shorten, shorten_mut};
use fused_moe::checkpoint::{Checkpoint, CheckpointLayer};
use fused_moe::config::LayerConfig;
use fused_moe::operation::{Forward, RoutesOut};
use fused_moe::{Backend, DType, Device, Layer, Options, Stream, View, Visitor};
use fused_moe_conformance::tolerance;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Golden numbers are the model's own f64 with a few constants in f32.
const GOLDEN_TOLERANCE: f64 = 1e-5;

/// What a folder's comparison found; errors are relative to the largest expected value.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    pub(crate) layer: usize,
    pub(crate) tokens: usize,
    /// Tokens that went to other experts.
    pub(crate) rerouted: usize,
    pub(crate) weights: f64,
    /// Of the routed experts alone, where the folder has it.
    pub(crate) experts: Option<f64>,
    pub(crate) output: f64,
    pub(crate) tolerance: f64,
}

impl Verdict {
    pub(crate) fn passed(&self) -> bool {
        let close = |error: f64| error <= self.tolerance;
        self.rerouted == 0 && close(self.weights) && close(self.output) && self.experts.is_none_or(close)
    }
}

/// Compares every `input.i` of a folder.
pub(crate) fn compare(device: &Device, folder: &Path) -> Result<Verdict> {
    let checkpoint = Checkpoint::open(folder).map_err(checkpoint_error)?;
    let golden = folder.join("golden.safetensors");
    let help = "a golden folder has config.json, model.safetensors and golden.safetensors with input.0, output.0, ...";
    let failed = |message: String| remedied(format!("{}: {message}", golden.display()), help);
    let bytes = fs::read(&golden).map_err(|error| failed(error.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| failed(error.to_string()))?;
    let layer = match layer_number(folder)?.or(checkpoint.first_stored_layer()) {
        Some(index) => checkpoint.layer(index).map_err(checkpoint_error)?,
        None => return Err(failed("the model has no layer with experts".into())),
    };
    let LayerConfig { hidden, intermediate, top_k, .. } = layer.config;
    let allowed = tolerance::layer(hidden + intermediate + top_k, DType::F32, 0.0).max(GOLDEN_TOLERANCE);
    let mut verdict = Verdict {
        layer: layer.index,
        tokens: 0,
        rerouted: 0,
        weights: 0.0,
        experts: None,
        output: 0.0,
        tolerance: allowed,
    };
    let routed = routed_only(&layer);
    for case in 0.. {
        let Some(x) = floats(&file, &format!("input.{case}")) else { break };
        let x: Vec<f32> = x.into_iter().map(|x| x as f32).collect();
        let output = golden_floats(&file, "output", case).ok_or_else(|| failed(format!("no output.{case}")))?;
        if !x.len().is_multiple_of(hidden) || output.len() != x.len() {
            return Err(failed(format!("input.{case} and output.{case} are not both [T, {hidden}]")));
        }
        let ran = device.visit(Once { layer: &layer, x: &x })?;
        verdict.tokens += x.len() / hidden;
        verdict.output = verdict.output.max(relative(&ran.y, &output));
        if let (Some(ids), Some(weights)) = (ids(&file, case), golden_floats(&file, "topk_weights", case)) {
            let (rerouted, error) = routes(top_k, (&ran.experts, &ran.weights), (&ids, &weights));
            verdict.rerouted += rerouted;
            verdict.weights = verdict.weights.max(error);
        }
        if let Some(expected) = golden_floats(&file, "experts_output", case) {
            let y = device.visit(Once { layer: &routed, x: &x })?.y;
            let error = relative(&y, &expected);
            verdict.experts = Some(verdict.experts.unwrap_or(0.0).max(error));
        }
    }
    if verdict.tokens == 0 {
        return Err(failed("no input.0".into()));
    }
    Ok(verdict)
}

/// The layer that meta.json names.
fn layer_number(folder: &Path) -> Result<Option<usize>> {
    let path = folder.join("meta.json");
    let Ok(text) = fs::read(&path) else { return Ok(None) };
    let meta: Value = serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?;
    Ok(meta.get("layer").and_then(Value::as_u64).and_then(|layer| usize::try_from(layer).ok()))
}

/// The same layer without its shared expert and the factor on the routed ones.
fn routed_only<'a>(layer: &CheckpointLayer<'a>) -> CheckpointLayer<'a> {
    let mut routed = layer.clone();
    routed.config.shared = None;
    routed.config.routed_scale = 1.0;
    routed.weights.shared = None;
    routed
}

fn golden_floats(file: &SafeTensors<'_>, name: &str, case: usize) -> Option<Vec<f64>> {
    floats(file, &format!("{name}_f64.{case}")).or_else(|| floats(file, &format!("{name}.{case}")))
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Option<Vec<f64>> {
    let tensor = file.tensor(name).ok()?;
    match tensor.dtype() {
        Dtype::F64 => Some(tensor.data().as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()),
        Dtype::F32 => Some(crate::tensors::floats(DType::F32, tensor.data()).collect()),
        _ => None,
    }
}

fn ids(file: &SafeTensors<'_>, case: usize) -> Option<Vec<u32>> {
    let tensor = file.tensor(&format!("topk_ids.{case}")).ok()?;
    match tensor.dtype() {
        Dtype::I32 | Dtype::U32 => {
            Some(tensor.data().as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
        }
        Dtype::I64 => Some(tensor.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes) as u32).collect()),
        _ => None,
    }
}

/// Tokens with another set of experts, and the largest error of a weight of the others.
fn routes(top_k: usize, found: (&[u32], &[f32]), expected: (&[u32], &[f64])) -> (usize, f64) {
    let (mut rerouted, mut worst) = (0, 0f64);
    let largest = expected.1.iter().fold(f64::MIN_POSITIVE, |m, w| m.max(w.abs()));
    let tokens = found.0.chunks(top_k).zip(found.1.chunks(top_k));
    for ((ids, weights), (wanted_ids, wanted)) in tokens.zip(expected.0.chunks(top_k).zip(expected.1.chunks(top_k))) {
        let weight_of = |id| ids.iter().position(|&found| found == id).map(|k| f64::from(weights[k]));
        let errors: Option<Vec<f64>> =
            wanted_ids.iter().zip(wanted).map(|(&id, w)| Some((weight_of(id)? - w).abs() / largest)).collect();
        match errors {
            Some(errors) => worst = errors.into_iter().fold(worst, f64::max),
            None => rerouted += 1,
        }
    }
    rerouted += (found.0.len() != expected.0.len()) as usize;
    (rerouted, worst)
}

fn relative(actual: &[f32], expected: &[f64]) -> f64 {
    let actual = actual.iter().copied().map(f64::from);
    crate::run::relative_error(actual, || expected.iter().copied())
}

struct Ran {
    y: Vec<f32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

/// Runs a layer once on tokens in f32.
struct Once<'a> {
    layer: &'a CheckpointLayer<'a>,
    x: &'a [f32],
}

impl Visitor for Once<'_> {
    type Output = Result<Ran>;

    fn visit<B: Backend>(self, backend: &B) -> Result<Ran> {
        let layer = self.layer.prepare(backend, &Options::default())?;
        let LayerConfig { hidden, top_k, .. } = *layer.config();
        let tokens = self.x.len() / hidden;
        let mut ran =
            Ran { y: vec![0.0; self.x.len()], experts: vec![0; tokens * top_k], weights: vec![0.0; tokens * top_k] };
        let stream = backend.stream()?;
        let mut workspace = layer.workspace(tokens)?;
        let mut x = backend.allocate(size_of_val(self.x))?;
        backend.upload(bytemuck::cast_slice(self.x), &mut x)?;
        let mut y = backend.allocate(size_of_val(self.x))?;
        let mut experts = backend.allocate(tokens * top_k * size_of::<u32>())?;
        let mut weights = backend.allocate(tokens * top_k * size_of::<f32>())?;
        let mut call = Forward::<B>::new(
            shorten::<B>(View::new(B::read(&x), DType::F32, 0, [tokens, hidden])?),
            shorten_mut::<B>(View::new(B::write(&mut y), DType::F32, 0, [tokens, hidden])?),
        );
        call.routes = Some(RoutesOut {
            experts: shorten_mut::<B>(View::new(B::write(&mut experts), DType::U32, 0, [tokens, top_k])?),
            weights: shorten_mut::<B>(View::new(B::write(&mut weights), DType::F32, 0, [tokens, top_k])?),
        });
        layer.run(&stream, call, &mut workspace)?;
        let status = stream.status()?;
        anyhow::ensure!(status.is_ok(), "status: {status}");
        backend.download(&stream, &y, bytemuck::cast_slice_mut(&mut ran.y))?;
        backend.download(&stream, &experts, bytemuck::cast_slice_mut(&mut ran.experts))?;
        backend.download(&stream, &weights, bytemuck::cast_slice_mut(&mut ran.weights))?;
        Ok(ran)
    }
}
