//! A small language model: the last symbols' embeddings side by side, a Mixture-of-Experts layer with a residual, a head.

use crate::text::{Random, SYMBOLS};
use fused_moe::backend::In;
use fused_moe::config::{LayerConfig, Score};
use fused_moe::cpu::{Cpu, CpuStream, Error};
use fused_moe::operation::*;
use fused_moe::training::{TrainingLayer, TrainingWorkspace};
use fused_moe::{Backend, BackendBackward, Routing, View};

/// Symbols that the next one is guessed from, and numbers that stand for each.
pub(crate) const CONTEXT: usize = 12;
const EMBEDDING: usize = 8;
const HIDDEN: usize = CONTEXT * EMBEDDING;
const INTERMEDIATE: usize = 48;
pub(crate) const EXPERTS: usize = 16;
const TOP_K: usize = 2;

/// Weights, their gradients, and Adam's moments: an optimizer updates the weights where the layer reads them.
struct Parameter {
    values: Vec<f32>,
    gradients: Vec<f32>,
    moments: [Vec<f32>; 2],
}

impl Parameter {
    fn new(count: usize, scale: f32, random: &mut Random) -> Self {
        let zeros = || vec![0.0; count];
        let values = (0..count).map(|_| scale * random.normal()).collect();
        Self { values, gradients: zeros(), moments: [zeros(), zeros()] }
    }

    /// Adam (Kingma, Ba, arXiv:1412.6980), step number `step` from 1 on.
    fn update(&mut self, rate: f32, step: i32) {
        let correction = (1.0 - 0.999f32.powi(step)).sqrt() / (1.0 - 0.9f32.powi(step));
        let [first, second] = &mut self.moments;
        let moments = first.iter_mut().zip(second);
        for ((value, d), (m, v)) in self.values.iter_mut().zip(&self.gradients).zip(moments) {
            *m += 0.1 * (d - *m);
            *v += 0.001 * (d * d - *v);
            *value -= rate * correction * *m / (v.sqrt() + 1e-8);
        }
    }

    fn view<const N: usize>(&self, shape: [usize; N]) -> fused_moe::Result<In<'_, Cpu>>
    where
        fused_moe::Shape: From<[usize; N]>,
    {
        View::of(&self.values, shape)
    }
}

/// Where the gradient of a parameter goes.
fn assign<const N: usize>(to: &mut [f32], shape: [usize; N]) -> fused_moe::Result<Option<Gradient<'_, Cpu>>>
where
    fused_moe::Shape: From<[usize; N]>,
{
    Ok(Some(Gradient::assign(View::of_mut(to, shape)?)))
}

/// The model with the buffers of its batches.
pub(crate) struct Model {
    device: Cpu,
    stream: CpuStream,
    layer: TrainingLayer,
    workspace: TrainingWorkspace<Cpu>,
    embedding: Parameter,
    router: Parameter,
    gate_up: Parameter,
    down: Parameter,
    head: Parameter,
    /// T.
    tokens: usize,
    x: Vec<f32>,
    d_x: Vec<f32>,
    logits: Vec<f32>,
    d_logits: Vec<f32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
    pre_activation: Vec<f32>,
    y: Vec<f32>,
    d_y: Vec<f32>,
    guesses: Vec<f32>,
    steps: i32,
}

/// What a step showed.
pub(crate) struct Shown {
    /// The mean cross-entropy of the next symbol.
    pub(crate) loss: f32,
    /// Slots of each expert.
    pub(crate) load: [usize; EXPERTS],
}

impl Model {
    /// A model for batches of so many tokens; everything is allocated here.
    pub(crate) fn new(tokens: usize, seed: u64) -> Result<Self, Error> {
        let device = Cpu::new()?;
        let layer = TrainingLayer::new(&LayerConfig::new(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K))?;
        let random = &mut Random(seed);
        let slots = tokens * TOP_K;
        Ok(Self {
            stream: device.stream()?,
            workspace: layer.workspace(&device, tokens)?,
            layer,
            device,
            embedding: Parameter::new(SYMBOLS * EMBEDDING, 1.0, random),
            router: Parameter::new(EXPERTS * HIDDEN, 0.1, random),
            gate_up: Parameter::new(EXPERTS * 2 * INTERMEDIATE * HIDDEN, 0.1, random),
            down: Parameter::new(EXPERTS * HIDDEN * INTERMEDIATE, 0.1, random),
            head: Parameter::new(SYMBOLS * HIDDEN, 0.1, random),
            tokens,
            x: vec![0.0; tokens * HIDDEN],
            d_x: vec![0.0; tokens * HIDDEN],
            logits: vec![0.0; tokens * EXPERTS],
            d_logits: vec![0.0; tokens * EXPERTS],
            experts: vec![0; slots],
            weights: vec![0.0; slots],
            pre_activation: vec![0.0; slots * 2 * INTERMEDIATE],
            y: vec![0.0; tokens * HIDDEN],
            d_y: vec![0.0; tokens * HIDDEN],
            guesses: vec![0.0; tokens * SYMBOLS],
            steps: 0,
        })
    }

