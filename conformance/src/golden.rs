//! A layer of a checkpoint against golden data that the model's own code made in f64.
//!
//! A folder holds `config.json`, `model.safetensors`, `meta.json` (the layer's number) and `golden.safetensors`: for each
//! input i `input.i`, `output_f64.i`, `topk_ids.i`, `topk_weights_f64.i` and, where the model keeps the routed experts
//! apart, `experts_input.i` and `experts_output_f64.i`; `input_ids.i` where experts are chosen by token id.

use crate::compare::{self, Comparison};
use crate::data::{Tensor, Values, decode};
use crate::image::{Placement, Window};
use crate::operands::Buffer;
use crate::tolerance;
use fused_moe::checkpoint::{Checkpoint, CheckpointLayer};
use fused_moe_core::config::Selection;
use fused_moe_core::operation::{Forward, RoutesOut, Source};
use fused_moe_core::{Backend, DType, Error as ContractError, Layer, Options, Routing, Status, Stream};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What a golden folder says of a backend.
#[derive(Clone, Debug, Serialize)]
pub struct GoldenReport {
    /// The folder.
    pub folder: PathBuf,
    /// The layer's number.
    pub layer: usize,
    /// What the folder says of its data, where that is out of the ordinary.
    pub note: Option<String>,
    /// One for each input and format.
    pub results: Vec<GoldenResult>,
}

impl GoldenReport {
    /// Whether all is within the tolerance.
    pub fn passed(&self) -> bool {
        !self.results.is_empty() && self.results.iter().all(|result| result.message.is_none())
    }
}

/// One input in one format. Errors are parts of the largest golden value.
#[derive(Clone, Debug, Serialize)]
pub struct GoldenResult {
    /// The input's number.
    pub input: usize,
    /// Format of x and y.
    pub dtype: String,
    /// T.
    pub tokens: usize,
    /// Tokens that went to another set of experts.
    pub other_routes: usize,
    /// Of the weights of all other tokens.
    pub weights_error: f64,
    /// Of the sum over the routed experts before its scale, from the golden routes; absent where there is no golden value.
    pub experts_error: Option<f64>,
    /// Of the layer's output; in a format narrower than f32 from the golden routes.
    pub output_error: f64,
    /// What the errors may be.
    pub tolerance: f64,
    /// What is wrong, if anything is.
    pub message: Option<String>,
}

/// Why golden data could not be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GoldenError<E: std::error::Error> {
    /// The backend failed.
    #[error(transparent)]
    Backend(E),
    /// The checkpoint can not be read.
    #[error(transparent)]
    Checkpoint(#[from] fused_moe::checkpoint::Error),
    /// A file can not be read.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {message}", path = path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

type Result<T, E> = std::result::Result<T, GoldenError<E>>;

/// Runs the layer of a folder on its inputs, in f32 and in bf16.
///
/// Errors: `Checkpoint`, `File`, `Content` when the folder is not as described; `Backend`.
pub fn check_golden<B: Backend>(backend: &B, folder: &Path) -> Result<GoldenReport, B::Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read(&path).map_err(|source| GoldenError::File { path, source })
    };
    let content = |name: &str, message: String| GoldenError::Content { path: folder.join(name), message };
    let meta: serde_json::Value =
        serde_json::from_slice(&read("meta.json")?).map_err(|error| content("meta.json", error.to_string()))?;
    let number = meta.get("layer").and_then(serde_json::Value::as_u64);
    let number = number.ok_or_else(|| content("meta.json", "no number under \"layer\"".into()))? as usize;
    let bytes = read("golden.safetensors")?;
    let wrong = |message: String| content("golden.safetensors", message);
    let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
    let checkpoint = Checkpoint::open(folder)?;
    let layer = checkpoint.layer(number)?;

    let mut results = Vec::new();
    let mut input = 0;
    while file.tensor(&format!("input.{input}")).is_ok() {
        let golden = Golden::read(&file, input, &layer).map_err(wrong)?;
        for dtype in [DType::F32, DType::BF16] {
            results.push(golden.check(backend, &layer, dtype).map_err(GoldenError::Backend)?);
        }
        input += 1;
    }
    let note = meta.get("note").and_then(serde_json::Value::as_str).map(str::to_owned);
    Ok(GoldenReport { folder: folder.into(), layer: number, note, results })
}

