use crate::Wgpu;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::turn::Turn;
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
/// Several threads may record. Nothing of another thread's comes between the launches of an operation or of a layer's call:
/// who records, lends, takes or submits meanwhile waits for the last of them.
///
/// No pass may be open in an encoder that is lent; errors of launches in it appear when it is finished.
#[derive(Debug)]
pub struct WgpuStream {
    device: Arc<Device>,
    recording: Mutex<Option<Recording>>,
    turn: Turn,
    status: wgpu::Buffer,
    /// Where the host reads the status.
    mapped: Mutex<wgpu::Buffer>,
    /// What lies between two launches of an operation without a workspace, once there was one.
    scratch: Mutex<Option<wgpu::Buffer>>,
}

/// An encoder, and the compute pass that is open in it: launches that follow each other share one, since every pass is two
/// command buffers of its own, and a GPU stops before each.
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
        let (mapped, scratch) = (Mutex::new(mapped), Mutex::default());
        Ok(Self { device, recording: Mutex::default(), turn: Turn::default(), status, mapped, scratch })
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

    /// Room for [`SCRATCH`] numbers, made when it is asked for first. A layer's call brings its own.
    ///
    /// Errors: `OutOfMemory`, `DeviceLost`.
    pub(crate) fn scratch(&self) -> Result<wgpu::Buffer> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = &*scratch {
            return Ok(buffer.clone());
        }
        let buffer = self.device.buffer(4 * SCRATCH as u64, BufferUsages::STORAGE)?;
        Ok(scratch.insert(buffer).clone())
    }

    /// Whether a call needed that.
    #[cfg(test)]
    pub(crate) fn has_scratch(&self) -> bool {
        self.scratch.lock().is_ok_and(|scratch| scratch.is_some())
    }

    /// Records an operation, with nothing of another thread's between its launches.
    pub(crate) fn whole<T>(&self, operation: impl FnOnce() -> Result<T>) -> Result<T> {
        let _turn = self.turn.take();
        operation()
    }

    /// What was recorded, when no other thread is amid an operation.
    fn lock(&self) -> MutexGuard<'_, Option<Recording>> {
        let _turn = self.turn.take();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::first_adapter;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn who_takes_the_encoder_waits_for_the_end_of_an_operation() {
        let Some(wgpu) = first_adapter() else { return };
        let stream = WgpuStream::new(&wgpu).unwrap();
        let (taken, recorded) = channel();
        let record = || stream.record(|encoder| encoder.clear_buffer(stream.status_buffer(), 0, None));
        thread::scope(|scope| {
            let whole = stream.whole(|| {
                record()?;
                scope.spawn(|| taken.send(stream.take().is_some()).unwrap());
                assert!(recorded.recv_timeout(Duration::from_millis(200)).is_err());
                // an operation that it is made of
                stream.whole(record)?;
                assert!(recorded.recv_timeout(Duration::from_millis(200)).is_err());
                Ok(())
            });
            whole.unwrap();
            assert!(recorded.recv().unwrap());
        });
    }

    #[test]
    fn an_idle_stream_has_no_scratch() {
        let Some(wgpu) = first_adapter() else { return };
        let stream = WgpuStream::new(&wgpu).unwrap();
        assert!(!stream.has_scratch());
        assert_eq!(stream.scratch().unwrap(), stream.scratch().unwrap());
        assert!(stream.has_scratch());
    }
}
