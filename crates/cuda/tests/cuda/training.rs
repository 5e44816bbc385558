//! A layer that is trained: its gradients against the reference, in bf16, and a whole step in a graph.

use crate::layer::numbers;
use fused_moe_conformance::{Options, Scale, run_backward};
use fused_moe_core::config::{GateNorm, LayerConfig, Normalize, SharedConfig};
use fused_moe_core::operation::*;
use fused_moe_core::reference::{self, Input};
use fused_moe_core::training::{TrainingLayer, TrainingWorkspace};
use fused_moe_core::{Backend, DType, Routing, Stream, View};
use fused_moe_cuda::{Cuda, CudaStream, Graph, Memory, Result};

pub(crate) fn the_gradients_agree_with_the_reference() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let filter = std::env::var("FMOE_FILTER").ok();
    let scale = if std::env::var_os("FMOE_FULL").is_some() { Scale::Full } else { Scale::Quick };
    let report = run_backward(&cuda, &Options { filter, scale, ..Options::default() }, &mut |_| {})?;
    println!("{report}");
    assert!(report.passed());
    Ok(())
}

const H: usize = 136;
const I: usize = 72;
const S: usize = 40;
const E: usize = 6;
const K: usize = 2;
const BF16: DType = DType::BF16;

/// Names and sizes of the weights, which are those of their gradients.
const WEIGHTS: [(&str, usize); 7] = [
    ("router", E * H),
    ("router_norm", H),
    ("gate_up", E * 2 * I * H),
    ("down", E * H * I),
    ("shared_gate_up", 2 * S * H),
    ("shared_down", H * S),
    ("shared_gate", H),
];

fn config() -> LayerConfig {
    let shared = SharedConfig { intermediate: S, activation: Default::default(), gated: true, scale: 0.7 };
    let mut config = LayerConfig { shared: Some(shared), routed_scale: 1.5, ..LayerConfig::new(H, I, E, K) };
    config.gate.norm = Some(GateNorm { eps: 1e-5, feeds_experts: true });
    config.routing.weights.normalize = Normalize::Sum { eps: 0.0 };
    config
}

/// A step's memory, all of it bf16 but for routes and the gradient of the router.
struct Step {
    cuda: Cuda,
    tokens: usize,
    layer: TrainingLayer,
    workspace: TrainingWorkspace<Cuda>,
    x: Memory,
    d_y: Memory,
    weights: [Memory; 7],
    z: Memory,
    shared_z: Memory,
    routes: [Memory; 2],
    y: Memory,
    d_x: Memory,
    gradients: [Memory; 7],
}

impl Step {
    fn new(cuda: &Cuda, tokens: usize) -> Result<Self> {
        let of = |count: usize, seed: u32| -> Result<Memory> {
            let mut memory = cuda.allocate(2 * count)?;
            cuda.upload(bytemuck::cast_slice(&numbers(count, seed)), &mut memory)?;
            Ok(memory)
        };
        let layer = TrainingLayer::new(&config())?;
        let mut seed = 10;
        let weights = WEIGHTS.map(|(_, count)| {
            seed += 1;
            of(count, seed).unwrap()
        });
        Ok(Self {
            cuda: cuda.clone(),
            tokens,
            workspace: layer.workspace(cuda, tokens)?,
            layer,
            x: of(tokens * H, 1)?,
            d_y: of(tokens * H, 2)?,
            weights,
            z: cuda.allocate(2 * tokens * K * 2 * I)?,
            shared_z: cuda.allocate(2 * tokens * 2 * S)?,
            routes: [cuda.allocate(4 * tokens * K)?, cuda.allocate(4 * tokens * K)?],
            y: cuda.allocate(2 * tokens * H)?,
            d_x: cuda.allocate(2 * tokens * H)?,
            gradients: WEIGHTS.map(|(_, count)| cuda.allocate(4 * count).unwrap()),
        })
    }

