//! The host program's own slices and streams: in flight when they are freed, lent to captures, read without waiting.

use crate::layer::{H, direct, numbers, prepare};
use cudarc::driver::{CudaContext, CudaStream as DriverStream, result};
use fused_moe_core::operation::{Accumulate, Factor, Permute, Zero};
use fused_moe_core::{Backend, DType, Layer, Numerics, Status, Stream, View};
use fused_moe_cuda::{Cuda, CudaStream, Error, Graph, Memory, Result};
use half::bf16;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const N: usize = 1 << 20;

/// A stream of the host program's and one of the backend's.
fn streams(cuda: &Cuda) -> Result<(Arc<DriverStream>, CudaStream)> {
    Ok((cuda.context().new_stream().unwrap(), cuda.stream()?))
}

/// Keeps a stream busy for a while.
fn busy(cuda: &Cuda, stream: &CudaStream, memory: &mut Memory) -> Result<()> {
    (0..200).try_for_each(|_| zero(cuda, stream, memory))
}

fn zero(cuda: &Cuda, stream: &CudaStream, memory: &mut Memory) -> Result<()> {
    let count = memory.bytes() / 4;
    cuda.zero(stream, Zero { out: View::new(memory.write(), DType::F32, 0, [1, count])? })
}

pub(crate) fn a_slice_freed_at_once() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let ((theirs, ours), mut large) = (streams(&cuda)?, cuda.allocate(1 << 28)?);
    for _ in 0..5 {
        let (x, mut y) = (theirs.clone_htod(&vec![3f32; 2 * N]).unwrap(), theirs.alloc_zeros::<f32>(N).unwrap());
        busy(&cuda, &ours, &mut large)?;
        // SAFETY: used on `ours` alone.
        unsafe {
            ours.lend(|lent| {
                let (y, acc) = (lent.read(x.slice(N..), [1, N])?, lent.write(y.as_view_mut(), [1, N])?);
                cuda.accumulate(&ours, Accumulate { acc, weight: Factor::Value(2.0), y })
            })?;
        }
        drop(x);
        // cudarc gives out the same memory again
        let again = theirs.clone_htod(&vec![5f32; 2 * N]).unwrap();
        // and its own stream waits for what was written on ours
        assert!(theirs.clone_dtoh(&y).unwrap() == [6.0; N], "overwritten while it was read");
        assert!(theirs.clone_dtoh(&again).unwrap() == [5.0; 2 * N]);
    }
    Ok(())
}

pub(crate) fn memory_made_of_a_slice_and_freed_at_once() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let layer = prepare(&cuda, Numerics::Fast)?;
    let ((theirs, ours), mut large) = (streams(&cuda)?, cuda.allocate(1 << 28)?);
    let (x, mut y, shape) = (numbers(300 * H, 8), cuda.allocate(2 * 300 * H)?, [300, H]);
    let expected = direct(&cuda, &layer, &ours, &x);
    let x = Memory::from_slice(&cuda, theirs.clone_htod(&bits(&x)).unwrap())?;
    let bytes = layer.workspace_bytes(300)?;
    let memory = Memory::from_slice(&cuda, theirs.alloc_zeros::<u8>(bytes).unwrap())?;
    assert_eq!(memory.bytes(), bytes);
    let mut workspace = layer.workspace_in(memory, 300)?;
    busy(&cuda, &ours, &mut large)?;
    let (from, to) = (View::new(x.read(), DType::BF16, 0, shape)?, View::new(y.write(), DType::BF16, 0, shape)?);
    layer.forward(&ours, from, to, &mut workspace)?;
    drop((x, workspace));
    // cudarc gives out the same memory again
    let _again = [2 * 300 * H, bytes].map(|bytes| theirs.clone_htod(&vec![0x7fu8; bytes]).unwrap());
    let mut found = vec![0u16; 300 * H];
    cuda.download(&ours, &y, bytemuck::cast_slice_mut(&mut found))?;
    assert!(found == expected);
    Ok(())
}

fn bits(x: &[bf16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub(crate) fn what_is_lent_is_checked() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let stream = CudaStream::from_cudarc(&cuda, cuda.context().new_stream().unwrap())?;
    let elsewhere = CudaContext::new_non_primary(0, 0).unwrap();
    let handle = CudaContext::new(0).unwrap().default_stream().alloc_zeros::<f32>(64).unwrap();
    let foreign = elsewhere.new_stream().unwrap().alloc_zeros::<f32>(64).unwrap();
    let mut own = stream.driver().alloc_zeros::<f32>(64).unwrap();
    // SAFETY: nothing is enqueued.
    unsafe {
        for slice in [&foreign, &handle] {
            let refused = stream.lend(|lent| lent.read(slice.as_view(), [64]).map(drop));
            assert!(matches!(refused, Err(Error::OtherContext { .. })), "{refused:?}");
        }
        stream.lend(|lent| lent.read(own.slice(32..), [4, 8]).map(drop))?;
        let refused = stream.lend(|lent| lent.write(own.slice_mut(32..), [4, 9]).map(drop));
        assert!(matches!(refused, Err(Error::Contract(_))), "{refused:?}");
    }
    let refused = Memory::from_slice(&cuda, foreign).map(drop);
    assert!(matches!(refused, Err(Error::OtherContext { .. })), "{refused:?}");
    Ok(())
}

pub(crate) fn a_layer_captured_with_slices() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let layer = prepare(&cuda, Numerics::Fast)?;
    let (theirs, stream) = streams(&cuda)?;
    assert!(cuda.context().is_managing_stream_synchronization());
    let tokens = 5;
    let mut workspace = layer.workspace(tokens)?;
    // made and used on another stream than the layer runs on: there are events to wait for
    let mut x = theirs.alloc_zeros::<u16>(tokens * H).unwrap();
    let mut y = theirs.alloc_zeros::<u16>(tokens * H).unwrap();
    // SAFETY: addresses of what is lent, for as long; all that is captured outlives the graph.
    let graph = unsafe {
        stream.lend(|lent| {
            let (x, y) = lend_bf16(lent, &x, &mut y, tokens)?;
            Graph::capture(&stream, || layer.forward(&stream, x, y, &mut workspace))
        })
    }?;
    for seed in [30, 31, 32] {
        let fresh = numbers(tokens * H, seed);
        theirs.memcpy_htod(&bits(&fresh), &mut x).unwrap();
        // SAFETY: as above.
        unsafe {
            stream.lend(|lent| {
                let _operands = lend_bf16(lent, &x, &mut y, tokens)?;
                graph.replay(&stream)
            })?;
        }
        // another stream's, which waits for the replay
        let found = theirs.clone_dtoh(&y).unwrap();
        assert!(found == direct(&cuda, &layer, &stream, &fresh));
    }
    cuda.context().check_err().unwrap();
    Ok(())
}

