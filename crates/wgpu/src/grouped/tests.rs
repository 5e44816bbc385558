//! What conformance does not reach: every text, bindings that hold little, and the groupings of layers.

use super::{Groups, Schedule};
use crate::device::{Device, adapters};
use crate::down::down_of;
use crate::error::Result;
use crate::gate_up::gate_up_of;
use crate::kernel::{Kernel, OPERANDS, Slot, Variant};
use crate::launch::Operand;
use crate::memory::Memory;
use crate::plan::grouped as plan;
use crate::{Experts, Wgpu, WgpuStream};
use fused_moe_conformance::{Options, run};
use fused_moe_core::config::Activation;
use fused_moe_core::operation::{Down, GateUp, GateUpOutput, Matrices, RowSource};
use fused_moe_core::weights::{ExpertWeights, StackLayout};
use fused_moe_core::{Backend, DType, HostView, Permutation, View};
use wgpu::BufferUsages;

/// The first device, if there is one, with bindings of at most so many bytes.
fn device(binding_bytes: u64) -> Option<Wgpu> {
    let mut device = Device::new(adapters().first()?).unwrap();
    device.numbers.binding_bytes = device.numbers.binding_bytes.min(binding_bytes);
    Some(Wgpu::on(device))
}

#[test]
fn every_text_is_valid() {
    let formats = [DType::F32, DType::F16, DType::BF16];
    for kernel in plan::all().into_iter().map(Kernel::Grouped) {
        for (turn, wide) in (0..6).map(|i| (i / 2, i % 2 == 1)) {
            let mut slots = [None; OPERANDS];
            for (i, (slot, binding)) in slots.iter_mut().zip(kernel.bindings()).enumerate() {
                let float = binding.kind == crate::kernel::Kind::Float;
                let format = if float { formats[(turn + usize::from(i == 0)) % 3] } else { DType::U32 };
                let wide = wide && ["x", "gate", "up"].contains(&binding.name);
                let absent = turn == 1 && ["bias", "groups", "row_slot", "input_weights"].contains(&binding.name);
                *slot = (!absent).then_some(Slot { format, shared: false, wide });
            }
            let text = Variant { kernel, slots }.source(false);
            let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&text)));
            let capabilities =
                naga::valid::Capabilities::IMMEDIATES | naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32;
            let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
            validator.validate(&module).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&text)));
        }
    }
}

#[test]
fn bindings_that_hold_little() {
    // experts that are cut, both ways of packing; then windows of the rows of x, which are gathered or not, and of out
    let cut = ["gate_up/gated packed interleaved", "gate_up/silu Pre", "down/packed gate_up"];
    let windows = ["gate_up/rows input", "gate_up/input", "gate_up/local"];
    for (binding_bytes, filters) in [(6 << 10, cut), (1536, windows)] {
        let Some(wgpu) = device(binding_bytes) else { return };
        for filter in filters {
            let options = Options { filter: Some(filter.into()), ..Options::default() };
            let report = run(&wgpu, &options, &mut |_| {}).unwrap();
            assert!(report.passed() && !report.results.is_empty(), "{filter}: {report}");
        }
    }
}

const H: usize = 136;
const I: usize = 72;
const E: usize = 5;

/// Numbers between -0.5 and 0.5.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn memory(wgpu: &Wgpu, bytes: &[u8]) -> Memory {
    let mut memory = wgpu.allocate(bytes.len()).unwrap();
    wgpu.upload(bytes, &mut memory).unwrap();
    memory
}

/// Rows in order of experts, `counts` of them each, and what a layer makes of them.
struct Layer {
    wgpu: Wgpu,
    stream: WgpuStream,
    experts: Experts,
    rows: usize,
    x: Memory,
    offsets: Memory,
    slots: Memory,
    of_row: Memory,
}

impl Layer {
    fn new(wgpu: &Wgpu, counts: [usize; E]) -> Self {
        let rows = counts.iter().sum::<usize>();
        let mut offsets = vec![0_u32];
        for count in counts {
            offsets.push(offsets[offsets.len() - 1] + count as u32);
        }
        let of_row: Vec<u32> =
            (0..rows as u32).map(|r| offsets.iter().filter(|&&o| o <= r).count() as u32 - 1).collect();
        let (gate_up, down) = (noise(E * 2 * I * H, 1), noise(E * H * I, 2));
        let gate_up = HostView::of(&gate_up, [E, 2 * I, H]).unwrap();
        let down = HostView::of(&down, [E, H, I]).unwrap();
        let weights = ExpertWeights::stacked(gate_up, down, StackLayout::default()).unwrap();
        Self {
            experts: wgpu.pack(&weights).unwrap(),
            stream: wgpu.stream().unwrap(),
            rows,
            x: memory(wgpu, bytemuck::cast_slice(&noise(rows * H, 3))),
            offsets: memory(wgpu, bytemuck::cast_slice(&offsets)),
            slots: memory(wgpu, bytemuck::cast_slice(&(0..rows as u32).collect::<Vec<_>>())),
            of_row: memory(wgpu, bytemuck::cast_slice(&of_row)),
            wgpu: wgpu.clone(),
        }
    }

