//! `fmoe devices`, and the choice of one.

use crate::args::On;
use crate::output::{self, BAD, DIM, GOOD, Table, plain, remedied};
use anyhow::Result;
use fused_moe::{Device, DeviceError};
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;

/// The device that the command line asks for.
pub(crate) fn chosen(on: &On) -> Result<Device> {
    let device = Device::by_name(on.backend.as_deref().unwrap_or("auto"));
    device.map_err(|error| match &error {
        DeviceError::Unknown { name, known } => {
            remedied(format!("--backend {name}: no such backend"), format!("this fmoe has auto, {}", known.join(", ")))
        }
        _ => remedied(error.to_string(), "`fmoe devices` says what can be used here"),
    })
}

pub(crate) fn devices(arguments: &crate::args::Devices) -> Result<ExitCode> {
    let devices = Device::list();
    let best = Device::best_and_why();
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
        output::print_json(&json!({ "devices": list, "chosen": best.as_ref().ok().map(|(_, why)| why) }))?;
    } else {
        let mut out = output::stdout();
        let mut table = Table::new(["backend", "usable", "device"]).text(&[1, 2]);
        for device in &devices {
            match &device.available {
                Ok(()) => table.row([plain(device.name), ("yes".into(), GOOD), plain(&device.description)]),
                Err(reason) => table.row([plain(device.name), ("no".into(), BAD), (reason.clone(), DIM)]),
            }
        }
        table.print(&mut out)?;
        if let Ok((_, why)) = &best {
            writeln!(out, "chosen: {why}")?;
        }
        out.flush()?;
    }
    best?;
    Ok(ExitCode::SUCCESS)
}
