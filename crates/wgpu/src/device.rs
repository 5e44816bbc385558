use crate::error::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};
use wgpu::{BufferDescriptor, BufferUsages, ErrorFilter, Features, Limits};

/// What the plans ask of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNumbers {
    /// Its name.
    pub name: String,
    /// `vulkan`, `metal`, `dx12`.
    pub api: String,
    /// Its driver and that one's version, where they are told.
    pub driver: String,
    /// Whether it is a processor that plays a GPU.
    pub software: bool,
    /// Whether threads can add up within a subgroup; off where the environment has `FMOE_WGPU_SUBGROUPS=0`.
    pub subgroups: bool,
    /// Whether commands can be timed on the device.
    pub timestamps: bool,
    /// The largest part of a buffer that a kernel can be given, in bytes.
    pub binding_bytes: u64,
    /// The largest buffer, in bytes.
    pub buffer_bytes: u64,
    /// Bindings begin at multiples of this, in bytes.
    pub binding_alignment: u64,
    /// Memory that a workgroup shares, in bytes.
    pub workgroup_bytes: u32,
}

impl DeviceNumbers {
    pub(crate) fn new(info: wgpu::AdapterInfo, features: Features, limits: &Limits) -> Self {
        Self {
            name: info.name,
            api: info.backend.to_str().to_owned(),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            software: info.device_type == wgpu::DeviceType::Cpu,
            subgroups: features.contains(Features::SUBGROUP)
                && std::env::var_os("FMOE_WGPU_SUBGROUPS").is_none_or(|value| value != "0"),
            timestamps: features.contains(Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS),
            // element numbers are u32, and so are the lengths that Metal is told
            binding_bytes: limits.max_storage_buffer_binding_size.min(i32::MAX as u64) & !255,
            buffer_bytes: limits.max_buffer_size,
            binding_alignment: limits.min_storage_buffer_offset_alignment.into(),
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
        }
    }
}

/// What is needed of every device.
const FEATURES: Features = Features::IMMEDIATES;
/// What is used where it is there.
const OPTIONAL: Features =
    Features::SUBGROUP.union(Features::TIMESTAMP_QUERY).union(Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);

/// Storage buffers of a kernel: what a default device offers.
pub(crate) const BINDINGS: usize = 8;
/// Bytes of a kernel's parameters: what every Vulkan device offers.
pub(crate) const PARAMETER_BYTES: usize = 128;

/// A device and its queue.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) numbers: DeviceNumbers,
    /// What wgpu reported outside of any call of ours, and that the device is gone.
    faults: Arc<Faults>,
}

#[derive(Debug, Default)]
struct Faults {
    lost: Mutex<Option<String>>,
    other: Mutex<Option<String>>,
}

fn keep(fault: &Mutex<Option<String>>, message: String) {
    fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
}

/// Every adapter, GPUs before processors. wgpu would fall back on the compiler FXC where there is no DXC: it refuses
/// barriers that follow a choice by what was read from memory, as the kernels have them, and knows no subgroups.
pub(crate) fn adapters() -> Vec<wgpu::Adapter> {
    let flags = wgpu::InstanceFlags::empty().with_env();
    let shader_compiler = wgpu::Dx12Compiler::default_dynamic_dxc().with_env();
    let dx12 = wgpu::Dx12BackendOptions { shader_compiler, ..Default::default() };
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::PRIMARY,
        flags,
        backend_options: wgpu::BackendOptions { dx12, ..Default::default() },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => 2,
        wgpu::DeviceType::Cpu => 3,
    });
    adapters
}

impl Device {
    pub(crate) const USAGES: BufferUsages =
        BufferUsages::STORAGE.union(BufferUsages::COPY_SRC).union(BufferUsages::COPY_DST);

