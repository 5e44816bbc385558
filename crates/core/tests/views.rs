//! Views and weight layouts: what is accepted, what is refused, and that every layout shows the same matrices.

use fused_moe_core::weights::*;
use fused_moe_core::*;
use proptest::prelude::*;

#[test]
fn a_view_lies_inside_its_buffer() {
    let data = [0.0f32; 12];
    assert!(View::of(&data, [3, 4]).is_ok());
    let error = View::of(&data, [4, 4]).unwrap_err();
    assert_eq!(error.to_string(), "view [4, 4] of f32 with row stride 4 at byte 0 needs 64 bytes, the buffer has 48");
    assert!(matches!(View::of(&data, [usize::MAX, 4]), Err(Error::OutOfBounds { needed: u64::MAX, .. })));
    assert!(matches!(View::of(&data, [usize::MAX, usize::MAX, 2]), Err(Error::OutOfBounds { .. })));
    assert!(View::of(&data, [0, usize::MAX]).is_ok(), "an empty view needs nothing");
    assert!(View::of(&data, [usize::MAX, 0]).is_ok(), "an empty view needs nothing");
}

#[test]
fn strides_and_windows() -> Result<()> {
    let data: Vec<f32> = (0..20).map(|i| i as f32).collect();
    let x = View::of(&data, [3, 4])?.with_row_stride(7)?;
    assert_eq!(x.typed::<f32>()?.row(2), &[14.0, 15.0, 16.0, 17.0]);
    assert!(matches!(x.with_row_stride(3), Err(Error::RowStride { .. })));
    assert!(matches!(x.with_row_stride(9), Err(Error::OutOfBounds { .. })));
    let window = x.columns(1, 2)?.row_range(1, 2)?;
    assert_eq!(window.typed::<f32>()?.row(0), &[8.0, 9.0]);
    assert_eq!(window.typed::<f32>()?.row(1), &[15.0, 16.0]);
    assert!(window.typed::<f32>()?.row(5).is_empty());
    assert!(x.columns(3, 2).is_err() && x.row_range(2, 2).is_err() && x.row_range(usize::MAX, 2).is_err());
    assert!(x.reshape([12]).is_err(), "rows lie apart");
    assert_eq!(View::of(&data, [3, 4])?.reshape([2, 2, 3])?.rows(), 4);
    assert!(View::of(&data, [3, 4])?.reshape([5, 2]).is_err());
    Ok(())
}

#[test]
fn formats_and_alignment() -> Result<()> {
    let data = [1.0f32; 4];
    let bytes: &[u8] = bytemuck::cast_slice(&data);
    assert!(matches!(View::new(bytes, DType::F32, 2, [1]), Err(Error::Misaligned { .. })));
    let view = View::new(&bytes[1..], DType::F32, 0, [2])?;
    assert!(matches!(view.typed::<f32>(), Err(Error::Misaligned { .. })), "the memory is not aligned");
    assert!(matches!(View::of(&data, [4])?.typed::<half::f16>(), Err(Error::DType { .. })));
    Ok(())
}

fn rows_of(matrix: &Matrix<'_>) -> Vec<f32> {
    let mut out = vec![0u8; matrix.cols() * 4];
    (0..matrix.rows())
        .flat_map(|r| {
            matrix.copy_row(r, &mut out);
            out.chunks(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>()
        })
        .collect()
}

fn transposed(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| data[r * cols + c])).collect()
}

