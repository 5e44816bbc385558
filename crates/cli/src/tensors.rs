//! Single tensors of safetensors files, as inputs and expectations.

use crate::bench::machine::available_memory;
use crate::bench::weights::Numbers;
use crate::output::{bytes, counted, remedied};
use anyhow::Result;
use fused_moe::{DType, Shape};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

/// A tensor of floats on the host.
#[derive(Debug)]
pub(crate) struct Tensor {
    /// Where it came from.
    pub(crate) origin: String,
    pub(crate) dtype: DType,
    /// Two or three dimensions.
    pub(crate) shape: Shape,
    /// Whether it was f64 and is f32 now.
    pub(crate) narrowed: bool,
    /// Of random numbers, which are made when they are first asked for.
    seed: u64,
    words: OnceCell<Vec<u32>>,
}

impl Tensor {
    /// Random tokens `[T, H]` in f32, uniform in -1..1.
    pub(crate) fn random(tokens: usize, hidden: usize, seed: u64) -> Result<Self> {
        let size = DType::F32.size();
        if tokens.checked_mul(hidden).and_then(|n| n.checked_mul(size)).is_none_or(|bytes| bytes > isize::MAX as usize)
        {
            let message = format!("--tokens {tokens}: x, [{tokens}, {hidden}], is larger than any memory");
            return Err(remedied(message, "give a smaller number"));
        }
        Ok(Self {
            origin: format!("random tokens, seed {seed}"),
            dtype: DType::F32,
            shape: [tokens, hidden].into(),
            narrowed: false,
            seed,
            words: OnceCell::new(),
        })
    }

    /// Whether its numbers are yet to be made.
    pub(crate) fn is_random(&self) -> bool {
        self.words.get().is_none()
    }

    /// Errors where a run on this input does not fit into memory; `workspace` gives the bytes for a number of tokens,
    /// `tensors` is how many of this one's size a run makes beside it, and `largest` the bytes that one of them may have.
    pub(crate) fn check_memory(
        &self,
        tensors: usize,
        largest: u64,
        workspace: impl Fn(usize) -> Option<usize>,
    ) -> Result<()> {
        let available = available_memory().unwrap_or(u64::MAX);
        let made = tensors + usize::from(self.is_random());
        let one = |tokens| tokens as u128 * (self.shape.cols() * self.dtype.size()) as u128;
        let needed = |tokens| Some(workspace(tokens)? as u128 + one(tokens) * made as u128);
        let tokens = self.shape.rows();
        let fits = |tokens, room: u64| {
            one(tokens) <= u128::from(largest) && needed(tokens).is_some_and(|needed| needed <= u128::from(room))
        };
        // what else runs here needs some too, and what fits now should a moment later
        if fits(tokens, available - available / 16) {
            return Ok(());
        }
        let (mut most, mut over) = (0, tokens);
        while over - most > 1 {
            let middle = most + (over - most) / 2;
            *(if fits(middle, available - available / 8) { &mut most } else { &mut over }) = middle;
        }
        let size = |bytes_of: Option<u128>| bytes_of.and_then(|n| n.try_into().ok()).map_or("more".to_owned(), bytes);
        let (name, advice) = match self.is_random() {
            true => (format!("--tokens {tokens}"), format!("at most {} fit", counted(most, "token"))),
            false => (self.origin.clone(), format!("at most {} fit; cut the input into parts", counted(most, "token"))),
        };
        let message = if one(tokens) > u128::from(largest) {
            let x = size(Some(one(tokens)));
            let tokens = counted(tokens, "token");
            format!("{name}: x of {tokens} takes {x}; a buffer of this device has at most {}", bytes(largest))
        } else {
            let needed = size(needed(tokens));
            let (tokens, free) = (counted(tokens, "token"), bytes(available));
            format!("{name}: x, y and the workspace of {tokens} take {needed}; {free} of memory are free")
        };
        Err(remedied(message, advice))
    }

    /// The tensor that `FILE` or `FILE:TENSOR` names.
    pub(crate) fn read(name: &str) -> Result<Self> {
        let (path, tensor) = split(name);
        let data = read(&path)?;
        Self::parse(&path, &data, tensor)
    }

