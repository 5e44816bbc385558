//! Tensors to a file, all of them or none.

use fused_moe_core::{DType, HostView};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Symbolic links that are followed, one to the next: as many as Linux follows.
const MAX_LINKS: usize = 40;

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The system refuses.
    #[error("{}: cannot {action}: {source}; nothing was written there", path.display())]
    Io {
        /// The file that was to be written.
        path: PathBuf,
        /// What was to be done.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The tensors make no file.
    #[error("{}: the tensors make no safetensors file: {source}", path.display())]
    Header {
        /// The file that was to be written.
        path: PathBuf,
        /// Why.
        source: safetensors::SafeTensorError,
    },
    /// Something that is not a regular file has that name.
    #[error("{}: {kind}, not a regular file; nothing was written, name another path", path.display())]
    NotAFile {
        /// The file that was to be written.
        path: PathBuf,
        /// What is there.
        kind: &'static str,
    },
    /// Two tensors of one name.
    #[error("{}: two tensors are called {name}; rename one", path.display())]
    Duplicate {
        /// The file that was to be written.
        path: PathBuf,
        /// The name.
        name: String,
    },
}

/// Writes `name: tensor` pairs as a safetensors file.
///
/// They go to a temporary file in the same directory, which is flushed to the disk and then renamed: `path` holds
/// either what it held before or all of the new file, which has the permissions of the old one. A symbolic link stays,
/// and the file that it leads to is written. Rows that lie apart are written without their gaps.
///
/// Errors: `Io`, `Header`, `Duplicate`, and `NotAFile` where there is a directory, a device, a pipe or a socket; the
/// temporary file is removed.
pub fn write_safetensors<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (&'a str, HostView<'a>)>,
) -> Result<(), WriteError> {
    let path = path.as_ref();
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by(|(a, x), (b, y)| y.dtype().size().cmp(&x.dtype().size()).then(a.cmp(b)));
    let header = header(path, &tensors)?;
    let io = |action| move |source| WriteError::Io { path: path.into(), action, source };
    let target = resolve(path).map_err(io("follow its symbolic links"))?;
    let existing = match fs::symlink_metadata(&target) {
        Ok(existing) => Some(existing),
        Err(source) if source.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(io("look at what is there")(source)),
    };
    if let Some(existing) = &existing
        && !existing.is_file()
    {
        let kind = if existing.is_dir() { "a directory" } else { "a device, a pipe or a socket" };
        return Err(WriteError::NotAFile { path: path.into(), kind });
    }
    let temporary = Temporary::new(&target);
    let file = temporary.create().map_err(io("create a temporary file beside it"))?;
    if let Some(existing) = existing {
        file.set_permissions(existing.permissions()).map_err(io("keep its permissions"))?;
    }
    write(&file, &header, &tensors).map_err(io("write a temporary file beside it"))?;
    file.sync_all().map_err(io("flush a temporary file beside it to the disk"))?;
    drop(file);
    temporary.rename(&target).map_err(io("rename the temporary file to it"))
}

/// Where symbolic links lead, whether or not there is anything.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::symlink_metadata(&path) {
            Ok(kind) if kind.is_symlink() => path = path.with_file_name("").join(fs::read_link(&path)?),
            _ => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

fn header(path: &Path, tensors: &[(&str, HostView<'_>)]) -> Result<Vec<u8>, WriteError> {
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    if let Some((name, _)) = names.iter().zip(names.iter().skip(1)).find(|(a, b)| a == b) {
        return Err(WriteError::Duplicate { path: path.into(), name: (*name).into() });
    }
    let mut end = 0;
    let infos = tensors.iter().map(|(name, view)| {
        let start = end;
        end += view.rows() * view.cols() * view.dtype().size();
        let shape = view.shape().dims().to_vec();
        ((*name).to_owned(), TensorInfo { dtype: dtype(view.dtype()), shape, data_offsets: (start, end) })
    });
    let invalid = |source| WriteError::Header { path: path.into(), source };
    let metadata = Metadata::new(None, infos.collect()).map_err(invalid)?;
    let mut header = serde_json::to_vec(&metadata).map_err(|source| invalid(source.into()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn write(file: &File, header: &[u8], tensors: &[(&str, HostView<'_>)]) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header)?;
    for (_, view) in tensors {
        let size = view.dtype().size();
        for row in 0..view.rows() {
            let start = view.offset() + row * view.row_stride() * size;
            let bytes = view.storage().get(start..start + view.cols() * size);
            out.write_all(bytes.ok_or(io::ErrorKind::UnexpectedEof)?)?;
        }
    }
    out.flush()
}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::U32 => Dtype::U32,
        _ => Dtype::F32,
    }
}

/// A file that is removed unless it is renamed.
struct Temporary(PathBuf);

impl Temporary {
    fn new(path: &Path) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}.{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        Self(path.with_file_name(name))
    }

    fn create(&self) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).open(&self.0)
    }

    fn rename(self, path: &Path) -> io::Result<()> {
        fs::rename(&self.0, path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove.
        let _ = fs::remove_file(&self.0);
    }
}