type Pair<'s> = (View<fused_moe_cuda::Ref<'s>>, View<fused_moe_cuda::Mut<'s>>);

/// The same memory as bf16, of which cudarc knows nothing without its feature.
fn lend_bf16<'s>(
    lent: &fused_moe_cuda::Lending<'s, '_>,
    x: &'s cudarc::driver::CudaSlice<u16>,
    y: &'s mut cudarc::driver::CudaSlice<u16>,
    tokens: usize,
) -> Result<Pair<'s>> {
    // SAFETY: any two bytes are a bf16.
    let (x, y) = unsafe { (x.transmute::<bf16>(tokens * H), y.transmute_mut::<bf16>(tokens * H)) };
    Ok((lent.read(x.unwrap(), [tokens, H])?, lent.write(y.unwrap(), [tokens, H])?))
}

pub(crate) fn lending_within_a_capture() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let ((theirs, stream), mut memory) = (streams(&cuda)?, cuda.allocate(64)?);
    let x = theirs.clone_htod(&[1f32; 64]).unwrap();
    zero(&cuda, &stream, &mut memory)?;
    // SAFETY: all that is captured outlives the graph.
    let graph = unsafe {
        Graph::capture(&stream, || {
            let refused = stream.lend(|lent| lent.read(x.as_view(), [64]).map(drop));
            assert!(matches!(refused, Err(Error::Capturing)), "{refused:?}");
            zero(&cuda, &stream, &mut memory)
        })
    }?;
    // the capture, the slice and its stream are none the worse for it
    cuda.upload(&[1; 64], &mut memory)?;
    graph.replay(&stream)?;
    let mut found = [1; 64];
    cuda.download(&stream, &memory, &mut found)?;
    assert_eq!(found, [0; 64]);
    assert_eq!(theirs.clone_dtoh(&x).unwrap(), [1.0; 64]);
    cuda.context().check_err().unwrap();
    Ok(())
}

pub(crate) fn a_panic_within_a_capture() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let (stream, mut memory) = (cuda.stream()?, cuda.allocate(64)?);
    zero(&cuda, &stream, &mut memory)?;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let enqueue = || {
            zero(&cuda, &stream, &mut memory)?;
            panic!("on purpose")
        };
        // SAFETY: there is no graph.
        unsafe { Graph::capture(&stream, enqueue) }.map(drop)
    }));
    assert!(panicked.is_err());
    assert_eq!(stream.status()?, Status::OK);
    cuda.upload(&[1; 64], &mut memory)?;
    // SAFETY: all that is captured outlives the graph.
    unsafe { Graph::capture(&stream, || zero(&cuda, &stream, &mut memory)) }?.replay(&stream)?;
    let mut found = [1; 64];
    cuda.download(&stream, &memory, &mut found)?;
    assert_eq!(found, [0; 64]);
    Ok(())
}

pub(crate) fn the_status_word_without_waiting() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let stream = cuda.stream()?;
    let (mut ids, mut out) = (cuda.allocate(4)?, [cuda.allocate(4)?, cuda.allocate(4)?, cuda.allocate(12)?]);
    let read = || {
        let mut word = [0xff; 4];
        cuda.context().bind_to_thread().unwrap();
        // SAFETY: the word lives, and so does its copy until the wait.
        unsafe {
            result::memcpy_dtoh_async(&mut word, stream.status_word().address(), stream.driver().cu_stream()).unwrap();
        }
        stream.synchronize()?;
        Ok::<_, Error>(Status::from_bits(u32::from_le_bytes(word)))
    };
    assert_eq!(read()?, Status::OK);
    cuda.upload(&7u32.to_le_bytes(), &mut ids)?;
    let [row_slot, slot_row, offsets] = &mut out;
    let u32 = DType::U32;
    cuda.permute(
        &stream,
        Permute {
            experts: View::new(ids.read(), u32, 0, [1, 1])?,
            experts_total: 2,
            local: 0..2,
            row_slot: View::new(row_slot.write(), u32, 0, [1])?,
            slot_row: View::new(slot_row.write(), u32, 0, [1])?,
            offsets: View::new(offsets.write(), u32, 0, [3])?,
        },
    )?;
    assert_eq!(read()?, Status::EXPERT_OUT_OF_RANGE);
    assert_eq!(read()?, stream.status()?, "kept until it is asked for");
    assert_eq!(read()?, Status::OK);
    Ok(())
}
