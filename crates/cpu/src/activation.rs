//! `act(g) * u` or `act(u)`, element by element.

use crate::Cpu;
use crate::error::Result;
use crate::plan::{CHUNK, RowsPlan};
use crate::rows::{Floats, FloatsMut, share_rows};
use fused_moe_core::operation::{Activate, ActivationOperands};

/// Where gate and up are read; `Out` is the operand that is written.
enum Source<'a> {
    Separate(Floats<'a>, Floats<'a>),
    SeparateInPlace(Floats<'a>),
    Halves(Floats<'a>),
    HalvesInPlace,
    Interleaved(Floats<'a>),
    Plain(Floats<'a>),
    PlainInPlace,
}

pub(crate) fn activation(cpu: &Cpu, operands: Activate<'_, Cpu>) -> Result<()> {
    let problem = operands.problem()?;
    let (source, out) = source(operands.operands)?;
    let (kernels, width) = (cpu.kernels, problem.intermediate);
    if width == 0 {
        return Ok(());
    }
    share_rows(&cpu.pool, out, problem.rows, RowsPlan::activation(width), |range, mut out| {
        let (mut gate, mut up, mut pairs) = ([0.0; CHUNK], [0.0; CHUNK], [0.0; 2 * CHUNK]);
        for (i, row) in range.enumerate() {
            for col in (0..width).step_by(CHUNK) {
                let n = CHUNK.min(width - col);
                let (gate, up) = (&mut gate[..n], &mut up[..n]);
                match &source {
                    Source::Separate(g, u) => {
                        g.load(kernels, row, col, gate);
                        u.load(kernels, row, col, up);
                    }
                    Source::SeparateInPlace(u) => {
                        out.load(kernels, i, col, gate);
                        u.load(kernels, row, col, up);
                    }
                    Source::Halves(z) => {
                        z.load(kernels, row, col, gate);
                        z.load(kernels, row, width + col, up);
                    }
                    Source::HalvesInPlace => {
                        out.load(kernels, i, col, gate);
                        out.load(kernels, i, width + col, up);
                    }
                    Source::Interleaved(z) => {
                        let pairs = &mut pairs[..2 * n];
                        z.load(kernels, row, 2 * col, pairs);
                        for ((pair, g), u) in pairs.chunks_exact(2).zip(gate.iter_mut()).zip(up.iter_mut()) {
                            (*g, *u) = (pair[0], pair[1]);
                        }
                    }
                    Source::Plain(u) => u.load(kernels, row, col, up),
                    Source::PlainInPlace => out.load(kernels, i, col, up),
                }
                kernels.activation_into_up(problem.activation, gate, up);
                out.store(kernels, i, col, up);
            }
        }
    });
    Ok(())
}

fn source<'a>(operands: ActivationOperands<'a, Cpu>) -> Result<(Source<'a>, FloatsMut<'a>)> {
    use ActivationOperands as Operands;
    let (source, out) = match operands {
        Operands::Separate { gate, up, out } => (Source::Separate(Floats::new(&gate)?, Floats::new(&up)?), out),
        Operands::SeparateInPlace { gate, up } => (Source::SeparateInPlace(Floats::new(&up)?), gate),
        Operands::Halves { gate_up, out } => (Source::Halves(Floats::new(&gate_up)?), out),
        Operands::HalvesInPlace { gate_up } => (Source::HalvesInPlace, gate_up),
        Operands::Interleaved { gate_up, out } => (Source::Interleaved(Floats::new(&gate_up)?), out),
        Operands::Plain { up, out } => (Source::Plain(Floats::new(&up)?), out),
        Operands::PlainInPlace { up } => (Source::PlainInPlace, up),
    };
    Ok((source, FloatsMut::new(out)?))
}
