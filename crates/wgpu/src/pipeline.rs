use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernel::Variant;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

/// The kernels of a device that were compiled so far.
#[derive(Debug, Default)]
pub(crate) struct Pipelines {
    compiled: Mutex<HashMap<Variant, Arc<Pipeline>>>,
}

impl Pipelines {
    /// A kernel, compiled if it is the first time that it is asked for.
    ///
    /// Errors: `Compile`, `DeviceLost`.
    pub(crate) fn get(&self, device: &Device, variant: &Variant) -> Result<Arc<Pipeline>> {
        let lock = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = lock().get(variant) {
            return Ok(Arc::clone(pipeline));
        }
        let pipeline = Arc::new(compile(device, variant)?);
        Ok(Arc::clone(lock().entry(*variant).or_insert(pipeline)))
    }
}

fn compile(device: &Device, variant: &Variant) -> Result<Pipeline> {
    let entry = variant.kernel.entry();
    let mut entries = Vec::new();
    for (index, (binding, slot)) in variant.kernel.bindings().iter().zip(variant.slots).enumerate() {
        if let Some(slot) = slot {
            let read_only = !binding.written && !slot.shared;
            entries.push(wgpu::BindGroupLayoutEntry {
                binding: index as u32,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            });
        }
    }
    let gpu = &device.device;
    let compiled = device.checked("compilation", || {
        let module = gpu.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(entry),
            source: wgpu::ShaderSource::Wgsl(Cow::Owned(variant.source(device.numbers.subgroups))),
        });
        let layout =
            gpu.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(entry), entries: &entries });
        let pipeline_layout = gpu.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(entry),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: variant.kernel.params().1,
        });
        let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(entry),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        Pipeline { pipeline, layout }
    });
    compiled.map_err(|error| match error {
        Error::Device { reason, .. } => Error::Compile { kernel: format!("{variant:?}"), reason },
        other => other,
    })
}
