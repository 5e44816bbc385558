//! A layer of a checkpoint against golden data that the model's own code made in f64.
//!
//! A folder holds `config.json`, `model.safetensors` and `golden.safetensors`, which has for each input i `input.i` and
//! `output_f64.i`. Compared where they are there: `topk_ids.i` with `topk_weights_f64.i`; `experts_output_f64.i`, the sum
//! over the routed experts before its scale, made of `experts_input.i` or, without that, of `input.i`. `input_ids.i` has
//! the token ids where experts are chosen by them; `router_state.i` what the router of the layer before hands on, where
//! routers do that: without it the layer is as the first of its model. A name without `_f64` will do too. `meta.json` may
//! say which layer it is; otherwise it is the first one that is stored.
//!
//! An input `[N, L, H]` is N sequences, where experts have a capacity. Of experts that every token goes to the golden routes
//! say nothing. Where `meta.json` notes that the output is that of a whole decoder layer, it is `(x + y) * layer_scalar`.

mod file;

use crate::compare::{self, Comparison};
use crate::data::{Tensor, Values, decode};
use crate::image::{Placement, Window};
use crate::operands::Buffer;
use crate::tolerance;
use file::{Meta, layer_scalar, meta, needed, numbers, sequences};
use fused_moe::checkpoint::{Checkpoint, CheckpointLayer};
use fused_moe_core::config::{GateConfig, LayerConfig, RouterMlp, RoutingRule, Selection};
use fused_moe_core::operation::{Forward, RoutesOut, Source};
use fused_moe_core::weights::{LayerWeights, NormWeights};
use fused_moe_core::{Backend, DType, Error as ContractError, Layer, NO_EXPERT, Options, Routing, Status, Stream};
use safetensors::SafeTensors;
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

/// How a note begins where the output holds more than the block's.
const WHOLE_LAYER: &str = "output = whole decoder layer";

/// Runs the layer of a folder on its inputs, in f32 and, where there are golden routes, in bf16.
///
/// Errors: `Checkpoint`, `File`, `Content` when the folder is not as described; `Backend`.
pub fn check_golden<B: Backend>(backend: &B, folder: &Path) -> Result<GoldenReport, B::Error> {
    let content = |name: &str, message: String| GoldenError::Content { path: folder.join(name), message };
    let Meta { layer: number, note, module_path } = meta(folder).map_err(|message| content("meta.json", message))?;
    let checkpoint = open_part(folder, number, module_path.as_deref())?;
    let path = folder.join("golden.safetensors");
    let bytes = std::fs::read(&path).map_err(|source| GoldenError::File { path, source })?;
    let wrong = |message: String| content("golden.safetensors", message);
    let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
    let number = number.or(checkpoint.first_stored_layer());
    let number = number.ok_or_else(|| content("config.json", "no layer with experts is stored".into()))?;
    let layer = checkpoint.layer(number)?;

    let mut results = Vec::new();
    for input in 0.. {
        if input > 0 && file.tensor(&format!("input.{input}")).is_err() {
            break;
        }
        let mut golden = Golden::read(&file, input, &layer).map_err(wrong)?;
        if note.as_ref().is_some_and(|note| note.starts_with(WHOLE_LAYER)) {
            let factor = layer_scalar(folder, &layer).map_err(|message| content("model.safetensors", message))?;
            golden.output.iter_mut().zip(&golden.x).for_each(|(y, x)| *y = *y / factor - x);
        }
        let formats: &[DType] = if golden.routes.is_some() { &[DType::F32, DType::BF16] } else { &[DType::F32] };
        for &dtype in formats {
            results.push(golden.check(backend, &layer, dtype).map_err(GoldenError::Backend)?);
        }
    }
    Ok(GoldenReport { folder: folder.into(), layer: number, note, results })
}

/// Of several language models in a folder, the one that the golden data is of: whose layer has the name in meta.json.
fn open_part(
    folder: &Path,
    layer: Option<usize>,
    module_path: Option<&str>,
) -> std::result::Result<Checkpoint, fused_moe::checkpoint::Error> {
    let first = Checkpoint::open(folder)?;
    if let (Some(number), Some(module_path)) = (layer, module_path) {
        for part in first.parts() {
            let checkpoint = Checkpoint::open_part(folder, part)?;
            if checkpoint.layer(number).is_ok_and(|layer| layer.name == module_path) {
                return Ok(checkpoint);
            }
        }
    }
    Ok(first)
}

/// One input and what the model's own code makes of it.
struct Golden {
    input: usize,
    tokens: usize,
    x: Vec<f64>,
    token_ids: Option<Vec<u32>>,
    /// Where sequences begin and end.
    sequences: Option<Vec<u32>>,
    /// What the router of the layer before hands on.
    router_state: Option<Vec<f64>>,
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
    /// The slots of a token by id; one that goes nowhere has no weight.
    fn row(&self, t: usize, top_k: usize, chosen: usize) -> Vec<(u32, f64)> {
        let weight = |r: usize| if self.experts[r] == NO_EXPERT { 0.0 } else { self.weights[r] };
        let mut row: Vec<(u32, f64)> = (t * top_k..t * top_k + chosen).map(|r| (self.experts[r], weight(r))).collect();
        row.sort_by_key(|&(id, _)| id);
        row
    }

