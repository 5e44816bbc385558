//! What goes wrong with a device: each its own error, and the host program's context left as it was.

use crate::layer::{H, direct, numbers, prepare};
use crate::multi;
use cudarc::driver::{CudaContext, result};
use fused_moe_core::operation::Zero;
use fused_moe_core::{Backend, DType, Layer, Numerics, Stream, View};
use fused_moe_cuda::{Cuda, CudaStream, Error, Graph, Memory, Mut, Result, time_replays};
use sha2::{Digest, Sha256};
use std::process::{Command, ExitCode};
use std::{fs, ptr};

/// Names what a child process does.
pub(crate) const CHILD: &str = "FMOE_TEST_CHILD";

pub(crate) fn child(name: &str) -> ExitCode {
    let ran = match name {
        "lost" => lost(),
        "foreign" => multi::foreign(),
        "kernel" => kernel(),
        _ => panic!("{name}"),
    };
    ran.unwrap_or_else(|error| panic!("{name}: {error}"));
    ExitCode::SUCCESS
}

/// Runs this program again, for what would break it.
pub(crate) fn in_a_child(name: &str) {
    ran(Command::new(std::env::current_exe().unwrap()).env(CHILD, name));
}

fn ran(command: &mut Command) {
    let out = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    print!("{}", String::from_utf8_lossy(&out.stdout));
    assert!(out.status.success() && !stderr.contains("panicked"), "{}\n{stderr}", out.status);
}

pub(crate) fn no_such_device() -> Result<()> {
    let error = Cuda::new(99).unwrap_err();
    assert!(matches!(error, Error::NoDevice { ordinal: 99, count: 1.. }), "{error}");
    Ok(())
}

pub(crate) fn too_little_memory() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let free = cuda.free_bytes()?;
    match cuda.allocate(free + (1 << 30)) {
        Err(Error::OutOfMemory { needed, free }) => assert!(needed > free && free > 0),
        other => panic!("{other:?}"),
    }
    // a whole layer, when the rest is taken
    let mut taken = Vec::new();
    let mut piece = free;
    while piece >= 1 << 12 {
        match cuda.allocate(piece) {
            Ok(memory) => taken.push(memory),
            Err(Error::OutOfMemory { .. }) => piece /= 2,
            Err(error) => return Err(error),
        }
    }
    match prepare(&cuda, Numerics::Fast) {
        Err(Error::OutOfMemory { needed, .. }) => println!("{needed} bytes and there are none"),
        other => panic!("{:?}", other.map(|layer| layer.weight_bytes())),
    }
    drop(taken);
    prepare(&cuda, Numerics::Fast).map(drop)
}

pub(crate) fn streams_of_another_context() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let other = CudaContext::new_non_primary(0, 0).unwrap();
    let stream = other.new_stream().unwrap();
    // SAFETY: the stream lives.
    let raw = unsafe { CudaStream::from_raw(&cuda, stream.cu_stream()) };
    for refused in [raw, CudaStream::from_cudarc(&cuda, stream)] {
        assert!(matches!(refused, Err(Error::OtherContext { .. })), "{refused:?}");
    }
    Ok(())
}

pub(crate) fn the_current_context_stays() -> Result<()> {
    // a thread of its own, whose stack of contexts is empty
    std::thread::spawn(contexts).join().unwrap()
}

