use crate::device::driver_error;
use crate::error::Result;
use crate::stream::{CudaStream, Graph};
use cudarc::driver::sys::CUevent_flags;

/// Microseconds of each of `repeats` replays, by the device's own clock, after two that are not timed. Waits.
///
/// Errors: `Driver`, `DeviceLost`.
pub fn time_replays(stream: &CudaStream, graph: &Graph, repeats: usize) -> Result<Vec<f64>> {
    let _current = stream.device().bind("timing")?;
    let failed = |e| driver_error("timing", e);
    let event = || stream.driver().context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed);
    let (begin, end) = (event()?, event()?);
    for _ in 0..2 {
        graph.replay(stream)?;
    }
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        begin.record(stream.driver()).map_err(failed)?;
        graph.replay(stream)?;
        end.record(stream.driver()).map_err(failed)?;
        times.push(f64::from(begin.elapsed_ms(&end).map_err(failed)?) * 1000.0);
    }
    Ok(times)
}