    fn enqueue(&mut self, stream: &CudaStream) -> Result<()> {
        let (t, slots) = (self.tokens, [self.tokens, K]);
        let [router, router_norm, gate_up, down, shared_gate_up, shared_down, shared_gate] = &self.weights;
        let shared = SharedParameters {
            gate_up: View::new(shared_gate_up.read(), BF16, 0, [2 * S, H])?,
            gate_up_bias: None,
            down: View::new(shared_down.read(), BF16, 0, [H, S])?,
            down_bias: None,
            gate: Some(View::new(shared_gate.read(), BF16, 0, [H])?),
        };
        let parameters = LayerParameters {
            router_norm: Some(View::new(router_norm.read(), BF16, 0, [H])?),
            shared: Some(shared),
            ..LayerParameters::new(
                View::new(router.read(), BF16, 0, [E, H])?,
                View::new(gate_up.read(), BF16, 0, [E, 2 * I, H])?,
                View::new(down.read(), BF16, 0, [E, H, I])?,
            )
        };
        let [experts, weights] = &mut self.routes;
        let forward = ForwardSaving {
            x: View::new(self.x.read(), BF16, 0, [t, H])?,
            parameters: &parameters,
            source: Source::Router,
            token_ids: None,
            residual: None,
            norm: None,
            pre_activation: View::new(self.z.write(), BF16, 0, [t * K, 2 * I])?,
            shared_pre_activation: Some(View::new(self.shared_z.write(), BF16, 0, [t, 2 * S])?),
            routes: Some(RoutesOut {
                experts: View::new(experts.write(), DType::U32, 0, slots)?,
                weights: View::new(weights.write(), DType::F32, 0, slots)?,
            }),
            y: View::new(self.y.write(), BF16, 0, [t, H])?,
        };
        self.layer.forward(&self.cuda, stream, forward, &mut self.workspace)?;
        let [experts, weights] = &self.routes;
        let [router, router_norm, gate_up, down, shared_gate_up, shared_down, shared_gate] = &mut self.gradients;
        let assign = |memory, shape: &[usize]| -> Result<Option<Gradient<'_, Cuda>>> {
            let shape = match *shape {
                [n] => fused_moe_core::Shape::from([n]),
                [m, n] => [m, n].into(),
                [e, m, n] => [e, m, n].into(),
                _ => return Ok(None),
            };
            Ok(Some(Gradient::assign(View::new(Memory::write(memory), DType::F32, 0, shape)?)))
        };
        let backward = LayerBackward {
            d_y: View::new(self.d_y.read(), BF16, 0, [t, H])?,
            d_logits: None,
            x: View::new(self.x.read(), BF16, 0, [t, H])?,
            parameters: &parameters,
            source: RoutesFrom::Router,
            routing: Routing {
                experts: View::new(experts.read(), DType::U32, 0, slots)?,
                weights: View::new(weights.read(), DType::F32, 0, slots)?,
            },
            pre_activation: View::new(self.z.read(), BF16, 0, [t * K, 2 * I])?,
            shared_pre_activation: Some(View::new(self.shared_z.read(), BF16, 0, [t, 2 * S])?),
            gradients: LayerGradients {
                x: Some(Gradient::assign(View::new(self.d_x.write(), BF16, 0, [t, H])?)),
                router: assign(router, &[E, H])?,
                router_norm: assign(router_norm, &[H])?,
                gate_up: assign(gate_up, &[E, 2 * I, H])?,
                down: assign(down, &[E, H, I])?,
                shared: SharedGradients {
                    gate_up: assign(shared_gate_up, &[2 * S, H])?,
                    down: assign(shared_down, &[H, S])?,
                    gate: assign(shared_gate, &[H])?,
                    ..SharedGradients::default()
                },
                ..LayerGradients::default()
            },
        };
        self.layer.backward(&self.cuda, stream, backward, &mut self.workspace)
    }

    /// What a step wrote: y and the gradient of x, then those of the weights, as bytes.
    fn written(&self, stream: &CudaStream) -> Result<Vec<Vec<u8>>> {
        assert!(stream.status()?.is_ok());
        let all = [&self.y, &self.d_x].into_iter().chain(&self.gradients);
        all.map(|memory| {
            let mut bytes = vec![0; memory.bytes()];
            self.cuda.download(stream, memory, &mut bytes).map(|()| bytes)
        })
        .collect()
    }

    fn poison(&mut self) -> Result<()> {
        for memory in
            [&mut self.y, &mut self.d_x, &mut self.z, &mut self.shared_z].into_iter().chain(&mut self.gradients)
        {
            self.cuda.upload(&vec![0xff; memory.bytes()], memory)?;
        }
        Ok(())
    }
}

