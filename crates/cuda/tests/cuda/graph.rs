//! Operations captured into a graph replay with whatever their operands then hold; foreign streams and memory work.

use fused_moe_core::config::{Normalize, RoutingRule, WeightRule};
use fused_moe_core::operation::{Choice, Combine, Gate, GateRoute, Permute, Route, SlotRows, Zero};
use fused_moe_core::{Backend, DType, Status, Stream, View};
use fused_moe_cuda::{Cuda, CudaStream, Error, Graph, Memory, Result};
use std::time::Instant;

/// Numbers in -1 .. 1 that differ with the seed.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 * 2.0 - 1.0
        })
        .collect()
}

struct Shape {
    tokens: usize,
    hidden: usize,
    experts: usize,
    top_k: usize,
}

/// A router's memory: f32 throughout.
struct Router {
    cuda: Cuda,
    shape: Shape,
    x: Memory,
    router: Memory,
    logits: Memory,
    experts: Memory,
    weights: Memory,
    row_slot: Memory,
    slot_row: Memory,
    offsets: Memory,
    rows: Memory,
    y: Memory,
}

/// What the operations leave behind.
#[derive(PartialEq)]
struct Found {
    experts: Vec<u8>,
    weights: Vec<u8>,
    row_slot: Vec<u8>,
    slot_row: Vec<u8>,
    offsets: Vec<u8>,
    y: Vec<u8>,
}

const RULE: RoutingRule = RoutingRule {
    score: fused_moe_core::config::Score::Softmax,
    selection: fused_moe_core::config::Selection::TopK {
        by: fused_moe_core::config::SelectBy::Score,
        bias: false,
        groups: None,
    },
    weights: WeightRule {
        value: fused_moe_core::config::WeightValue::Score,
        expert_scale: None,
        normalize: Normalize::Sum { eps: 0.0 },
        scale: 1.0,
    },
    always: 0,
};

impl Router {
    fn new(cuda: &Cuda, shape: Shape) -> Result<Self> {
        let Shape { tokens, hidden, experts, top_k } = shape;
        let slots = tokens * top_k;
        let words = |count: usize| cuda.allocate(4 * count);
        let mut router = words(experts * hidden)?;
        cuda.upload(bytemuck::cast_slice(&numbers(experts * hidden, 1)), &mut router)?;
        let mut rows = words(slots * hidden)?;
        cuda.upload(bytemuck::cast_slice(&numbers(slots * hidden, 2)), &mut rows)?;
        Ok(Self {
            cuda: cuda.clone(),
            x: words(tokens * hidden)?,
            router,
            logits: words(tokens * experts)?,
            experts: words(slots)?,
            weights: words(slots)?,
            row_slot: words(slots)?,
            slot_row: words(slots)?,
            offsets: words(experts + 1)?,
            rows,
            y: words(tokens * hidden)?,
            shape,
        })
    }

    fn fill(&mut self, seed: u32) -> Result<()> {
        let x = numbers(self.shape.tokens * self.shape.hidden, seed);
        self.cuda.upload(bytemuck::cast_slice(&x), &mut self.x)
    }

    fn enqueue(&mut self, stream: &CudaStream, fused: bool) -> Result<()> {
        let Shape { tokens, hidden, experts, top_k } = self.shape;
        let (f32, u32, slots) = (DType::F32, DType::U32, tokens * top_k);
        let x = View::new(self.x.read(), f32, 0, [tokens, hidden])?;
        let router = View::new(self.router.read(), f32, 0, [experts, hidden])?;
        let ids = View::new(self.experts.write(), u32, 0, [tokens, top_k])?;
        let weights = View::new(self.weights.write(), f32, 0, [tokens, top_k])?;
        let choice = Choice::new(RULE, ids, weights);
        if fused {
            let logits = View::new(self.logits.write(), f32, 0, [tokens, experts])?;
            let gate = Gate::new(x, router, logits);
            self.cuda.gate_route(stream, GateRoute { gate, choice })?;
        } else {
            let logits = View::new(self.logits.write(), f32, 0, [tokens, experts])?;
            self.cuda.gate(stream, Gate::new(x, router, logits))?;
            let logits = View::new(self.logits.read(), f32, 0, [tokens, experts])?;
            self.cuda.route(stream, Route { logits, choice })?;
        }
        self.cuda.permute(
            stream,
            Permute {
                experts: View::new(self.experts.read(), u32, 0, [tokens, top_k])?,
                experts_total: experts,
                local: 0..experts,
                row_slot: View::new(self.row_slot.write(), u32, 0, [slots])?,
                slot_row: View::new(self.slot_row.write(), u32, 0, [slots])?,
                offsets: View::new(self.offsets.write(), u32, 0, [experts + 1])?,
            },
        )?;
        let y = View::new(self.rows.read(), f32, 0, [slots, hidden])?;
        let slot_row = View::new(self.slot_row.read(), u32, 0, [slots])?;
        let weights = View::new(self.weights.read(), f32, 0, [tokens, top_k])?;
        let out = View::new(self.y.write(), f32, 0, [tokens, hidden])?;
        self.cuda.combine(stream, Combine::new(SlotRows::Permuted { y, slot_row }, weights, out))
    }

