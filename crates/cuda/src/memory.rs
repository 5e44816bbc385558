use crate::Cuda;
use crate::device::{self, Allocation, Device};
use crate::error::{Error, Result};
use crate::stream::CudaStream;
use cudarc::driver::{CudaSlice, DevicePtr};
use fused_moe_core::Storage;
use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

/// Device memory: owned, or a handle to what the host program owns.
#[derive(Debug)]
pub struct Memory {
    address: u64,
    bytes: usize,
    owner: Owner,
}

#[derive(Debug)]
enum Owner {
    Allocation(Allocation),
    Slice(Slice),
    Foreign,
}

/// A cudarc slice, which is freed when the device has done with it.
#[derive(Debug)]
struct Slice {
    device: Arc<Device>,
    slice: Option<Box<dyn Any + Send + Sync>>,
}

impl Drop for Slice {
    fn drop(&mut self) {
        // what cudarc does to free it changes the current context
        let current = self.device.bind("free");
        // a failure means that the context is gone, and the memory with it
        let _ = self.device.synchronize("free");
        self.slice = None;
        drop(current);
    }
}

impl Memory {
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        let allocation = device.allocate(bytes)?;
        Ok(Self { address: allocation.address, bytes, owner: Owner::Allocation(allocation) })
    }

    /// Addresses that stand for memory while kernels are found and not launched.
    pub(crate) fn placeholder(bytes: usize) -> Self {
        Self { address: 1 << 40, bytes, owner: Owner::Foreign }
    }

    /// Memory that the host program owns.
    ///
    /// # Safety
    /// `address .. address + bytes` must be device memory of the backend's context, must stay allocated as long as the
    /// value or anything enqueued with it lives, and what others do with it must be ordered with the streams it is used on.
    pub unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self { address, bytes, owner: Owner::Foreign }
    }

    /// A cudarc slice, which becomes the value's: memory from the host program's own pool, for a workspace say. Waits for
    /// the device, and waits again before it gives the slice back to cudarc, as memory of its own does.
    ///
    /// Errors: `OtherContext`, `Driver`, `DeviceLost`.
    pub fn from_slice<T: Send + Sync + 'static>(cuda: &Cuda, slice: CudaSlice<T>) -> Result<Self> {
        let device = cuda.device();
        device.check(slice.context(), "memory", "slice")?;
        device.synchronize("memory")?;
        let _current = device.bind("memory")?;
        let (bytes, stream) = (slice.num_bytes(), Arc::clone(slice.stream()));
        let address = slice.device_ptr(&stream).0;
        let slice = Slice { device: Arc::clone(device), slice: Some(Box::new(slice)) };
        Ok(Self { address, bytes, owner: Owner::Slice(slice) })
    }

    /// Its device address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// As storage of operands that are read.
    pub fn read(&self) -> Ref<'_> {
        Ref(Range { address: self.address, bytes: self.bytes, lives: PhantomData })
    }

    /// As storage of operands that are written.
    pub fn write(&mut self) -> Mut<'_> {
        Mut(Range { address: self.address, bytes: self.bytes, lives: PhantomData })
    }

    /// Errors: `OtherContext` when it was allocated for another device.
    pub(crate) fn check(&self, device: &Device, during: &'static str, operand: &'static str) -> Result<()> {
        match &self.owner {
            Owner::Allocation(allocation) => device.check(&allocation.device.context, during, operand),
            Owner::Slice(slice) => device.check(&slice.device.context, during, operand),
            Owner::Foreign => Ok(()),
        }
    }

    pub(crate) fn copy_in(&mut self, device: &Device, data: &[u8]) -> Result<()> {
        if data.len() > self.bytes {
            return Err(Error::Copy { bytes: data.len(), available: self.bytes });
        }
        self.check(device, "upload", "memory")?;
        if data.is_empty() { Ok(()) } else { device::copy_in(device, data, self.address) }
    }

    pub(crate) fn copy_out(&self, stream: &CudaStream, data: &mut [u8]) -> Result<()> {
        if data.len() > self.bytes {
            return Err(Error::Copy { bytes: data.len(), available: self.bytes });
        }
        self.check(stream.device(), "download", "memory")?;
        if data.is_empty() {
            return stream.synchronize();
        }
        device::copy_out(stream.device(), stream.driver(), self.address, data, "download")
    }
}

/// A range of device addresses that lives as long as its owner is borrowed.
#[derive(Clone, Copy, Debug)]
struct Range<'a> {
    address: u64,
    bytes: usize,
    lives: PhantomData<&'a ()>,
}

/// Device memory that operations read.
#[derive(Clone, Copy, Debug)]
pub struct Ref<'a>(Range<'a>);

/// Device memory that operations write.
#[derive(Debug)]
pub struct Mut<'a>(Range<'a>);

impl<'a> Ref<'a> {
    /// Memory that the host program owns; [`CudaStream::lend`] makes one of a cudarc slice.
    ///
    /// # Safety
    /// `address .. address + bytes` must be device memory of the backend's context that stays allocated for `'a` and until
    /// what was enqueued with it has run, and nobody may write to it meanwhile.
    pub unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self(Range { address, bytes, lives: PhantomData })
    }

    /// Its device address.
    pub fn address(&self) -> u64 {
        self.0.address
    }

    pub(crate) fn shorten<'short>(self) -> Ref<'short>
    where
        'a: 'short,
    {
        self
    }
}

impl<'a> Mut<'a> {
    /// Memory that the host program owns; [`CudaStream::lend`] makes one of a cudarc slice.
    ///
    /// # Safety
    /// As [`Ref::from_raw`], and nobody else may read or write it meanwhile.
    pub unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self(Range { address, bytes, lives: PhantomData })
    }

    /// Its device address.
    pub fn address(&self) -> u64 {
        self.0.address
    }

    pub(crate) fn shorten<'short>(self) -> Mut<'short>
    where
        'a: 'short,
    {
        self
    }

    pub(crate) fn share(&self) -> Ref<'_> {
        Ref(self.0)
    }

    pub(crate) fn reborrow(&mut self) -> Mut<'_> {
        Mut(self.0)
    }

    /// The first `bytes` bytes (all, if there are fewer); what follows them is left.
    pub(crate) fn split_off_front(&mut self, bytes: usize) -> Mut<'a> {
        let bytes = bytes.min(self.0.bytes);
        let front = Range { bytes, ..self.0 };
        self.0.address += bytes as u64;
        self.0.bytes -= bytes;
        Mut(front)
    }
}

impl Storage for Ref<'_> {
    fn bytes(&self) -> usize {
        self.0.bytes
    }
}

impl Storage for Mut<'_> {
    fn bytes(&self) -> usize {
        self.0.bytes
    }
}
