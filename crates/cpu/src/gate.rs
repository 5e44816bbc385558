//! Tokens to router logits.

use crate::arch::{Kernels, SharedSlice};
use crate::error::Result;
use crate::plan::{CHUNK, GATE_COLUMNS as COLUMNS, GATE_EXPERTS as EXPERTS, GATE_TOKENS as TOKENS, GatePlan, RowsPlan};
use crate::pool::Pool;
use crate::rows::{Floats, FloatsMut, each_format, norm_factor, share_rows};
use crate::{Cpu, CpuStream, route};
use fused_moe_core::Rows;
use fused_moe_core::backend::{reborrow, share, shorten, shorten_mut};
use fused_moe_core::config::GateConfig;
use fused_moe_core::dtype::Float;
use fused_moe_core::operation::{Gate, GateRoute};
use fused_moe_core::problem::GateProblem;
use std::array::from_fn;

/// What all blocks read, and the logits that each writes its part of.
struct Router<'a, W> {
    kernels: Kernels,
    problem: GateProblem,
    config: GateConfig,
    x: Floats<'a>,
    router: Rows<'a, W>,
    bias: Option<Floats<'a>>,
    norm_weight: Option<Floats<'a>>,
    logits: SharedSlice<'a, f32>,
    stride: usize,
}

/// Some tokens and some experts: the first of them and how many.
struct Block {
    token: usize,
    tokens: usize,
    expert: usize,
    experts: usize,
}

/// Products of a block, `[experts, tokens]`.
type Tile = [f32; TOKENS * EXPERTS];

pub(crate) fn gate(cpu: &Cpu, _stream: &CpuStream, operands: Gate<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let Gate { x, router, bias, norm_weight, config, normed, logits } = operands;
    let (x, router) = (Floats::new(&x)?, Floats::new(&router)?);
    let (bias, norm_weight) = (Floats::optional(&bias)?, Floats::optional(&norm_weight)?);
    let normed = normed.map(FloatsMut::new).transpose()?;
    let logits = logits.typed_mut::<f32>()?;
    let stride = logits.stride();
    let logits = SharedSlice::new(logits.into_data());
    let kernels = cpu.kernels;
    each_format!(Floats, router, router => {
        Router { kernels, problem, config, x, router, bias, norm_weight, logits, stride }.run(&cpu.pool);
    });
    if let (Some(normed), Some(norm)) = (normed, config.norm) {
        store_normed(cpu, (&x, norm_weight.as_ref()), norm.eps, normed, problem);
    }
    Ok(())
}

/// The two in order; there is nothing that a thread would save by keeping its logits to itself.
pub(crate) fn gate_route(cpu: &Cpu, stream: &CpuStream, operands: GateRoute<'_, Cpu>) -> Result<()> {
    let (_, problem) = operands.problem()?;
    let GateRoute { gate: Gate { x, router, bias, norm_weight, config, normed, mut logits }, choice } = operands;
    let operands = Gate {
        x: shorten::<Cpu>(x),
        router: shorten::<Cpu>(router),
        bias: bias.map(shorten::<Cpu>),
        norm_weight: norm_weight.map(shorten::<Cpu>),
        config,
        normed: normed.map(shorten_mut::<Cpu>),
        logits: reborrow::<Cpu>(&mut logits),
    };
    route::check_alignment(&choice)?;
    gate(cpu, stream, operands)?;
    route::choose(cpu, stream, problem, Floats::new(&share::<Cpu>(&logits))?, choice)
}

