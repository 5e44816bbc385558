//! The memory of a training step: weights where an optimizer would update them, their gradients, what a batch keeps.

use super::batch::{Batch, poison, poisoned, uploaded};
use super::weights::{Numbers, Source};
use anyhow::Result;
use fused_moe::backend::{In, Out, shorten, shorten_mut};
use fused_moe::config::LayerConfig;
use fused_moe::operation::{
    self, ForwardSaving, Gradient, LayerBackward, LayerGradients, LayerParameters, RoutesFrom, RoutesOut,
    SharedGradients,
};
use fused_moe::weights::Matrix;
use fused_moe::{Backend, DType, Routing, View};

/// Sizes that all operands follow from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes<'a> {
    pub(crate) config: &'a LayerConfig,
    /// Format of weights, tokens, saved pre-activations and gradients.
    pub(crate) dtype: DType,
    pub(crate) tokens: usize,
    /// Whether the routes come from the layer's router.
    pub(crate) from_router: bool,
}

impl Sizes<'_> {
    fn slots(&self) -> usize {
        self.tokens * self.config.top_k
    }

    fn rows(&self) -> [usize; 2] {
        [self.tokens, self.config.hidden]
    }

    fn gate_up(&self) -> [usize; 3] {
        [self.config.experts, self.config.gate_up_rows(), self.config.hidden]
    }

    fn down(&self) -> [usize; 3] {
        [self.config.experts, self.config.hidden, self.config.intermediate]
    }

    /// Bytes that matrices take: as prepared, as an optimizer has them, their gradients, and once on the host.
    pub(crate) fn matrix_bytes(layer: u64) -> u64 {
        layer.saturating_mul(4)
    }

    /// Bytes that a token takes, with so many batches.
    pub(crate) fn token_bytes(&self, batches: usize) -> usize {
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = *self.config;
        let kept = (5 * hidden + top_k * self.config.gate_up_rows()) * self.dtype.size() + 8 * top_k + 8 * experts;
        let scratch =
            4 * (top_k * (3 * intermediate + self.config.gate_up_rows() + 2 * hidden) + 4 * hidden + 2 * experts);
        batches * kept + scratch
    }
}

/// Matrices of a layer, or their gradients: router `[E, H]`, gate_up `[E, N, H]`, down `[E, H, I]`.
pub(crate) struct MatrixMemory<B: Backend> {
    pub(crate) router: B::Memory,
    pub(crate) gate_up: B::Memory,
    pub(crate) down: B::Memory,
    /// `[E]`, of weights alone.
    router_bias: Option<B::Memory>,
}

impl<B: Backend> MatrixMemory<B> {
    /// The weights of the first layer.
    pub(crate) fn weights(backend: &B, sizes: &Sizes<'_>, source: &Source) -> Result<Self> {
        let layer = source.layer(0)?;
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for expert in layer.experts.iter() {
            expert.gate.iter().chain([&expert.up]).for_each(|matrix| append(matrix, &mut gate_up));
            append(&expert.down, &mut down);
        }
        debug_assert_eq!(gate_up.len(), sizes.gate_up().iter().product::<usize>() * sizes.dtype.size());
        let router_bias = source.bias().map(|bias| uploaded(backend, bytemuck::cast_slice(bias))).transpose()?;
        Ok(Self {
            router: uploaded(backend, source.router())?,
            gate_up: uploaded(backend, &gate_up)?,
            down: uploaded(backend, &down)?,
            router_bias,
        })
    }

    /// Their gradients, all NaN so far: what a pass leaves out shows.
    pub(crate) fn gradients(backend: &B, sizes: &Sizes<'_>) -> Result<Self> {
        let poisoned = |elements: usize| poisoned(backend, elements, sizes.dtype);
        Ok(Self {
            router: poisoned(sizes.config.experts * sizes.config.hidden)?,
            gate_up: poisoned(sizes.gate_up().iter().product())?,
            down: poisoned(sizes.down().iter().product())?,
            router_bias: None,
        })
    }

