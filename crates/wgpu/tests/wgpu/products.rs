//! Matrix products: what their bits depend on, and operands that no binding holds.

use fused_moe_core::backend::{Backend, Stream};
use fused_moe_core::operation::Linear;
use fused_moe_core::{DType, Status, View};
use fused_moe_wgpu::{Error, Result, Wgpu};

/// The first adapter, with subgroups if it has them, and without, with bindings no larger than every device has.
pub(super) fn devices() -> Result<[Wgpu; 2]> {
    let with = Wgpu::new(0)?;
    let adapters = pollster::block_on(wgpu::Instance::default().enumerate_adapters(wgpu::Backends::PRIMARY));
    let same = |adapter: &wgpu::Adapter| adapter.get_info().name == with.numbers().name;
    let adapter = adapters.into_iter().find(same).ok_or(Error::NoAdapter)?;
    let descriptor = wgpu::DeviceDescriptor {
        required_features: wgpu::Features::IMMEDIATES,
        required_limits: wgpu::Limits { max_storage_buffer_binding_size: 128 << 20, ..adapter.limits() },
        ..Default::default()
    };
    let failed = |error: wgpu::RequestDeviceError| Error::Device { during: "device", reason: error.to_string() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).map_err(failed)?;
    let without = Wgpu::from_device(device, queue)?;
    assert!(!without.numbers().subgroups);
    Ok([with, without])
}

/// Numbers in -1 .. 1 that look random.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// `x . weight^T`, f32; `sizes` are rows, C, N.
fn linear(wgpu: &Wgpu, x: &[f32], weight: &[f32], [rows, inner, outer]: [usize; 3]) -> Result<Vec<f32>> {
    let stream = wgpu.stream()?;
    let upload = |data: &[f32]| {
        let mut memory = wgpu.allocate(4 * data.len())?;
        wgpu.upload(bytemuck::cast_slice(data), &mut memory)?;
        Ok::<_, Error>(memory)
    };
    let (x, weight) = (upload(&x[..rows * inner])?, upload(weight)?);
    let mut out = wgpu.allocate(4 * rows * outer)?;
    let operands = Linear {
        x: View::new(Wgpu::read(&x), DType::F32, 0, [rows, inner])?,
        weight: View::new(Wgpu::read(&weight), DType::F32, 0, [outer, inner])?,
        bias: None,
        out: View::new(Wgpu::write(&mut out), DType::F32, 0, [rows, outer])?,
    };
    wgpu.linear(&stream, operands)?;
    let mut result = vec![0.0; rows * outer];
    wgpu.download(&stream, &out, bytemuck::cast_slice_mut(&mut result))?;
    assert_eq!(stream.status()?, Status::from_bits(0));
    Ok(result)
}

pub(super) fn bits_depend_neither_on_subgroups_nor_within_a_form_on_how_many_rows_there_are() -> Result<()> {
    // teams of 256 and of 32 threads; widths read by 16 bytes and one by one
    for (inner, outer) in [(2056, 40), (301, 40), (72, 4100)] {
        let (x, weight) = (numbers(70 * inner, 1), numbers(outer * inner, 2));
        let mut all: Vec<Vec<f32>> = Vec::new();
        for wgpu in devices()? {
            for [most, fewer] in [[16, 1], [16, 6], [70, 17]] {
                let whole = linear(&wgpu, &x, &weight, [most, inner, outer])?;
                let part = linear(&wgpu, &x, &weight, [fewer, inner, outer])?;
                assert!(whole[..part.len()] == part, "{inner} {outer} {most} {fewer}");
                all.push(whole);
            }
        }
        if let [a, b, c, d, e, f] = &all[..] {
            assert!([a, b, c] == [d, e, f], "{inner} {outer}");
        }
    }
    Ok(())
}

pub(super) fn what_no_binding_holds_goes_in_pieces() -> Result<()> {
    let [_, wgpu] = devices()?;
    let (many, inner) = (1030, 1 << 15);
    let (large, small) = (numbers(many * inner, 3), numbers(2 * inner, 4));
    let by_rows = linear(&wgpu, &large, &small, [many, inner, 2])?;
    let by_columns = linear(&wgpu, &small, &large, [2, inner, many])?;
    for i in 0..many {
        for j in 0..2 {
            let pairs = large[i * inner..][..inner].iter().zip(&small[j * inner..][..inner]);
            let expected: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            for result in [by_rows[2 * i + j], by_columns[many * j + i]] {
                assert!((f64::from(result) - expected).abs() < 0.01, "{i} {j}: {result} {expected}");
            }
        }
    }
    Ok(())
}