proptest! {
    #[test]
    fn every_layout_shows_the_same_matrices(e in 1usize..4, i in 1usize..5, h in 1usize..6) {
        let gate: Vec<f32> = (0..e * i * h).map(|n| n as f32).collect();
        let up: Vec<f32> = gate.iter().map(|x| x + 1000.0).collect();
        let down: Vec<f32> = gate.iter().map(|x| x + 2000.0).collect();
        let plane = |data: &[f32], n: usize| data[n * i * h..(n + 1) * i * h].to_vec();
        let halves: Vec<f32> = (0..e).flat_map(|n| [plane(&gate, n), plane(&up, n)].concat()).collect();
        let interleaved: Vec<f32> = (0..e * i)
            .flat_map(|r| [&gate[r * h..(r + 1) * h], &up[r * h..(r + 1) * h]].concat())
            .collect();
        let flip = |data: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            data.chunks(rows * cols).flat_map(|plane| transposed(plane, rows, cols)).collect()
        };
        let (halves_t, interleaved_t) = (flip(&halves, 2 * i, h), flip(&interleaved, 2 * i, h));
        let down_t = flip(&down, h, i);
        let layout = |order, orientation| StackLayout { order, gate_up: orientation, down: orientation };
        use {GateUpOrder::*, Orientation::*};
        let candidates = [
            ExpertWeights::stacked(View::of(&halves, [e, 2 * i, h])?, View::of(&down, [e, h, i])?, layout(GateThenUp, OutIn))?,
            ExpertWeights::stacked(View::of(&interleaved, [e, 2 * i, h])?, View::of(&down, [e, h, i])?, layout(Interleaved, OutIn))?,
            ExpertWeights::stacked(View::of(&halves_t, [e, h, 2 * i])?, View::of(&down_t, [e, i, h])?, layout(GateThenUp, InOut))?,
            ExpertWeights::stacked(View::of(&interleaved_t, [e, h, 2 * i])?, View::of(&down_t, [e, i, h])?, layout(Interleaved, InOut))?,
            ExpertWeights::stacked_apart(
                Some(View::of(&gate, [e, i, h])?),
                View::of(&up, [e, i, h])?,
                View::of(&down, [e, h, i])?,
                StackLayout::default(),
            )?,
        ];
        for weights in &candidates {
            prop_assert_eq!(weights.len(), e);
            for (n, expert) in weights.iter().enumerate() {
                prop_assert_eq!(rows_of(&expert.gate.unwrap()), plane(&gate, n));
                prop_assert_eq!(rows_of(&expert.up), plane(&up, n));
                prop_assert_eq!(rows_of(&expert.down), plane(&down, n));
            }
        }
    }

    #[test]
    fn biases_follow_the_order(e in 1usize..4, i in 1usize..5, h in 1usize..6) {
        let matrices = vec![0.0f32; e * 2 * i * h];
        let halves: Vec<f32> = (0..e * 2 * i).map(|n| n as f32).collect();
        let interleaved: Vec<f32> =
            halves.chunks(2 * i).flat_map(|row| (0..i).flat_map(|r| [row[r], row[i + r]]).collect::<Vec<_>>()).collect();
        let down: Vec<f32> = (0..e * h).map(|n| n as f32 + 0.5).collect();
        for (bias, order) in [(&halves, GateUpOrder::GateThenUp), (&interleaved, GateUpOrder::Interleaved)] {
            let weights = ExpertWeights::stacked(
                View::of(&matrices, [e, 2 * i, h])?,
                View::of(&matrices, [e, h, i])?,
                StackLayout { order, ..StackLayout::default() },
            )?
            .with_biases(Some(View::of(bias, [e, 2 * i])?), Some(View::of(&down, [e, h])?), order)?;
            for (n, expert) in weights.iter().enumerate() {
                prop_assert_eq!(rows_of(&expert.gate_bias.unwrap()), &halves[n * 2 * i..][..i]);
                prop_assert_eq!(rows_of(&expert.up_bias.unwrap()), &halves[n * 2 * i + i..][..i]);
                prop_assert_eq!(rows_of(&expert.down_bias.unwrap()), &down[n * h..][..h]);
            }
        }
    }
}

#[test]
fn stacks_that_disagree_are_refused() -> Result<()> {
    let data = [0.0f32; 64];
    let stack = |gate_up: [usize; 3], down: [usize; 3]| {
        ExpertWeights::stacked(View::of(&data, gate_up)?, View::of(&data, down)?, StackLayout::default())
    };
    assert!(stack([2, 4, 3], [2, 3, 2]).is_ok());
    assert!(matches!(stack([2, 4, 3], [3, 3, 2]), Err(Error::Shape { operand: "down", .. })));
    assert!(matches!(stack([2, 3, 3], [2, 3, 2]), Err(Error::Value { .. })), "an odd number of gate and up rows");
    let flat = View::of(&data, [8, 8])?;
    assert!(ExpertWeights::stacked(flat, flat, StackLayout::default()).is_err());
    let experts = stack([2, 4, 3], [2, 3, 2])?;
    let error = experts.with_biases(Some(View::of(&data, [3, 4])?), None, GateUpOrder::GateThenUp).unwrap_err();
    assert_eq!(error.to_string(), "stacked experts: gate_up_bias expected [E, 2I] = [2, 4], got [3, 4]");
    let wide = View::of(&data, [2, 5])?;
    let biased = |gate_up, down| stack([2, 4, 3], [2, 3, 2])?.with_biases(gate_up, down, GateUpOrder::GateThenUp);
    assert!(matches!(biased(Some(wide), None), Err(Error::Shape { operand: "gate_up_bias", .. })));
    assert!(matches!(biased(None, Some(wide)), Err(Error::Shape { operand: "down_bias", .. })));
    Ok(())
}

