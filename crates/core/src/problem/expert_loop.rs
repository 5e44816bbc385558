use super::layer::GATE_REASONS;
use super::{ACTIVATION, Check};
use crate::backend::Backend;
use crate::config::Activation;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::operation::{Expert, ExpertLoop};

/// A checked [`ExpertLoop`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertLoopProblem {
    /// T.
    pub tokens: usize,
    /// K.
    pub top_k: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// The activation.
    pub activation: Activation,
}

const CHECK: Check = Check("expert_loop");

impl<B: Backend> ExpertLoop<'_, '_, B> {
    /// Checks shapes, formats and the number of routes; experts are checked as they are found.
    pub fn problem(&self) -> Result<ExpertLoopProblem> {
        let (tokens, hidden, routes) = (self.x.rows(), self.x.cols(), self.experts.len());
        CHECK.float("x", &self.x)?;
        CHECK.value(hidden > 0, "H", "a size above zero", hidden)?;
        let top_k = routes.checked_div(tokens).unwrap_or(0);
        CHECK.value(
            CHECK.slots(tokens, top_k)? == routes,
            "experts",
            "K for each of T tokens",
            format_args!("{routes} for T = {tokens}"),
        )?;
        CHECK.value(
            self.weights.len() == routes,
            "weights",
            "as many as experts",
            format_args!("{} for {routes}", self.weights.len()),
        )?;
        CHECK.activation(ACTIVATION, self.activation)?;
        let (rows, y) = (&self.scratch.0, &self.scratch.1);
        let intermediate = rows.cols();
        CHECK.value(intermediate > 0, "I", "a size above zero", intermediate)?;
        CHECK.only("scratch.0", rows, DType::F32)?;
        CHECK.shape("scratch.0", rows, "[2, I]", [2, intermediate])?;
        CHECK.value(
            rows.is_contiguous(),
            "scratch.0",
            "contiguous rows",
            format_args!("stride {}", rows.row_stride()),
        )?;
        CHECK.only("scratch.1", y, DType::F32)?;
        CHECK.shape("scratch.1", y, "[1, H]", [1, hidden])?;
        CHECK.float("out", &self.out)?;
        CHECK.rows("out", &self.out, "[T, H]", [tokens, hidden])?;
        Ok(ExpertLoopProblem { tokens, top_k, hidden, intermediate, activation: self.activation })
    }
}

impl ExpertLoopProblem {
    /// Checks the expert `id` that was found.
    pub fn expert<B: Backend>(&self, id: u32, expert: &Expert<'_, B>) -> Result<()> {
        self.fits(expert).map_err(|error| Error::Expert { expert: id as usize, error: Box::new(error) })
    }

    fn fits<B: Backend>(&self, expert: &Expert<'_, B>) -> Result<()> {
        let (hidden, intermediate, gated) = (self.hidden, self.intermediate, self.activation.is_gated());
        CHECK.matches("gate", &expert.gate, gated, GATE_REASONS)?;
        if !gated {
            CHECK.absent("gate_bias", &expert.gate_bias, GATE_REASONS[1])?;
        }
        let up = Some(expert.up);
        for (operand, matrix, layout, dims) in [
            ("gate", &expert.gate, "[I, H]", [intermediate, hidden]),
            ("up", &up, "[I, H]", [intermediate, hidden]),
            ("down", &Some(expert.down), "[H, I]", [hidden, intermediate]),
        ] {
            if let Some(matrix) = matrix {
                CHECK.float(operand, matrix)?;
                CHECK.shape(operand, matrix, layout, dims)?;
            }
        }
        for (operand, bias, layout, n) in [
            ("gate_bias", &expert.gate_bias, "[I]", intermediate),
            ("up_bias", &expert.up_bias, "[I]", intermediate),
            ("down_bias", &expert.down_bias, "[H]", hidden),
        ] {
            if let Some(bias) = bias {
                CHECK.vector(operand, bias, layout, n)?;
            }
        }
        Ok(())
    }
}