    /// Bytes of the layer's weights, and of what a token keeps for the backward pass.
    pub(crate) fn bytes(&self) -> [usize; 2] {
        let weights = 4 * (self.router.values.len() + self.gate_up.values.len() + self.down.values.len());
        [weights, self.layer.activation_bytes(1, fused_moe::DType::F32) + 4 * HIDDEN]
    }

    /// Learns to follow each of `contexts`, `CONTEXT` symbols, by the symbol after it: forward, backward, Adam.
    pub(crate) fn step(&mut self, contexts: &[&[u8]], rate: f32, balance: f32) -> Result<Shown, Error> {
        self.forward(contexts)?;
        let loss = self.cross_entropy(contexts);
        self.backward(balance)?;
        self.d_embedding(contexts);
        self.steps += 1;
        let Self { embedding, router, gate_up, down, head, .. } = self;
        [embedding, router, gate_up, down, head].into_iter().for_each(|parameter| parameter.update(rate, self.steps));
        let mut load = [0; EXPERTS];
        self.experts.iter().for_each(|&expert| load[expert as usize] += 1);
        Ok(Shown { loss, load })
    }

    /// The likeliest next symbol.
    pub(crate) fn next(&mut self, context: &[u8]) -> Result<u8, Error> {
        self.forward(&[context])?;
        let best = self.guesses[..SYMBOLS].iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        Ok(best.map_or(0, |(symbol, _)| symbol as u8))
    }

    fn forward(&mut self, contexts: &[&[u8]]) -> Result<(), Error> {
        let Self { device, stream, layer, workspace, embedding, router, gate_up, down, head, .. } = self;
        let (tokens, slots) = (contexts.len(), contexts.len() * TOP_K);
        for (x, context) in self.x.chunks_exact_mut(HIDDEN).zip(contexts) {
            for (x, &symbol) in x.chunks_exact_mut(EMBEDDING).zip(*context) {
                x.copy_from_slice(&embedding.values[usize::from(symbol) * EMBEDDING..][..EMBEDDING]);
            }
        }
        let x = View::of(&self.x[..tokens * HIDDEN], [tokens, HIDDEN])?;
        let matrix = router.view([EXPERTS, HIDDEN])?;
        device.gate(
            stream,
            Gate::new(x, matrix, View::of_mut(&mut self.logits[..tokens * EXPERTS], [tokens, EXPERTS])?),
        )?;
        let call = ForwardSaving {
            x,
            parameters: &LayerParameters::new(
                matrix,
                gate_up.view([EXPERTS, 2 * INTERMEDIATE, HIDDEN])?,
                down.view([EXPERTS, HIDDEN, INTERMEDIATE])?,
            ),
            source: Source::Logits(View::of(&self.logits[..tokens * EXPERTS], [tokens, EXPERTS])?),
            token_ids: None,
            residual: Some(Residual::Of(x)),
            norm: None,
            pre_activation: View::of_mut(
                &mut self.pre_activation[..slots * 2 * INTERMEDIATE],
                [slots, 2 * INTERMEDIATE],
            )?,
            shared_pre_activation: None,
            routes: Some(RoutesOut {
                experts: View::of_mut(&mut self.experts[..slots], [tokens, TOP_K])?,
                weights: View::of_mut(&mut self.weights[..slots], [tokens, TOP_K])?,
            }),
            y: View::of_mut(&mut self.y[..tokens * HIDDEN], [tokens, HIDDEN])?,
        };
        layer.forward(device, stream, call, workspace)?;
        let out = View::of_mut(&mut self.guesses[..tokens * SYMBOLS], [tokens, SYMBOLS])?;
        let y = View::of(&self.y[..tokens * HIDDEN], [tokens, HIDDEN])?;
        device.linear(stream, Linear { x: y, weight: head.view([SYMBOLS, HIDDEN])?, bias: None, out })
    }