    /// A tensor of a file in memory; its only one where no name is given.
    pub(crate) fn parse(path: &Path, data: &[u8], name: Option<&str>) -> Result<Self> {
        let (name, tensor) = find(path, data, name)?;
        let origin = format!("tensor {name} of {}", path.display());
        let (dtype, words) = match tensor.dtype() {
            Dtype::F32 => (DType::F32, words(tensor.data())),
            Dtype::F16 => (DType::F16, words(tensor.data())),
            Dtype::BF16 => (DType::BF16, words(tensor.data())),
            Dtype::F64 => (DType::F32, narrow(tensor.data())),
            other => {
                return Err(remedied(
                    format!(
                        "{origin} is {other:?} {:?}, expected F32, F16, BF16 or F64 [T, H] or [B, S, H]",
                        tensor.shape()
                    ),
                    "name another tensor, or convert this one",
                ));
            }
        };
        let shape = match *tensor.shape() {
            [rows, cols] => Shape::from([rows, cols]),
            [batch, sequence, cols] => Shape::from([batch, sequence, cols]),
            ref other => {
                return Err(remedied(
                    format!("{origin} has shape {other:?}, expected [T, H] or [B, S, H]"),
                    "name another tensor, or reshape this one",
                ));
            }
        };
        Ok(Self { origin, dtype, shape, narrowed: tensor.dtype() == Dtype::F64, seed: 0, words: words.into() })
    }

    /// Its elements.
    pub(crate) fn bytes(&self) -> &[u8] {
        let count = self.shape.rows() * self.shape.cols();
        let length = count * self.dtype.size();
        let words = self.words.get_or_init(|| Numbers::new(self.dtype, count, 1.0, self.seed).into_words());
        bytemuck::cast_slice(words).get(..length).unwrap_or(&[])
    }

    /// Its elements in f64.
    pub(crate) fn values(&self) -> impl Iterator<Item = f64> {
        floats(self.dtype, self.bytes())
    }
}

/// The tensor of the same file that goes with an input, if there is one: beside `input.0` that is STEM`.0`, else STEM.
pub(crate) fn companion(input: &str, stem: &str) -> Result<Option<String>> {
    let (path, name) = split(input);
    let data = fs::read(&path)?;
    let Ok(file) = SafeTensors::deserialize(&data) else { return Ok(None) };
    let numbered = name.and_then(|name| name.strip_prefix("input").or(name.strip_prefix("output")));
    let names = [format!("{stem}{}", numbered.unwrap_or_default()), stem.to_owned()];
    let found = names.into_iter().find(|name| file.tensor(name).is_ok());
    Ok(found.map(|name| format!("{}:{name}", path.display())))
}

/// The token ids that `FILE` or `FILE:TENSOR` names: integers below `vocabulary`, one for each token.
pub(crate) fn ids(name: &str, tokens: usize, vocabulary: usize) -> Result<Vec<u32>> {
    let (path, tensor) = split(name);
    let data = read(&path)?;
    let (tensor, found) = find(&path, &data, tensor)?;
    let origin = format!("tensor {tensor} of {}", path.display());
    let ids: Vec<i64> = match found.dtype() {
        Dtype::I64 => found.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
        Dtype::I32 => found.data().as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect(),
        Dtype::U32 => found.data().as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes).into()).collect(),
        other => {
            let message = format!("{origin} is {other:?}, expected token ids in I64, I32 or U32");
            return Err(remedied(message, "name another tensor, or convert this one"));
        }
    };
    if ids.len() != tokens {
        let message =
            format!("{origin} has {}, the input has {}", counted(ids.len(), "token id"), counted(tokens, "token"));
        return Err(remedied(message, "give one for each token"));
    }
    let valid = |id: i64| u32::try_from(id).ok().filter(|&id| (id as usize) < vocabulary);
    ids.iter()
        .map(|&id| {
            valid(id).ok_or_else(|| {
                let message =
                    format!("{origin} has token id {id}, the layer's table has 0 to {}", vocabulary.saturating_sub(1));
                remedied(message, "they must be ids of this model's own tokenizer")
            })
        })
        .collect()
}

/// A file's bytes.
fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| {
        let message = format!("{}: cannot read the file: {error}", path.display());
        remedied(message, "give an existing safetensors file, and the tensor after a colon")
    })
}

