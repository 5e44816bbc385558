//! A layer with every part that has a gradient, and a step of its training.

use fused_moe_core::config::*;
use fused_moe_core::operation::*;
use fused_moe_core::training::{TrainingLayer, TrainingWorkspace};
use fused_moe_core::{BackendBackward, Routing, View};
use fused_moe_cpu::{Cpu, CpuStream};

/// Numbers that look random, between -1 and 1.
pub(crate) fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let hash = |n: u32| n.wrapping_mul(2654435761).wrapping_add(seed.wrapping_mul(40503)).rotate_left(13);
    (0..count as u32).map(|n| hash(hash(n)) as f32 / (1u64 << 31) as f32 - 1.0).collect()
}

pub(crate) fn config([hidden, intermediate, experts, top_k]: [usize; 4]) -> LayerConfig {
    let shared = SharedConfig { intermediate: 24, activation: Activation::default(), gated: true, scale: 1.0 };
    let gate = GateConfig { norm: Some(GateNorm { eps: 1e-6, feeds_experts: true }), ..GateConfig::default() };
    LayerConfig { shared: Some(shared), gate, ..LayerConfig::new(hidden, intermediate, experts, top_k) }
}

/// Buffers of a step, made once.
pub(crate) struct Step {
    layer: TrainingLayer,
    tokens: usize,
    shapes: Vec<Vec<usize>>,
    /// In the order of [`shapes`].
    pub(crate) weights: Vec<Vec<f32>>,
    gradients: Vec<Vec<f32>>,
    x: Vec<f32>,
    pub(crate) d_x: Vec<f32>,
    d_y: Vec<f32>,
    pub(crate) y: Vec<f32>,
    pre_activation: Vec<f32>,
    shared_pre_activation: Vec<f32>,
    experts: Vec<u32>,
    routing_weights: Vec<f32>,
    d_logits: Vec<f32>,
    losses: Vec<f32>,
    workspace: TrainingWorkspace<Cpu>,
}

/// Router, its norm, gate_up and its bias, down and its bias, of the shared expert gate_up, down and gate.
fn shapes(config: &LayerConfig) -> Vec<Vec<usize>> {
    let LayerConfig { hidden: h, intermediate: i, experts: e, shared, .. } = *config;
    let s = shared.map_or(0, |shared| shared.intermediate);
    let n = config.gate_up_rows();
    vec![vec![e, h], vec![h], vec![e, n, h], vec![e, n], vec![e, h, i], vec![e, h], vec![2 * s, h], vec![h, s], vec![h]]
}

fn view<'a>(values: &'a [f32], shape: &[usize]) -> View<&'a [u8]> {
    match *shape {
        [n] => View::of(values, [n]),
        [n, m] => View::of(values, [n, m]),
        [n, m, k] => View::of(values, [n, m, k]),
        _ => unreachable!("no operand has more dimensions"),
    }
    .unwrap()
}

fn gradient<'a>(values: &'a mut [f32], shape: &[usize]) -> Option<Gradient<'a, Cpu>> {
    let view = match *shape {
        [n] => View::of_mut(values, [n]),
        [n, m] => View::of_mut(values, [n, m]),
        [n, m, k] => View::of_mut(values, [n, m, k]),
        _ => unreachable!("no operand has more dimensions"),
    };
    Some(Gradient::assign(view.unwrap()))
}

impl Step {
    pub(crate) fn new(cpu: &Cpu, config: &LayerConfig, tokens: usize) -> Self {
        let LayerConfig { hidden: h, top_k: k, experts: e, shared, .. } = *config;
        let layer = TrainingLayer::new(config).unwrap();
        let shapes = shapes(config);
        let sizes: Vec<usize> = shapes.iter().map(|shape| shape.iter().product()).collect();
        let weights = sizes.iter().zip(1..).map(|(&size, seed)| numbers(size, seed)).collect();
        let gradients = sizes.iter().map(|&size| vec![f32::NAN; size]).collect();
        let s = shared.map_or(0, |shared| shared.intermediate);
        Self {
            workspace: layer.workspace(cpu, tokens).unwrap(),
            layer,
            tokens,
            weights,
            gradients,
            shapes,
            x: numbers(tokens * h, 20),
            d_x: vec![f32::NAN; tokens * h],
            d_y: numbers(tokens * h, 21),
            y: vec![0.0; tokens * h],
            pre_activation: vec![0.0; tokens * k * config.gate_up_rows()],
            shared_pre_activation: vec![0.0; tokens * 2 * s],
            experts: vec![0; tokens * k],
            routing_weights: vec![0.0; tokens * k],
            d_logits: vec![0.0; tokens * e],
            losses: vec![0.0; 2],
        }
    }