fn contexts() -> Result<()> {
    let other = CudaContext::new_non_primary(0, 0).unwrap();
    for before in [ptr::null_mut(), other.cu_ctx()] {
        // SAFETY: null, or a context that lives.
        unsafe { result::ctx::set_current(before) }.unwrap();
        let same = |what: &str| {
            assert_eq!(result::ctx::get_current().unwrap().unwrap_or(ptr::null_mut()), before, "{what}");
        };
        let cuda = Cuda::new(0)?;
        same("device");
        cuda.free_bytes()?;
        same("free memory");
        let stream = cuda.stream()?;
        same("stream");
        // SAFETY: the default stream of the backend's context.
        drop(unsafe { CudaStream::from_raw(&cuda, ptr::null_mut()) }?);
        same("default stream");
        let mut memory = cuda.allocate(1 << 12)?;
        same("allocation");
        cuda.upload(&[1; 1 << 12], &mut memory)?;
        same("upload");
        let mut enqueue = || cuda.zero(&stream, Zero { out: View::new(memory.write(), DType::F32, 0, [1, 1 << 10])? });
        enqueue()?;
        same("operation");
        time_replays(&stream, 2, &mut enqueue)?;
        same("timing");
        // SAFETY: all that is captured outlives the graph.
        let graph = unsafe { Graph::capture(&stream, enqueue) }?;
        same("capture");
        graph.replay(&stream)?;
        same("replay");
        cuda.download(&stream, &memory, &mut [0; 1 << 12])?;
        same("download");
        stream.synchronize()?;
        assert!(stream.status()?.is_ok());
        same("status");
        let layer = prepare(&cuda, Numerics::Fast)?;
        same("layer");
        direct(&cuda, &layer, &stream, &numbers(3 * H, 1));
        same("forward");
        assert!(matches!(cuda.allocate(1 << 50), Err(Error::OutOfMemory { .. })));
        same("no memory");
        drop((graph, memory, layer));
        same("drop");
        drop((stream, cuda));
        same("drop of the device");
    }
    Ok(())
}

pub(crate) fn a_lost_device_is_said_to_be_lost() -> Result<()> {
    in_a_child("lost");
    Ok(())
}

/// In a process of its own: a kernel writes where nothing is.
fn lost() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let (layer, stream) = (prepare(&cuda, Numerics::Fast)?, cuda.stream()?);
    let mut memory = cuda.allocate(64)?;
    let workspace = layer.workspace(4)?;
    let zero = |out: Mut<'_>| cuda.zero(&stream, Zero { out: View::new(out, DType::F32, 0, [1, 16])? });
    // SAFETY: all that is captured outlives the graph.
    let capture = |memory: &mut Memory| unsafe { Graph::capture(&stream, || zero(memory.write())) };
    let graph = capture(&mut memory)?;
    // SAFETY: there is none: an address near 0 is nobody's, and the process ends with this.
    zero(unsafe { Mut::from_raw(1 << 12, 64) })?;
    let found = [
        ("status", stream.status().map(drop)),
        ("status again", stream.status().map(drop)),
        ("synchronisation", stream.synchronize()),
        ("operation", zero(memory.write())),
        ("replay", graph.replay(&stream)),
        ("capture", capture(&mut memory).map(drop)),
        ("upload", cuda.upload(&[0; 64], &mut memory)),
        ("download", cuda.download(&stream, &memory, &mut [0; 64])),
        ("allocation", cuda.allocate(64).map(drop)),
        ("stream", cuda.stream().map(drop)),
        ("free memory", cuda.free_bytes().map(drop)),
        ("layer", prepare(&cuda, Numerics::Fast).map(drop)),
        ("workspace", layer.workspace(4).map(drop)),
        ("another handle", Cuda::new(0).map(drop)),
    ];
    for (what, found) in found {
        assert!(matches!(found, Err(Error::DeviceLost { .. })), "{what}: {found:?}");
    }
    drop((graph, workspace, layer, memory, stream, cuda));
    Ok(())
}

/// In a process of its own, for its cache folder is another.
fn kernel() -> Result<()> {
    let cuda = Cuda::new(0)?;
    let (stream, mut memory) = (cuda.stream()?, cuda.allocate(64)?);
    cuda.upload(&[1; 64], &mut memory)?;
    cuda.zero(&stream, Zero { out: View::new(memory.write(), DType::F32, 0, [1, 16])? })?;
    let mut bytes = [1; 64];
    cuda.download(&stream, &memory, &mut bytes)?;
    assert_eq!(bytes, [0; 64]);
    Ok(())
}

/// An entry whose checksum holds and that the driver does not take.
pub(crate) fn a_forged_cache_entry_is_replaced() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        ran(Command::new(std::env::current_exe().unwrap()).env(CHILD, "kernel").env("FMOE_CACHE_DIR", folder.path()))
    };
    run();
    let entries: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [entry] = entries.as_slice() else { panic!("{entries:?}") };
    let whole = fs::read(entry).unwrap();
    let mut forged = whole.clone();
    forged[88..].fill(b'x');
    let digest: [u8; 32] = Sha256::digest(&forged[88..]).into();
    forged[48..80].copy_from_slice(&digest);
    fs::write(entry, &forged).unwrap();
    run();
    assert!(fs::read(entry).unwrap() == whole);
    Ok(())
}
