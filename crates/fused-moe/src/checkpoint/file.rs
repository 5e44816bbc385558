//! One safetensors file: mapped, header checked, tensors found by name.

use super::error::{Error, HeaderError, Result};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The largest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// What a pointer of Git LFS begins with.
pub(super) const GIT_LFS: &[u8] = b"version https://git-lfs";

/// A mapped safetensors file.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    real_path: PathBuf,
    map: Mmap,
    tensors: HashMap<String, Located>,
}

/// Where a tensor lies in its file.
#[derive(Clone, Debug)]
struct Located {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// The header of a file.
#[derive(Deserialize)]
struct Header {
    /// Read so that it is not taken for a tensor.
    #[serde(rename = "__metadata__")]
    _metadata: Option<HashMap<String, String>>,
    #[serde(flatten)]
    tensors: BTreeMap<String, TensorInfo>,
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
        let io = |action| move |source| Error::Io { path: path.into(), action, source };
        if !fs::metadata(path).map_err(io("open the file"))?.is_file() {
            return Err(Error::NotAFile { path: path.into() });
        }
        let real_path = path.canonicalize().map_err(io("resolve the path"))?;
        let map = map(path).map_err(io("map the file"))?;
        if map.starts_with(GIT_LFS) {
            return Err(Error::GitLfs { path: path.into() });
        }
        let tensors = header(&map).map_err(|reason| Error::Header { path: path.into(), reason })?;
        Ok(Self { path: path.into(), real_path, map, tensors })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn real_path(&self) -> &Path {
        &self.real_path
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

fn header(bytes: &[u8]) -> Result<HashMap<String, Located>, HeaderError> {
    let size = bytes.len() as u64;
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or(HeaderError::TooShort { bytes: size })?;
    let header = u64::from_le_bytes(*length);
    if header > MAX_HEADER {
        return Err(HeaderError::TooLong { header, limit: MAX_HEADER });
    }
    let (text, data) = rest.split_at_checked(header as usize).ok_or(HeaderError::Cut { header, bytes: size })?;
    let header: Header = serde_json::from_str(std::str::from_utf8(text)?)?;
    let end = check(&header.tensors)?;
    if end != data.len() {
        return Err(HeaderError::DataLength { expected: end as u64, actual: data.len() as u64 });
    }
    let start = bytes.len() - data.len();
    let located = header.tensors.into_iter().map(|(name, info)| {
        let (first, end) = info.data_offsets;
        (name, Located { dtype: info.dtype, shape: info.shape, bytes: start + first..start + end })
    });
    Ok(located.collect())
}

/// Checks that the tensors lie one after the other and are as long as their shapes; returns where they end.
fn check(tensors: &BTreeMap<String, TensorInfo>) -> Result<usize, HeaderError> {
    let mut ordered: Vec<_> = tensors.iter().collect();
    ordered.sort_by_key(|(_, info)| info.data_offsets);
    let mut expected = 0;
    for (name, info) in ordered {
        let (start, end) = info.data_offsets;
        if start != expected || end < start {
            return Err(HeaderError::TensorOffsets { name: name.clone(), expected, start, end });
        }
        let elements = info.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let bits = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
        if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != end - start) {
            let (dtype, shape) = (info.dtype.to_string(), info.shape.clone());
            return Err(HeaderError::TensorLength { name: name.clone(), dtype, shape, bytes: end - start });
        }
        expected = end;
    }
    Ok(expected)
}
