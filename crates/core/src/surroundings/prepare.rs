//! The weights of the surroundings, copied to a device.

use super::Surroundings;
use crate::DType::{self, F32};
use crate::backend::{Backend, In};
use crate::config::{LayerConfig, RmsNorm, RouterMlp};
use crate::error::Result;
use crate::tensor::{HostView, Shape, View};
use crate::weights::{LayerWeights, Matrix, Orientation, RouterMlpWeights, SharedWeights, floats};
use std::fmt;

/// A dense operand on the device.
pub(super) struct Tensor<B: Backend> {
    memory: B::Memory,
    dtype: DType,
    shape: Shape,
}

impl<B: Backend> Tensor<B> {
    fn new(backend: &B, bytes: &[u8], dtype: DType, shape: impl Into<Shape>) -> Result<Self, B::Error> {
        let mut memory = backend.allocate(bytes.len())?;
        backend.upload(bytes, &mut memory)?;
        Ok(Self { memory, dtype, shape: shape.into() })
    }

    /// A matrix in the format that it came in.
    fn matrix(backend: &B, view: HostView<'_>) -> Result<Self, B::Error> {
        Self::new(backend, &rows_of(&[Matrix::new(view, Orientation::OutIn)?]), view.dtype(), view.shape())
    }

    /// A vector of any float format, in f32, as `[n]`; `offset` is added to each number.
    fn vector(backend: &B, view: HostView<'_>, offset: f32) -> Result<Self, B::Error> {
        let numbers: Vec<f32> = floats(view)?.into_iter().map(|x| x + offset).collect();
        Self::new(backend, bytemuck::cast_slice(&numbers), F32, [numbers.len()])
    }

    fn optional(backend: &B, view: Option<HostView<'_>>) -> Result<Option<Self>, B::Error> {
        view.map(|view| Self::vector(backend, view, 0.0)).transpose()
    }

    pub(super) fn view(&self) -> Result<In<'_, B>> {
        View::new(B::read(&self.memory), self.dtype, 0, self.shape)
    }

    fn bytes(&self) -> usize {
        self.shape.rows() * self.shape.cols() * self.dtype.size()
    }
}

/// The rows of matrices one after the other, without gaps.
fn rows_of(matrices: &[Matrix<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for matrix in matrices {
        let row_bytes = matrix.cols() * matrix.dtype().size();
        let first = bytes.len();
        bytes.resize(first + matrix.rows() * row_bytes, 0);
        for (row, to) in bytes[first..].chunks_exact_mut(row_bytes.max(1)).enumerate() {
            matrix.copy_row(row, to);
        }
    }
    bytes
}

/// A norm and its weight.
pub(super) struct NormTensor<B: Backend> {
    weight: Option<Tensor<B>>,
    pub(super) eps: f32,
}

impl<B: Backend> NormTensor<B> {
    fn new(backend: &B, norm: RmsNorm, weight: Option<HostView<'_>>) -> Result<Self, B::Error> {
        let offset = if norm.unit_offset { 1.0 } else { 0.0 };
        let weight = weight.map(|view| Tensor::vector(backend, view, offset)).transpose()?;
        Ok(Self { weight, eps: norm.eps })
    }

    fn optional(backend: &B, norm: Option<RmsNorm>, weight: Option<HostView<'_>>) -> Result<Option<Self>, B::Error> {
        norm.map(|norm| Self::new(backend, norm, weight)).transpose()
    }

    pub(super) fn weight(&self) -> Result<Option<In<'_, B>>> {
        self.weight.as_ref().map(Tensor::view).transpose()
    }
}

/// The layers before the router's matrix.
pub(super) struct RouterLayers<B: Backend> {
    pub(super) config: RouterMlp,
    pub(super) down: Tensor<B>,
    pub(super) down_bias: Option<Tensor<B>>,
    /// f32 `[M]`.
    pub(super) state_scale: Option<Tensor<B>>,
    pub(super) norm: NormTensor<B>,
    pub(super) fc1: Tensor<B>,
    pub(super) fc1_bias: Option<Tensor<B>>,
    pub(super) fc2: Tensor<B>,
    pub(super) fc2_bias: Option<Tensor<B>>,
}