#[test]
fn a_description_is_checked() {
    use fused_moe_core::config::*;
    let good = LayerConfig::new(8, 4, 6, 2);
    assert_eq!(good.check(), Ok(()));
    let refused = |change: fn(&mut LayerConfig), part: &str| {
        let mut config = LayerConfig::new(8, 4, 6, 2);
        change(&mut config);
        let message = config.check().unwrap_err().to_string();
        assert!(message.starts_with("layer: ") && message.contains(part), "{message}");
    };
    refused(|c| c.top_k = 7, "1 <= K <= E, got K = 7, E = 6");
    refused(|c| c.top_k = 0, "1 <= K <= E");
    refused(|c| c.experts = 0, "1 to 4096 experts");
    refused(|c| c.experts = 4097, "1 to 4096 experts");
    refused(|c| c.hidden = 0, "H expected a size above zero");
    refused(|c| c.intermediate = 0, "I expected a size above zero");
    refused(|c| c.gate.softcap = Some(0.0), "softcap");
    refused(|c| c.gate.scale = f32::NAN, "gate.scale");
    refused(|c| c.gate.norm = Some(GateNorm { eps: -1.0, feeds_experts: false }), "eps");
    refused(|c| c.activation = Activation::ClampedSilu { limit: 0.0 }, "limit");
    refused(|c| c.routing.selection = Selection::SparseMixer { jitter: -0.1 }, "jitter");
    refused(|c| c.routing.weights.normalize = Normalize::Lp { p: 0.0 }, "p expected a positive number");
    refused(
        |c| {
            let groups = Groups { count: 4, keep: 2, score: GroupScore::Best, masked: Masked::NegInfinity };
            c.routing.selection = Selection::TopK { by: SelectBy::Score, bias: false, groups: Some(groups) };
        },
        "a divisor of E",
    );
    refused(
        |c| {
            let groups = Groups { count: 6, keep: 1, score: GroupScore::Best, masked: Masked::NegInfinity };
            c.routing.selection = Selection::TopK { by: SelectBy::Score, bias: false, groups: Some(groups) };
        },
        "no more than the kept groups hold",
    );
}

#[test]
fn nothing_needs_no_alignment() -> Result<(), Error> {
    let mut bytes = [0u8; 16];
    let odd = 1 + bytes.as_ptr().align_offset(4);
    let view = View::new(&bytes[odd..odd], DType::F32, 0, [0, 3])?;
    assert!(view.typed::<f32>()?.row(0).is_empty());
    let view = View::new(&mut bytes[odd..odd], DType::F32, 0, [3, 0])?;
    assert!(view.typed_mut::<f32>()?.row_mut(0).is_empty());
    Ok(())
}

#[test]
fn hostile_sizes_are_no_overflow() -> Result<()> {
    const MAX: usize = usize::MAX;
    let data = [1.0f32; 8];
    let bytes: &[u8] = bytemuck::cast_slice(&data);
    let empty = View::of(&data, [10, 0])?.with_row_stride(MAX)?;
    assert_eq!((empty.row_stride(), empty.extent()), (0, 0));
    assert_eq!(empty.row_range(9, 1)?.rows(), 1);
    assert_eq!(View::of(&data, [0, MAX])?.columns(MAX - 1, 1)?.cols(), 1);
    let far = View::new(bytes, DType::F32, MAX - 3, [0, 4])?;
    assert_eq!((far.offset(), far.columns(2, 1)?.offset()), (0, 0));
    let one = View::of(&data, [1, 4])?.with_row_stride(MAX)?;
    assert_eq!((one.row_stride(), one.extent(), one.row_range(0, 1)?.row_range(1, 0)?.rows()), (4, 16, 0));

    let layout = StackLayout::default();
    let hollow = |e| View::of(&data, [e, 0, 0]);
    assert!(matches!(ExpertWeights::stacked(hollow(MAX)?, hollow(MAX)?, layout), Err(Error::Value { .. })));
    assert!(matches!(ExpertWeights::stacked_apart(None, hollow(MAX)?, hollow(MAX)?, layout), Err(Error::Value { .. })));
    assert!(matches!(ExpertWeights::stacked(hollow(0)?, hollow(0)?, layout), Err(Error::Value { .. })));
    for shape in [[2, 2, 0], [2, MAX - 1, 0], [2, 0, MAX - 1]] {
        for orientation in [Orientation::OutIn, Orientation::InOut] {
            for order in [GateUpOrder::GateThenUp, GateUpOrder::Interleaved, GateUpOrder::UpOnly] {
                let view = View::of(&data, shape)?.with_row_stride(MAX)?;
                let weights =
                    ExpertWeights::stacked(view, view, StackLayout { order, gate_up: orientation, down: orientation })?;
                for expert in weights.iter() {
                    for row in [0, 1, MAX - 2, MAX] {
                        expert.up.copy_row(row, &mut []);
                        assert!(expert.down.contiguous_row(row).is_none_or(<[u8]>::is_empty));
                    }
                }
            }
        }
    }
    let matrix = Matrix::new(View::of(&data, [1, 2])?.with_row_stride(MAX)?, Orientation::OutIn)?;
    assert_eq!(matrix.row_range(1, 0)?.rows(), 0);
    assert!(matrix.contiguous_row(MAX).is_none());
    matrix.copy_row(MAX, &mut [0; 8]);
    Ok(())
}

#[test]
fn debug_prints_no_elements() -> Result<()> {
    let data = [7.5f32; 64];
    let view = View::of(&data, [4, 4, 4])?;
    assert_eq!(format!("{view:?}"), "View { dtype: F32, shape: [4, 4, 4], offset: 0, row_stride: 4, .. }");
    let experts = ExpertWeights::stacked(view, view, StackLayout::default())?;
    assert!(
        format!("{experts:?}").starts_with("ExpertWeights { len: 4, first: Some(ExpertMatrices { gate: Some(Matrix {")
    );
    Ok(())
}
