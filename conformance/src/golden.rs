//! A layer of a checkpoint against golden data that the model's own code made in f64.
//!
//! A folder holds `config.json`, `model.safetensors` and `golden.safetensors`, which has for each input i `input.i` and
//! `output_f64.i`. Compared where they are there: `topk_ids.i` with `topk_weights_f64.i`; `experts_output_f64.i`, the sum
//! over the routed experts before its scale, made of `experts_input.i` or, without that, of `input.i`. `input_ids.i` has
//! the token ids where experts are chosen by them. A name without `_f64` will do too. `meta.json` may say which layer it
//! is; otherwise it is the first one that is stored.

use crate::compare::{self, Comparison};
use crate::data::{Tensor, Values, decode};
use crate::image::{Placement, Window};
use crate::operands::Buffer;
use crate::tolerance;
use fused_moe::checkpoint::{Checkpoint, CheckpointLayer};
use fused_moe_core::config::{LayerConfig, Selection};
use fused_moe_core::operation::{Forward, RoutesOut, Source};
use fused_moe_core::{Backend, DType, Error as ContractError, Layer, Options, Routing, Status, Stream};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde_json::Value;
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
    /// Of the sum over the routed experts before its scale, from the golden routes where there are any; absent where there
    /// is no golden value.
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
    #[error("{path}: {source}; {HOLDS}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {message}; {HOLDS}", path = path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

const HOLDS: &str = "a golden folder has config.json, model.safetensors and golden.safetensors with input.0, output_f64.0, \
                     topk_ids.0, topk_weights_f64.0, input.1 and so on";

type Result<T, E> = std::result::Result<T, GoldenError<E>>;

/// Runs the layer of a folder on its inputs, in f32 and, where there are golden routes, in bf16.
///
/// Errors: `Checkpoint`, `File`, `Content` when the folder is not as described; `Backend`.
pub fn check_golden<B: Backend>(backend: &B, folder: &Path) -> Result<GoldenReport, B::Error> {
    let content = |name: &str, message: String| GoldenError::Content { path: folder.join(name), message };
    let checkpoint = Checkpoint::open(folder)?;
    let path = folder.join("golden.safetensors");
    let bytes = std::fs::read(&path).map_err(|source| GoldenError::File { path, source })?;
    let wrong = |message: String| content("golden.safetensors", message);
    let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
    let (number, note) = meta(folder).map_err(|message| content("meta.json", message))?;
    let number = number.or(checkpoint.first_stored_layer());
    let number = number.ok_or_else(|| content("config.json", "no layer with experts is stored".into()))?;
    let layer = checkpoint.layer(number)?;

    let mut results = Vec::new();
    for input in 0.. {
        if input > 0 && file.tensor(&format!("input.{input}")).is_err() {
            break;
        }
        let golden = Golden::read(&file, input, &layer).map_err(wrong)?;
        let formats: &[DType] = if golden.routes.is_some() { &[DType::F32, DType::BF16] } else { &[DType::F32] };
        for &dtype in formats {
            results.push(golden.check(backend, &layer, dtype).map_err(GoldenError::Backend)?);
        }
    }
    Ok(GoldenReport { folder: folder.into(), layer: number, note, results })
}

/// What meta.json says, if there is one: the layer's number and a note.
fn meta(folder: &Path) -> std::result::Result<(Option<usize>, Option<String>), String> {
    let Ok(text) = std::fs::read(folder.join("meta.json")) else { return Ok((None, None)) };
    let meta: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let layer = match meta.get("layer") {
        None | Some(Value::Null) => None,
        Some(number) => {
            let layer = number.as_u64().and_then(|layer| usize::try_from(layer).ok());
            Some(layer.ok_or_else(|| format!("\"layer\" is {number}, expected a number"))?)
        }
    };
    Ok((layer, meta.get("note").and_then(Value::as_str).map(str::to_owned)))
}

/// One input and what the model's own code makes of it.
struct Golden {
    input: usize,
    tokens: usize,
    x: Vec<f64>,
    token_ids: Option<Vec<u32>>,
    routes: Option<Routes>,
    routed: Option<Routed>,
    output: Vec<f64>,
}

struct Routes {
    experts: Vec<u32>,
    weights: Vec<f64>,
}

/// The routed experts alone.
struct Routed {
    /// What they read, where that is not the layer's input.
    input: Option<Vec<f64>>,
    output: Vec<f64>,
}