    /// A device of its own, with all that the adapter offers.
    pub(crate) fn new(adapter: &wgpu::Adapter) -> Result<Self> {
        let info = adapter.get_info();
        check(&info.name, adapter.features(), &adapter.limits())?;
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("fused-moe"),
            required_features: FEATURES | (OPTIONAL & adapter.features()),
            required_limits: adapter.limits(),
            ..Default::default()
        });
        let failed = |e: wgpu::RequestDeviceError| Error::Device { during: "device", reason: e.to_string() };
        let (device, queue) = pollster::block_on(request).map_err(failed)?;
        let this = Self::of(device, queue)?;
        let faults = Arc::clone(&this.faults);
        this.device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| keep(&faults.other, error.to_string())));
        let faults = Arc::clone(&this.faults);
        this.device.set_device_lost_callback(move |_, message| keep(&faults.lost, message));
        Ok(this)
    }

    /// The host program's; its handlers of errors stay as they are.
    pub(crate) fn of(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let (info, features, limits) = (device.adapter_info(), device.features(), device.limits());
        check(&info.name, features, &limits)?;
        let numbers = DeviceNumbers::new(info, features, &limits);
        Ok(Self { device, queue, numbers, faults: Arc::default() })
    }

    /// A zeroed buffer of at least so many bytes.
    ///
    /// Errors: `OutOfMemory`, `DeviceLost`.
    pub(crate) fn buffer(&self, bytes: u64, usage: BufferUsages) -> Result<wgpu::Buffer> {
        let size = bytes.max(4).checked_next_multiple_of(4).filter(|&size| size <= self.numbers.buffer_bytes);
        let size = size.ok_or(Error::OutOfMemory { needed: bytes })?;
        self.alive("allocation")?;
        let memory = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let other = self.device.push_error_scope(ErrorFilter::Internal);
        let buffer =
            self.device.create_buffer(&BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        let (other, memory) = (pollster::block_on(other.pop()), pollster::block_on(memory.pop()));
        match (memory, other) {
            (None, None) => self.alive("allocation").map(|()| buffer),
            _ => Err(Error::OutOfMemory { needed: bytes }),
        }
    }

    /// Runs `work` and reports what wgpu says of it.
    pub(crate) fn checked<T>(&self, during: &'static str, work: impl FnOnce() -> T) -> Result<T> {
        self.alive(during)?;
        let scopes = [ErrorFilter::Validation, ErrorFilter::OutOfMemory, ErrorFilter::Internal]
            .map(|filter| self.device.push_error_scope(filter));
        let result = work();
        let mut errors = Vec::new();
        for scope in scopes.into_iter().rev() {
            errors.extend(pollster::block_on(scope.pop()));
        }
        match errors.pop() {
            None => Ok(result),
            Some(error) => Err(Error::Device { during, reason: error.to_string() }),
        }
    }

    /// Waits for everything that was submitted.
    ///
    /// Errors: `DeviceLost`, `Device`.
    pub(crate) fn wait(&self, during: &'static str) -> Result<()> {
        let polled = self.device.poll(wgpu::PollType::wait_indefinitely());
        self.alive(during)?;
        polled.map(|_| ()).map_err(|e| Error::Device { during, reason: e.to_string() })
    }

    /// The beginning of a buffer that can be mapped, after everything that was submitted. Waits.
    ///
    /// Errors: `DeviceLost`, `Device`.
    pub(crate) fn read_mapped(&self, mapped: &wgpu::Buffer, data: &mut [u8], during: &'static str) -> Result<()> {
        let bytes = (data.len() as u64).next_multiple_of(4);
        let (sender, receiver) = std::sync::mpsc::channel();
        self.checked(during, || {
            mapped.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
                let _ = sender.send(result);
            });
        })?;
        let failed = |reason: String| Error::Device { during, reason };
        let mut copy = || {
            self.wait(during)?;
            receiver.recv().map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
            let view = mapped.get_mapped_range(0..bytes).map_err(|e| failed(e.to_string()))?;
            data.copy_from_slice(&view[..data.len()]);
            Ok(())
        };
        let copied = copy();
        // in a scope, since what could not be mapped cannot be unmapped
        let unmapped = self.checked(during, || mapped.unmap());
        copied.and(unmapped)
    }

    /// Errors: `DeviceLost` once it is, `Device` with what wgpu reported meanwhile.
    pub(crate) fn alive(&self, during: &'static str) -> Result<()> {
        let take = |fault: &Mutex<Option<String>>| fault.lock().unwrap_or_else(PoisonError::into_inner).take();
        let lost = self.faults.lost.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (lost, take(&self.faults.other)) {
            (Some(reason), _) => Err(Error::DeviceLost { during, reason }),
            (None, Some(reason)) => Err(Error::Device { during, reason }),
            (None, None) => Ok(()),
        }
    }
}

/// Whether a device can run the kernels at all.
fn check(name: &str, features: Features, limits: &Limits) -> Result<()> {
    let device = || name.to_owned();
    if !features.contains(FEATURES) {
        return Err(Error::Unsupported { device: device(), missing: "immediate data (wgpu's feature IMMEDIATES)" });
    }
    let needed = [
        ("max_immediate_size", limits.max_immediate_size.into(), PARAMETER_BYTES as u64),
        ("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage.into(), BINDINGS as u64),
        ("max_compute_invocations_per_workgroup", limits.max_compute_invocations_per_workgroup.into(), 256),
        ("max_compute_workgroup_size_x", limits.max_compute_workgroup_size_x.into(), 256),
        ("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into(), 16384),
        ("max_compute_workgroups_per_dimension", limits.max_compute_workgroups_per_dimension.into(), 65535),
        ("max_storage_buffer_binding_size", limits.max_storage_buffer_binding_size, 128 << 20),
    ];
    match needed.into_iter().find(|(_, actual, needed)| actual < needed) {
        Some((limit, actual, needed)) => Err(Error::Limit { device: device(), limit, actual, needed }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(features: Features, change: impl FnOnce(&mut Limits)) -> String {
        let mut limits = Limits { max_immediate_size: 128, ..Limits::default() };
        change(&mut limits);
        check("an adapter", features, &limits).map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn the_limits_of_webgpu_with_immediate_data_will_do() {
        assert_eq!(refusal(FEATURES, |_| {}), "");
    }

    #[test]
    fn what_is_missing_is_named() {
        let message = refusal(Features::SUBGROUP, |_| {});
        assert!(message.starts_with("an adapter offers no ") && message.contains("IMMEDIATES"), "{message}");
        type Change = fn(&mut Limits);
        let changes: [(&str, Change); 7] = [
            ("max_immediate_size is 127, at least 128", |l| l.max_immediate_size = 127),
            ("max_storage_buffers_per_shader_stage is 7", |l| l.max_storage_buffers_per_shader_stage = 7),
            ("max_compute_invocations_per_workgroup is 128", |l| l.max_compute_invocations_per_workgroup = 128),
            ("max_compute_workgroup_size_x is 255", |l| l.max_compute_workgroup_size_x = 255),
            ("max_compute_workgroup_storage_size is 16352", |l| l.max_compute_workgroup_storage_size = 16352),
            ("max_compute_workgroups_per_dimension is 65534", |l| l.max_compute_workgroups_per_dimension = 65534),
            ("max_storage_buffer_binding_size is 134217727", |l| l.max_storage_buffer_binding_size -= 1),
        ];
        for (part, change) in changes {
            let message = refusal(FEATURES, change);
            assert!(message.contains(part) && message.starts_with("an adapter: "), "{message}");
        }
    }
}