/// One input and what the model's own code makes of it.
struct Golden {
    input: usize,
    tokens: usize,
    x: Vec<f64>,
    token_ids: Option<Vec<u32>>,
    experts: Vec<u32>,
    weights: Vec<f64>,
    /// Input and output of the routed experts.
    routed: Option<[Vec<f64>; 2]>,
    output: Vec<f64>,
}

/// What a call returned.
struct Returned {
    y: Vec<f64>,
    experts: Vec<u32>,
    weights: Vec<f64>,
    status: Status,
}

impl Golden {
    fn read(file: &SafeTensors<'_>, input: usize, layer: &CheckpointLayer<'_>) -> std::result::Result<Self, String> {
        let floats = |name: &str| numbers(file, &format!("{name}.{input}"));
        let ids = |name: &str| -> std::result::Result<Vec<u32>, String> {
            Ok(floats(name)?.into_iter().map(|id| id as i64 as u32).collect())
        };
        let x = floats("input")?;
        let tokens = x.len() / layer.config.hidden;
        let by_token_id = layer.config.routing.selection == Selection::Table;
        let token_ids = by_token_id.then(|| ids("input_ids")).transpose()?;
        let routed = match (floats("experts_input"), floats("experts_output_f64")) {
            (Ok(x), Ok(y)) if x.len() == tokens * layer.config.hidden && y.len() == x.len() => Some([x, y]),
            _ => None,
        };
        let (experts, weights) = (ids("topk_ids")?, floats("topk_weights_f64")?);
        let (output, slots) = (floats("output_f64")?, tokens * layer.config.top_k);
        let sizes = [output.len(), experts.len(), weights.len()];
        if sizes != [x.len(), slots, slots] {
            return Err(format!("input {input}: output, ids and weights have {sizes:?} elements"));
        }
        Ok(Self { input, tokens, x, token_ids, experts, weights, routed, output })
    }

    fn check<B: Backend>(
        &self,
        backend: &B,
        layer: &CheckpointLayer<'_>,
        dtype: DType,
    ) -> std::result::Result<GoldenResult, B::Error> {
        let tolerance = tolerance::golden(dtype);
        let own = self.run(backend, layer, (&self.x, dtype), false)?;
        let (other_routes, weights_error) = self.compare_routes(layer.config.top_k, &own);
        let given = if dtype == DType::F32 { None } else { Some(self.run(backend, layer, (&self.x, dtype), true)?) };
        let output = relative("output", &self.output, &given.as_ref().unwrap_or(&own).y, tolerance);
        let routed = match &self.routed {
            Some([x, y]) => {
                let mut alone = layer.clone();
                alone.config.routed_scale = 1.0;
                (alone.config.shared, alone.weights.shared) = (None, None);
                (alone.config.gate.norm, alone.weights.router_norm) = (None, None);
                let run = self.run(backend, &alone, (x, dtype), true)?;
                Some(relative("experts_output", y, &run.y, tolerance))
            }
            None => None,
        };
        // rounding x moves the logits: a narrow format may choose otherwise
        let routes =
            (dtype == DType::F32 && other_routes > 0).then(|| format!("{other_routes} tokens took other routes"));
        let weights = (weights_error > tolerance).then(|| format!("weights are off by {weights_error:.1e}"));
        let status = (!own.status.is_ok()).then(|| format!("status: {}", own.status));
        let failures = [routes, weights, status, output.failure, routed.as_ref().and_then(|c| c.failure.clone())];
        let failures: Vec<String> = failures.into_iter().flatten().collect();
        Ok(GoldenResult {
            input: self.input,
            dtype: dtype.to_string(),
            tokens: self.tokens,
            other_routes,
            weights_error,
            experts_error: routed.map(|comparison| comparison.error),
            output_error: output.error,
            tolerance,
            message: (!failures.is_empty()).then(|| failures.join("; ")),
        })
    }

    /// Tokens with another set of experts, and the largest error of the others' weights.
    fn compare_routes(&self, top_k: usize, found: &Returned) -> (usize, f64) {
        let largest = self.weights.iter().fold(f64::MIN_POSITIVE, |m, w| m.max(w.abs()));
        let (mut other, mut error) = (0, 0.0f64);
        for t in 0..self.tokens {
            let sorted = |ids: &[u32], weights: &[f64]| {
                let mut row: Vec<(u32, f64)> = (t * top_k..(t + 1) * top_k).map(|r| (ids[r], weights[r])).collect();
                row.sort_by_key(|&(id, _)| id);
                row
            };
            let (want, got) = (sorted(&self.experts, &self.weights), sorted(&found.experts, &found.weights));
            if want.iter().zip(&got).any(|(want, got)| want.0 != got.0) {
                other += 1;
                continue;
            }
            for ((_, want), (_, got)) in want.iter().zip(&got) {
                let off = (want - got).abs() / largest;
                error = if off.is_nan() { f64::INFINITY } else { error.max(off) };
            }
        }
        (other, error)
    }

