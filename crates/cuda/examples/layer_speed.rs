//! Microseconds a layer call, from router logits to output, in one graph of several calls, each with logits of its own, on
//! two sets of weights in turn. The output of some tokens is checked before anything is timed.
//!
//! `layer_speed [H I E K] [T ..]`, in bf16; qwen3-30b-a3b's sizes and 1, 8, 32, 128, 512, 2048, 8192 tokens by default.

use fused_moe_core::config::{LayerConfig, Normalize, RoutingRule, WeightRule};
use fused_moe_core::operation::{Forward, Source};
use fused_moe_core::weights::{ExpertWeights, LayerWeights, StackLayout};
use fused_moe_core::{Backend, DType, Layer, Options, Stream, View};
use fused_moe_cuda::{Cuda, CudaLayer, CudaStream, Graph, Memory, time_replays};
use half::bf16;
use std::time::Instant;

type Anything<T> = Result<T, Box<dyn std::error::Error>>;

/// Normal enough: the sum of four uniform numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let word = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D);
        let part = |i: u32| ((word >> (16 * i)) & 0xffff) as f32 / 65536.0 - 0.5;
        (part(0) + part(1) + part(2) + part(3)) * 1.732
    }

    fn many(&mut self, count: usize, scale: f32) -> Vec<bf16> {
        (0..count).map(|_| bf16::from_f32(self.next() * scale)).collect()
    }
}

struct Bench {
    cuda: Cuda,
    stream: CudaStream,
    config: LayerConfig,
    gate_up: Vec<bf16>,
    down: Vec<bf16>,
    layers: [CudaLayer; 2],
}

/// One call's memory.
struct Call {
    x: Memory,
    logits: Memory,
    y: Memory,
    x_host: Vec<bf16>,
    logits_host: Vec<f32>,
}

impl Bench {
    fn new([hidden, intermediate, experts, top_k]: [usize; 4]) -> Anything<Self> {
        let cuda = Cuda::new(0)?;
        let weights = WeightRule { normalize: Normalize::Sum { eps: 0.0 }, ..WeightRule::default() };
        let routing = RoutingRule { weights, ..RoutingRule::default() };
        let config = LayerConfig { routing, ..LayerConfig::new(hidden, intermediate, experts, top_k) };
        let part = |seed: u64, count: usize, scale: f32| {
            // one expert's numbers after the other's, by several threads
            let mut all = vec![bf16::ZERO; experts * count];
            std::thread::scope(|scope| {
                for (e, part) in all.chunks_mut(count).enumerate() {
                    let mut random = Random(seed + 7919 * (e as u64 + 1));
                    scope.spawn(move || part.copy_from_slice(&random.many(part.len(), scale)));
                }
            });
            all
        };
        let gate_up = part(1, 2 * intermediate * hidden, 1.0 / (hidden as f32).sqrt());
        let down = part(2, hidden * intermediate, 1.0 / (intermediate as f32).sqrt());
        let prepare = || -> Anything<CudaLayer> {
            let start = Instant::now();
            let stack = ExpertWeights::stacked(
                View::of(&gate_up, [experts, 2 * intermediate, hidden])?,
                View::of(&down, [experts, hidden, intermediate])?,
                StackLayout::default(),
            )?;
            let weights = LayerWeights {
                router: None,
                router_bias: None,
                router_norm: None,
                correction_bias: None,
                expert_scale: None,
                table: None,
                experts: stack,
                shared: None,
            };
            let layer = cuda.prepare(&config, &weights, &Options::default())?;
            let seconds = start.elapsed().as_secs_f64();
            println!("prepared {} MiB in {seconds:.2} s", layer.weight_bytes() >> 20);
            Ok(layer)
        };
        let layers = [prepare()?, prepare()?];
        Ok(Self { stream: cuda.stream()?, cuda, config, gate_up, down, layers })
    }

    fn call(&self, tokens: usize, seed: u64) -> Anything<Call> {
        let LayerConfig { hidden, experts, .. } = self.config;
        let mut random = Random(seed * 977 + 12345);
        let x_host = random.many(tokens * hidden, 1.0);
        let logits_host: Vec<f32> = (0..tokens * experts).map(|_| random.next() * 2.0).collect();
        let memory = |bytes: &[u8]| -> Anything<Memory> {
            let mut memory = self.cuda.allocate(bytes.len())?;
            self.cuda.upload(bytes, &mut memory)?;
            Ok(memory)
        };
        let poison = vec![bf16::NAN; tokens * hidden];
        Ok(Call {
            x: memory(bytemuck::cast_slice(&x_host))?,
            logits: memory(bytemuck::cast_slice(&logits_host))?,
            y: memory(bytemuck::cast_slice(&poison))?,
            x_host,
            logits_host,
        })
    }

