//! Adapters and devices that will not do: each its own error.

use fused_moe_wgpu::{Error, Result, Wgpu, adapters};
use wgpu::{DeviceDescriptor, Features, Limits};

pub(crate) fn no_such_adapter() -> Result<()> {
    let count = adapters().len();
    for index in [count, usize::MAX] {
        match Wgpu::new(index) {
            Err(Error::NoSuchAdapter { index: asked, count: there }) => assert_eq!((asked, there), (index, count)),
            other => panic!("{other:?}"),
        }
    }
    Ok(())
}

/// A device as a host program might have made it.
fn made(required_features: Features, required_limits: Limits) -> Result<Wgpu> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    let descriptor = DeviceDescriptor { required_features, required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapters[0].request_device(&descriptor)).unwrap();
    Wgpu::from_device(device, queue)
}

pub(crate) fn devices_that_lack_something() -> Result<()> {
    let enough = Limits { max_immediate_size: 128, ..Limits::default() };
    made(Features::IMMEDIATES, enough.clone())?;
    let error = made(Features::empty(), Limits::default()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("IMMEDIATES"), "{error}");
    let error = made(Features::IMMEDIATES, Limits { max_immediate_size: 64, ..enough.clone() }).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: "max_immediate_size", actual: 64, needed: 128, .. }), "{error}");
    let error = made(Features::IMMEDIATES, Limits { max_storage_buffers_per_shader_stage: 4, ..enough }).unwrap_err();
    assert!(error.to_string().contains("max_storage_buffers_per_shader_stage is 4, at least 8"), "{error}");
    Ok(())
}
