use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::{Cuda, CudaStream, kernel::Kernel, plan};
use fused_moe_core::config::Activation;
use fused_moe_core::operation::{Activate, ActivationOperands};
use fused_moe_core::problem::Arrangement;
use fused_moe_core::DType;

params! {
    ActivationParams { gate: Tensor, up: Tensor, out: Tensor, rows: u64, width: u64, step: u64, limit: f32, alpha: f32 }
}

/// The numbers of an activation: its limit and its alpha.
pub(crate) fn constants(activation: Activation) -> (f32, f32) {
    match activation {
        Activation::ClampedSilu { limit } | Activation::SiluThenClamp { limit } => (limit, 0.0),
        Activation::ClampedSwish { alpha, limit } => (limit, alpha),
        _ => (0.0, 0.0),
    }
}

/// Gate, up and out, whose formats are known apart.
struct Operands {
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    dtypes: [DType; 3],
}

impl Operands {
    fn new(operands: &ActivationOperands<'_, Cuda>) -> Result<Self> {
        use ActivationOperands::*;
        let both = |dtype, out| [dtype, dtype, out];
        Ok(match operands {
            Separate { gate, up, out } => Self {
                gate: Tensor::of(gate)?,
                up: Tensor::of(up)?,
                out: Tensor::of(out)?,
                dtypes: [gate.dtype(), up.dtype(), out.dtype()],
            },
            SeparateInPlace { gate, up } => {
                let dtypes = [gate.dtype(), up.dtype(), gate.dtype()];
                Self { gate: Tensor::of(gate)?, up: Tensor::of(up)?, out: Tensor::of(gate)?, dtypes }
            }
            Halves { gate_up, out } | Interleaved { gate_up, out } => {
                let tensor = Tensor::of(gate_up)?;
                let dtypes = both(gate_up.dtype(), out.dtype());
                Self { gate: tensor, up: tensor, out: Tensor::of(out)?, dtypes }
            }
            HalvesInPlace { gate_up } => {
                let tensor = Tensor::of(gate_up)?;
                Self { gate: tensor, up: tensor, out: tensor, dtypes: both(gate_up.dtype(), gate_up.dtype()) }
            }
            Plain { up, out } => {
                let tensor = Tensor::of(up)?;
                Self { gate: tensor, up: tensor, out: Tensor::of(out)?, dtypes: both(up.dtype(), out.dtype()) }
            }
            PlainInPlace { up } => {
                let tensor = Tensor::of(up)?;
                Self { gate: tensor, up: tensor, out: tensor, dtypes: both(up.dtype(), up.dtype()) }
            }
        })
    }
}

pub(crate) fn activation(cuda: &Cuda, stream: &CudaStream, operands: Activate<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let Operands { gate, mut up, out, dtypes: [gate_type, up_type, out_type] } = Operands::new(&operands.operands)?;
    let (ahead, step) = match problem.arrangement {
        Arrangement::Halves => (problem.intermediate, 1),
        Arrangement::Interleaved => (1, 2),
        Arrangement::Separate | Arrangement::Plain => (0, 1),
    };
    up.data += (ahead * up_type.size()) as u64;
    let (limit, alpha) = constants(problem.activation);
    let (rows, width) = (problem.rows, problem.intermediate);
    let params =
        ActivationParams { gate, up, out, rows: rows as u64, width: width as u64, step, limit, alpha };
    let activation = problem.activation.into();
    let kernel = Kernel::Activation { activation, gate: gate_type, up: up_type, out: out_type };
    launch(cuda, stream, kernel, plan::elementwise(rows, width), &params)
}
