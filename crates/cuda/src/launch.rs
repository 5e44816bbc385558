//! The one place that launches kernels, and how operands become their parameters.

use crate::Cuda;
use crate::device::driver_error;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::memory::{Mut, Ref};
use crate::stream::CudaStream;
use cudarc::driver::sys;
use fused_moe_core::{DType, Storage, View};
use std::ffi::c_void;

/// Makes a struct that is a kernel's only parameter, and its text in CUDA C++.
macro_rules! params {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ident),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type),*
        }
        impl $crate::launch::Params for $name {
            const DEFINITION: &'static str = concat!(
                "struct ", stringify!($name), " {", $(" ", stringify!($type), " ", stringify!($field), ";",)* " };\n"
            );
        }
    };
}
pub(crate) use params;

/// A kernel's parameter.
pub(crate) trait Params: Copy {
    /// The same struct in CUDA C++.
    const DEFINITION: &'static str;
}

params! {
    /// An operand: address, row stride in elements, format. No address: it is absent.
    Tensor { data: u64, stride: u64, dtype: u32, zero: u32 }
}

/// What `Tensor::dtype` holds.
pub(crate) const fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::U32 => 3,
        _ => 0,
    }
}

/// The format of such a code.
pub(crate) const fn dtype_of(code: u32) -> DType {
    match code {
        1 => DType::F16,
        2 => DType::BF16,
        3 => DType::U32,
        _ => DType::F32,
    }
}

/// Device memory under a view.
pub(crate) trait Addressed: Storage {
    fn address(&self) -> u64;
}
impl Addressed for Ref<'_> {
    fn address(&self) -> u64 {
        Ref::address(self)
    }
}
impl Addressed for Mut<'_> {
    fn address(&self) -> u64 {
        Mut::address(self)
    }
}

impl Tensor {
    /// An operand that is there.
    ///
    /// Errors: `Misaligned` when its address is no multiple of its element size.
    pub(crate) fn of<S: Addressed>(view: &View<S>) -> Result<Self> {
        let data = view.storage().address() + view.offset() as u64;
        let (dtype, size) = (view.dtype(), view.dtype().size());
        if !data.is_multiple_of(size as u64) {
            return Err(fused_moe_core::Error::Misaligned { dtype, offset: view.offset(), size }.into());
        }
        Ok(Self { data, stride: view.row_stride() as u64, dtype: dtype_code(dtype), zero: 0 })
    }

    /// A vector or column, whose elements lie `stride` apart whichever way it is shaped.
    ///
    /// Errors: as [`of`](Self::of).
    pub(crate) fn column<S: Addressed>(view: &View<S>) -> Result<Self> {
        let stride = if view.cols() == 1 && view.shape().dims().len() > 1 { view.row_stride() } else { 1 };
        Ok(Self { stride: stride as u64, ..Self::of(view)? })
    }

    /// An operand that may be absent.
    ///
    /// Errors: as [`of`](Self::of).
    pub(crate) fn maybe<S: Addressed>(view: Option<&View<S>>) -> Result<Self> {
        view.map_or(Ok(Self::default()), Self::of)
    }

    /// Bytes of an element.
    pub(crate) fn element_bytes(&self) -> u64 {
        if self.dtype == 0 || self.dtype == 3 { 4 } else { 2 }
    }

    /// Whether groups of so many elements are aligned at the beginning of each row; an absent operand's are.
    pub(crate) fn aligned(&self, elements: u64) -> bool {
        self.data.is_multiple_of(self.element_bytes() * elements) && self.stride.is_multiple_of(elements)
    }
}

/// How many blocks of how many threads, and their dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared: u32,
}

impl Grid {
    /// So many blocks in a row; kernels whose rows may be more than a grid takes go round.
    pub(crate) fn line(blocks: usize, threads: u32) -> Self {
        Self { blocks: [limit(blocks, i32::MAX as u32), 1, 1], threads, shared: 0 }
    }

    /// Blocks in two directions, the second within its limit.
    pub(crate) fn plane(x: usize, y: usize, threads: u32) -> Self {
        Self { blocks: [limit(x, i32::MAX as u32), limit(y, 65535), 1], threads, shared: 0 }
    }

    pub(crate) fn with_shared(self, bytes: usize) -> Self {
        Self { shared: limit(bytes, u32::MAX), ..self }
    }
}

fn limit(n: usize, most: u32) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX).min(most)
}

/// Enqueues a kernel; an empty grid is nothing to do.
pub(crate) fn launch<P: Params>(
    cuda: &Cuda,
    stream: &CudaStream,
    kernel: Kernel,
    grid: Grid,
    params: &P,
) -> Result<()> {
    if grid.blocks.contains(&0) {
        return Ok(());
    }
    let during = kernel.entry();
    if kernel.params() != P::DEFINITION {
        return Err(Error::Driver { during, reason: "launched with another kernel's parameters".into() });
    }
    if let Some(recorder) = cuda.recorder() {
        recorder.note(kernel, grid);
        return Ok(());
    }
    let function = cuda.kernels().function(kernel)?;
    cuda.device().check(stream.driver().context(), during, "stream")?;
    let _current = cuda.device().bind(during)?;
    let mut copy = *params;
    let mut pointers = [(&raw mut copy).cast::<c_void>()];
    let [x, y, z] = grid.blocks;
    // SAFETY: plain numbers and pointers, for which zeros are values.
    let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
    let mut free = attributes.iter_mut();
    if kernel.takes_turn()
        && cuda.numbers().overlaps_launches()
        && let Some(attribute) = free.next()
    {
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
    }
    if kernel.is_cluster()
        && x > 1
        && let Some(attribute) = free.next()
    {
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
    }
    let left = free.len();
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared,
        hStream: stream.driver().cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: (attributes.len() - left) as u32,
    };
    // SAFETY: the function lives as long as the backend, and its one parameter is a P: the text it was compiled from holds
    // P's own definition. Its operands were checked by the operation's `problem`, and their owners promise that they stay. A
    // kernel that may begin early waits by itself for the launch before.
    unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
        .map_err(|e| driver_error(during, e))
}
