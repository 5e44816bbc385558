//! Expert matrices in the layouts in use, and slots grouped by expert.

use crate::cases::Scale;
use crate::data::{Data, Spread, Tensor};
use crate::operands::{Operands, Prepared};
use fused_moe_core::config::Activation;
use fused_moe_core::weights::{ExpertMatrices, ExpertWeights, GateUpOrder, Matrix, Orientation, StackLayout};
use fused_moe_core::{Backend, DType, Result, reference};

/// How expert matrices come to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// A canonical stack in the backend's memory.
    Stack,
    /// Packed from stacks in host memory that lie like this.
    Packed(StackLayout),
    /// Packed from matrices that lie each on their own.
    PackedApart,
}

impl Weights {
    /// Packed from canonical stacks.
    pub fn packed() -> Self {
        Self::Packed(StackLayout::default())
    }

    /// As in the name of a case.
    pub(super) fn name(self) -> String {
        match self {
            Self::Stack => String::new(),
            Self::PackedApart => "packed apart".into(),
            Self::Packed(layout) => {
                let order = if layout.order == GateUpOrder::Interleaved { " interleaved" } else { "" };
                let turned = |o, name: &'static str| if o == Orientation::InOut { name } else { "" };
                let up = turned(layout.gate_up, " gate_up transposed");
                format!("packed{order}{up}{}", turned(layout.down, " down transposed"))
            }
        }
    }

    /// The layouts in use, for a gated activation and one without gate.
    pub(super) fn all(activation: Activation) -> Vec<Self> {
        let orders: &[GateUpOrder] = if activation.is_gated() {
            &[GateUpOrder::GateThenUp, GateUpOrder::Interleaved]
        } else {
            &[GateUpOrder::UpOnly]
        };
        let (plain, turned) = (Orientation::OutIn, Orientation::InOut);
        let mut all = vec![Self::Stack, Self::PackedApart];
        for &order in orders {
            for (gate_up, down) in [(plain, plain), (turned, turned), (turned, plain)] {
                all.push(Self::Packed(StackLayout { order, gate_up, down }));
            }
        }
        all
    }
}

/// What the experts of a case are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    /// H, I, E.
    pub(super) sizes: [usize; 3],
    pub(super) dtype: DType,
    pub(super) activation: Activation,
    pub(super) weights: Weights,
    pub(super) bias: bool,
}

impl Experts {
    fn rows(&self) -> usize {
        self.activation.gate_up_rows(self.sizes[1])
    }

    /// The canonical stacks `gate_up`, `down`, and the biases, if there are any.
    pub(super) fn canonical(&self, data: Data) -> [(&'static str, Option<Tensor>); 4] {
        let [hidden, intermediate, experts] = self.sizes;
        let (rows, dtype) = (self.rows(), self.dtype);
        let scale = |inner: usize| 1.3 / (inner as f64).sqrt();
        let gate_up = data.of("gate_up").normal(dtype, [experts, rows, hidden], scale(hidden));
        let down = data.of("down").normal(dtype, [experts, hidden, intermediate], scale(intermediate));
        let bias = |name: &str, n| self.bias.then(|| data.of(name).normal(dtype, [experts, n], 0.4));
        [
            ("gate_up", Some(gate_up)),
            ("down", Some(down)),
            ("gate_up_bias", bias("gate_up_bias", rows)),
            ("down_bias", bias("down_bias", hidden)),
        ]
    }

    /// Adds the host's tensors, laid out as [`Self::weights`] says, under the canonical names.
    pub(super) fn host(&self, data: Data, prepared: &mut Prepared) {
        let [hidden, intermediate, experts] = self.sizes;
        let layout = self.layout();
        for (name, tensor) in self.canonical(data) {
            let Some(tensor) = tensor else { continue };
            let [rows, cols, order, orientation] = match name {
                "gate_up" => [self.rows(), hidden, 1, usize::from(layout.gate_up == Orientation::InOut)],
                "down" => [hidden, intermediate, 0, usize::from(layout.down == Orientation::InOut)],
                "gate_up_bias" => [self.rows(), 1, 1, 0],
                _ => [hidden, 1, 0, 0],
            };
            let interleave = order == 1 && layout.order == GateUpOrder::Interleaved;
            let source = tensor.as_floats();
            let mut values = Vec::with_capacity(source.len());
            for e in 0..experts {
                let at = |r: usize, c: usize| {
                    let r = if interleave { r / 2 + (r % 2) * (rows / 2) } else { r };
                    source[(e * rows + r) * cols + c]
                };
                match orientation {
                    0 => (0..rows).for_each(|r| values.extend((0..cols).map(|c| at(r, c)))),
                    _ => (0..cols).for_each(|c| values.extend((0..rows).map(|r| at(r, c)))),
                }
            }
            let tensor = match (tensor.shape().dims().len(), orientation) {
                (2, _) => Tensor::floats(self.dtype, [experts, rows], values),
                (_, 0) => Tensor::floats(self.dtype, [experts, rows, cols], values),
                _ => Tensor::floats(self.dtype, [experts, cols, rows], values),
            };
            prepared.host.push((name, tensor));
        }
    }

    fn layout(&self) -> StackLayout {
        let layout = match self.weights {
            Weights::Packed(layout) => layout,
            _ => StackLayout::default(),
        };
        if self.activation.is_gated() { layout } else { StackLayout { order: GateUpOrder::UpOnly, ..layout } }
    }

    /// The experts of the host's tensors.
    pub(super) fn of_host<'a, B: Backend>(&self, operands: &Operands<'a, B>) -> Result<ExpertWeights<'a>> {
        let bias = |name| operands.host_if(name).map(Tensor::view).transpose();
        let (gate_up, down) = (operands.host("gate_up")?.view()?, operands.host("down")?.view()?);
        let biases = (bias("gate_up_bias")?, bias("down_bias")?);
        if self.weights != Weights::PackedApart {
            let layout = self.layout();
            return ExpertWeights::stacked(gate_up, down, layout)?.with_biases(biases.0, biases.1, layout.order);
        }
        let [hidden, intermediate, count] = self.sizes;
        let mut experts = Vec::with_capacity(count);
        for e in 0..count {
            let of = |view: fused_moe_core::HostView<'a>, first, rows| {
                Matrix::new(view.row_range(first, rows)?, Orientation::OutIn)
            };
            let column = |view: fused_moe_core::HostView<'a>, first, n| {
                Matrix::new(view.row_range(e, 1)?.columns(first, n)?.reshape([n])?, Orientation::OutIn)
            };
            let gated = usize::from(self.activation.is_gated()) * intermediate;
            let first = e * self.rows();
            let gate = (gated > 0).then(|| of(gate_up, first, gated)).transpose()?;
            let up = of(gate_up, first + gated, intermediate)?;
            let mut expert = ExpertMatrices::new(gate, up, of(down, e * hidden, hidden)?);
            if let Some(bias) = biases.0 {
                expert.gate_bias = (gated > 0).then(|| column(bias, 0, gated)).transpose()?;
                expert.up_bias = Some(column(bias, gated, intermediate)?);
            }
            expert.down_bias = biases.1.map(|bias| column(bias, 0, hidden)).transpose()?;
            experts.push(expert);
        }
        Ok(ExpertWeights::per_expert(experts))
    }
}