    /// The largest error of some tokens, relative to the largest element of the token.
    fn check(&self, call: &Call, tokens: usize) -> Anything<f64> {
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = self.config;
        let mut y = vec![bf16::ZERO; tokens * hidden];
        self.cuda.download(&self.stream, &call.y, bytemuck::cast_slice_mut(&mut y))?;
        if let Some(bad) = y.iter().position(|y| !y.is_finite()) {
            return Err(format!("element {bad} of {} is {}", y.len(), y[bad]).into());
        }
        let mut worst = 0f64;
        let mut some = [0, tokens / 3, tokens / 2, tokens - 1].to_vec();
        some.dedup();
        for t in some {
            let logits = &call.logits_host[t * experts..(t + 1) * experts];
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let chosen = &order[..top_k];
            let total: f64 = chosen.iter().map(|&e| f64::from(logits[e]).exp()).sum();
            let x = &call.x_host[t * hidden..(t + 1) * hidden];
            let mut expected = vec![0f64; hidden];
            for &e in chosen {
                let dot = |row: &[bf16], x: &[f32]| row.iter().zip(x).map(|(w, x)| w.to_f32() * x).sum::<f32>();
                let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
                let rows = &self.gate_up[e * 2 * intermediate * hidden..][..2 * intermediate * hidden];
                let a: Vec<f32> = (0..intermediate)
                    .map(|i| {
                        let g = dot(&rows[i * hidden..][..hidden], &x);
                        let u = dot(&rows[(intermediate + i) * hidden..][..hidden], &x);
                        g / (1.0 + (-g).exp()) * u
                    })
                    .collect();
                let weight = f64::from(logits[e]).exp() / total;
                let rows = &self.down[e * intermediate * hidden..][..intermediate * hidden];
                for (h, expected) in expected.iter_mut().enumerate() {
                    *expected += weight * f64::from(dot(&rows[h * intermediate..][..intermediate], &a));
                }
            }
            let scale = expected.iter().fold(0f64, |m, y| m.max(y.abs()));
            for (y, expected) in y[t * hidden..].iter().zip(&expected) {
                worst = worst.max((y.to_f64() - expected).abs() / scale);
            }
        }
        Ok(worst)
    }

    fn measure(&self, tokens: usize) -> Anything<()> {
        let LayerConfig { hidden, intermediate, experts, top_k, .. } = self.config;
        let count = if tokens <= 512 { 8 } else { 4 };
        let mut calls = (0..count).map(|i| self.call(tokens, i + 1)).collect::<Anything<Vec<_>>>()?;
        let start = Instant::now();
        let mut workspace = self.layers[0].workspace(tokens)?;
        let compiled = start.elapsed().as_secs_f64();
        let mut run = |calls: &mut [Call]| -> fused_moe_cuda::Result<()> {
            for (i, call) in calls.iter_mut().enumerate() {
                let x = View::new(call.x.read(), DType::BF16, 0, [tokens, hidden])?;
                let logits = View::new(call.logits.read(), DType::F32, 0, [tokens, experts])?;
                let y = View::new(call.y.write(), DType::BF16, 0, [tokens, hidden])?;
                let forward = Forward { source: Source::Logits(logits), ..Forward::new(x, y) };
                self.layers[i % 2].run(&self.stream, forward, &mut workspace)?;
            }
            Ok(())
        };
        let graph = Graph::capture(&self.stream, || run(&mut calls))?;
        graph.replay(&self.stream)?;
        let status = self.stream.status()?;
        let mut error = 0f64;
        for call in calls.iter().take(2) {
            error = error.max(self.check(call, tokens)?);
        }
        let mut times = time_replays(&self.stream, &graph, 25)?;
        times.sort_by(f64::total_cmp);
        let per_call = |i: usize| times[i] / count as f64;
        let flops = 6.0 * (tokens * top_k * hidden * intermediate) as f64;
        println!(
            "T {tokens:5}  {:8.1} us  (least {:8.1})  {:6.1} TFLOP/s  error {error:.1e}  {status:?}  ready in {compiled:.2} s",
            per_call(times.len() / 2),
            per_call(0),
            flops / per_call(times.len() / 2) * 1e-6,
        );
        Ok(())
    }
}

fn main() -> Anything<()> {
    let numbers = std::env::args().skip(1).map(|n| n.parse()).collect::<Result<Vec<usize>, _>>()?;
    let sizes = numbers.get(..4).map_or([2048, 768, 128, 8], |n| [n[0], n[1], n[2], n[3]]);
    let tokens = match numbers.get(4..) {
        Some(tokens) if !tokens.is_empty() => tokens.to_vec(),
        _ => vec![1, 8, 32, 128, 512, 2048, 8192],
    };
    let bench = Bench::new(sizes)?;
    println!("{}", bench.cuda.describe());
    for tokens in tokens {
        println!("{}", bench.layers[0].explain(tokens));
        bench.measure(tokens)?;
    }
    Ok(())
}