    /// The loss; `guesses` become its gradient.
    fn cross_entropy(&mut self, contexts: &[&[u8]]) -> f32 {
        let mut loss = 0.0;
        for (guess, context) in self.guesses.chunks_exact_mut(SYMBOLS).zip(contexts) {
            let largest = guess.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let next = usize::from(context[CONTEXT]);
            let likelihood = guess[next] - largest;
            guess.iter_mut().for_each(|z| *z = (*z - largest).exp());
            let sum: f32 = guess.iter().sum();
            loss += sum.ln() - likelihood;
            guess.iter_mut().for_each(|z| *z /= sum);
            guess[next] -= 1.0;
            guess.iter_mut().for_each(|z| *z /= self.tokens as f32);
        }
        loss / self.tokens as f32
    }

    fn backward(&mut self, balance: f32) -> Result<(), Error> {
        let Self { device, stream, layer, workspace, router, gate_up, down, head, tokens, .. } = self;
        let tokens = *tokens;
        // of a product with a matrix, which is what a router is too
        let operands = GateBackward {
            d_logits: View::of(&self.guesses, [tokens, SYMBOLS])?,
            logits: None,
            softcap: None,
            scale: 1.0,
            n: Some(View::of(&self.y, [tokens, HIDDEN])?),
            router: View::of(&head.values, [SYMBOLS, HIDDEN])?,
            d_n: assign(&mut self.d_y, [tokens, HIDDEN])?,
            d_router: assign(&mut head.gradients, [SYMBOLS, HIDDEN])?,
            d_bias: None,
        };
        device.gate_backward(stream, operands)?;
        let operands = LoadBalanceLoss {
            logits: View::of(&self.logits, [tokens, EXPERTS])?,
            experts: View::of(&self.experts, [tokens, TOP_K])?,
            score: Score::Softmax,
            sequences: None,
            coefficient: balance,
            loss: None,
            d_logits: assign(&mut self.d_logits, [tokens, EXPERTS])?,
        };
        device.load_balance_loss(stream, operands)?;
        // the residual's part of x's gradient, which the layer adds its own to
        self.d_x.copy_from_slice(&self.d_y);
        let shapes = ([EXPERTS, 2 * INTERMEDIATE, HIDDEN], [EXPERTS, HIDDEN, INTERMEDIATE]);
        let call = LayerBackward {
            d_y: View::of(&self.d_y, [tokens, HIDDEN])?,
            d_logits: Some(View::of(&self.d_logits, [tokens, EXPERTS])?),
            x: View::of(&self.x, [tokens, HIDDEN])?,
            parameters: &LayerParameters::new(
                View::of(&router.values, [EXPERTS, HIDDEN])?,
                View::of(&gate_up.values, shapes.0)?,
                View::of(&down.values, shapes.1)?,
            ),
            source: RoutesFrom::Router,
            routing: Routing {
                experts: View::of(&self.experts, [tokens, TOP_K])?,
                weights: View::of(&self.weights, [tokens, TOP_K])?,
            },
            pre_activation: View::of(&self.pre_activation, [tokens * TOP_K, 2 * INTERMEDIATE])?,
            shared_pre_activation: None,
            gradients: LayerGradients {
                x: Some(Gradient::accumulate(View::of_mut(&mut self.d_x, [tokens, HIDDEN])?)),
                router: assign(&mut router.gradients, [EXPERTS, HIDDEN])?,
                gate_up: assign(&mut gate_up.gradients, shapes.0)?,
                down: assign(&mut down.gradients, shapes.1)?,
                ..LayerGradients::default()
            },
        };
        layer.backward(device, stream, call, workspace)
    }

    fn d_embedding(&mut self, contexts: &[&[u8]]) {
        self.embedding.gradients.fill(0.0);
        for (d_x, context) in self.d_x.chunks_exact(HIDDEN).zip(contexts) {
            for (d, &symbol) in d_x.chunks_exact(EMBEDDING).zip(*context) {
                let sum = &mut self.embedding.gradients[usize::from(symbol) * EMBEDDING..][..EMBEDDING];
                sum.iter_mut().zip(d).for_each(|(sum, d)| *sum += d);
            }
        }
    }
}
