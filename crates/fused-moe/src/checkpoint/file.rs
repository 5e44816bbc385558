//! One safetensors file: mapped, header checked, tensors found by name.

use super::error::{Error, HeaderError, Result};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The largest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// A mapped safetensors file.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    map: Mmap,
    tensors: HashMap<String, TensorInfo>,
}

/// Where a tensor lies in its file.
#[derive(Clone, Debug)]
struct TensorInfo {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A tensor as it lies in its file.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoredTensor<'a> {
    pub(super) dtype: Dtype,
    pub(super) shape: &'a [usize],
    pub(super) data: &'a [u8],
}

impl TensorFile {
    /// Maps a file and reads its header, and nothing else of it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let map = map(path).map_err(|source| Error::Io { path: path.into(), action: "map the file", source })?;
        let tensors = header(&map).map_err(|reason| Error::Header { path: path.into(), reason })?;
        Ok(Self { path: path.into(), map, tensors })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn tensor(&self, name: &str) -> Option<StoredTensor<'_>> {
        let info = self.tensors.get(name)?;
        let data = self.map.get(info.bytes.clone())?;
        Some(StoredTensor { dtype: info.dtype, shape: &info.shape, data })
    }
}

#[allow(unsafe_code)]
fn map(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the documentation of `Checkpoint::open` asks that the files be neither changed nor cut while it lives.
    unsafe { Mmap::map(&file) }
}

fn header(bytes: &[u8]) -> Result<HashMap<String, TensorInfo>, HeaderError> {
    let size = bytes.len() as u64;
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or(HeaderError::TooShort { bytes: size })?;
    let header = u64::from_le_bytes(*length);
    if header > MAX_HEADER {
        return Err(HeaderError::TooLong { header, limit: MAX_HEADER });
    }
    let (text, data) = rest.split_at_checked(header as usize).ok_or(HeaderError::Cut { header, bytes: size })?;
    let metadata: Metadata = serde_json::from_str(std::str::from_utf8(text)?)?;
    if metadata.data_len() != data.len() {
        return Err(HeaderError::DataLength { expected: metadata.data_len() as u64, actual: data.len() as u64 });
    }
    let start = bytes.len() - data.len();
    let located = metadata.tensors().into_iter().map(|(name, info)| {
        let (first, end) = info.data_offsets;
        let (dtype, shape) = (info.dtype, info.shape.clone());
        (name, TensorInfo { dtype, shape, bytes: start + first..start + end })
    });
    Ok(located.collect())
}
