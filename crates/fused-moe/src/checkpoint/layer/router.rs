//! What chooses the experts.

use super::tensors::Tensors;
use super::{Copies, full};
use crate::checkpoint::error::TensorProblem;
use crate::checkpoint::family::{Family, Zero};
use fused_moe_core::config::{LayerConfig, Selection};
use fused_moe_core::weights::{Matrix, Orientation, RouterMlpWeights, Table};
use fused_moe_core::{DType, HostView, Shape};
use half::{bf16, f16};
use safetensors::Dtype;

impl<'a> Tensors<'a, '_> {
    /// `[E, H]`; one that lies the other way is copied.
    pub(super) fn router(
        &mut self,
        family: &Family,
        config: &LayerConfig,
        copies: Option<&'a Copies>,
    ) -> Option<HostView<'a>> {
        let [choices, width] = [config.choices(), config.router_width()];
        let shape = Shape::from([choices, width]);
        let (Orientation::InOut, Some(copies)) = (family.router_lies, copies) else {
            return self.named(family.router, shape, &[]);
        };
        let stored = self.named(family.router, Shape::from([width, choices]), &[])?;
        let matrix = Matrix::new(stored, Orientation::InOut).ok()?;
        let bytes = copies.router.get_or_init(|| {
            let row = width * stored.dtype().size();
            let mut bytes = vec![0; choices * row];
            for (e, row) in bytes.chunks_exact_mut(row).enumerate() {
                matrix.copy_row(e, row);
            }
            bytes
        });
        HostView::new(bytes, stored.dtype(), 0, shape).ok()
    }

    /// `[E]`, if the rule has one; one whose end is not that of the file is copied.
    pub(super) fn correction(
        &mut self,
        family: &Family,
        config: &LayerConfig,
        copies: Option<&'a Copies>,
    ) -> Option<HostView<'a>> {
        if !matches!(config.routing.selection, Selection::TopK { bias: true, .. }) {
            return None;
        }
        let competing = config.choices() - config.routing.always;
        let stored = self.vector(family.correction_bias, [family.correction_rows, competing])?;
        let (Some(end), Some(copies)) = (family.correction_end, copies) else { return Some(stored) };
        let bytes = copies.correction.get_or_init(|| {
            let mut bytes = stored.storage().get(..stored.extent()).unwrap_or(&[]).to_vec();
            let end = encode(end, stored.dtype());
            let from = bytes.len().saturating_sub(end.len());
            bytes.splice(from.., end);
            bytes
        });
        HostView::new(bytes, stored.dtype(), 0, [competing]).ok()
    }

    /// `[E]`, if weights have factors: those of the file, or 1 but for experts whose slots have weight 0.
    pub(super) fn expert_scale(
        &mut self,
        family: &Family,
        config: &LayerConfig,
        copies: Option<&'a Copies>,
    ) -> Option<HostView<'a>> {
        let (Some(Zero { weighted: false, .. }), Some(copies)) = (family.zero_experts, copies) else {
            return self.vector(family.expert_scale, [1, config.choices()]);
        };
        let factor = |choice| if choice < config.experts { 1.0f32 } else { 0.0 };
        let bytes = copies
            .expert_scale
            .get_or_init(|| (0..config.choices()).flat_map(|choice| factor(choice).to_le_bytes()).collect());
        HostView::new(bytes, DType::F32, 0, [config.choices()]).ok()
    }

    /// `[1]`, a finite number, if weights have such a factor.
    pub(super) fn factor(&mut self, family: &Family) -> Option<f32> {
        let absent = !family.scale.iter().any(|name| self.has(name));
        if absent && (family.scale_optional || family.scale.is_empty()) {
            return None;
        }
        let (name, view) = self.find(family.scale, Shape::from([1]), &[])?;
        let bytes = view.storage();
        let factor = match (view.dtype(), bytes) {
            (DType::F32, &&[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (DType::F16, &&[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (DType::BF16, &&[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            _ => f32::NAN,
        };
        if factor.is_finite() {
            return Some(factor);
        }
        self.problems.push(TensorProblem::Number { name, actual: factor });
        None
    }

    /// `[H]`, if what the router reads is normed.
    pub(super) fn router_norm(&mut self, family: &Family, config: &LayerConfig) -> Option<HostView<'a>> {
        let (weight, _) = family.router_norm?;
        self.named(&[weight], Shape::from([config.router_width()]), &[])
    }

    /// The layers before the router's matrix. The first router may lack the factor on the state before it: there is none.
    pub(super) fn router_mlp(
        &mut self,
        family: &Family,
        config: &LayerConfig,
        first: bool,
    ) -> Option<RouterMlpWeights<'a>> {
        let described = family.router_mlp.as_ref()?;
        let (hidden, width) = (config.hidden, config.router_width());
        let mut layer = |[weight, bias]: [&str; 2], inputs| {
            let weight = self.named(&[weight], Shape::from([width, inputs]), &[]);
            (weight, self.named(&[bias], Shape::from([width]), &[]))
        };
        let (down, down_bias) = layer(described.down, hidden);
        let (fc1, fc1_bias) = layer(described.fc1, width);
        let (fc2, fc2_bias) = layer(described.fc2, width);
        let norm = self.named(&[described.norm], Shape::from([width]), &[]);
        let stored = self.files.tensor(&full(self.block, described.state_scale)).map(|tensor| tensor.shape);
        let state_scale = match stored {
            None if first => None,
            Some([1]) => self.named(&[described.state_scale], Shape::from([1]), &[]),
            _ => self.named(&[described.state_scale], Shape::from([width]), &[]),
        };
        let (Some(down), Some(fc1), Some(fc2)) = (down, fc1, fc2) else { return None };
        Some(RouterMlpWeights { down, down_bias, state_scale, norm, fc1, fc1_bias, fc2, fc2_bias })
    }

    /// Experts by token id, as the numbers that backends read.
    pub(super) fn table(
        &mut self,
        family: &Family,
        config: &LayerConfig,
        vocabulary: Option<usize>,
    ) -> Option<Table<'a>> {
        let described = family.table.as_ref().filter(|_| config.routing.selection == Selection::Table)?;
        let full_names = || described.names.iter().map(|name| full(self.block, name));
        let found = full_names().find_map(|name| self.files.tensor(&name).map(|tensor| (name, tensor)));
        let rows = |rows| Shape::from([vocabulary.unwrap_or(rows), config.top_k]);
        let Some((name, tensor)) = found else {
            let names = full_names().collect();
            self.problems.push(TensorProblem::Missing { names, expected: rows(1), nearest: None });
            return None;
        };
        self.read.push(name.clone());
        let expected = rows(tensor.shape.first().copied().unwrap_or(1));
        if tensor.shape != expected.dims() {
            self.problems.push(TensorProblem::Shape { name, expected, actual: tensor.shape.to_vec() });
            return None;
        }
        let entries: Vec<i64> = match tensor.dtype {
            Dtype::I64 => tensor.data.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
            Dtype::U32 => tensor.data.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes).into()).collect(),
            Dtype::I32 => tensor.data.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect(),
            format => {
                self.problems.push(TensorProblem::TableFormat { name, format: format.to_string() });
                return None;
            }
        };
        let is_expert = |entry: i64| usize::try_from(entry).is_ok_and(|e| e < config.experts);
        if let Some(at) = entries.iter().position(|&entry| !is_expert(entry)) {
            let (row, actual) = (at / config.top_k, entries[at]);
            self.problems.push(TensorProblem::Entry { name, row, actual, experts: config.experts });
            return None;
        }
        let experts = entries.into_iter().map(|entry| entry as u32).collect();
        Some(Table { experts, vocabulary: expected.rows() })
    }
}

/// A number as a format has it.
fn encode(x: f32, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    }
}