    fn found(&self, stream: &CudaStream) -> Result<Found> {
        assert_eq!(stream.status()?, Status::OK);
        let read = |memory: &Memory| {
            let mut bytes = vec![0; memory.bytes()];
            self.cuda.download(stream, memory, &mut bytes).map(|()| bytes)
        };
        Ok(Found {
            experts: read(&self.experts)?,
            weights: read(&self.weights)?,
            row_slot: read(&self.row_slot)?,
            slot_row: read(&self.slot_row)?,
            offsets: read(&self.offsets)?,
            y: read(&self.y)?,
        })
    }
}

pub(crate) fn a_graph_replays_with_new_inputs() -> Result<()> {
    let cuda = Cuda::new(0)?;
    for (tokens, hidden, experts, top_k) in [(1, 2048, 128, 8), (1, 256, 128, 8), (37, 133, 60, 4), (9000, 64, 160, 6)]
    {
        let stream = cuda.stream()?;
        let mut router = Router::new(&cuda, Shape { tokens, hidden, experts, top_k })?;
        router.fill(3)?;
        router.enqueue(&stream, true)?;
        let first = router.found(&stream)?;
        // SAFETY: all that is captured outlives the graph, and uploads and downloads wait.
        let graph = unsafe { Graph::capture(&stream, || router.enqueue(&stream, true)) }?;
        router.fill(4)?;
        graph.replay(&stream)?;
        let replayed = router.found(&stream)?;
        assert!(first != replayed, "other inputs");
        router.enqueue(&stream, false)?;
        assert!(router.found(&stream)? == replayed, "gate and route apart, the same bits, T = {tokens}");
        router.fill(3)?;
        graph.replay(&stream)?;
        assert!(router.found(&stream)? == first, "the same inputs again, T = {tokens}");
    }
    Ok(())
}

pub(crate) fn a_graph_keeps_its_kernels_and_its_status_word() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let mut memory = cuda.allocate(64)?;
    let graph = {
        // a backend with kernels of its own, and a stream of it
        let other = Cuda::new(0)?;
        let stream = other.stream()?;
        let mut zero = || other.zero(&stream, Zero { out: View::new(memory.write(), DType::F32, 0, [1, 16])? });
        zero()?;
        stream.synchronize()?;
        // SAFETY: what it writes to is there to the end; that its kernels and its stream are not is the test.
        unsafe { Graph::capture(&stream, zero) }?
    };
    let stream = cuda.stream()?;
    cuda.upload(&[1; 64], &mut memory)?;
    graph.replay(&stream)?;
    let mut bytes = [1; 64];
    cuda.download(&stream, &memory, &mut bytes)?;
    assert_eq!(bytes, [0; 64]);
    Ok(())
}

pub(crate) fn raw_streams_and_memory() -> Result<()> {
    let cuda = Cuda::new(0)?;
    // SAFETY: the context's own default stream, and memory that outlives its use.
    let (stream, memory) = unsafe {
        let stream = CudaStream::from_raw(&cuda, std::ptr::null_mut())?;
        let own = cuda.allocate(1024)?;
        (stream, (Memory::from_raw(own.address() + 256, 256), own))
    };
    let mut word = [1u8; 256];
    cuda.download(&stream, &memory.0, &mut word)?;
    assert_eq!(word, [0; 256]);
    let misaligned = View::new(memory.0.read(), DType::F32, 2, [3]);
    assert!(misaligned.is_err());
    assert!(matches!(cuda.allocate(1 << 50), Err(Error::OutOfMemory { free: 1.., .. })));
    Ok(())
}

