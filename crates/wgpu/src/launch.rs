//! The one place that records launches, and how operands become bindings and parameters.

use crate::Wgpu;
use crate::device::{BINDINGS, Device};
use crate::error::{Error, Result};
use crate::kernel::{Kernel, OPERANDS, Slot, Variant};
use crate::memory::Bound;
use crate::stream::WgpuStream;
use fused_moe_core::{DType, View};
use std::num::NonZeroU64;
use std::ops::Range;

/// Makes a struct that is a kernel's parameters, and its text in WGSL. Fields are u32, f32 and Tensor.
macro_rules! params {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ident),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type),*
        }
        impl $crate::launch::Params for $name {
            const DEFINITION: &'static str =
                concat!("struct Params {", $(" ", stringify!($field), ": ", stringify!($type), ",",)* " }\n");
        }
        const _: () = assert!(size_of::<$name>() <= $crate::device::PARAMETER_BYTES);
    };
}
pub(crate) use params;

/// A kernel's parameters.
pub(crate) trait Params: bytemuck::Pod {
    /// The same struct in WGSL.
    const DEFINITION: &'static str;
}

/// An operand's place in its binding, in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Tensor {
    pub(crate) offset: u32,
    pub(crate) stride: u32,
}

/// An operand: the part of a buffer that is bound, and the operand's place in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<'a> {
    buffer: &'a wgpu::Buffer,
    start: u64,
    bytes: u64,
    /// Bytes that can be bound from the beginning of the buffer on.
    end: u64,
    format: DType,
    wide: bool,
    pub(crate) tensor: Tensor,
}

impl<'a> Operand<'a> {
    /// An operand that is there.
    ///
    /// Errors: `Misaligned`, `Binding` when it is larger than a binding may be, `Usage`.
    pub(crate) fn of<S: Bound>(device: &Device, operation: &'static str, view: &'a View<S>) -> Result<Self> {
        Self::rows(device, operation, view, 0..view.rows())
    }