pub(crate) fn a_captured_training_step_replays() -> Result<()> {
    let cuda = Cuda::new(0)?;
    for tokens in [1, 40, 700] {
        let stream = cuda.stream()?;
        let mut step = Step::new(&cuda, tokens)?;
        step.enqueue(&stream)?;
        let direct = step.written(&stream)?;
        compare(&direct, tokens);
        // SAFETY: all that is captured outlives the graph, and uploads and downloads wait.
        let graph = unsafe { Graph::capture(&stream, || step.enqueue(&stream)) }?;
        graph.replay(&stream)?;
        step.poison()?;
        let free = cuda.free_bytes()?;
        graph.replay(&stream)?;
        assert!(step.written(&stream)? == direct, "the same bits, T = {tokens}");
        assert_eq!(cuda.free_bytes()?, free);
    }
    Ok(())
}

/// Against the reference on the same numbers. What is stored between operations is rounded to bf16, several times on the way
/// to a gradient; the norm of the difference is held to eight such roundings.
fn compare(found: &[Vec<u8>], tokens: usize) {
    let of = |count: usize, seed: u32| -> Vec<f64> { numbers(count, seed).into_iter().map(f64::from).collect() };
    let mut seed = 10;
    let weights = WEIGHTS.map(|(_, count)| {
        seed += 1;
        of(count, seed)
    });
    let [router, router_norm, gate_up, down, shared_gate_up, shared_down, shared_gate] = &weights;
    let layer = reference::Layer {
        router,
        router_norm: Some(router_norm),
        gate_up,
        down,
        shared: Some(reference::SharedExpert {
            gate_up: shared_gate_up,
            gate_up_bias: None,
            down: shared_down,
            down_bias: None,
            gate: Some(shared_gate),
        }),
        ..reference::Layer::default()
    };
    let (config, x, d_y) = (config(), of(tokens * H, 1), of(tokens * H, 2));
    let input = Input { x: &x, tokens, ..Input::default() };
    let source = reference::Source::Router;
    let (output, saved) = reference::forward_saving(&config, &layer, &input, source);
    let op = reference::LayerBackward { d_y: &d_y, d_logits: None, x: &x, source, saved: &saved, tokens };
    let d = reference::backward(&config, &layer, &op);
    let shared = d.shared.unwrap();
    let expected = [
        ("y", &output.y),
        ("d_x", &d.x),
        ("router", &d.router),
        ("router_norm", &d.router_norm),
        ("gate_up", &d.gate_up),
        ("down", &d.down),
        ("shared_gate_up", &shared.gate_up),
        ("shared_down", &shared.down),
        ("shared_gate", &shared.gate),
    ];
    for ((name, expected), bytes) in expected.into_iter().zip(found) {
        let found: Vec<f64> = if bytes.len() == 2 * expected.len() {
            bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).into()).collect()
        } else {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect()
        };
        assert_eq!(found.len(), expected.len(), "{name}");
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let off = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e)) / norm(&mut expected.iter().copied());
        println!("T = {tokens}, {name}: off by {off:.1e}");
        assert!(off < 8.0 * DType::BF16.epsilon(), "T = {tokens}, {name}: off by {off:e}");
    }
}
