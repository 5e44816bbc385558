use crate::Wgpu;
use crate::device::Device;
use crate::error::{Error, Result};
use fused_moe_core::{Status, Stream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use wgpu::{BufferUsages, CommandEncoder, ComputePass};

/// Commands in order, and a status word on the device.
///
/// Operations record into a `CommandEncoder`: one of the host program's, from [`lend`](Self::lend) to
/// [`take`](Self::take), or else one of the stream's own. [`submit`](Self::submit), `status`, `download` and another
/// `lend` submit what was recorded so far, in a lent encoder too: take it back first to submit it yourself.
///
/// What was recorded runs when it is submitted: an `upload` or another stream's work that is submitted earlier runs before
/// it. Submit before you upload to what a recorded call reads.
///
/// Several threads may record. An operation of several launches keeps them together only if no other thread lends, takes or
/// submits meanwhile. No pass may be open in an encoder that is lent; errors of launches in it appear when it is finished.
#[derive(Debug)]
pub struct WgpuStream {
    device: Arc<Device>,
    recording: Mutex<Option<Recording>>,
    status: wgpu::Buffer,
    /// Where the host reads the status.
    mapped: Mutex<wgpu::Buffer>,
    /// What lies between two launches of one operation.
    scratch: Mutex<wgpu::Buffer>,
}

/// An encoder, and the compute pass that is open in it: launches that follow each other share one, since every pass is a
/// command buffer of its own, before which a GPU stops.
#[derive(Debug)]
struct Recording {
    /// Dropped, and thereby ended, before its encoder is used.
    pass: Option<ComputePass<'static>>,
    encoder: CommandEncoder,
}

/// Numbers in f32 that the scratch of a stream has room for.
pub(crate) const SCRATCH: usize = 1 << 16;

impl WgpuStream {
    pub(crate) fn new(wgpu: &Wgpu) -> Result<Self> {
        let device = Arc::clone(wgpu.device());
        let status = device.buffer(4, Device::USAGES)?;
        let mapped = device.buffer(4, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
        let scratch = device.buffer(4 * SCRATCH as u64, BufferUsages::STORAGE)?;
        let (mapped, scratch) = (Mutex::new(mapped), Mutex::new(scratch));
        Ok(Self { device, recording: Mutex::default(), status, mapped, scratch })
    }

    /// Records into this encoder from now on. What was recorded before is submitted.
    ///
    /// Errors: `DeviceLost`, `Device`.
    pub fn lend(&self, encoder: CommandEncoder) -> Result<()> {
        let mut recording = self.lock();
        self.submit_recorded(&mut recording)?;
        *recording = Some(Recording { pass: None, encoder });
        Ok(())
    }

    /// The encoder with what was recorded so far, for the host program to go on with and to submit; none, if nothing was.
    pub fn take(&self) -> Option<CommandEncoder> {
        self.lock().take().map(|Recording { pass, encoder }| {
            drop(pass);
            encoder
        })
    }

    /// Submits what was recorded so far.
    ///
    /// Errors: `DeviceLost`, `Device`.
    pub fn submit(&self) -> Result<()> {
        self.submit_recorded(&mut self.lock())
    }

    /// Under the lock, so that nobody records or submits meanwhile what comes later.
    fn submit_recorded(&self, recording: &mut Option<Recording>) -> Result<()> {
        let Some(Recording { pass, encoder }) = recording.take() else { return self.device.alive("submission") };
        drop(pass);
        self.device.checked("submission", || self.device.queue.submit([encoder.finish()])).map(|_| ())
    }

    /// Records with the encoder.
    pub(crate) fn record(&self, work: impl FnOnce(&mut CommandEncoder)) -> Result<()> {
        let mut recording = self.lock();
        let Recording { pass, encoder } = recording.get_or_insert_with(|| self.begin());
        *pass = None;
        work(encoder);
        Ok(())
    }

    /// Records in a compute pass.
    pub(crate) fn dispatch(&self, work: impl FnOnce(&mut ComputePass<'_>)) -> Result<()> {
        let mut recording = self.lock();
        let Recording { pass, encoder } = recording.get_or_insert_with(|| self.begin());
        let begin = || encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()).forget_lifetime();
        work(pass.get_or_insert_with(begin));
        Ok(())
    }

    fn begin(&self) -> Recording {
        Recording { pass: None, encoder: self.device.device.create_command_encoder(&Default::default()) }
    }

    /// The status word.
    pub(crate) fn status_buffer(&self) -> &wgpu::Buffer {
        &self.status
    }

    /// The scratch, for one operation at a time to record its launches.
    pub(crate) fn scratch(&self) -> MutexGuard<'_, wgpu::Buffer> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Recording>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream for WgpuStream {
    type Error = Error;

    fn status(&self) -> Result<Status> {
        // one thread at a time, from the copy to what is read of it
        let mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let mut recording = self.lock();
        let Recording { pass, encoder } = recording.get_or_insert_with(|| self.begin());
        *pass = None;
        encoder.copy_buffer_to_buffer(&self.status, 0, &mapped, 0, 4);
        encoder.clear_buffer(&self.status, 0, None);
        self.submit_recorded(&mut recording)?;
        drop(recording);
        let mut word = [0; 4];
        self.device.read_mapped(&mapped, &mut word, "status")?;
        Ok(Status::from_bits(u32::from_le_bytes(word)))
    }
}
