//! What a layer's description and weights may be together, and what the messages say.
#![allow(clippy::unwrap_used)]

use fused_moe_core::config::*;
use fused_moe_core::problem::LayerProblem;
use fused_moe_core::weights::*;
use fused_moe_core::*;

const H: usize = 6;
const I: usize = 4;
const S: usize = 3;
const DATA: [f32; 64] = [0.5; 64];
const HALF: [half::f16; 64] = [half::f16::ONE; 64];

fn matrix(rows: usize, cols: usize) -> Matrix<'static> {
    Matrix::new(View::of(&DATA, [rows, cols]).unwrap(), Orientation::OutIn).unwrap()
}

fn vector(n: usize) -> Option<HostView<'static>> {
    Some(View::of(&DATA, [n]).unwrap())
}

fn expert(width: usize) -> ExpertMatrices<'static> {
    ExpertMatrices::new(Some(matrix(width, H)), matrix(width, H), matrix(H, width))
}

fn parts() -> (LayerConfig, LayerWeights<'static>) {
    let shared = SharedConfig { intermediate: S, activation: Activation::default(), gated: false, scale: 1.0 };
    let config = LayerConfig { shared: Some(shared), ..LayerConfig::new(H, I, 3, 2) };
    let experts = ExpertWeights::per_expert(vec![expert(I); 3]);
    let mut weights = LayerWeights::new(View::of(&DATA, [3, H]).unwrap(), experts);
    weights.shared = Some(SharedWeights { matrices: expert(S), gate: None });
    (config, weights)
}

fn problem(change: impl FnOnce(&mut LayerConfig, &mut LayerWeights<'static>)) -> Result<LayerProblem> {
    let (mut config, mut weights) = parts();
    change(&mut config, &mut weights);
    LayerProblem::new(&config, &weights, &Options::default())
}

fn shared(weights: &mut LayerWeights<'static>, change: impl FnOnce(&mut ExpertMatrices<'static>)) {
    change(&mut weights.shared.as_mut().unwrap().matrices);
}

#[test]
fn biases_of_gate_and_up_are_independent() -> Result<()> {
    problem(|_, weights| shared(weights, |matrices| matrices.gate_bias = Some(matrix(S, 1))))?;
    problem(|_, weights| shared(weights, |matrices| matrices.up_bias = Some(matrix(S, 1))))?;
    let ungated = problem(|config, weights| {
        config.shared.as_mut().unwrap().activation = Activation::Plain(Function::Relu);
        shared(weights, |matrices| (matrices.gate, matrices.gate_bias) = (None, Some(matrix(S, 1))));
    });
    assert!(matches!(ungated, Err(Error::Unexpected { operand: "shared.matrices.gate_bias", .. })));
    Ok(())
}

#[test]
fn a_router_bias_needs_a_router() {
    assert!(problem(|_, weights| weights.router_bias = vector(3)).is_ok());
    assert!(problem(|_, weights| weights.router = None).is_ok());
    let refused = problem(|_, weights| (weights.router, weights.router_bias) = (None, vector(3)));
    assert!(matches!(refused, Err(Error::Unexpected { operand: "router_bias", .. })));
}

#[test]
fn the_shared_expert_may_mix_formats() -> Result<()> {
    let down = Matrix::new(View::of(&HALF, [H, S])?, Orientation::OutIn)?;
    let mixed = problem(|_, weights| shared(weights, |matrices| matrices.down = down))?;
    assert_eq!(mixed.shared, Some([DType::F32, DType::F16]));
    Ok(())
}

#[test]
fn messages_say_which_expert_and_whose_number() {
    let message = |change: fn(&mut LayerConfig, &mut LayerWeights<'static>)| problem(change).unwrap_err().to_string();
    let third = message(|_, weights| {
        let wrong = ExpertMatrices { down: matrix(H, 5), ..expert(I) };
        weights.experts = ExpertWeights::per_expert(vec![expert(I), expert(I), wrong]);
    });
    assert_eq!(third, "layer: down expected [H, I] = [6, 4], got [6, 5] (expert 2)");
    let of_shared = message(|_, weights| shared(weights, |matrices| matrices.up = matrix(5, H)));
    assert_eq!(of_shared, "layer: shared.matrices.up expected [I, H] = [3, 6], got [5, 6]");
    let limit =
        message(|config, _| config.shared.as_mut().unwrap().activation = Activation::ClampedSilu { limit: 0.0 });
    assert_eq!(limit, "layer: shared.activation.limit expected a positive number, got 0");
    let eps = message(|config, _| config.routing.weights.normalize = Normalize::Sum { eps: -1.0 });
    assert_eq!(eps, "layer: weights.normalize.eps expected a number not below zero, got -1");
}
