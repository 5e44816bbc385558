//! What a golden folder's files say.

use fused_moe::checkpoint::CheckpointLayer;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::Path;

/// What meta.json says.
#[derive(Default)]
pub(super) struct Meta {
    pub(super) layer: Option<usize>,
    pub(super) note: Option<String>,
    pub(super) module_path: Option<String>,
}

/// An absent file says nothing.
pub(super) fn meta(folder: &Path) -> std::result::Result<Meta, String> {
    let Ok(text) = std::fs::read(folder.join("meta.json")) else { return Ok(Meta::default()) };
    let meta: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let layer = match meta.get("layer") {
        None | Some(Value::Null) => None,
        Some(number) => {
            let layer = number.as_u64().and_then(|layer| usize::try_from(layer).ok());
            Some(layer.ok_or_else(|| format!("\"layer\" is {number}, expected a number"))?)
        }
    };
    let text = |field: &str| meta.get(field).and_then(Value::as_str).map(str::to_owned);
    Ok(Meta { layer, note: text("note"), module_path: text("module_path") })
}

/// What a decoder layer's output is multiplied by, if anything.
pub(super) fn layer_scalar(folder: &Path, layer: &CheckpointLayer<'_>) -> std::result::Result<f64, String> {
    let bytes = std::fs::read(folder.join("model.safetensors")).map_err(|error| error.to_string())?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| error.to_string())?;
    let name = format!("{}.layer_scalar", layer.name);
    let Ok(tensor) = file.tensor(&name) else { return Ok(1.0) };
    match floats(tensor.dtype(), tensor.data()).as_deref() {
        Some(&[factor]) => Ok(factor),
        _ => Err(format!("{name} is {:?} {:?}, expected one number", tensor.dtype(), tensor.shape())),
    }
}

/// Where the sequences of an input `[N, L, H]` begin and end.
pub(super) fn sequences(file: &SafeTensors<'_>, input: usize) -> Option<Vec<u32>> {
    let tensor = file.tensor(&format!("input.{input}")).ok()?;
    let &[count, length, _] = tensor.shape() else { return None };
    (0..=count).map(|n| u32::try_from(n * length).ok()).collect()
}

pub(super) fn needed(
    file: &SafeTensors<'_>,
    name: &str,
    input: usize,
    count: Option<usize>,
) -> std::result::Result<Vec<f64>, String> {
    numbers(file, name, input, count)?.ok_or_else(|| format!("no {name}.{input}"))
}

/// The numbers of `NAME_f64.i` or `NAME.i`, whatever their format, if there is one of them.
pub(super) fn numbers(
    file: &SafeTensors<'_>,
    name: &str,
    input: usize,
    count: Option<usize>,
) -> std::result::Result<Option<Vec<f64>>, String> {
    let names = [format!("{name}_f64.{input}"), format!("{name}.{input}")];
    let found = names.into_iter().find_map(|name| Some((file.tensor(&name).ok()?, name)));
    let Some((tensor, name)) = found else { return Ok(None) };
    let expected = "F64, F32, F16, BF16, I64, I32 or U32";
    let Some(values) = floats(tensor.dtype(), tensor.data()) else {
        return Err(format!("{name} is {:?}, expected {expected}", tensor.dtype()));
    };
    match count {
        Some(count) if values.len() != count => Err(format!("{name} has {} elements, expected {count}", values.len())),
        _ => Ok(Some(values)),
    }
}

/// Numbers of any format that golden data has.
fn floats(format: Dtype, data: &[u8]) -> Option<Vec<f64>> {
    Some(match format {
        Dtype::F64 => data.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        Dtype::F32 => data.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f64()).collect(),
        Dtype::BF16 => data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f64()).collect(),
        Dtype::I64 => data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect(),
        Dtype::I32 => data.as_chunks().0.iter().map(|&b| f64::from(i32::from_le_bytes(b))).collect(),
        Dtype::U32 => data.as_chunks().0.iter().map(|&b| f64::from(u32::from_le_bytes(b))).collect(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format() {
        for (format, bytes) in [
            (Dtype::F64, &2f64.to_le_bytes()[..]),
            (Dtype::F32, &2f32.to_le_bytes()),
            (Dtype::F16, &f16::from_f32(2.0).to_le_bytes()),
            (Dtype::BF16, &bf16::from_f32(2.0).to_le_bytes()),
            (Dtype::I64, &2i64.to_le_bytes()),
            (Dtype::I32, &2i32.to_le_bytes()),
            (Dtype::U32, &2u32.to_le_bytes()),
        ] {
            assert_eq!(floats(format, bytes), Some(vec![2.0]), "{format:?}");
        }
        assert_eq!(floats(Dtype::U8, &[2]), None);
    }
}
