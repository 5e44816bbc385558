//! Several devices in one process.

use crate::hostile;
use crate::layer::{H, direct, numbers, prepare};
use fused_moe_conformance::{Options, run};
use fused_moe_core::operation::Zero;
use fused_moe_core::{Backend, DType, Layer, Numerics, Stream, View};
use fused_moe_cuda::{Cuda, CudaStream, Error, Graph, Memory, Result};

fn zero(cuda: &Cuda, stream: &CudaStream, memory: &mut Memory) -> Result<()> {
    let count = memory.bytes() / 4;
    cuda.zero(stream, Zero { out: View::new(memory.write(), DType::F32, 0, [1, count])? })
}

pub(crate) fn two_devices_at_the_same_time() -> Result<()> {
    let both = [Cuda::new(0)?, Cuda::new(1)?];
    let x = numbers(500 * H, 3);
    let on = |cuda: &Cuda| -> Result<Vec<u16>> {
        let layer = prepare(cuda, Numerics::Fast)?;
        let stream = cuda.stream()?;
        let first = direct(cuda, &layer, &stream, &x);
        for _ in 0..50 {
            assert!(direct(cuda, &layer, &stream, &x) == first, "{}", cuda.context().ordinal());
        }
        let report = run(cuda, &Options { filter: Some("combine".into()), ..Options::default() }, &mut |_| {})?;
        assert!(!report.results.is_empty() && report.passed(), "{report}");
        Ok(first)
    };
    let [one, other] =
        std::thread::scope(|scope| both.each_ref().map(|cuda| scope.spawn(|| on(cuda))).map(|t| t.join().unwrap()));
    assert!(one? == other? || both[0].numbers().name != both[1].numbers().name);
    Ok(())
}

pub(crate) fn two_devices_in_turn() -> Result<()> {
    let x = numbers(40 * H, 3);
    for order in [[0, 1], [1, 0]] {
        let mut on = Vec::new();
        for ordinal in order {
            let cuda = Cuda::new(ordinal)?;
            on.push((prepare(&cuda, Numerics::Fast)?, cuda.stream()?, cuda));
        }
        let expected = direct(&on[0].2, &on[0].0, &on[0].1, &x);
        for (layer, stream, cuda) in on.iter().chain(on.iter().rev()) {
            let found = direct(cuda, layer, stream, &x);
            assert!(found == expected || on[0].2.numbers().name != on[1].2.numbers().name);
        }
    }
    Ok(())
}

pub(crate) fn operands_of_another_device() -> Result<()> {
    let (one, other) = (Cuda::new(0)?, Cuda::new(1)?);
    let (layer, stream) = (prepare(&one, Numerics::Fast)?, one.stream()?);
    let (foreign_stream, mut foreign) = (other.stream()?, other.allocate(1 << 20)?);
    let refused = |result: Result<()>| match result {
        Err(Error::OtherContext { .. }) => {}
        result => panic!("{result:?}"),
    };
    let mut own = one.allocate(1 << 12)?;
    refused(zero(&one, &foreign_stream, &mut own));
    refused(one.upload(&[0; 8], &mut foreign));
    refused(one.download(&stream, &foreign, &mut [0; 8]));
    refused(CudaStream::from_cudarc(&one, other.context().new_stream().unwrap()).map(drop));
    // SAFETY: it is never replayed.
    let graph = unsafe { Graph::capture(&stream, || zero(&one, &stream, &mut own)) }?;
    refused(graph.replay(&foreign_stream));
    refused(layer.workspace_in(foreign, 4).map(drop));
    let mut elsewhere = prepare(&other, Numerics::Fast)?.workspace(4)?;
    let (x, mut y) = (one.allocate(4 * H)?, one.allocate(4 * H)?);
    let (x, y) = (View::new(x.read(), DType::BF16, 0, [1, H])?, View::new(y.write(), DType::BF16, 0, [1, H])?);
    refused(layer.forward(&stream, x, y, &mut elsewhere));
    // neither device is the worse for it
    let x = numbers(3 * H, 5);
    let theirs = prepare(&other, Numerics::Fast)?;
    let found = direct(&other, &theirs, &foreign_stream, &x);
    assert!(found == direct(&one, &layer, &stream, &x) || one.numbers().name != other.numbers().name);
    Ok(())
}

pub(crate) fn a_kernel_on_memory_of_another_device() -> Result<()> {
    hostile::in_a_child("foreign");
    Ok(())
}

/// In a process of its own: the right result, or an error.
pub(crate) fn foreign() -> Result<()> {
    let (one, other) = (Cuda::new(0)?, Cuda::new(1)?);
    let (stream, mut memory) = (one.stream()?, other.allocate(1 << 12)?);
    other.upload(&[1; 1 << 12], &mut memory)?;
    match zero(&one, &stream, &mut memory).and_then(|()| stream.status()) {
        Ok(_) => {
            let mut bytes = [1; 1 << 12];
            other.download(&other.stream()?, &memory, &mut bytes)?;
            assert!(bytes == [0; 1 << 12]);
            println!("the devices reach each other's memory");
        }
        Err(Error::DeviceLost { .. }) => println!("device 0 is lost, and says so"),
        Err(error) => panic!("{error}"),
    }
    Ok(())
}