    /// Some of its rows, which must be there.
    ///
    /// Errors: as [`of`](Self::of).
    pub(crate) fn rows<S: Bound>(
        device: &Device,
        operation: &'static str,
        view: &'a View<S>,
        rows: Range<usize>,
    ) -> Result<Self> {
        let range = view.storage().range();
        let (buffer, format, stride) = (range.buffer, view.dtype(), view.row_stride());
        // a placeholder is longer than its buffer
        let end = buffer.size().max(range.start.saturating_add(range.bytes as u64));
        let size = format.size() as u64;
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::Usage { operation, missing: "STORAGE" });
        }
        let elements = if view.extent() == 0 || rows.is_empty() { 0 } else { (rows.len() - 1) * stride + view.cols() };
        if elements == 0 {
            let tensor = Tensor { offset: 0, stride: stride as u32 };
            return Ok(Self { buffer, start: 0, bytes: 4, end, format, wide: false, tensor });
        }
        let first = range.start + view.offset() as u64 + (rows.start * stride) as u64 * size;
        if !first.is_multiple_of(size) {
            let offset = view.offset();
            return Err(fused_moe_core::Error::Misaligned { dtype: format, offset, size: size as usize }.into());
        }
        let start = first - first % device.numbers.binding_alignment.max(16);
        let bytes = (first + elements as u64 * size - start).next_multiple_of(4);
        let limit = device.numbers.binding_bytes;
        if bytes > limit {
            return Err(Error::Binding { operation, bytes, limit });
        }
        if start + bytes > end {
            return Err(Error::Unbindable { operation, size: end });
        }
        let tensor = Tensor { offset: ((first - start) / size) as u32, stride: stride as u32 };
        Ok(Self { buffer, start, bytes, end, format, wide: false, tensor })
    }

    /// A vector or column, whose elements lie `stride` apart whichever way it is shaped.
    ///
    /// Errors: as [`of`](Self::of).
    pub(crate) fn column<S: Bound>(device: &Device, operation: &'static str, view: &'a View<S>) -> Result<Self> {
        let stride = if view.cols() == 1 && view.shape().dims().len() > 1 { view.row_stride() as u32 } else { 1 };
        let operand = Self::of(device, operation, view)?;
        Ok(Self { tensor: Tensor { stride, ..operand.tensor }, ..operand })
    }

    /// An operand that may be absent.
    ///
    /// Errors: as [`of`](Self::of).
    pub(crate) fn maybe<S: Bound>(
        device: &Device,
        operation: &'static str,
        view: Option<&'a View<S>>,
    ) -> Result<Option<Self>> {
        view.map(|view| Self::of(device, operation, view)).transpose()
    }

    /// All of a buffer of the backend's own, as u32.
    pub(crate) fn whole(buffer: &'a wgpu::Buffer) -> Self {
        let tensor = Tensor { offset: 0, stride: 1 };
        Self { buffer, start: 0, bytes: buffer.size(), end: buffer.size(), format: DType::U32, wide: false, tensor }
    }

    /// All of a buffer of the backend's own, as rows of so many elements.
    ///
    /// Errors: `Binding`.
    pub(crate) fn matrix(
        device: &Device,
        operation: &'static str,
        buffer: &'a wgpu::Buffer,
        (format, stride): (DType, u32),
    ) -> Result<Self> {
        let (bytes, limit) = (buffer.size(), device.numbers.binding_bytes);
        if bytes > limit {
            return Err(Error::Binding { operation, bytes, limit });
        }
        Ok(Self { format, tensor: Tensor { offset: 0, stride }, ..Self::whole(buffer) })
    }

    /// Some f32 of a buffer of the backend's own, as rows of so many; the first is at a multiple of 64, and they are whole
    /// fours.
    pub(crate) fn part(buffer: &'a wgpu::Buffer, elements: Range<usize>, stride: usize) -> Self {
        let [start, end] = [elements.start, elements.end].map(|element| 4 * element as u64);
        let tensor = Tensor { offset: 0, stride: stride as u32 };
        Self { start, bytes: end - start, end, format: DType::F32, tensor, ..Self::whole(buffer) }
    }

    /// Whether groups of so many elements are aligned at the beginning of each row.
    pub(crate) fn aligned(&self, elements: u32) -> bool {
        self.tensor.offset.is_multiple_of(elements) && self.tensor.stride.is_multiple_of(elements)
    }

    /// The same, to be read by 16 bytes; its binding ends with whole ones. What is shorter stays as it is: an operand without
    /// elements may lie in a buffer of 4 bytes.
    pub(crate) fn widened(self) -> Self {
        let bytes = self.bytes.next_multiple_of(16).min(self.end - self.start);
        if bytes < 16 { self } else { Self { wide: true, bytes, ..self } }
    }

    /// The same, to be read by 16 bytes if rows begin at multiples of 16 bytes and the buffer has all that such reads touch.
    pub(crate) fn widest(self) -> Self {
        let whole = self.start + self.bytes.next_multiple_of(16) <= self.end;
        if whole && self.aligned(16 / self.format.size() as u32) { self.widened() } else { self }
    }

    pub(crate) fn is_wide(&self) -> bool {
        self.wide
    }

    /// The same from a later row on.
    ///
    /// Errors: `Binding` when that begins where no element number reaches.
    pub(crate) fn after(self, device: &Device, operation: &'static str, rows: u32) -> Result<Self> {
        let Tensor { offset, stride } = self.tensor;
        let elements = u64::from(offset).saturating_add(u64::from(rows).saturating_mul(stride.into()));
        let offset = u32::try_from(elements).map_err(|_| {
            let bytes = elements.saturating_mul(self.format.size() as u64);
            Error::Binding { operation, bytes, limit: device.numbers.binding_bytes }
        })?;
        Ok(Self { tensor: Tensor { offset, stride }, ..self })
    }

    /// Every second row, from the first and from the second on.
    ///
    /// Errors: as [`after`](Self::after).
    pub(crate) fn alternate(self, device: &Device, operation: &'static str) -> Result<[Self; 2]> {
        let (second, third) = (self.after(device, operation, 1)?, self.after(device, operation, 2)?);
        let stride = third.tensor.offset - self.tensor.offset;
        Ok([self, second].map(|rows| Self { tensor: Tensor { stride, ..rows.tensor }, ..rows }))
    }
}

