//! The matrices of routed and shared experts.

use super::Contract;
use super::tensors::{Formats, Side, Tensors, odd};
use crate::checkpoint::family::{Family, Layout};
use fused_moe_core::Shape;
use fused_moe_core::config::LayerConfig;
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, GateUpOrder, Matrix, Orientation, SharedWeights};
use std::cmp::Reverse;

impl<'a> Tensors<'a, '_> {
    /// The routed experts, behind them those that every token goes to besides. What is missing is among the problems.
    pub(super) fn experts(&mut self, family: &Family, config: &LayerConfig) -> Contract<ExpertWeights<'a>> {
        let (inner, width, always) = (config.intermediate, config.expert_width(), config.routing.always);
        let (routed, mut formats) = self.matrices(family.matrices, [config.experts - always, inner, width])?;
        let mut experts: Vec<ExpertMatrices<'a>> = routed.iter().copied().collect();
        match &family.always {
            Some(described) if always > 0 => {
                let (besides, more) = self.matrices(described.matrices, [always, inner, width])?;
                experts.extend(besides.iter());
                formats.iter_mut().zip(more).for_each(|(formats, more)| formats.extend(more));
            }
            Some(described) => self.unasked(described.matrices.iter().map(down), described.count),
            None => {}
        }
        let [gate_up, down] = formats;
        self.problems.extend(odd(gate_up).into_iter().chain(odd(down)));
        if let Some(bias) = self.vector(family.sum_bias, [1, config.hidden]) {
            let bias = Matrix::new(bias, Orientation::OutIn)?;
            experts.iter_mut().for_each(|expert| expert.down_bias = Some(bias));
        }
        Ok(ExpertWeights::per_expert(experts))
    }

    /// The shared expert, if config.json has one.
    pub(super) fn shared(&mut self, family: &Family, config: &LayerConfig) -> Contract<Option<SharedWeights<'a>>> {
        let Some(described) = &family.shared else { return Ok(None) };
        let Some(shared) = &config.shared else {
            self.unasked(described.matrices.iter().map(down), described.times.unwrap_or(described.width));
            return Ok(None);
        };
        let gate = self.vector(described.gate, [1, config.hidden]);
        let (one, formats) = self.matrices(described.matrices, [1, shared.intermediate, config.hidden])?;
        self.problems.extend(odd(formats.concat()));
        Ok(one.iter().next().map(|&matrices| SharedWeights { matrices, gate }))
    }

    /// The first layout whose tensors are all there with the right shapes; if there is none, no experts and the problems of
    /// the layout of which most fits, or is there at all, with the fewest problems.
    fn matrices(&mut self, layouts: &[Layout], sizes: [usize; 3]) -> Contract<(ExpertWeights<'a>, Formats)> {
        let mut nearest: Option<Self> = None;
        for layout in layouts {
            let mut attempt = Tensors::new(self.files, self.block);
            let experts = attempt.layout(*layout, sizes)?;
            if let (true, Some(experts)) = (attempt.problems.is_empty(), experts) {
                self.read.append(&mut attempt.read);
                return Ok((experts, attempt.formats));
            }
            if nearest.as_ref().is_none_or(|nearest| attempt.nearness() > nearest.nearness()) {
                nearest = Some(attempt);
            }
        }
        if let Some(mut nearest) = nearest {
            self.read.append(&mut nearest.read);
            self.problems.append(&mut nearest.problems);
        }
        Ok((ExpertWeights::per_expert(Vec::new()), Formats::default()))
    }

    /// How well the files fit a layout; of those of which nothing is there, none is better.
    fn nearness(&self) -> (usize, usize, Reverse<usize>) {
        let found = self.read.len();
        (self.fit, found, Reverse(if found > 0 { self.problems.len() } else { 0 }))
    }

    fn layout(&mut self, layout: Layout, [experts, inner, hidden]: [usize; 3]) -> Contract<Option<ExpertWeights<'a>>> {
        match layout {
            Layout::Apart { gate, up, down } => self.apart(Some(gate), up, down, None, [experts, inner, hidden]),
            Layout::Plain { up, down, biases } => self.apart(None, up, down, biases, [experts, inner, hidden]),
            Layout::Joint { gate_up, down, layout, biases } => {
                let rows = if layout.order == GateUpOrder::UpOnly { inner } else { inner.saturating_mul(2) };
                let gate_up = self.stack(Side::GateUp, gate_up, oriented(experts, layout.gate_up, rows, hidden), false);
                let down = self.stack(Side::Down, down, oriented(experts, layout.down, hidden, inner), false);
                let biases = biases.map(|[gate_up, down]| {
                    let mut bias = |name, cols| self.named(&[name], Shape::from([experts, cols]), &[]);
                    (bias(gate_up, rows), bias(down, hidden))
                });
                let (Some(gate_up), Some(down)) = (gate_up, down) else { return Ok(None) };
                let stacked = ExpertWeights::stacked(gate_up, down, layout)?;
                match biases {
                    Some((gate_up, down)) => stacked.with_biases(gate_up, down, layout.order).map(Some),
                    None => Ok(Some(stacked)),
                }
            }
            Layout::Stacks { gate, up, down, layout, flat } => {
                let gate = self.stack(Side::GateUp, gate, oriented(experts, layout.gate_up, inner, hidden), flat);
                let up = self.stack(Side::GateUp, up, oriented(experts, layout.gate_up, inner, hidden), flat);
                let down = self.stack(Side::Down, down, oriented(experts, layout.down, hidden, inner), flat);
                let (Some(gate), Some(up), Some(down)) = (gate, up, down) else { return Ok(None) };
                ExpertWeights::stacked_apart(Some(gate), up, down, layout).map(Some)
            }
        }
    }

    /// A tensor for each matrix, and for the biases of up and down.
    fn apart(
        &mut self,
        gate: Option<&str>,
        up: &str,
        down: &str,
        biases: Option<[&str; 2]>,
        [experts, inner, hidden]: [usize; 3],
    ) -> Contract<Option<ExpertWeights<'a>>> {
        let mut all = Vec::new();
        for expert in 0..experts {
            let expert = expert.to_string();
            let mut matrix = |side, name: &str, shape: [usize; 2]| {
                self.matrix(side, &name.replace("{e}", &expert), shape.into(), &[])
                    .map(|view| Matrix::new(view, Orientation::OutIn))
                    .transpose()
            };
            let gate_matrix = match gate {
                Some(gate) => matrix(Side::GateUp, gate, [inner, hidden])?,
                None => None,
            };
            let up = matrix(Side::GateUp, up, [inner, hidden])?;
            let down = matrix(Side::Down, down, [hidden, inner])?;
            let mut bias = |name: &str, rows| {
                self.named(&[&name.replace("{e}", &expert)], Shape::from([rows]), &[])
                    .map(|view| Matrix::new(view, Orientation::OutIn))
                    .transpose()
            };
            let [up_bias, down_bias] = match biases {
                Some([up, down]) => [bias(up, inner)?, bias(down, hidden)?],
                None => [None, None],
            };
            if let (Some(up), Some(down)) = (up, down)
                && gate_matrix.is_some() == gate.is_some()
            {
                all.push(ExpertMatrices { up_bias, down_bias, ..ExpertMatrices::new(gate_matrix, up, down) });
            }
        }
        Ok(Some(ExpertWeights::per_expert(all)))
    }
}

/// What a layout calls its matrix behind the activation.
fn down(layout: &Layout) -> &'static str {
    match *layout {
        Layout::Apart { down, .. } | Layout::Plain { down, .. } => down,
        Layout::Joint { down, .. } | Layout::Stacks { down, .. } => down,
    }
}

fn oriented(experts: usize, orientation: Orientation, rows: usize, cols: usize) -> [usize; 3] {
    match orientation {
        Orientation::OutIn => [experts, rows, cols],
        Orientation::InOut => [experts, cols, rows],
    }
}
