//! `fmoe devices`, and the choice of one.

use crate::args::On;
use crate::output::{self, BAD, DIM, GOOD, Table, misused, note, plain, remedied, warn};
use anyhow::Result;
use fused_moe::{Device, DeviceError, cuda, wgpu};
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The device that the command line asks for; where it leaves the choice, a word about what could not be chosen.
pub(crate) fn chosen(on: &On) -> Result<Device> {
    let device = match (on.backend.as_deref(), on.adapter.as_deref()) {
        (None | Some("wgpu"), Some(adapter)) => Device::wgpu(number(adapter)?),
        (Some(backend), Some(adapter)) => {
            let message = format!("--adapter {adapter}: --backend {backend} has no adapters to choose from");
            return Err(misused(message, "--adapter goes with --backend wgpu"));
        }
        (None | Some("auto"), None) => Device::best_and_why().map(|(device, why)| {
            if let Some(why) = why {
                note(format_args!("on {why}"));
            }
            device
        }),
        (Some(name), None) => Device::by_name(name),
    };
    if let Ok(Device::Cuda(_)) = &device {
        warn_of_cache();
    }
    device.map_err(|error| refused("--backend", &error))
}

/// The device that an option names.
pub(crate) fn named(option: &str, name: &str) -> Result<Device> {
    Device::by_name(name).map_err(|error| refused(option, &error))
}

fn refused(option: &str, error: &DeviceError) -> anyhow::Error {
    match error {
        DeviceError::Unknown { name, known } => {
            let known = known.join(", ");
            let help = format!("this fmoe has auto, {known}; one of several GPUs is cuda:0, wgpu:0, cuda:1, ...");
            misused(format!("{option} {name}: no such backend"), help)
        }
        _ => remedied(error.to_string(), "`fmoe devices` says what can be used here"),
    }
}

/// The number of the adapter that has this number or, alone, this in its name or its driver's.
fn number(adapter: &str) -> Result<usize> {
    if adapter.trim().is_empty() {
        return Err(misused(
            "--adapter: the name is empty",
            "give a number or a part of a name; `fmoe devices` lists them",
        ));
    }
    let adapters = wgpu::adapters();
    let part = adapter.to_lowercase();
    // Mesa's driver on the processor goes by either name
    let part = if part == "lavapipe" { "llvmpipe".to_owned() } else { part };
    let named = |(number, numbers): (usize, &wgpu::DeviceNumbers)| {
        [&numbers.name, &numbers.driver].iter().any(|name| name.to_lowercase().contains(&part)).then_some(number)
    };
    let found: Vec<_> = match adapter.parse() {
        Ok(number) => (number < adapters.len()).then_some(number).into_iter().collect(),
        Err(_) => adapters.iter().enumerate().filter_map(named).collect(),
    };
    match found.as_slice() {
        &[number] => Ok(number),
        // the backend says why
        _ if adapters.is_empty() => Ok(0),
        _ => {
            let several =
                if found.is_empty() { "no adapter has this number or name" } else { "several have this name" };
            let line = |(i, numbers): (usize, &wgpu::DeviceNumbers)| {
                format!("\n  {i}  {}, {}, {}", numbers.name, numbers.api, numbers.driver)
            };
            let list: String = adapters.iter().enumerate().map(line).collect();
            Err(remedied(format!("--adapter {adapter}: {several}"), format!("give the number of one of these:{list}")))
        }
    }
}

/// Says where kernels will not be kept, which costs their compilation in each process.
pub(crate) fn warn_of_cache() {
    let cache = cuda::KernelCache::get();
    if let Err(reason) = cache.writable() {
        let folder = folder_of(&cache);
        warn(format_args!("kernels cannot be kept in {folder}: {reason}; FMOE_CACHE_DIR may name another folder"));
    }
}

fn folder_of(cache: &cuda::KernelCache) -> String {
    cache.folder().map_or("any folder".into(), |folder| folder.display().to_string())
}

/// What the CUDA backend would work with: names and values.
fn cuda_parts() -> [(&'static str, String); 3] {
    let driver = cuda::driver().unwrap_or_else(|_| "not found".into());
    let compiler = match cuda::compiler() {
        Ok((path, (major, minor))) => format!("{path}, version {major}.{minor}"),
        Err(_) => "not found".into(),
    };
    let cache = cuda::KernelCache::get();
    let folder = folder_of(&cache);
    let cache = match cache.writable() {
        Ok(()) => folder,
        Err(reason) => format!("{folder}, cannot be written: {reason}"),
    };
    [("driver", driver), ("nvrtc", compiler), ("kernel cache", cache)]
}

/// From the start of a program to the end of its first call, with an empty kernel cache and again with what that left.
fn first_calls(backend: &str) -> Result<[Duration; 2]> {
    let cache = tempfile::tempdir()?;
    let call = || -> Result<Duration> {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        let start = Instant::now();
        let run = command.args(["run", "--backend", backend]).env("FMOE_CACHE_DIR", cache.path()).output()?;
        let time = start.elapsed();
        anyhow::ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        Ok(time)
    };
    Ok([call()?, call()?])
}

pub(crate) fn devices(arguments: &crate::args::Devices) -> Result<ExitCode> {
    let devices = Device::list();
    let chosen = devices.iter().find(|device| device.available.is_ok() && device.preference > 0);
    let chosen = chosen.map(|device| device.name.clone());
    let code = if chosen.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    let parts = cuda_parts();
    if arguments.json {
        let list: Vec<_> = devices
            .iter()
            .map(|device| {
                json!({
                    "name": device.name,
                    "description": device.description,
                    "available": device.available.is_ok(),
                    "reason": device.available.as_ref().err(),
                })
            })
            .collect();
        let parts: serde_json::Map<_, _> =
            parts.into_iter().map(|(name, value)| (name.replace(' ', "_"), value.into())).collect();
        output::print_json(&json!({ "devices": list, "chosen": chosen, "cuda": parts }))?;
    } else {
        let mut out = output::stdout();
        let mut table = Table::new(["backend", "usable", "device"]).text(&[1, 2]);
        for device in &devices {
            match &device.available {
                Ok(()) => table.row([plain(&device.name), ("yes".into(), GOOD), plain(&device.description)]),
                Err(reason) => table.row([plain(&device.name), ("no".into(), BAD), (reason.clone(), DIM)]),
            }
        }
        table.print(&mut out)?;
        let by_name =
            || if devices.iter().any(|device| device.available.is_ok()) { "none, only by name" } else { "none" };
        writeln!(out, "chosen: {}", chosen.as_deref().unwrap_or_else(by_name))?;
        for (name, value) in parts {
            writeln!(out, "cuda {name}: {value}")?;
        }
        if arguments.timing {
            for device in devices.iter().filter(|device| device.available.is_ok()) {
                let [cold, warm] = first_calls(&device.name)?.map(output::duration);
                writeln!(
                    out,
                    "{}: first call after {cold} with an empty kernel cache, after {warm} with a warm one",
                    device.name
                )?;
            }
        }
        out.flush()?;
    }
    Ok(code)
}
