//! Layers with what few families have: captured, and alone and in a batch.

use crate::layer::{E, H, I, K, S, invariant_in_any_batch, numbers, replays_with_new_tokens};
use fused_moe_core::config::*;
use fused_moe_core::weights::*;
use fused_moe_core::{Backend, Numerics, Options, View};
use fused_moe_cuda::{Cuda, CudaLayer, Result};

/// Width of the experts, and of the router's layers.
const L: usize = 40;
const M: usize = 16;
/// Experts without weights.
const Z: usize = 3;

/// Experts without weights, a capacity by score and a norm of the experts' outputs.
fn with_capacity(cuda: &Cuda) -> Result<CudaLayer> {
    let (limit, order) = (CapacityLimit::Fraction(0.25), CapacityOrder::Score);
    let config = LayerConfig {
        zero_experts: Some(ZeroExperts { count: Z, output: ZeroOutput::Copy }),
        capacity: Some(Capacity { limit, order, renormalize: Some(1e-3) }),
        norms: Norms {
            expert_out: Some(RmsNorm { eps: 1e-6, unit_offset: true, scaled_first: false }),
            ..Norms::default()
        },
        ..LayerConfig::new(H, I, E, K)
    };
    let (router, gate_up, down) = (numbers((E + Z) * H, 1), numbers(E * 2 * I * H, 2), numbers(E * H * I, 3));
    let norm = numbers(H, 4);
    let stack = (View::of(&gate_up, [E, 2 * I, H])?, View::of(&down, [E, H, I])?);
    let experts = ExpertWeights::stacked(stack.0, stack.1, StackLayout::default())?;
    let weights = LayerWeights {
        norms: NormWeights { expert_out: Some(View::of(&norm, [H])?), ..NormWeights::default() },
        ..LayerWeights::new(View::of(&router, [E + Z, H])?, experts)
    };
    cuda.prepare(&config, &weights, &Options::default())
}

/// Everything that may stand around the experts, some of which are always chosen.
fn surrounded(cuda: &Cuda, numerics: Numerics) -> Result<CudaLayer> {
    let norm = Some(RmsNorm { eps: 1e-6, unit_offset: false, scaled_first: false });
    let config = LayerConfig {
        routing: RoutingRule { always: 1, ..RoutingRule::default() },
        shared: Some(SharedConfig { intermediate: S, activation: Default::default(), gated: true, scale: 0.5 }),
        latent: Some(L),
        norms: Norms {
            experts_in: norm,
            expert_out: norm,
            routed_out: norm,
            shared_in: norm,
            shared_out: norm,
            out: norm,
        },
        router_mlp: Some(RouterMlp { width: M, eps: 1e-6, function: Function::GeluErf }),
        ..LayerConfig::new(H, I, E, K)
    };
    let (router, gate_up, down) = (numbers(E * M, 1), numbers(E * 2 * I * L, 2), numbers(E * L * I, 3));
    let (gate, up, shared_down, factor) = (numbers(S * H, 4), numbers(S * H, 5), numbers(H * S, 6), numbers(H, 7));
    let (latent_down, latent_up) = (numbers(L * H, 10), numbers(H * L, 11));
    let (mlp_down, fc1, fc2) = (numbers(M * H, 12), numbers(M * M, 13), numbers(M * M, 14));
    let stack = (View::of(&gate_up, [E, 2 * I, L])?, View::of(&down, [E, L, I])?);
    let experts = ExpertWeights::stacked(stack.0, stack.1, StackLayout::default())?;
    let matrix = |data, shape: [usize; 2]| Matrix::new(View::of(data, shape)?, Default::default());
    let matrices =
        ExpertMatrices::new(Some(matrix(&gate, [S, H])?), matrix(&up, [S, H])?, matrix(&shared_down, [H, S])?);
    let weights = LayerWeights {
        shared: Some(SharedWeights { matrices, gate: Some(View::of(&factor, [H])?) }),
        latent: Some(LatentWeights { down: View::of(&latent_down, [L, H])?, up: View::of(&latent_up, [H, L])? }),
        router_mlp: Some(RouterMlpWeights {
            down: View::of(&mlp_down, [M, H])?,
            down_bias: None,
            state_scale: None,
            norm: None,
            fc1: View::of(&fc1, [M, M])?,
            fc1_bias: None,
            fc2: View::of(&fc2, [M, M])?,
            fc2_bias: None,
        }),
        ..LayerWeights::new(View::of(&router, [E, M])?, experts)
    };
    cuda.prepare(&config, &weights, &Options { numerics, ..Options::default() })
}

pub(crate) fn a_captured_layer_with_a_capacity_replays() -> Result<()> {
    let cuda = Cuda::new(0)?;
    replays_with_new_tokens(&cuda, &with_capacity(&cuda)?);
    Ok(())
}

pub(crate) fn a_captured_layer_with_surroundings_replays() -> Result<()> {
    let cuda = Cuda::new(0)?;
    replays_with_new_tokens(&cuda, &surrounded(&cuda, Numerics::Fast)?);
    Ok(())
}

pub(crate) fn surroundings_do_not_depend_on_the_batch() -> Result<()> {
    let cuda = Cuda::new(0)?;
    invariant_in_any_batch(&cuda, &surrounded(&cuda, Numerics::BatchInvariant)?);
    Ok(())
}