    /// Tokens with another set of experts, and the largest error of the others' weights. Experts that every token goes to
    /// are in the last slots of what was found, and not among these.
    fn compare(&self, config: &LayerConfig, found: &Routes) -> (usize, f64) {
        let largest = self.weights.iter().fold(f64::MIN_POSITIVE, |m, w| m.max(w.abs()));
        let chosen = config.top_k - config.routing.always;
        let (mut other, mut error) = (0, 0.0f64);
        for t in 0..self.experts.len() / chosen {
            let (want, got) = (self.row(t, chosen, chosen), found.row(t, config.top_k, chosen));
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

    /// These, and behind them the slots of the experts that every token goes to.
    fn completed(&self, config: &LayerConfig, found: &Routes) -> Routes {
        let (top_k, chosen) = (config.top_k, config.top_k - config.routing.always);
        let mut all = Routes { experts: Vec::new(), weights: Vec::new() };
        for (t, (experts, weights)) in self.experts.chunks(chosen).zip(self.weights.chunks(chosen)).enumerate() {
            let besides = t * top_k + chosen..(t + 1) * top_k;
            all.experts.extend(experts.iter().chain(&found.experts[besides.clone()]));
            all.weights.extend(weights.iter().chain(&found.weights[besides]));
        }
        all
    }
}

/// The routed experts of a layer alone, from routes that are given: nothing around them, and no others. Their input is
/// normed as in the layer unless it is golden.
fn alone<'a>(layer: &CheckpointLayer<'a>, golden_input: bool) -> CheckpointLayer<'a> {
    let mut alone = layer.clone();
    let top_k = layer.config.top_k - layer.config.routing.always;
    let core = layer.config.core();
    let (routing, mut gate) = (RoutingRule::default(), GateConfig::default());
    if golden_input {
        alone.weights.router_norm = None;
    } else {
        gate.norm = layer.config.gate.norm;
    }
    alone.config = LayerConfig { gate, routing, top_k, routed_scale: 1.0, shared: None, capacity: None, ..core };
    let norms = NormWeights { expert_out: layer.weights.norms.expert_out, ..NormWeights::default() };
    alone.weights = LayerWeights {
        router: None,
        router_bias: None,
        correction_bias: None,
        expert_scale: None,
        table: None,
        shared: None,
        latent: None,
        norms,
        router_mlp: None,
        ..alone.weights
    };
    alone
}

/// What a call returned.
struct Returned {
    y: Vec<f64>,
    routes: Routes,
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
        let slots = Some(tokens * (layer.config.top_k - layer.config.routing.always));
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
        let inside = Some(tokens * layer.config.expert_width());
        let routed = match numbers(file, "experts_output", input, inside)? {
            Some(output) => Some(Routed { input: numbers(file, "experts_input", input, inside)?, output }),
            None => None,
        };
        let output = needed(file, "output", input, count)?;
        let sequences = layer.by_sequence.then(|| sequences(file, input)).flatten();
        let router_state = match layer.config.router_mlp {
            Some(RouterMlp { width, .. }) => numbers(file, "router_state", input, Some(tokens * width))?,
            None => None,
        };
        Ok(Self { input, tokens, x, token_ids, sequences, router_state, routes, routed, output })
    }

    fn check<B: Backend>(
        &self,
        backend: &B,
        layer: &CheckpointLayer<'_>,
        dtype: DType,
    ) -> std::result::Result<GoldenResult, B::Error> {
        let config = &layer.config;
        let LayerConfig { hidden, intermediate, top_k, shared, latent, .. } = *config;
        let inner =
            hidden + intermediate + top_k + shared.map_or(0, |shared| shared.intermediate) + latent.unwrap_or(0);
        let tolerance = tolerance::golden(inner, dtype);
        let own = self.run(backend, layer, (&self.x, dtype), None)?;
        let routes = self.routes.as_ref();
        let (other_routes, weights_error) = routes.map_or((0, 0.0), |routes| routes.compare(config, &own.routes));
        let given = match routes {
            Some(routes) if dtype != DType::F32 => {
                let exact = self.run(backend, layer, (&self.x, DType::F32), None)?;
                let routes = routes.completed(config, &exact.routes);
                Some(self.run(backend, layer, (&self.x, dtype), Some(&routes))?)
            }
            _ => None,
        };
        let output = relative("output", &self.output, &given.as_ref().unwrap_or(&own).y, tolerance);
        let routed = match (&self.routed, routes) {
            (Some(Routed { input, output }), Some(routes)) => {
                let x = input.as_ref().unwrap_or(&self.x);
                let run = self.run(backend, &alone(layer, input.is_some()), (x, dtype), Some(routes))?;
                Some(relative("experts_output", output, &run.y, tolerance))
            }
            _ => None,
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
        let sequences = match &self.sequences {
            Some(ends) if given.is_none() => Some(input("sequences", Tensor::ids([ends.len()], ends.clone()))?),
            _ => None,
        };
        let router_state = match (&self.router_state, layer.config.router_mlp) {
            (Some(state), Some(RouterMlp { width, .. })) if given.is_none() => {
                Some(input("router_state", Tensor::floats(DType::F32, [tokens, width], state.iter().copied()))?)
            }
            _ => None,
        };
        let mut y = output("y", dtype, [tokens, hidden])?;
        let mut experts = output("experts", DType::U32, [tokens, top_k])?;
        let mut weights = output("weights", DType::F32, [tokens, top_k])?;
        let mut call = Forward::new(x.read()?, y.write()?);
        call.token_ids = token_ids.as_ref().map(Buffer::read).transpose()?;
        call.sequences = sequences.as_ref().map(Buffer::read).transpose()?;
        call.router_state.previous = router_state.as_ref().map(Buffer::read).transpose()?;
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
                Ok(Returned { y, routes: Routes { experts, weights }, status })
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