/// The place of an operand that may be absent.
pub(crate) fn tensor(operand: &Option<Operand<'_>>) -> Tensor {
    operand.map_or(Tensor::default(), |operand| operand.tensor)
}

/// How many workgroups there are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Groups<'a> {
    /// So many, in lines of 65535.
    Line(u64),
    /// As three u32 in a buffer say, at this offset in bytes.
    Indirect(&'a wgpu::Buffer, u64),
}

impl Groups<'_> {
    /// How many, where the host knows.
    fn count(self) -> Option<u64> {
        match self {
            Self::Line(count) => Some(count),
            Self::Indirect(..) => None,
        }
    }
}

/// Workgroups of a line of the grid; the kernels know it.
const LINE: u64 = 65535;

/// Records a kernel; no workgroups are nothing to do. Operands are in the order of the kernel's bindings.
///
/// Errors: `Compile`, `Device`.
pub(crate) fn launch<P: Params>(
    wgpu: &Wgpu,
    stream: &WgpuStream,
    kernel: Kernel,
    operands: &[Option<Operand<'_>>],
    (groups, params): (Groups<'_>, &P),
) -> Result<()> {
    let during = kernel.entry();
    let bindings = kernel.bindings();
    let there = operands.iter().flatten().count();
    if kernel.params().0 != P::DEFINITION || bindings.len() != operands.len() || there > BINDINGS {
        return Err(Error::Device { during, reason: "launched with another kernel's operands".into() });
    }
    if matches!(groups, Groups::Line(0)) {
        return Ok(());
    }
    let written = |operand: &Operand<'_>| {
        let mut all = operands.iter().zip(bindings);
        all.any(|(other, binding)| binding.written && other.is_some_and(|other| other.buffer == operand.buffer))
    };
    let mut slots = [None; OPERANDS];
    for ((slot, operand), binding) in slots.iter_mut().zip(operands).zip(bindings) {
        *slot = operand.map(|operand| Slot {
            format: operand.format,
            shared: !binding.written && written(&operand),
            wide: operand.wide,
        });
    }
    let variant = Variant { kernel, slots };
    if let Some(recorder) = wgpu.recorder() {
        recorder.note(variant, groups.count());
        return Ok(());
    }
    let pipeline = wgpu.pipelines().get(wgpu.device(), &variant)?;
    let mut entries = Vec::with_capacity(BINDINGS);
    for (index, operand) in operands.iter().enumerate() {
        if let Some(Operand { buffer, start, bytes, .. }) = *operand {
            let resource = wgpu::BufferBinding { buffer, offset: start, size: NonZeroU64::new(bytes) };
            entries.push(wgpu::BindGroupEntry {
                binding: index as u32,
                resource: wgpu::BindingResource::Buffer(resource),
            });
        }
    }
    // a buffer may be another device's
    let descriptor = wgpu::BindGroupDescriptor { label: Some(during), layout: &pipeline.layout, entries: &entries };
    let group = wgpu.device().checked(during, || wgpu.device().device.create_bind_group(&descriptor))?;
    stream.dispatch(|pass| {
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.set_immediates(0, bytemuck::bytes_of(params));
        match groups {
            Groups::Line(count) => pass.dispatch_workgroups(count.min(LINE) as u32, count.div_ceil(LINE) as u32, 1),
            Groups::Indirect(buffer, offset) => pass.dispatch_workgroups_indirect(buffer, offset),
        }
    })
}