    /// Makes gradients NaN again.
    pub(crate) fn poison(&mut self, backend: &B, sizes: &Sizes<'_>) -> Result<()> {
        let size = sizes.dtype.size();
        poison(backend, &mut self.router, sizes.config.experts * sizes.config.hidden * size)?;
        poison(backend, &mut self.gate_up, sizes.gate_up().iter().product::<usize>() * size)?;
        poison(backend, &mut self.down, sizes.down().iter().product::<usize>() * size)
    }

    pub(crate) fn parameters(&self, sizes: &Sizes<'_>) -> fused_moe::Result<LayerParameters<'_, B>> {
        let &Sizes { config, dtype, from_router, .. } = sizes;
        let router = View::new(B::read(&self.router), dtype, 0, [config.experts, config.hidden])?;
        let gate_up = View::new(B::read(&self.gate_up), dtype, 0, sizes.gate_up())?;
        let down = View::new(B::read(&self.down), dtype, 0, sizes.down())?;
        let bias = self.router_bias.as_ref().filter(|_| from_router);
        let bias = bias.map(|bias| View::new(B::read(bias), DType::F32, 0, [config.experts])).transpose()?;
        let parameters = LayerParameters { router_bias: bias, ..LayerParameters::new(router, gate_up, down) };
        Ok(if from_router { parameters } else { LayerParameters { router: None, ..parameters } })
    }
}

/// What a batch has beside x, its logits and the output of the prepared layer.
pub(crate) struct Kept<B: Backend> {
    pub(crate) d_y: Numbers,
    d_y_memory: B::Memory,
    pre_activation: B::Memory,
    pub(crate) experts: B::Memory,
    pub(crate) weights: B::Memory,
    pub(crate) y: B::Memory,
    pub(crate) d_x: B::Memory,
    pub(crate) d_logits: B::Memory,
}

impl<B: Backend> Kept<B> {
    /// All that is written is NaN, or an id of no expert, so far.
    pub(crate) fn new(backend: &B, sizes: &Sizes<'_>, seed: u64) -> Result<Self> {
        let elements = sizes.tokens * sizes.config.hidden;
        let d_y = Numbers::new(sizes.dtype, elements, 1.0, seed);
        Ok(Self {
            d_y_memory: uploaded(backend, d_y.bytes())?,
            d_y,
            pre_activation: poisoned(backend, sizes.slots() * sizes.config.gate_up_rows(), sizes.dtype)?,
            experts: poisoned(backend, sizes.slots(), DType::U32)?,
            weights: poisoned(backend, sizes.slots(), DType::F32)?,
            y: poisoned(backend, elements, sizes.dtype)?,
            d_x: poisoned(backend, elements, sizes.dtype)?,
            d_logits: poisoned(backend, sizes.tokens * sizes.config.experts, DType::F32)?,
        })
    }

    /// Makes all that is written NaN, or an id of no expert, again.
    pub(crate) fn poison(&mut self, backend: &B, sizes: &Sizes<'_>) -> Result<()> {
        let (size, elements) = (sizes.dtype.size(), sizes.tokens * sizes.config.hidden);
        poison(backend, &mut self.pre_activation, sizes.slots() * sizes.config.gate_up_rows() * size)?;
        poison(backend, &mut self.experts, sizes.slots() * DType::U32.size())?;
        poison(backend, &mut self.weights, sizes.slots() * DType::F32.size())?;
        poison(backend, &mut self.y, elements * size)?;
        poison(backend, &mut self.d_x, elements * size)?;
        poison(backend, &mut self.d_logits, sizes.tokens * sizes.config.experts * DType::F32.size())
    }