/// A tensor of a file in memory, with its name; its only one where no name is given.
fn find<'a>(path: &Path, data: &'a [u8], name: Option<&str>) -> Result<(String, TensorView<'a>)> {
    let file = SafeTensors::deserialize(data).map_err(|error| {
        let message = format!("{}: not a whole safetensors file: {error}", path.display());
        remedied(message, "the header and the length of the data must agree; write the file again")
    })?;
    let mut names = file.names();
    names.sort_unstable();
    let name = match (name, names.as_slice()) {
        (Some(name), _) => name,
        (None, [one]) => one,
        (None, []) => return Err(remedied(format!("{}: holds no tensor", path.display()), "write one to it")),
        (None, _) => {
            let message = format!("{}: holds {} tensors, and none is named", path.display(), names.len());
            return Err(remedied(
                message,
                format!("add one of them, as in {}:{}\n{}", path.display(), names[0], list(&names)),
            ));
        }
    };
    match file.tensor(name) {
        Ok(tensor) => Ok((name.to_owned(), tensor)),
        Err(_) => {
            let message = format!("{}: holds no tensor {name:?}", path.display());
            Err(remedied(message, format!("it holds\n{}", list(&names))))
        }
    }
}

/// Floats as they lie in memory.
pub(crate) fn floats(dtype: DType, bytes: &[u8]) -> impl Iterator<Item = f64> {
    bytes.chunks_exact(dtype.size()).map(move |bytes| match (dtype, bytes) {
        (DType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        (DType::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (_, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        _ => f64::NAN,
    })
}

/// `FILE:TENSOR`, unless there is a file of the whole name.
pub(crate) fn split(name: &str) -> (PathBuf, Option<&str>) {
    match name.rsplit_once(':') {
        Some((file, tensor)) if !tensor.is_empty() && !Path::new(name).exists() => (file.into(), Some(tensor)),
        _ => (name.into(), None),
    }
}

fn list(names: &[&str]) -> String {
    const SHOWN: usize = 40;
    let mut text: Vec<String> = names.iter().take(SHOWN).map(|name| format!("  {name}")).collect();
    if names.len() > SHOWN {
        text.push(format!("  and {} more", names.len() - SHOWN));
    }
    text.join("\n")
}

/// Bytes in memory that is aligned for every element.
fn words(bytes: &[u8]) -> Vec<u32> {
    let mut words = vec![0u32; bytes.len().div_ceil(4)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    words
}

fn narrow(bytes: &[u8]) -> Vec<u32> {
    let (wide, _) = bytes.as_chunks::<8>();
    wide.iter().map(|&bytes| (f64::from_le_bytes(bytes) as f32).to_bits()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_and_tensors() {
        assert_eq!(split("a.safetensors:input.0"), ("a.safetensors".into(), Some("input.0")));
        assert_eq!(split("a.safetensors"), ("a.safetensors".into(), None));
        assert_eq!(split("a.safetensors:"), ("a.safetensors:".into(), None));
    }

    #[test]
    fn random_tokens_are_the_same_for_a_seed() {
        let bytes = |seed| Tensor::random(5, 7, seed).unwrap().bytes().to_vec();
        assert_eq!(bytes(1), bytes(1));
        assert_ne!(bytes(1), bytes(2));
        assert_eq!(bytes(1).len(), 5 * 7 * 4);
        assert!(Tensor::random(usize::MAX, 7, 0).is_err());
        assert!(Tensor::random(0, 7, 0).unwrap().bytes().is_empty());
    }

    #[test]
    fn as_many_tokens_as_are_advised_fit() {
        // a workspace a hundred times larger than x
        let workspace = |tokens: usize| tokens.checked_mul(400 * 8);
        let check = |tokens| Tensor::random(tokens, 8, 0).unwrap().check_memory(3, u64::MAX, workspace);
        check(0).unwrap();
        let in_buffers = |tokens| Tensor::random(tokens, 8, 0).unwrap().check_memory(3, 3200, workspace);
        in_buffers(100).unwrap();
        let error = in_buffers(101).unwrap_err();
        assert!(error.to_string().contains("a buffer of this device has at most 3.2 kB"), "{error}");
        assert_eq!(crate::output::help(&error), Some("at most 100 tokens fit"));
        let error = check(1 << 50).unwrap_err();
        let help = crate::output::help(&error).unwrap();
        let most: usize = help.split(' ').find_map(|word| word.parse().ok()).unwrap();
        assert!(most > 0, "{help}");
        check(most).unwrap();
        assert!(check(most + most / 4).is_err());
    }
}
