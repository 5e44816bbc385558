use crate::error::Result;
use crate::launch::{Tensor, launch, params};
use crate::route::{ChoiceParams, RouteParams};
use crate::{Cuda, CudaStream, plan};
use fused_moe_core::operation::{Gate, GateRoute};

params! {
    GateParams {
        x: Tensor, router: Tensor, bias: Tensor, norm_weight: Tensor, normed: Tensor, logits: Tensor,
        tokens: u64, hidden: u64, experts: u64, scale: f32, softcap: f32, eps: f32, norm: u32, early: u32, zero: u32,
    }
}

params! {
    GateRouteParams { gate: GateParams, choice: ChoiceParams }
}

impl GateParams {
    fn new(operands: &Gate<'_, Cuda>) -> Result<Self> {
        Ok(Self {
            x: Tensor::of(&operands.x)?,
            router: Tensor::of(&operands.router)?,
            bias: Tensor::maybe(operands.bias.as_ref())?,
            norm_weight: Tensor::maybe(operands.norm_weight.as_ref())?,
            normed: Tensor::maybe(operands.normed.as_ref())?,
            logits: Tensor::of(&operands.logits)?,
            tokens: operands.x.rows() as u64,
            hidden: operands.x.cols() as u64,
            experts: operands.router.rows() as u64,
            scale: operands.config.scale,
            softcap: operands.config.softcap.unwrap_or(0.0),
            eps: operands.config.norm.map_or(0.0, |norm| norm.eps),
            norm: operands.config.norm.is_some().into(),
            ..Self::default()
        })
    }

    /// Whether groups of so many elements may be read at once.
    fn aligned(&self, elements: u64) -> bool {
        [self.x, self.router].iter().all(|operand| operand.aligned(elements))
            && Tensor { stride: 0, ..self.norm_weight }.aligned(elements)
    }
}

/// `early`: the next launch may begin before this one's turn, as it uses nothing of what it reads before its own.
pub(crate) fn gate(cuda: &Cuda, stream: &CudaStream, operands: &Gate<'_, Cuda>, early: bool) -> Result<()> {
    let problem = operands.problem()?;
    let params = GateParams { early: early.into(), ..GateParams::new(operands)? };
    let plan = plan::gate(&problem, operands.norm_weight.is_some(), |n| params.aligned(n), cuda.numbers());
    launch(cuda, stream, plan.kernel, plan.grid, &params)
}

pub(crate) fn gate_route(cuda: &Cuda, stream: &CudaStream, operands: GateRoute<'_, Cuda>) -> Result<()> {
    let problem = operands.problem()?;
    let params = GateRouteParams {
        gate: GateParams::new(&operands.gate)?,
        choice: ChoiceParams::new(&problem.1, &operands.choice, stream)?,
    };
    match plan::gate_route(&problem, |n| params.gate.aligned(n)) {
        Some(plan) => launch(cuda, stream, plan.kernel, plan.grid, &params),
        None => {
            gate(cuda, stream, &operands.gate, false)?;
            let GateRouteParams { gate: GateParams { logits, tokens, .. }, choice } = params;
            let plan = plan::route(&problem.1, operands.choice.witness.is_some());
            launch(cuda, stream, plan.kernel, plan.grid, &RouteParams { logits, choice, tokens })
        }
    }
}