impl Routes {
    /// Tokens with another set of experts, and the largest error of the others' weights.
    fn compare(&self, top_k: usize, found: &Returned) -> (usize, f64) {
        let largest = self.weights.iter().fold(f64::MIN_POSITIVE, |m, w| m.max(w.abs()));
        let (mut other, mut error) = (0, 0.0f64);
        for t in 0..self.experts.len() / top_k {
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
        let hidden = layer.config.hidden;
        let x = needed(file, "input", input, None)?;
        if !x.len().is_multiple_of(hidden) {
            return Err(format!("input.{input} has {} elements, expected [T, {hidden}]", x.len()));
        }
        let (tokens, count) = (x.len() / hidden, Some(x.len()));
        let slots = Some(tokens * layer.config.top_k);
        let ids = |values: Vec<f64>| -> Vec<u32> { values.into_iter().map(|id| id as i64 as u32).collect() };
        let token_ids = match layer.config.routing.selection {
            Selection::Table => Some(ids(needed(file, "input_ids", input, Some(tokens))?)),
            _ => None,
        };
        let experts = numbers(file, "topk_ids", input, slots)?.map(ids);
        let routes = match (experts, numbers(file, "topk_weights", input, slots)?) {
            (Some(experts), Some(weights)) => Some(Routes { experts, weights }),
            _ => None,
        };
        let routed = match numbers(file, "experts_output", input, count)? {
            Some(output) => Some(Routed { input: numbers(file, "experts_input", input, count)?, output }),
            None => None,
        };
        let output = needed(file, "output", input, count)?;
        Ok(Self { input, tokens, x, token_ids, routes, routed, output })
    }

    fn check<B: Backend>(
        &self,
        backend: &B,
        layer: &CheckpointLayer<'_>,
        dtype: DType,
    ) -> std::result::Result<GoldenResult, B::Error> {
        let LayerConfig { hidden, intermediate, top_k, shared, .. } = layer.config;
        let inner = hidden + intermediate + top_k + shared.map_or(0, |shared| shared.intermediate);
        let tolerance = tolerance::golden(inner, dtype);
        let own = self.run(backend, layer, (&self.x, dtype), None)?;
        let routes = self.routes.as_ref();
        let (other_routes, weights_error) = routes.map_or((0, 0.0), |routes| routes.compare(top_k, &own));
        let given = match routes {
            Some(_) if dtype != DType::F32 => Some(self.run(backend, layer, (&self.x, dtype), routes)?),
            _ => None,
        };
        let output = relative("output", &self.output, &given.as_ref().unwrap_or(&own).y, tolerance);
        let routed = match &self.routed {
            Some(Routed { input, output }) => {
                let mut alone = layer.clone();
                alone.config.routed_scale = 1.0;
                (alone.config.shared, alone.weights.shared) = (None, None);
                if input.is_some() {
                    (alone.config.gate.norm, alone.weights.router_norm) = (None, None);
                }
                let run = self.run(backend, &alone, (input.as_ref().unwrap_or(&self.x), dtype), routes)?;
                Some(relative("experts_output", output, &run.y, tolerance))
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

    /// Calls the layer, with its own routes or with the golden ones.
    fn run<B: Backend>(
        &self,
        backend: &B,
        layer: &CheckpointLayer<'_>,
        (x, dtype): (&[f64], DType),
        given: Option<&Routes>,
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
        let given = match given {
            Some(Routes { experts, weights }) => Some([
                input("experts", Tensor::ids([tokens, top_k], experts.clone()))?,
                input("weights", Tensor::floats(DType::F32, [tokens, top_k], weights.iter().copied()))?,
            ]),
            None => None,
        };
        let token_ids = match &self.token_ids {
            Some(ids) if given.is_none() => Some(input("token_ids", Tensor::ids([tokens], ids.clone()))?),
            _ => None,
        };
        let mut y = output("y", dtype, [tokens, hidden])?;
        let mut experts = output("experts", DType::U32, [tokens, top_k])?;
        let mut weights = output("weights", DType::F32, [tokens, top_k])?;
        let mut call = Forward::new(x.read()?, y.write()?);
        call.token_ids = token_ids.as_ref().map(Buffer::read).transpose()?;
        call.routes = Some(RoutesOut { experts: experts.write()?, weights: weights.write()? });
        if let Some([experts, weights]) = &given {
            call.source = Source::Routes(Routing { experts: experts.read()?, weights: weights.read()? });
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

fn needed(
    file: &SafeTensors<'_>,
    name: &str,
    input: usize,
    count: Option<usize>,
) -> std::result::Result<Vec<f64>, String> {
    numbers(file, name, input, count)?.ok_or_else(|| format!("no {name}.{input}"))
}

/// The numbers of `NAME_f64.i` or `NAME.i`, whatever their format, if there is one of them.
fn numbers(
    file: &SafeTensors<'_>,
    name: &str,
    input: usize,
    count: Option<usize>,
) -> std::result::Result<Option<Vec<f64>>, String> {
    let names = [format!("{name}_f64.{input}"), format!("{name}.{input}")];
    let found = names.into_iter().find_map(|name| Some((file.tensor(&name).ok()?, name)));
    let Some((tensor, name)) = found else { return Ok(None) };
    let data = tensor.data();
    let values: Vec<f64> = match tensor.dtype() {
        Dtype::F64 => data.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        Dtype::F32 => data.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        Dtype::I32 => data.as_chunks().0.iter().map(|&b| f64::from(i32::from_le_bytes(b))).collect(),
        Dtype::U32 => data.as_chunks().0.iter().map(|&b| f64::from(u32::from_le_bytes(b))).collect(),
        Dtype::I64 => data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect(),
        other => return Err(format!("{name} is {other:?}, expected F32, F64, I32, U32 or I64")),
    };
    match count {
        Some(count) if values.len() != count => Err(format!("{name} has {} elements, expected {count}", values.len())),
        _ => Ok(Some(values)),
    }
}