impl<W: Float> Router<'_, W> {
    fn run(&self, pool: &Pool) {
        let GateProblem { tokens, hidden, experts, .. } = self.problem;
        let GatePlan { experts: width, grain } = GatePlan::new([tokens, hidden], self.config.norm.is_some());
        let across = experts.div_ceil(width);
        pool.for_each(tokens.div_ceil(TOKENS) * across, grain, |block| {
            let (token, expert) = (block / across * TOKENS, block % across * width);
            let block =
                Block { token, tokens: TOKENS.min(tokens - token), expert, experts: width.min(experts - expert) };
            let mut tile = [0.0; TOKENS * EXPERTS];
            match self.config.norm {
                Some(norm) if block.tokens == 1 => self.of_normed::<1>(&block, norm.eps, &mut tile),
                Some(norm) => self.of_normed::<TOKENS>(&block, norm.eps, &mut tile),
                None => each_format!(Floats, self.x, x => self.of_rows(&block, x, &mut tile)),
            }
            self.finish(&block, &tile);
        });
    }

    fn of_rows<X: Float>(&self, block: &Block, x: Rows<'_, X>, tile: &mut Tile) {
        let weights: [&[W]; EXPERTS] = from_fn(|i| self.router.row(block.expert + i));
        let tokens: [&[X]; TOKENS] = from_fn(|i| x.row(block.token + i));
        self.kernels.dot_tile(&weights[..block.experts], &tokens[..block.tokens], tile);
    }

    /// The tokens, at most N, are normalised in f32, some columns at a time; the products of these are added in order.
    fn of_normed<const N: usize>(&self, block: &Block, eps: f32, tile: &mut Tile) {
        let (kernels, hidden) = (self.kernels, self.problem.hidden);
        let mut factors = [0.0; N];
        for (i, factor) in factors.iter_mut().enumerate().take(block.tokens) {
            *factor = norm_factor(self.x.sum_squares(kernels, block.token + i), hidden, eps);
        }
        let (mut normed, mut weight) = ([[0.0; COLUMNS]; N], [0.0; COLUMNS]);
        for col in (0..hidden).step_by(COLUMNS) {
            let n = COLUMNS.min(hidden - col);
            let weight = self.norm_weight.as_ref().map(|norm_weight| {
                norm_weight.load(kernels, 0, col, &mut weight[..n]);
                &weight[..n]
            });
            for (i, normed) in normed.iter_mut().enumerate().take(block.tokens) {
                self.x.scale(kernels, [block.token + i, col], factors[i], weight, &mut normed[..n]);
            }
            let weights: [&[W]; EXPERTS] = from_fn(|i| {
                let row = self.router.row(block.expert + i);
                row.get(col..col + n).unwrap_or_default()
            });
            let tokens: [&[f32]; N] = from_fn(|i| &normed[i][..n]);
            let mut part = [0.0; TOKENS * EXPERTS];
            kernels.dot_tile(&weights[..block.experts], &tokens[..block.tokens], &mut part);
            for (sum, part) in tile.iter_mut().zip(&part) {
                *sum += part;
            }
        }
    }

    /// Products to logits.
    fn finish(&self, block: &Block, tile: &Tile) {
        for (e, sums) in tile.chunks(block.tokens).enumerate().take(block.experts) {
            let expert = block.expert + e;
            let bias = self.bias.as_ref().map_or(0.0, |bias| bias.at(0, expert));
            for (t, sum) in sums.iter().enumerate() {
                let logit = self.config.scale * sum + bias;
                let logit = self.config.softcap.map_or(logit, |cap| cap * (logit / cap).tanh());
                self.logits.store((block.token + t) * self.stride + expert, logit);
            }
        }
    }
}

/// `normed = x / sqrt(mean(x^2) + eps) * weight`.
fn store_normed(
    cpu: &Cpu,
    (x, weight): (&Floats<'_>, Option<&Floats<'_>>),
    eps: f32,
    normed: FloatsMut<'_>,
    problem: GateProblem,
) {
    let (kernels, hidden) = (cpu.kernels, problem.hidden);
    share_rows(&cpu.pool, normed, problem.tokens, RowsPlan::elements(hidden), |range, mut normed| {
        let (mut weights, mut scaled) = ([0.0; CHUNK], [0.0; CHUNK]);
        for (i, t) in range.enumerate() {
            let factor = norm_factor(x.sum_squares(kernels, t), hidden, eps);
            for col in (0..hidden).step_by(CHUNK) {
                let n = CHUNK.min(hidden - col);
                let weight = weight.map(|weight| {
                    weight.load(kernels, 0, col, &mut weights[..n]);
                    &weights[..n]
                });
                x.scale(kernels, [t, col], factor, weight, &mut scaled[..n]);
                normed.store(kernels, i, col, &scaled[..n]);
            }
        }
    });
}
