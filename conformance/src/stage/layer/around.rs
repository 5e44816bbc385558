//! What stands around the experts: projections, norms, a router of several layers; where sequences begin.

use super::LayerCase;
use crate::data::{Data, Tensor};
use crate::operands::{Operands, Prepared};
use crate::stage::combine::norm_errors;
use crate::stage::drop_overflow::Sequences;
use crate::stage::gate::gated;
use crate::stage::{magnitudes, sums};
use crate::tolerance;
use fused_moe_core::config::{Activation, LayerConfig, RmsNorm, RouterMlp};
use fused_moe_core::reference::{self, Linear, activate, linear, rms_norm};
use fused_moe_core::weights::{LatentWeights, NormWeights, RouterMlpWeights};
use fused_moe_core::{Backend, DType, Error};

/// What the parts around the experts come with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Around {
    /// Whether the norms have weights.
    pub norm_weights: bool,
    /// Whether the router's layers have biases, and their norm a weight.
    pub router_vectors: bool,
    /// What a previous state is multiplied by.
    pub state_scale: StateScale,
    /// Whether there is a previous state.
    pub previous: bool,
    /// Whether the state is asked for.
    pub next: bool,
    /// Where sequences begin.
    pub sequences: Sequences,
}

/// What a previous state is multiplied by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StateScale {
    /// Nothing.
    #[default]
    None,
    /// A number each.
    Each,
    /// One number.
    One,
}

impl LayerCase {
    /// The norms, the names of their weights, their lengths.
    fn norms(&self) -> [(&'static str, Option<RmsNorm>, usize); 6] {
        let (hidden, width, norms) = (self.config.hidden, self.config.expert_width(), self.config.norms);
        [
            ("norm_experts_in", norms.experts_in, width),
            ("norm_expert_out", norms.expert_out, width),
            ("norm_routed_out", norms.routed_out, hidden),
            ("norm_shared_in", norms.shared_in, hidden),
            ("norm_shared_out", norms.shared_out, hidden),
            ("norm_out", norms.out, hidden),
        ]
    }

    /// Adds what is read.
    pub(super) fn around_inputs(&self, data: Data, prepared: &mut Prepared) {
        let (hidden, tokens, dtype) = (self.config.hidden, self.tokens, self.dtypes[1]);
        let mut host = |name: &'static str, tensor| prepared.host.push((name, tensor));
        let matrix =
            |name, [rows, cols]: [usize; 2]| data.of(name).normal(dtype, [rows, cols], 1.3 / (cols as f64).sqrt());
        if let Some(width) = self.config.latent {
            host("latent_down", matrix("latent_down", [width, hidden]));
            host("latent_up", matrix("latent_up", [hidden, width]));
        }
        for (name, norm, width) in self.norms() {
            if let Some(norm) = norm.filter(|_| self.around.norm_weights) {
                let (offset, factor) = (data.of(name).normal(dtype, [width], 0.3), data.of(name));
                host(name, if norm.unit_offset { offset } else { factor.between(dtype, [width], 0.5, 1.5) });
            }
        }
        if let Some(RouterMlp { width, .. }) = self.config.router_mlp {
            host("mlp_down", matrix("mlp_down", [width, hidden]));
            host("mlp_fc1", matrix("mlp_fc1", [width, width]));
            host("mlp_fc2", matrix("mlp_fc2", [width, width]));
            if self.around.router_vectors {
                for name in ["mlp_down_bias", "mlp_fc1_bias", "mlp_fc2_bias"] {
                    host(name, data.of(name).normal(dtype, [width], 0.4));
                }
                host("mlp_norm", data.of("mlp_norm").between(dtype, [width], 0.5, 1.5));
            }
            let scale = data.of("state_scale").between(dtype, [width], 0.25, 2.0);
            let one = Tensor::floats(dtype, [1], scale.as_floats().iter().copied().take(1));
            let all = Tensor::floats(dtype, [width], vec![one.as_floats()[0]; width]);
            // what the reference reads has a number for each
            let (given, each) = match self.around.state_scale {
                StateScale::None => (None, None),
                StateScale::Each => (Some(scale.clone()), Some(scale)),
                StateScale::One => (Some(one), Some(all)),
            };
            for (name, tensor) in [("state_scale", given), ("state_scale_each", each)] {
                tensor.into_iter().for_each(|tensor| host(name, tensor));
            }
            if self.around.previous {
                prepared.input("previous", data.of("previous").normal(DType::F32, [tokens, width], 1.0));
            }
        }
        prepared.input_if("sequences", self.around.sequences.starts(tokens));
    }

    /// The reference's weights of them.
    pub(super) fn around_reference<'a>(&self, prepared: &'a Prepared) -> reference::Layer<'a> {
        let [experts_in, expert_out, routed_out, shared_in, shared_out, out] =
            self.norms().map(|(name, _, _)| prepared.floats_if(name));
        reference::Layer {
            latent: self
                .config
                .latent
                .map(|_| reference::Latent { down: prepared.floats("latent_down"), up: prepared.floats("latent_up") }),
            norms: reference::NormVectors { experts_in, expert_out, routed_out, shared_in, shared_out, out },
            router_mlp: self.config.router_mlp.map(|_| reference::RouterMlp {
                down: prepared.floats("mlp_down"),
                down_bias: prepared.floats_if("mlp_down_bias"),
                state_scale: prepared.floats_if("state_scale_each"),
                norm: prepared.floats_if("mlp_norm"),
                fc1: prepared.floats("mlp_fc1"),
                fc1_bias: prepared.floats_if("mlp_fc1_bias"),
                fc2: prepared.floats("mlp_fc2"),
                fc2_bias: prepared.floats_if("mlp_fc2_bias"),
            }),
            ..reference::Layer::default()
        }
    }

    /// The weights that a layer is prepared with.
    pub(super) fn around_weights<'a, B: Backend>(
        &self,
        operands: &Operands<'a, B>,
    ) -> Result<(Option<LatentWeights<'a>>, NormWeights<'a>, Option<RouterMlpWeights<'a>>), Error> {
        let view = |name| operands.host_if(name).map(Tensor::view).transpose();
        let matrix = |name| operands.host(name)?.view();
        let latent = match self.config.latent {
            Some(_) => Some(LatentWeights { down: matrix("latent_down")?, up: matrix("latent_up")? }),
            None => None,
        };
        let norms = NormWeights {
            experts_in: view("norm_experts_in")?,
            expert_out: view("norm_expert_out")?,
            routed_out: view("norm_routed_out")?,
            shared_in: view("norm_shared_in")?,
            shared_out: view("norm_shared_out")?,
            out: view("norm_out")?,
        };
        let router_mlp = match self.config.router_mlp {
            Some(_) => Some(RouterMlpWeights {
                down: matrix("mlp_down")?,
                down_bias: view("mlp_down_bias")?,
                state_scale: view("state_scale")?,
                norm: view("mlp_norm")?,
                fc1: matrix("mlp_fc1")?,
                fc1_bias: view("mlp_fc1_bias")?,
                fc2: matrix("mlp_fc2")?,
                fc2_bias: view("mlp_fc2_bias")?,
            }),
            None => None,
        };
        Ok((latent, norms, router_mlp))
    }
}