    /// Forward, both losses, backward, and a step against the gradients, for the first `tokens` tokens.
    pub(crate) fn run(&mut self, cpu: &Cpu, stream: &CpuStream, tokens: usize) {
        let config = self.layer.config();
        let LayerConfig { hidden: h, top_k: k, experts: e, .. } = *config;
        let (shapes, rows) = (&self.shapes, config.gate_up_rows());
        assert!(tokens <= self.tokens);
        let weight = |i: usize| view(&self.weights[i], &shapes[i]);
        let shared = SharedParameters::<Cpu> {
            gate_up: weight(6),
            gate_up_bias: None,
            down: weight(7),
            down_bias: None,
            gate: Some(weight(8)),
        };
        let parameters = LayerParameters {
            router_norm: Some(weight(1)),
            gate_up_bias: Some(weight(3)),
            down_bias: Some(weight(5)),
            shared: Some(shared),
            ..LayerParameters::<Cpu>::new(weight(0), weight(2), weight(4))
        };
        let x = View::of(&self.x[..tokens * h], [tokens, h]).unwrap();
        let shared_rows = self.shared_pre_activation.len() / self.tokens.max(1);
        let (z, shared_z) = (tokens * k * rows, tokens * shared_rows);
        let forward = ForwardSaving {
            x,
            parameters: &parameters,
            source: Source::Router,
            token_ids: None,
            residual: None,
            norm: None,
            pre_activation: View::of_mut(&mut self.pre_activation[..z], [tokens * k, rows]).unwrap(),
            shared_pre_activation: Some(
                View::of_mut(&mut self.shared_pre_activation[..shared_z], [tokens, shared_rows]).unwrap(),
            ),
            routes: Some(RoutesOut {
                experts: View::of_mut(&mut self.experts[..tokens * k], [tokens, k]).unwrap(),
                weights: View::of_mut(&mut self.routing_weights[..tokens * k], [tokens, k]).unwrap(),
            }),
            y: View::of_mut(&mut self.y[..tokens * h], [tokens, h]).unwrap(),
        };
        self.layer.forward(cpu, stream, forward, &mut self.workspace).unwrap();

        let logits = View::of(&self.x[..tokens * e], [tokens, e]).unwrap();
        let [balance, z_loss] = self.losses.get_disjoint_mut([0..1, 1..2]).unwrap();
        let operands = LoadBalanceLoss {
            logits,
            experts: View::of(&self.experts[..tokens * k], [tokens, k]).unwrap(),
            score: Score::Softmax,
            sequences: None,
            coefficient: 0.1,
            loss: gradient(balance, &[1]),
            d_logits: gradient(&mut self.d_logits[..tokens * e], &[tokens, e]),
        };
        cpu.load_balance_loss(stream, operands).unwrap();
        let operands = ZLoss {
            logits,
            coefficient: 0.1,
            loss: gradient(z_loss, &[1]),
            d_logits: gradient(&mut self.d_logits[..tokens * e], &[tokens, e]).map(|d| Gradient::accumulate(d.view)),
        };
        cpu.z_loss(stream, operands).unwrap();

        let [router, router_norm, gate_up, gate_up_bias, down, down_bias, shared @ ..] = self.gradients.as_mut_slice()
        else {
            unreachable!("as many gradients as shapes")
        };
        let [shared_gate_up, shared_down, shared_gate] = shared else { unreachable!("likewise") };
        let backward = LayerBackward {
            d_y: View::of(&self.d_y[..tokens * h], [tokens, h]).unwrap(),
            d_logits: Some(View::of(&self.d_logits[..tokens * e], [tokens, e]).unwrap()),
            x,
            parameters: &parameters,
            source: RoutesFrom::Router,
            routing: Routing {
                experts: View::of(&self.experts[..tokens * k], [tokens, k]).unwrap(),
                weights: View::of(&self.routing_weights[..tokens * k], [tokens, k]).unwrap(),
            },
            pre_activation: View::of(&self.pre_activation[..z], [tokens * k, rows]).unwrap(),
            shared_pre_activation: Some(
                View::of(&self.shared_pre_activation[..shared_z], [tokens, shared_rows]).unwrap(),
            ),
            gradients: LayerGradients {
                x: gradient(&mut self.d_x[..tokens * h], &[tokens, h]),
                router: gradient(router, &shapes[0]),
                router_norm: gradient(router_norm, &shapes[1]),
                gate_up: gradient(gate_up, &shapes[2]),
                gate_up_bias: gradient(gate_up_bias, &shapes[3]),
                down: gradient(down, &shapes[4]),
                down_bias: gradient(down_bias, &shapes[5]),
                shared: SharedGradients {
                    gate_up: gradient(shared_gate_up, &shapes[6]),
                    down: gradient(shared_down, &shapes[7]),
                    gate: gradient(shared_gate, &shapes[8]),
                    ..SharedGradients::default()
                },
                ..LayerGradients::default()
            },
        };
        self.layer.backward(cpu, stream, backward, &mut self.workspace).unwrap();
        for (weights, gradients) in self.weights.iter_mut().zip(&self.gradients) {
            weights.iter_mut().zip(gradients).for_each(|(weight, gradient)| *weight -= 1e-3 * gradient);
        }
    }
}

#[test]
fn a_workspace_takes_the_bytes_that_its_documentation_says() {
    let cpu = Cpu::with_threads(1).unwrap();
    let (h, i, e, k) = (40, 12, 7, 3);
    let up = Activation::Plain(Function::Relu);
    let whole = config([h, i, e, k]);
    let plain = LayerConfig { shared: None, ..whole.clone() };
    let shared = whole.shared.map(|shared| SharedConfig { activation: up, ..shared });
    for config in [&plain, &whole, &LayerConfig { activation: up, shared, ..plain.clone() }] {
        for t in [0, 1, 9] {
            let (r, n) = (t * k, config.gate_up_rows());
            let mut expected = 4 * (r * (2 * i + n + h + 4) + t * (3 * h + 2 * e + 1) + e + 3);
            if let Some(SharedConfig { intermediate: s, activation, .. }) = config.shared {
                expected += 4 * t * (2 * h + 2 * s + activation.gate_up_rows(s) + 5);
            }
            let workspace = TrainingLayer::new(config).unwrap().workspace(&cpu, t).unwrap();
            assert_eq!(workspace.bytes(), expected, "{config:?}, {t} tokens");
        }
    }
}