impl<B: Backend> RouterLayers<B> {
    fn new(backend: &B, config: RouterMlp, weights: &RouterMlpWeights<'_>) -> Result<Self, B::Error> {
        let state_scale = |scale: HostView<'_>| -> Result<Tensor<B>, B::Error> {
            let mut scale = floats(scale)?;
            if let &[one] = &scale[..] {
                scale = vec![one; config.width];
            }
            Tensor::new(backend, bytemuck::cast_slice(&scale), F32, [config.width])
        };
        Ok(Self {
            config,
            down: Tensor::matrix(backend, weights.down)?,
            down_bias: Tensor::optional(backend, weights.down_bias)?,
            state_scale: weights.state_scale.map(state_scale).transpose()?,
            norm: NormTensor::new(
                backend,
                RmsNorm { eps: config.eps, unit_offset: false, scaled_first: false },
                weights.norm,
            )?,
            fc1: Tensor::matrix(backend, weights.fc1)?,
            fc1_bias: Tensor::optional(backend, weights.fc1_bias)?,
            fc2: Tensor::matrix(backend, weights.fc2)?,
            fc2_bias: Tensor::optional(backend, weights.fc2_bias)?,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor<B>> {
        let biases = [&self.down_bias, &self.fc1_bias, &self.fc2_bias, &self.state_scale, &self.norm.weight];
        [&self.down, &self.fc1, &self.fc2].into_iter().chain(biases.into_iter().flatten())
    }
}

/// The shared expert as dense products.
pub(super) struct SharedTensors<B: Backend> {
    /// Rows of gate_up, and the width inside.
    pub(super) sizes: [usize; 2],
    pub(super) gate_up: Tensor<B>,
    pub(super) gate_up_bias: Option<Tensor<B>>,
    pub(super) down: Tensor<B>,
    pub(super) down_bias: Option<Tensor<B>>,
    /// `[1, H]`.
    pub(super) gate: Option<Tensor<B>>,
}

impl<B: Backend> SharedTensors<B> {
    fn new(backend: &B, weights: &SharedWeights<'_>) -> Result<Self, B::Error> {
        let matrices = &weights.matrices;
        let (up, hidden) = (matrices.up, matrices.up.cols());
        let both: Vec<Matrix<'_>> = matrices.gate.into_iter().chain([up]).collect();
        let rows = both.len() * up.rows();
        let biases: &[_] = if both.len() > 1 { &[matrices.gate_bias, matrices.up_bias] } else { &[matrices.up_bias] };
        let gate_up = Tensor::new(backend, &rows_of(&both), up.dtype(), [rows, hidden])?;
        let gate = match weights.gate {
            Some(gate) => Some(Tensor { shape: [1, hidden].into(), ..Tensor::vector(backend, gate, 0.0)? }),
            None => None,
        };
        Ok(Self {
            sizes: [rows, up.rows()],
            gate_up,
            gate_up_bias: bias_of(backend, biases, rows)?,
            down: Tensor::new(backend, &rows_of(&[matrices.down]), matrices.down.dtype(), [hidden, up.rows()])?,
            down_bias: bias_of(backend, &[matrices.down_bias], hidden)?,
            gate,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor<B>> {
        let others = [&self.gate_up_bias, &self.down_bias, &self.gate];
        [&self.gate_up, &self.down].into_iter().chain(others.into_iter().flatten())
    }
}

/// Biases `[n, 1]` one after the other, in f32; zeros for one that is absent beside one that is not.
fn bias_of<B: Backend>(backend: &B, biases: &[Option<Matrix<'_>>], rows: usize) -> Result<Option<Tensor<B>>, B::Error> {
    if biases.iter().all(Option::is_none) {
        return Ok(None);
    }
    let mut numbers = Vec::with_capacity(rows);
    for bias in biases {
        match bias {
            Some(bias) => numbers.extend(bias.to_f32()),
            None => numbers.resize(numbers.len() + rows / biases.len(), 0.0),
        }
    }
    Tensor::new(backend, bytemuck::cast_slice(&numbers), F32, [numbers.len()]).map(Some)
}

impl<B: Backend> Surroundings<B> {
    /// Copies the weights of a checked layer.
    pub fn new(backend: &B, config: &LayerConfig, weights: &LayerWeights<'_>) -> Result<Self, B::Error> {
        let (norms, given) = (&config.norms, &weights.norms);
        let latent = weights.latent.filter(|_| config.latent.is_some());
        let router = match (config.router_mlp, &weights.router_mlp) {
            (Some(config), Some(weights)) => Some(RouterLayers::new(backend, config, weights)?),
            _ => None,
        };
        let shared = match (config.shared, &weights.shared) {
            (Some(config), Some(weights)) => Some((config, SharedTensors::new(backend, weights)?)),
            _ => None,
        };
        Ok(Self {
            config: config.clone(),
            latent_down: latent.map(|latent| Tensor::matrix(backend, latent.down)).transpose()?,
            latent_up: latent.map(|latent| Tensor::matrix(backend, latent.up)).transpose()?,
            experts_in: NormTensor::optional(backend, norms.experts_in, given.experts_in)?,
            routed_out: NormTensor::optional(backend, norms.routed_out, given.routed_out)?,
            shared_in: NormTensor::optional(backend, norms.shared_in, given.shared_in)?,
            shared_out: NormTensor::optional(backend, norms.shared_out, given.shared_out)?,
            out: NormTensor::optional(backend, norms.out, given.out)?,
            router,
            shared,
        })
    }

    /// Bytes of weights that it holds.
    pub fn weight_bytes(&self) -> usize {
        let latent = self.latent_down.iter().chain(&self.latent_up);
        let norms = [&self.experts_in, &self.routed_out, &self.shared_in, &self.shared_out, &self.out];
        let norms = norms.into_iter().flatten().filter_map(|norm| norm.weight.as_ref());
        let router = self.router.iter().flat_map(RouterLayers::tensors);
        let shared = self.shared.iter().flat_map(|(_, shared)| shared.tensors());
        latent.chain(norms).chain(router).chain(shared).map(Tensor::bytes).sum()
    }
}

impl<B: Backend> fmt::Debug for Surroundings<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("config", &self.config).finish_non_exhaustive()
    }
}