    fn view<'a>(&self, memory: &'a Memory, dtype: DType, shape: [usize; 2]) -> View<crate::Ref<'a>> {
        View::new(Wgpu::read(memory), dtype, 0, shape).unwrap()
    }

    fn run(&self, groups: Groups<'_>, invariant: bool) -> Result<Vec<f32>> {
        let Self { wgpu, stream, rows, .. } = self;
        let (mut a, mut y) = (wgpu.allocate(rows * I * 4)?, wgpu.allocate(rows * H * 4)?);
        let list = |memory, n: usize| View::new(Wgpu::read(memory), DType::U32, 0, [n]).unwrap();
        let (slots, offsets) = (list(&self.slots, *rows), list(&self.offsets, E + 1));
        let operands = GateUp {
            x: self.view(&self.x, DType::F32, [*rows, H]),
            rows: RowSource::Tokens { top_k: 1 },
            permutation: Permutation { row_slot: slots, slot_row: slots, offsets },
            input_weights: None,
            matrices: Matrices::Packed(&self.experts),
            bias: None,
            activation: Activation::default(),
            output: GateUpOutput::Activated,
            out: View::new(Wgpu::write(&mut a), DType::F32, 0, [*rows, I])?,
        };
        gate_up_of(wgpu, stream, &operands, groups, invariant)?;
        let operands = Down {
            a: self.view(&a, DType::F32, [*rows, I]),
            offsets,
            matrices: Matrices::Packed(&self.experts),
            bias: None,
            out: View::new(Wgpu::write(&mut y), DType::F32, 0, [*rows, H])?,
        };
        down_of(wgpu, stream, &operands, groups, invariant)?;
        let mut out = vec![0.0; rows * H];
        wgpu.download(stream, &y, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }

    fn operand<'a>(&self, memory: &'a Memory) -> Operand<'a> {
        Operand::whole(memory.buffer())
    }

    fn offsets(&self) -> Groups<'_> {
        let row_slot = Some(self.operand(&self.slots));
        Groups::Offsets { offsets: self.operand(&self.offsets), row_slot, schedule: None }
    }
}

fn assert_close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().any(|a| a.abs() > 1e-3));
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= 1e-5, "{i}: {a} {b}");
    }
}

#[test]
fn slots_are_rows_of_their_experts() {
    let Some(wgpu) = device(u64::MAX) else { return };
    for counts in [[1, 0, 2, 0, 1], [0, 0, 0, 1, 0]] {
        let layer = Layer::new(&wgpu, counts);
        let slots = layer.run(Groups::Slots { experts: layer.operand(&layer.of_row) }, false).unwrap();
        assert_close(&slots, &layer.run(layer.offsets(), false).unwrap());
    }
}

#[test]
fn all_rows_are_the_one_experts() {
    let Some(wgpu) = device(u64::MAX) else { return };
    for rows in [1, 7, 70] {
        let layer = Layer::new(&wgpu, [rows, 0, 0, 0, 0]);
        for invariant in [false, true] {
            let one = layer.run(Groups::One, invariant).unwrap();
            assert_close(&one, &layer.run(layer.offsets(), false).unwrap());
        }
    }
}

#[test]
fn invariant_bits_do_not_depend_on_the_batch() {
    let Some(wgpu) = device(u64::MAX) else { return };
    let all = Layer::new(&wgpu, [70, 0, 0, 0, 0]);
    let bits = all.run(all.offsets(), true).unwrap();
    for rows in [1, 3, 33] {
        let some = Layer::new(&wgpu, [rows, 0, 0, 0, 0]);
        assert_eq!(some.run(some.offsets(), true).unwrap(), bits[..rows * H], "{rows}");
    }
}

#[test]
fn a_schedule_says_which_tiles_there_are() {
    let Some(wgpu) = device(u64::MAX) else { return };
    let layer = Layer::new(&wgpu, [40, 0, 70, 1, 20]);
    let expected = layer.run(layer.offsets(), true).unwrap();
    let tile = plan::TILE as u32;
    let mut tiles = Vec::new();
    for (e, (first, count)) in [(0, 40), (40, 0), (40, 70), (110, 1), (111, 20)].into_iter().enumerate() {
        tiles.extend((0..count).step_by(plan::TILE).map(|i| [e as u32, first + i, tile.min(count - i)]));
    }
    // gate_up has 72 pairs, down 68: two columns of tiles each
    assert_eq!([I, H / 2].map(plan::column_tiles), [2, 2]);
    let groups = wgpu.device().buffer(12, BufferUsages::INDIRECT | BufferUsages::COPY_DST).unwrap();
    wgpu.handles().1.write_buffer(&groups, 0, bytemuck::cast_slice(&[2, tiles.len() as u32, 1]));
    let tiles = memory(&wgpu, bytemuck::cast_slice(&tiles));
    let schedule = Schedule { tiles: layer.operand(&tiles), groups: (&groups, 0) };
    let Groups::Offsets { offsets, row_slot, .. } = layer.offsets() else { panic!("rows are grouped by offsets") };
    let scheduled = layer.run(Groups::Offsets { offsets, row_slot, schedule: Some(schedule) }, false).unwrap();
    assert_eq!(scheduled, expected);
}