pub(crate) fn many_slots() -> Result<()> {
    let cuda = Cuda::new(0)?;
    for (slots, experts) in [(100_003, 1), (300_000, 8), (200_001, 160), (65_536, 512), (60_000, 4096)] {
        // a few ids are out of range, and a few slots go nowhere
        let ids: Vec<u32> = numbers(slots, 7)
            .iter()
            .map(|x| ((x + 1.0) * 0.5001 * experts as f32) as u32)
            .enumerate()
            .map(|(slot, id)| if slot % 1001 == 5 { fused_moe_core::NO_EXPERT } else { id })
            .collect();
        let local = experts / 8..experts;
        let op = fused_moe_core::reference::Permute { ids: &ids, experts, local: local.clone() };
        let expected = fused_moe_core::reference::permute(&op);
        let stream = cuda.stream()?;
        let mut memory =
            [4 * slots, 4 * slots, 4 * slots, 4 * (experts + 1)].map(|bytes| cuda.allocate(bytes).unwrap());
        let [input, row_slot, slot_row, offsets] = &mut memory;
        cuda.upload(bytemuck::cast_slice(&ids), input)?;
        let u32 = DType::U32;
        let operands = Permute {
            experts: View::new(input.read(), u32, 0, [slots, 1])?,
            experts_total: experts,
            local,
            row_slot: View::new(row_slot.write(), u32, 0, [slots])?,
            slot_row: View::new(slot_row.write(), u32, 0, [slots])?,
            offsets: View::new(offsets.write(), u32, 0, [experts + 1])?,
        };
        cuda.permute(&stream, operands)?;
        assert_eq!(stream.status()?, expected.status, "R = {slots}, E = {experts}");
        for (memory, expected) in memory[1..].iter().zip([&expected.row_slot, &expected.slot_row, &expected.offsets]) {
            let mut found = vec![0u32; expected.len()];
            cuda.download(&stream, memory, bytemuck::cast_slice_mut(&mut found))?;
            assert!(found == *expected, "R = {slots}, E = {experts}");
        }
    }
    Ok(())
}

pub(crate) fn many_tokens_with_norm() -> Result<()> {
    use fused_moe_core::config::{GateConfig, GateNorm};
    let cuda = Cuda::new(0)?;
    let f32 = DType::F32;
    for (tokens, hidden, experts) in [(49, 64, 128), (200, 333, 61), (130, 68, 7)] {
        let stream = cuda.stream()?;
        let config =
            GateConfig { norm: Some(GateNorm { eps: 1e-5, feeds_experts: false }), scale: 0.5, softcap: Some(3.0) };
        let values = [tokens * hidden, experts * hidden, experts, hidden].map(|count| numbers(count, count as u32));
        let mut memory = values.each_ref().map(|values| cuda.allocate(4 * values.len()).unwrap());
        for (values, memory) in values.iter().zip(&mut memory) {
            cuda.upload(bytemuck::cast_slice(values), memory)?;
        }
        let (mut logits, mut normed) = (cuda.allocate(4 * tokens * experts)?, cuda.allocate(4 * tokens * hidden)?);
        let [x, router, bias, norm_weight] = &memory;
        let operands = Gate {
            bias: Some(View::new(bias.read(), f32, 0, [experts])?),
            norm_weight: Some(View::new(norm_weight.read(), f32, 0, [hidden])?),
            config,
            normed: Some(View::new(normed.write(), f32, 0, [tokens, hidden])?),
            ..Gate::new(
                View::new(x.read(), f32, 0, [tokens, hidden])?,
                View::new(router.read(), f32, 0, [experts, hidden])?,
                View::new(logits.write(), f32, 0, [tokens, experts])?,
            )
        };
        cuda.gate(&stream, operands)?;
        let [x, router, bias, norm_weight] = values.map(|values| values.into_iter().map(f64::from).collect::<Vec<_>>());
        let expected = fused_moe_core::reference::gate(&fused_moe_core::reference::Gate {
            x: &x,
            router: &router,
            bias: Some(&bias),
            norm_weight: Some(&norm_weight),
            config,
            tokens,
            hidden,
            experts,
        });
        for (memory, expected) in [(&logits, &expected.logits), (&normed, &expected.normed)] {
            let mut found = vec![0f32; expected.len()];
            cuda.download(&stream, memory, bytemuck::cast_slice_mut(&mut found))?;
            let error = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).abs()).fold(0.0, f64::max);
            assert!(error < 1e-5, "T = {tokens}: off by {error:e}");
        }
    }
    Ok(())
}

pub(crate) fn timing() -> Result<()> {
    let cuda = Cuda::new(0)?;
    for tokens in [1, 32, 2048, 8192] {
        let stream = cuda.stream()?;
        let mut router = Router::new(&cuda, Shape { tokens, hidden: 2048, experts: 128, top_k: 8 })?;
        router.fill(3)?;
        let start = Instant::now();
        router.enqueue(&stream, true)?;
        stream.synchronize()?;
        let first = start.elapsed();
        // SAFETY: all that is captured outlives the graph.
        let graph = unsafe { Graph::capture(&stream, || router.enqueue(&stream, true)) }?;
        graph.replay(&stream)?;
        stream.synchronize()?;
        let start = Instant::now();
        for _ in 0..100 {
            graph.replay(&stream)?;
        }
        stream.synchronize()?;
        println!("T={tokens}: first call {first:?}, routing stages {:?} a replay (f32)", start.elapsed() / 100);
    }
    Ok(())
}