/// Slots grouped by expert, as permute leaves them. Slots of `local` experts alone get rows.
pub(crate) fn permutation(
    data: Data,
    [tokens, top_k, experts]: [usize; 3],
    spread: Spread,
    local: std::ops::Range<usize>,
) -> reference::Permutation {
    let ids = data.of("routes").routes([tokens, top_k, experts], spread);
    reference::permute(&reference::Permute { ids: ids.as_ids(), experts, local })
}

/// Sizes with many rows an expert, which lie in pieces of 16 bytes in a 2-byte format: what matrix units take in tiles,
/// none of which comes out even. T, K, H, I, E and how the slots spread.
pub(crate) fn tall_sizes(scale: Scale) -> Vec<([usize; 5], Spread)> {
    let mut sizes = vec![
        ([150, 3, 200, 88, 5], Spread::Even),
        ([120, 2, 72, 136, 4], Spread::Skewed),
        ([260, 1, 64, 40, 2], Spread::One(1)),
        ([90, 2, 136, 72, 3], Spread::Holes),
        // a handful of rows to some hundred, whose tiles have their heights; the highest where sums are long
        ([160, 1, 96, 48, 12], Spread::Skewed),
        ([420, 1, 96, 48, 12], Spread::Skewed),
        ([1080, 1, 96, 48, 12], Spread::Skewed),
        ([700, 1, 224, 112, 12], Spread::Skewed),
        ([480, 1, 2576, 48, 4], Spread::Skewed),
        ([480, 1, 64, 2560, 4], Spread::Skewed),
    ];
    if scale == Scale::Full {
        sizes.extend([([800, 3, 72, 568, 5], Spread::Skewed), ([600, 2, 264, 712, 3], Spread::Even)]);
        // so many columns that the widest tiles are taken, and so many rows that tiles share weights
        sizes.extend([([800, 3, 72, 1020, 3], Spread::Skewed), ([800, 3, 2040, 72, 3], Spread::Even)]);
    }
    sizes
}

/// The sizes at which grouped products are tried: T, K, H, I, E and how the slots spread.
pub(crate) fn grouped_sizes() -> Vec<([usize; 5], Spread)> {
    vec![
        ([0, 2, 16, 8, 4], Spread::Even),
        ([1, 1, 1, 1, 1], Spread::Even),
        ([1, 2, 64, 32, 8], Spread::Even),
        ([1, 8, 48, 24, 8], Spread::Even),
        ([5, 3, 17, 13, 12], Spread::Even),
        ([7, 2, 31, 37, 24], Spread::Skewed),
        ([6, 4, 33, 19, 60], Spread::Even),
        ([9, 8, 29, 11, 128], Spread::Even),
        ([3, 6, 21, 9, 160], Spread::Even),
        ([4, 8, 16, 7, 256], Spread::Even),
        ([3, 10, 9, 5, 512], Spread::Even),
        ([2, 3, 5, 3, 4096], Spread::Even),
        ([41, 1, 67, 33, 4], Spread::One(2)),
        ([70, 2, 128, 64, 8], Spread::Same(5)),
        ([37, 4, 65, 47, 8], Spread::Skewed),
        ([16, 3, 40, 20, 6], Spread::Holes),
        ([16, 3, 40, 20, 6], Spread::Bad),
        ([5, 2, 24, 12, 6], Spread::Nowhere),
    ]
}
