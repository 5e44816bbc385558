use crate::error::Result;
use crate::kernel::Kernel;
use crate::launch::{Groups, Operand, Tensor, launch, params, tensor};
use crate::memory::Mut;
use crate::plan;
use crate::{Wgpu, WgpuStream};
use fused_moe_core::View;
use fused_moe_core::operation::{Permute, TileSchedule};

params! {
    PermuteParams {
        experts: Tensor, row_slot: Tensor, slot_row: Tensor, offsets: Tensor, slots: u32, slots_per_block: u32,
        blocks: u32, experts_total: u32, top_k: u32, first: u32, end: u32, parts: u32, share: u32,
    }
}

params! {
    TileScheduleParams {
        offsets: Tensor, tiles: Tensor, count: Tensor, arguments: Tensor, capacity: u32, experts_total: u32,
        tile_rows: u32, columns: u32, other_columns: u32, share: u32,
    }
}

/// Threads of a workgroup.
const THREADS: usize = 256;

pub(crate) fn permute(wgpu: &Wgpu, stream: &WgpuStream, operands: Permute<'_, Wgpu>) -> Result<()> {
    const NAME: &str = "permute";
    let (problem, device) = (operands.problem()?, wgpu.device());
    let experts = Operand::of(device, NAME, &operands.experts)?;
    let row_slot = Operand::of(device, NAME, &operands.row_slot)?;
    let slot_row = Operand::of(device, NAME, &operands.slot_row)?;
    let offsets = Operand::of(device, NAME, &operands.offsets)?;
    let plan = plan::permute(&problem);
    let params = PermuteParams {
        experts: experts.tensor,
        row_slot: row_slot.tensor,
        slot_row: slot_row.tensor,
        offsets: offsets.tensor,
        slots: problem.slots as u32,
        slots_per_block: plan.slots_per_block as u32,
        blocks: plan.blocks as u32,
        experts_total: problem.experts as u32,
        top_k: operands.experts.cols() as u32,
        first: problem.first as u32,
        end: problem.end as u32,
        parts: plan.parts as u32,
        share: problem.experts.div_ceil(THREADS) as u32,
    };
    let status = Operand::whole(stream.status_buffer());
    let all = [experts, row_slot, slot_row, offsets, status].map(Some);
    let blocks = Groups::Line(plan.blocks as u64);
    let run = |kernel, groups, bound: &[Option<Operand<'_>>]| launch(wgpu, stream, kernel, bound, (groups, &params));
    if let Some(recorder) = wgpu.recorder() {
        recorder.explain(plan.why);
    }
    if plan.blocks == 1 {
        return run(Kernel::Permute, blocks, &all);
    }
    run(Kernel::PermuteCount, blocks, &all)?;
    run(Kernel::PermuteScan, Groups::Line(1), &[Some(slot_row), Some(offsets)])?;
    run(Kernel::PermuteScatter, blocks, &all)
}

pub(crate) fn tile_schedule(wgpu: &Wgpu, stream: &WgpuStream, operands: TileSchedule<'_, Wgpu>) -> Result<()> {
    tiles(wgpu, stream, operands, None)
}

/// The tiles, and the arguments of two indirect dispatches, each of so many columns of workgroups and a row a tile: u32
/// `[2, 3]` to be written, and the columns. There must be room for no more than 65535 tiles then.
///
/// Errors: `Binding`, `Compile`, `Device`.
pub(crate) fn tiles(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    operands: TileSchedule<'_, Wgpu>,
    arguments: Option<(View<Mut<'_>>, [u32; 2])>,
) -> Result<()> {
    const NAME: &str = "tile_schedule";
    let (experts, device) = (operands.problem()?, wgpu.device());
    let (words, columns) = arguments.unzip();
    let [columns, other_columns] = columns.unwrap_or_default();
    let offsets = Operand::of(device, NAME, &operands.offsets)?;
    let tiles = Operand::of(device, NAME, &operands.tiles)?;
    let count = Operand::of(device, NAME, &operands.count)?;
    let arguments = Operand::maybe(device, NAME, words.as_ref())?;
    let params = TileScheduleParams {
        offsets: offsets.tensor,
        tiles: tiles.tensor,
        count: count.tensor,
        arguments: tensor(&arguments),
        capacity: u32::try_from(operands.tiles.rows()).unwrap_or(u32::MAX),
        experts_total: experts as u32,
        tile_rows: u32::try_from(operands.tile_rows).unwrap_or(u32::MAX),
        columns,
        other_columns,
        share: experts.div_ceil(THREADS) as u32,
    };
    let bound = [Some(offsets), Some(tiles), Some(count), arguments];
    launch(wgpu, stream, Kernel::TileSchedule, &bound, (Groups::Line(1), &params))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::first_adapter;
    use fused_moe_core::{Backend, DType, NO_EXPERT, Shape, Status, Storage, Stream, reference};

    fn view<S: Storage>(storage: S, offset: usize, shape: impl Into<Shape>) -> View<S> {
        View::new(storage, DType::U32, offset, shape).unwrap()
    }

    fn written(wgpu: &Wgpu, room: usize, columns: [u32; 2]) -> ([u32; 6], u32) {
        let stream = wgpu.stream().unwrap();
        let mut memory = [5, 3 * room, 1, 8].map(|words| wgpu.allocate(4 * words).unwrap());
        let [offsets, tiles_of, count, arguments] = &mut memory;
        wgpu.upload(bytemuck::cast_slice(&[0u32, 5, 5, 6, 14]), offsets).unwrap();
        wgpu.upload(bytemuck::cast_slice(&[9u32; 8]), arguments).unwrap();
        let schedule = TileSchedule {
            offsets: view(offsets.read(), 0, [5]),
            tile_rows: 4,
            tiles: view(tiles_of.write(), 0, [room, 3]),
            count: view(count.write(), 0, [1]),
        };
        let inner = view(arguments.write(), 4, [2, 3]);
        tiles(wgpu, &stream, schedule, Some((inner, columns))).unwrap();
        let (mut words, mut n) = ([0u32; 8], [0u32]);
        wgpu.download(&stream, arguments, bytemuck::cast_slice_mut(&mut words)).unwrap();
        wgpu.download(&stream, count, bytemuck::cast_slice_mut(&mut n)).unwrap();
        let [before, a, b, c, d, e, f, after] = words;
        assert_eq!([before, after], [9, 9]);
        ([a, b, c, d, e, f], n[0])
    }

    #[test]
    fn many_blocks_of_very_many_experts() {
        let Some(wgpu) = first_adapter() else { return };
        let (tokens, top_k, experts) = (5000, 4, 4096);
        let (slots, local) = (tokens * top_k, 100..4000);
        let ids: Vec<u32> = (0..slots as u32)
            .map(|i| match (i % 101, i.wrapping_mul(0x9e37_79b1) >> 20) {
                (7, _) => NO_EXPERT,
                (8, _) => 4096 + i,
                (9..30, _) => 3000,
                (_, e) => e,
            })
            .collect();
        let mut memory = [slots, slots, slots, experts + 1].map(|words| wgpu.allocate(4 * words).unwrap());
        let [input, row_slot, slot_row, offsets] = &mut memory;
        wgpu.upload(bytemuck::cast_slice(&ids), input).unwrap();
        let operands = Permute {
            experts: view(input.read(), 0, [tokens, top_k]),
            experts_total: experts,
            local: local.clone(),
            row_slot: view(row_slot.write(), 0, [slots]),
            slot_row: view(slot_row.write(), 0, [slots]),
            offsets: view(offsets.write(), 0, [experts + 1]),
        };
        assert!(plan::permute(&operands.problem().unwrap()).blocks > 2);
        let stream = wgpu.stream().unwrap();
        permute(&wgpu, &stream, operands).unwrap();
        let read = |memory| {
            let mut words = vec![0u32; slots];
            wgpu.download(&stream, memory, bytemuck::cast_slice_mut(&mut words)).unwrap();
            words
        };
        let expected = reference::permute(&reference::Permute { ids: &ids, experts, local });
        assert!(read(row_slot) == expected.row_slot);
        assert!(read(slot_row) == expected.slot_row);
        let mut found = vec![0u32; experts + 1];
        wgpu.download(&stream, offsets, bytemuck::cast_slice_mut(&mut found)).unwrap();
        assert!(found == expected.offsets);
        assert_eq!(stream.status().unwrap(), Status::EXPERT_OUT_OF_RANGE);
    }

    #[test]
    fn arguments_of_indirect_dispatches() {
        let Some(wgpu) = first_adapter() else { return };
        // 2 + 0 + 1 + 2 tiles
        assert_eq!(written(&wgpu, 5, [3, 70]), ([3, 5, 1, 70, 5, 1], 5));
        assert_eq!(written(&wgpu, 2, [3, 0]), ([3, 2, 1, 0, 2, 1], 2));
    }
}
