//! Compiled kernels on disk, one file each, named by the hash of everything they were made from.
//!
//! A file is a header and the machine code. It is written under another name and renamed, so that a reader sees all of it
//! or none; whatever does not match its header or its key is taken for absent and written anew.

use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const MAGIC: &[u8; 16] = b"fused-moe cubin1";
const HEADER: usize = 16 + 32 + 32 + 8;

/// Hash of what a kernel is compiled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key([u8; 32]);

impl Key {
    /// Of the parts, in order, each with its length.
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }

    fn name(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A folder of compiled kernels; none where there is no place for it.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// In `FMOE_CACHE_DIR`, else in the user's cache folder.
    pub(crate) fn from_environment() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = variable("FMOE_CACHE_DIR")
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("fused-moe")))
            .or_else(|| variable("LOCALAPPDATA").map(|cache| cache.join("fused-moe")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache").join("fused-moe")));
        Self { folder }
    }

    #[cfg(test)]
    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: Some(folder.to_path_buf()) }
    }

    /// Keeps the log of a failed compilation, in the folder of temporary files if need be, and says where.
    pub(crate) fn keep_log(&self, key: Key, text: &str) -> Option<PathBuf> {
        let folders = self.folder.iter().cloned().chain([std::env::temp_dir()]);
        let name = format!("fused-moe-{}.log", key.name());
        folders.map(|folder| folder.join(&name)).find(|path| write_log(path, text).is_ok())
    }

    fn path(&self, key: Key) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(format!("{}.cubin", key.name())))
    }

    /// The machine code of `key`, if it is there and whole.
    pub(crate) fn get(&self, key: Key) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(key)?).ok()?;
        if bytes.len() < HEADER || &bytes[..16] != MAGIC || bytes[16..48] != key.0 {
            return None;
        }
        let length = u64::from_le_bytes(bytes[80..88].try_into().ok()?);
        let code = &bytes[HEADER..];
        let digest: [u8; 32] = Sha256::digest(code).into();
        if code.is_empty() || length != code.len() as u64 || bytes[48..80] != digest {
            return None;
        }
        bytes.drain(..HEADER);
        Some(bytes)
    }

    /// Keeps the machine code of `key`. A folder that cannot be written is no error: the next process compiles again.
    pub(crate) fn put(&self, key: Key, code: &[u8]) {
        if let Some(path) = self.path(key) {
            let _ = write(&path, key, code);
        }
    }
}

/// Where compiled kernels are kept between processes.
#[derive(Clone, Debug)]
pub struct KernelCache(Cache);

impl KernelCache {
    /// The one that the environment names: `FMOE_CACHE_DIR`, else a folder among the user's caches.
    pub fn get() -> Self {
        Self(Cache::from_environment())
    }

    /// Its folder, which need not exist yet; none where the environment names no place.
    pub fn folder(&self) -> Option<&Path> {
        self.0.folder.as_deref()
    }

    /// Whether a kernel could be kept now; leaves no trace.
    ///
    /// Errors: why not, in words.
    pub fn writable(&self) -> std::result::Result<(), String> {
        let folder = self.folder().ok_or("the environment names no folder")?;
        // where it does not exist yet, it would be made in the innermost folder that does
        let place = folder.ancestors().find(|place| place.exists()).unwrap_or(folder);
        let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
        let probe = place.join(format!("fused-moe-probe-{}", std::process::id()));
        fs::File::create_new(&probe).and_then(|_| fs::remove_file(&probe)).map_err(|error| error.to_string())
    }
}

/// Follows no link that somebody may have left where everybody writes.
fn write_log(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let _ = fs::remove_file(path);
    let written = fs::File::create_new(path).and_then(|mut file| file.write_all(text.as_bytes()));
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

fn write(path: &Path, key: Key, code: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let digest: [u8; 32] = Sha256::digest(code).into();
    let mut bytes = Vec::with_capacity(HEADER + code.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&key.0);
    bytes.extend_from_slice(&digest);
    bytes.extend_from_slice(&(code.len() as u64).to_le_bytes());
    bytes.extend_from_slice(code);
    let unique = format!("tmp-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let temporary = path.with_extension(unique);
    let written = fs::write(&temporary, &bytes).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(Key::of(["ab", "c"]), Key::of(["a", "bc"]));
        assert_ne!(Key::of(["a"]), Key::of(["a", ""]));
        assert_eq!(Key::of(["a", "b"]), Key::of(["a", "b"]));
    }

    #[test]
    fn kept_and_found() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(&folder.path().join("deep").join("er"));
        let key = Key::of(["kernel"]);
        assert_eq!(cache.get(key), None);
        cache.put(key, b"code");
        assert_eq!(cache.get(key).as_deref(), Some(&b"code"[..]));
        assert_eq!(cache.get(Key::of(["other"])), None);
        assert_eq!(fs::read_dir(folder.path().join("deep/er")).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn damaged_and_foreign_entries_are_absent() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let (key, other) = (Key::of(["kernel"]), Key::of(["other"]));
        cache.put(key, b"code");
        let whole = fs::read(cache.path(key).unwrap()).unwrap();
        for cut in 0..whole.len() {
            fs::write(cache.path(key).unwrap(), &whole[..cut]).unwrap();
            assert_eq!(cache.get(key), None, "cut to {cut} bytes");
        }
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 1;
            fs::write(cache.path(key).unwrap(), &bytes).unwrap();
            assert_eq!(cache.get(key), None, "byte {place} changed");
        }
        fs::write(cache.path(other).unwrap(), &whole).unwrap();
        assert_eq!(cache.get(other), None, "an entry under another name");
        cache.put(key, b"code");
        assert!(cache.get(key).is_some());
    }

    #[test]
    fn whether_it_can_be_written_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let writable = |path: PathBuf| KernelCache(Cache::at(&path)).writable();
        assert_eq!(writable(folder.path().join("deep/er")), Ok(()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            assert!(writable(path).is_err());
        }
        assert!(KernelCache(Cache { folder: None }).writable().is_err());
    }

    #[test]
    fn no_place_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for cache in [Cache { folder: None }, Cache::at(file.path())] {
            cache.put(Key::of(["kernel"]), b"code");
            assert_eq!(cache.get(Key::of(["kernel"])), None);
            let log = cache.keep_log(Key::of(["kernel"]), "log").unwrap();
            assert!(log.starts_with(std::env::temp_dir()));
            assert_eq!(fs::read_to_string(&log).unwrap(), "log");
            fs::remove_file(log).unwrap();
        }
    }

    #[test]
    fn several_writers_leave_a_whole_entry() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let key = Key::of(["kernel"]);
        let code = vec![7; 100_000];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        cache.put(key, &code);
                        assert!(cache.get(key).is_none_or(|found| found == code));
                    }
                });
            }
        });
        assert_eq!(cache.get(key), Some(code));
    }
}