    /// The forward pass.
    pub(crate) fn forward<'a, 'p>(
        &'a mut self,
        sizes: &Sizes<'_>,
        batch: &'a Batch<B>,
        parameters: &'a LayerParameters<'p, B>,
    ) -> fused_moe::Result<ForwardSaving<'a, 'p, B>> {
        let source = match batch.logits_view(sizes.tokens, sizes.config)? {
            Some(logits) => operation::Source::Logits(logits),
            None => operation::Source::Router,
        };
        let slots = [sizes.tokens, sizes.config.top_k];
        Ok(ForwardSaving {
            x: batch.x_view(sizes.dtype, sizes.rows())?,
            parameters,
            source,
            token_ids: None,
            residual: None,
            norm: None,
            pre_activation: to::<B>(
                &mut self.pre_activation,
                sizes.dtype,
                [sizes.slots(), sizes.config.gate_up_rows()],
            )?,
            shared_pre_activation: None,
            routes: Some(RoutesOut {
                experts: to::<B>(&mut self.experts, DType::U32, slots)?,
                weights: to::<B>(&mut self.weights, DType::F32, slots)?,
            }),
            y: to::<B>(&mut self.y, sizes.dtype, sizes.rows())?,
        })
    }

    /// The backward pass: every gradient there is, assigned.
    pub(crate) fn backward<'a, 'p>(
        &'a mut self,
        sizes: &Sizes<'_>,
        batch: &'a Batch<B>,
        parameters: &'a LayerParameters<'p, B>,
        gradients: &'a mut MatrixMemory<B>,
    ) -> fused_moe::Result<LayerBackward<'a, 'p, B>> {
        let &Sizes { config, dtype, tokens, from_router } = sizes;
        let LayerConfig { hidden, experts, top_k, .. } = *config;
        let source = match batch.logits_view(tokens, config)? {
            Some(logits) => RoutesFrom::Logits(logits),
            None => RoutesFrom::Router,
        };
        let router = if from_router {
            Some(Gradient::assign(to::<B>(&mut gradients.router, dtype, [experts, hidden])?))
        } else {
            None
        };
        let slots = [tokens, top_k];
        Ok(LayerBackward {
            d_y: from::<B>(&self.d_y_memory, dtype, sizes.rows())?,
            d_logits: None,
            x: batch.x_view(dtype, sizes.rows())?,
            parameters,
            source,
            routing: Routing {
                experts: from::<B>(&self.experts, DType::U32, slots)?,
                weights: from::<B>(&self.weights, DType::F32, slots)?,
            },
            pre_activation: from::<B>(&self.pre_activation, dtype, [sizes.slots(), config.gate_up_rows()])?,
            shared_pre_activation: None,
            gradients: LayerGradients {
                x: Some(Gradient::assign(to::<B>(&mut self.d_x, dtype, sizes.rows())?)),
                logits: Some(Gradient::assign(to::<B>(&mut self.d_logits, DType::F32, [tokens, experts])?)),
                router,
                gate_up: Some(Gradient::assign(to::<B>(&mut gradients.gate_up, dtype, sizes.gate_up())?)),
                down: Some(Gradient::assign(to::<B>(&mut gradients.down, dtype, sizes.down())?)),
                shared: SharedGradients::default(),
                ..LayerGradients::default()
            },
        })
    }
}

fn from<B: Backend>(
    memory: &B::Memory,
    dtype: DType,
    shape: impl Into<fused_moe::Shape>,
) -> fused_moe::Result<In<'_, B>> {
    Ok(shorten::<B>(View::new(B::read(memory), dtype, 0, shape)?))
}

fn to<B: Backend>(
    memory: &mut B::Memory,
    dtype: DType,
    shape: impl Into<fused_moe::Shape>,
) -> fused_moe::Result<Out<'_, B>> {
    Ok(shorten_mut::<B>(View::new(B::write(memory), dtype, 0, shape)?))
}

/// The rows of a matrix, behind what is there.
fn append(matrix: &Matrix<'_>, to: &mut Vec<u8>) {
    let width = matrix.cols() * matrix.dtype().size();
    for row in 0..matrix.rows() {
        let first = to.len();
        to.resize(first + width, 0);
        matrix.copy_row(row, &mut to[first..]);
    }
}
