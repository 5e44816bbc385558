//! Which files make a checkpoint, and which of them holds a tensor.

use super::error::{Error, Result};
use super::file::{GIT_LFS, StoredTensor, TensorFile};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// The largest JSON file that is read: an index of a very large model has some megabytes.
const MAX_JSON: u64 = 256 << 20;

/// The files of a checkpoint.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) config: PathBuf,
    files: Vec<TensorFile>,
    /// Tensor to file.
    tensors: BTreeMap<String, usize>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Files {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let kind = fs::metadata(path).map_err(|source| io(path, "open it", source))?;
        if kind.is_dir() {
            return Self::directory(path);
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => {
                let directory = path.parent().unwrap_or(Path::new(""));
                Self::single(directory, path)
            }
            Some("gguf") => Err(Error::Gguf { path: path.into() }),
            _ => Err(Error::NotACheckpoint { path: path.into() }),
        }
    }

    fn directory(path: &Path) -> Result<Self> {
        let single = path.join("model.safetensors");
        if single.exists() {
            return Self::single(path, &single);
        }
        let index = path.join("model.safetensors.index.json");
        if index.exists() {
            return Self::sharded(path, &index);
        }
        let mut files = Vec::new();
        let mut gguf = None;
        for entry in fs::read_dir(path).map_err(|source| io(path, "list it", source))? {
            let file = entry.map_err(|source| io(path, "list it", source))?.path();
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("safetensors") => files.push(file),
                Some("gguf") => gguf = Some(file),
                _ => {}
            }
        }
        files.sort();
        match (files.as_slice(), gguf) {
            ([file], _) => Self::single(path, file),
            ([], Some(file)) => Err(Error::Gguf { path: file }),
            ([], None) => Err(Error::NoWeights { path: path.into() }),
            (several, _) => {
                let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Err(Error::NoIndex { path: path.into(), files: several.iter().map(name).collect() })
            }
        }
    }

    fn single(directory: &Path, file: &Path) -> Result<Self> {
        let file = TensorFile::open(file)?;
        let tensors = file.names().map(|name| (name.to_owned(), 0)).collect();
        Ok(Self { config: directory.join("config.json"), files: vec![file], tensors })
    }

    fn sharded(directory: &Path, index: &Path) -> Result<Self> {
        let Index { weight_map } = read_json(index)?;
        let mut shards: Vec<&String> = weight_map.values().collect();
        shards.sort();
        shards.dedup();
        for file in &shards {
            let mut parts = Path::new(file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(Error::ShardName { index: index.into(), file: file.to_string() });
            }
        }
        let missing: Vec<String> =
            shards.iter().filter(|file| !directory.join(file).exists()).map(|file| file.to_string()).collect();
        if !missing.is_empty() {
            return Err(Error::MissingShards { index: index.into(), files: missing });
        }
        let files = shards.iter().map(|file| TensorFile::open(&directory.join(file))).collect::<Result<Vec<_>>>()?;
        let mut tensors = BTreeMap::new();
        let mut absent = Vec::new();
        for (name, file) in &weight_map {
            match shards.binary_search(&file) {
                Ok(shard) if files[shard].tensor(name).is_some() => {
                    tensors.insert(name.clone(), shard);
                }
                _ => absent.push(format!("{name} ({file})")),
            }
        }
        if !absent.is_empty() {
            return Err(Error::Index { index: index.into(), tensors: absent });
        }
        Ok(Self { config: directory.join("config.json"), files, tensors })
    }

    pub(super) fn tensor(&self, name: &str) -> Option<StoredTensor<'_>> {
        self.files.get(*self.tensors.get(name)?)?.tensor(name)
    }

    /// Whether there is a tensor whose name begins like this.
    pub(super) fn has_prefix(&self, prefix: &str) -> bool {
        self.names(prefix).next().is_some()
    }

    /// The tensors whose names begin like this.
    pub(super) fn names(&self, prefix: &str) -> impl Iterator<Item = &str> {
        let from = self.tensors.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.map(|(name, _)| name.as_str()).take_while(move |name| name.starts_with(prefix))
    }

    /// How many tensors there are.
    pub(super) fn len(&self) -> usize {
        self.tensors.len()
    }

    /// The files that tensors lie in.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(TensorFile::path)
    }

    /// The same, without symbolic links.
    pub(super) fn real_paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(TensorFile::real_path)
    }
}

/// A JSON file of moderate size.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &read_text(path)?)
}

/// The same, with the numbers that Python writes and JSON has not as texts: NaN, Infinity and -Infinity.
pub(super) fn read_config<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &quoted(&read_text(path)?))
}

fn parse<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|source| Error::Json { path: path.into(), source })
}

/// What is no JSON number, in quotes.
fn quoted(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let (mut rest, mut inside) = (text, false);
    while let [byte, behind @ ..] = rest {
        let odd = ["-Infinity", "Infinity", "NaN"].into_iter().find(|odd| !inside && rest.starts_with(odd.as_bytes()));
        if let Some(odd) = odd {
            out.extend([b"\"", odd.as_bytes(), b"\""].concat());
            rest = rest.get(odd.len()..).unwrap_or_default();
            continue;
        }
        out.push(*byte);
        rest = behind;
        match (byte, behind) {
            (b'\\', [escaped, behind @ ..]) if inside => {
                out.push(*escaped);
                rest = behind;
            }
            (b'"', _) => inside = !inside,
            _ => {}
        }
    }
    out
}

fn read_text(path: &Path) -> Result<Vec<u8>> {
    let kind = fs::metadata(path).map_err(|source| io(path, "read the file", source))?;
    if !kind.is_file() {
        return Err(Error::NotAFile { path: path.into() });
    }
    let bytes = kind.len();
    if bytes > MAX_JSON {
        return Err(Error::JsonSize { path: path.into(), bytes, limit: MAX_JSON });
    }
    let text = fs::read(path).map_err(|source| io(path, "read the file", source))?;
    if text.starts_with(GIT_LFS) {
        return Err(Error::GitLfs { path: path.into() });
    }
    Ok(text)
}

fn io(path: &Path, action: &'static str, source: std::io::Error) -> Error {
    Error::Io { path: path.into(), action, source }
}