/// The logits of the layer's own router and what each may be off by; its state likewise, where it has layers.
pub(super) struct Routed {
    pub(super) logits: [Vec<f64>; 2],
    pub(super) state: Option<[Vec<f64>; 2]>,
}

impl Routed {
    /// All sums are formed in f32, and what comes between them is kept in f32: as logits are.
    pub(super) fn of(config: &LayerConfig, layer: &reference::Layer<'_>, input: &reference::Input<'_>) -> Self {
        let hidden_layers = HiddenLayers::of(config, layer, input);
        let op = reference::Gate {
            x: hidden_layers.as_ref().map_or(input.x, |layers| &layers.read[0]),
            router: layer.router,
            bias: layer.router_bias,
            norm_weight: layer.router_norm,
            config: config.gate,
            tokens: input.tokens,
            hidden: config.router_width(),
            experts: config.choices(),
        };
        let (gated, mut errors) = gated(&op);
        let Some(layers) = &hidden_layers else { return Self { logits: [gated.logits, errors], state: None } };
        let [read, off] = &layers.read;
        let off = match config.gate.norm {
            Some(_) => norm_errors(read, &gated.normed, off, op.hidden),
            None => off.clone(),
        };
        let carried = carried(&off, op.router, [op.hidden, op.experts]);
        let scale = f64::from(config.gate.scale.abs());
        errors.iter_mut().zip(carried).for_each(|(error, carried)| *error += scale * carried);
        Self { logits: [gated.logits, errors], state: Some(layers.state.clone()) }
    }
}

/// What a router of several layers makes of x, and what each number may be off by.
struct HiddenLayers {
    state: [Vec<f64>; 2],
    read: [Vec<f64>; 2],
}

impl HiddenLayers {
    fn of(config: &LayerConfig, layer: &reference::Layer<'_>, input: &reference::Input<'_>) -> Option<Self> {
        let (mlp, weights) = (config.router_mlp?, layer.router_mlp?);
        let (width, eps) = (mlp.width, f64::from(mlp.eps));
        let [mut state, mut terms] = product(input.x, weights.down, weights.down_bias, [config.hidden, width]);
        for (i, previous) in input.router_state.unwrap_or(&[]).iter().enumerate() {
            let added = weights.state_scale.map_or(1.0, |scale| scale[i % width]) * previous;
            state[i] += added;
            terms[i] += added.abs();
        }
        let errors = sums(config.hidden + 2, terms);
        let mut read = rms_norm(&state, weights.norm, eps, width);
        let mut off = norm_errors(&state, &read, &errors, width);
        for (weight, bias) in [(weights.fc1, weights.fc1_bias), (weights.fc2, weights.fc2_bias)] {
            let [z, terms] = product(&read, weight, bias, [width, width]);
            let own = sums(width + 1, terms);
            let moved = own.iter().zip(carried(&off, weight, [width, width])).map(|(own, carried)| own + carried);
            let function = Activation::Plain(mlp.function);
            off = moved.zip(&z).map(|(dz, &z)| tolerance::activated(function, [0.0, z], [0.0, dz])).collect();
            read = z.iter().map(|&z| activate(function, 0.0, z)).collect();
        }
        Some(Self { state: [state, errors], read: [read, off] })
    }
}

/// `weight . x + bias`, and the magnitudes that add up to it.
fn product(x: &[f64], weight: &[f64], bias: Option<&[f64]>, [inputs, outputs]: [usize; 2]) -> [Vec<f64>; 2] {
    let op = Linear { x, weight, bias, rows: x.len() / inputs, inputs, outputs };
    let (x, weight, bias) = (magnitudes(x), magnitudes(weight), bias.map(magnitudes));
    [linear(&op), linear(&Linear { x: &x, weight: &weight, bias: bias.as_deref(), ..op })]
}

/// How far a product moves when its rows move so far.
fn carried(errors: &[f64], weight: &[f64], [inputs, outputs]: [usize; 2]) -> Vec<f64> {
    let weight = magnitudes(weight);
    linear(&Linear { x: errors, weight: &weight, bias: None, rows: errors.len() / inputs, inputs, outputs })
}