    /// Calls the layer, with its own routes or with the golden ones.
    fn run<B: Backend>(
        &self,
        backend: &B,
        layer: &CheckpointLayer<'_>,
        (x, dtype): (&[f64], DType),
        given: bool,
    ) -> std::result::Result<Returned, B::Error> {
        let (hidden, top_k, tokens) = (layer.config.hidden, layer.config.top_k, self.tokens);
        let prepared = layer.prepare(backend, &Options::default())?;
        let mut workspace = prepared.workspace(tokens)?;
        let stream = backend.stream()?;
        let input = |name, tensor: Tensor| Buffer::<B>::input(backend, &(name, tensor), Placement::Plain, 0);
        let output = |name, dtype, shape: [usize; 2]| {
            let window = Window::new(dtype, shape.into(), Placement::Plain, 0);
            Buffer::<B>::new(backend, name, window, window.poisoned(0xff))
        };
        let x = input("x", Tensor::floats(dtype, [tokens, hidden], x.iter().copied()))?;
        let golden_experts = input("experts", Tensor::ids([tokens, top_k], self.experts.clone()))?;
        let golden_weights =
            input("weights", Tensor::floats(DType::F32, [tokens, top_k], self.weights.iter().copied()))?;
        let token_ids = match &self.token_ids {
            Some(ids) if !given => Some(input("token_ids", Tensor::ids([tokens], ids.clone()))?),
            _ => None,
        };
        let mut y = output("y", dtype, [tokens, hidden])?;
        let mut experts = output("experts", DType::U32, [tokens, top_k])?;
        let mut weights = output("weights", DType::F32, [tokens, top_k])?;
        let mut call = Forward::new(x.read()?, y.write()?);
        call.token_ids = token_ids.as_ref().map(Buffer::read).transpose()?;
        call.routes = Some(RoutesOut { experts: experts.write()?, weights: weights.write()? });
        if given {
            call.source = Source::Routes(Routing { experts: golden_experts.read()?, weights: golden_weights.read()? });
        }
        prepared.run(&stream, call, &mut workspace)?;
        let status = stream.status()?;
        let fetch = |buffer: &Buffer<B>| -> std::result::Result<Values, B::Error> {
            let mut image = vec![0; buffer.before.len()];
            backend.download(&stream, &buffer.memory, &mut image)?;
            Ok(decode(buffer.window.dtype, &buffer.window.elements(&image)))
        };
        match (fetch(&y)?, fetch(&experts)?, fetch(&weights)?) {
            (Values::Floats(y), Values::Ids(experts), Values::Floats(weights)) => {
                Ok(Returned { y, experts, weights, status })
            }
            _ => {
                let reason = "the layer returned other formats than it was given";
                Err(ContractError::Missing { operation: "golden", operand: "y", reason }.into())
            }
        }
    }
}

/// Elements within `tolerance` of the largest golden value.
fn relative(name: &str, golden: &[f64], found: &[f64], tolerance: f64) -> Comparison {
    let largest = golden.iter().fold(f64::MIN_POSITIVE, |m, y| m.max(y.abs()));
    compare::floats(name, [golden.len()].into(), [golden, &vec![tolerance * largest; golden.len()], found])
}

/// A tensor's numbers, whatever their format.
fn numbers(file: &SafeTensors<'_>, name: &str) -> std::result::Result<Vec<f64>, String> {
    let tensor = file.tensor(name).map_err(|error| format!("{name}: {error}"))?;
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F64 => Ok(data.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()),
        Dtype::F32 => Ok(data.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect()),
        Dtype::I32 => Ok(data.as_chunks().0.iter().map(|&b| f64::from(i32::from_le_bytes(b))).collect()),
        Dtype::I64 => Ok(data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect()),
        other => Err(format!("{name}: expected F32, F64, I32 or I64, got {other:?}")),
    }
}
