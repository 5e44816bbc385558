use crate::Cpu;
use crate::error::Result;
use crate::plan::{CHUNK, RowsPlan};
use crate::rows::{Floats, FloatsMut, share_rows};
use fused_moe_core::Rows;
use fused_moe_core::operation::{ActivationBackward, ActivationBackwardOperands as Operands, RowWeights};

/// Where gate and up lie.
enum Source<'a> {
    Separate(Floats<'a>, Floats<'a>),
    Halves(Floats<'a>),
    Interleaved(Floats<'a>),
    Plain(Floats<'a>),
}

/// Where their gradients go: the gate's, where it lies apart, and the rest.
type Targets<'a> = (Option<FloatsMut<'a>>, FloatsMut<'a>);

/// What a row is multiplied by.
struct Weights<'a> {
    weights: Option<Rows<'a, f32>>,
    row_slot: Option<&'a [u32]>,
    scale: f32,
}

impl<'a> Weights<'a> {
    fn new(weights: RowWeights<'a, Cpu>) -> Result<Self> {
        let row_slot = weights.row_slot.map(|row_slot| row_slot.typed()).transpose()?.map(|row_slot| row_slot.row(0));
        let (scale, weights) = (weights.scale, weights.weights.map(|weights| weights.typed()).transpose()?);
        Ok(Self { weights, row_slot, scale })
    }

    fn of(&self, row: usize) -> f32 {
        let slot = match self.row_slot {
            Some(row_slot) => row_slot.get(row).map(|&slot| slot as usize).filter(|&slot| slot < row_slot.len()),
            None => Some(row),
        };
        let weight = slot.and_then(|slot| {
            let Some(weights) = self.weights else { return Some(1.0) };
            let cols = weights.cols();
            weights.row(slot.checked_div(cols)?).get(slot.checked_rem(cols)?).copied()
        });
        self.scale * weight.unwrap_or(0.0)
    }
}

pub(crate) fn activation_backward(cpu: &Cpu, operands: ActivationBackward<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let ActivationBackward { activation, operands, d_a, row_weights, a } = operands;
    let (source, targets) = split(operands)?;
    let d_a = Floats::new(&d_a)?;
    let a = a.map(FloatsMut::new).transpose()?;
    let weights = row_weights.map(Weights::new).transpose()?;
    let (kernels, width) = (cpu.kernels, problem.intermediate);
    if width == 0 {
        return Ok(());
    }
    share_rows(&cpu.pool, (targets, a), problem.rows, RowsPlan::activation(width), |range, parts| {
        let ((mut d_gate, mut d_up), mut a) = parts;
        let (mut gate, mut up, mut d, mut pairs) = ([0.0; CHUNK], [0.0; CHUNK], [0.0; CHUNK], [0.0; 2 * CHUNK]);
        for (i, row) in range.enumerate() {
            let weight = weights.as_ref().map_or(1.0, |weights| weights.of(row));
            for col in (0..width).step_by(CHUNK) {
                let n = CHUNK.min(width - col);
                let (gate, up, d, pairs) = (&mut gate[..n], &mut up[..n], &mut d[..n], &mut pairs[..2 * n]);
                d_a.load(kernels, row, col, d);
                match &source {
                    Source::Separate(g, u) => {
                        g.load(kernels, row, col, gate);
                        u.load(kernels, row, col, up);
                    }
                    Source::Halves(z) => {
                        z.load(kernels, row, col, gate);
                        z.load(kernels, row, width + col, up);
                    }
                    Source::Interleaved(z) => {
                        z.load(kernels, row, 2 * col, pairs);
                        for ((pair, g), u) in pairs.chunks_exact(2).zip(gate.iter_mut()).zip(up.iter_mut()) {
                            (*g, *u) = (pair[0], pair[1]);
                        }
                    }
                    Source::Plain(u) => u.load(kernels, row, col, up),
                }
                kernels.activation_backward(activation, [&mut *gate, &mut *up, &mut *d], weight);
                match (&source, &mut d_gate) {
                    (Source::Halves(_), _) => {
                        d_up.store(kernels, i, col, gate);
                        d_up.store(kernels, i, width + col, up);
                    }
                    (Source::Interleaved(_), _) => {
                        for ((pair, &g), &u) in pairs.chunks_exact_mut(2).zip(&*gate).zip(&*up) {
                            pair.copy_from_slice(&[g, u]);
                        }
                        d_up.store(kernels, i, 2 * col, pairs);
                    }
                    (_, Some(d_gate)) => {
                        d_gate.store(kernels, i, col, gate);
                        d_up.store(kernels, i, col, up);
                    }
                    (_, None) => d_up.store(kernels, i, col, up),
                }
                if let Some(a) = &mut a {
                    a.store(kernels, i, col, d);
                }
            }
        }
    });
    Ok(())
}

fn split<'a>(operands: Operands<'a, Cpu>) -> Result<(Source<'a>, Targets<'a>)> {
    let one = |view: &_| Floats::new(view);
    Ok(match operands {
        Operands::Separate { gate, up, d_gate, d_up } => {
            (Source::Separate(one(&gate)?, one(&up)?), (Some(FloatsMut::new(d_gate)?), FloatsMut::new(d_up)?))
        }
        Operands::Halves { gate_up, d_gate_up } => (Source::Halves(one(&gate_up)?), (None, FloatsMut::new(d_gate_up)?)),
        Operands::Interleaved { gate_up, d_gate_up } => {
            (Source::Interleaved(one(&gate_up)?), (None, FloatsMut::new(d_gate_up)?))
        }
        Operands::Plain { up, d_up } => (Source::Plain(one(&up)?), (None, FloatsMut::new(d_up)?)),
    })
}
