use fused_moe_core::{DType, Shape};
use std::fmt;
use std::path::PathBuf;

/// Result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refuses a file.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was to be done with it.
        action: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
    /// A directory, a pipe or a device where a file should be.
    #[error("{}: not a regular file; give the model's own file of that name", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A pointer of Git LFS in place of the file.
    #[error("{}: a Git LFS pointer, not the file itself; run `git lfs pull` in its directory", path.display())]
    GitLfs {
        /// The file.
        path: PathBuf,
    },
    /// A GGUF file.
    #[error("{}: GGUF files cannot be read yet; give the safetensors directory of the same model", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
    },
    /// A path that is neither a directory nor a safetensors file.
    #[error("{}: not a checkpoint; give a model directory or a .safetensors file with config.json beside it", path.display())]
    NotACheckpoint {
        /// The path.
        path: PathBuf,
    },
    /// A directory without safetensors.
    #[error(
        "{}: no model.safetensors, no model.safetensors.index.json and no other .safetensors file; \
         convert the model with save_pretrained", path.display()
    )]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// Several safetensors files and nothing that says how they belong together.
    #[error(
        "{}: {} and no model.safetensors.index.json; name one file or add the index", path.display(), few(files)
    )]
    NoIndex {
        /// The directory.
        path: PathBuf,
        /// The files' names.
        files: Vec<String>,
    },
    /// Files that the index names are not there.
    #[error("{}: missing beside it: {}; download them again", index.display(), few(files))]
    MissingShards {
        /// The index.
        index: PathBuf,
        /// The files' names.
        files: Vec<String>,
    },
    /// The index promises tensors that its files do not have.
    #[error("{}: names tensors that are not in their files: {}; download the model again", index.display(), few(tensors))]
    Index {
        /// The index.
        index: PathBuf,
        /// `tensor (file)`.
        tensors: Vec<String>,
    },
    /// An index that leads out of its directory.
    #[error("{}: names the file {file:?}; only files in its own directory are read", index.display())]
    ShardName {
        /// The index.
        index: PathBuf,
        /// The name.
        file: String,
    },
    /// A JSON file that is none.
    #[error("{}: not the JSON that is expected here: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A JSON file far larger than any real one.
    #[error("{}: {bytes} bytes, at most {limit} are read; this is not a model's JSON file", path.display())]
    JsonSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The largest size that is read.
        limit: u64,
    },
    /// A safetensors file whose header does not hold.
    #[error("{}: {reason}; download or write the file again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: HeaderError,
    },
    /// A model that the table of families does not know; [`known_model_types`](super::known_model_types) has those that it
    /// does.
    #[error("{}: model type {model_type:?} is not known{}", config.display(), suggestion(nearest))]
    UnknownModel {
        /// The config.json.
        config: PathBuf,
        /// What it says.
        model_type: String,
        /// Known types that are spelled alike, if any are.
        nearest: Vec<&'static str>,
    },
    /// There is no such part.
    #[error("{}: no part {part}; it has {}", path.display(), parts.join(", "))]
    NoSuchPart {
        /// The checkpoint.
        path: PathBuf,
        /// What was asked for.
        part: String,
        /// The parts that there are.
        parts: Vec<&'static str>,
    },
    /// A field of config.json is absent.
    #[error("{}: field {} is missing", config.display(), fields.join(" or "))]
    ConfigMissing {
        /// The config.json.
        config: PathBuf,
        /// The names it may have.
        fields: Vec<String>,
    },
    /// A field of config.json has a value that makes no sense.
    #[error("{}: field {field} expected {expected}, got {actual}", config.display())]
    ConfigValue {
        /// The config.json.
        config: PathBuf,
        /// Its name.
        field: String,
        /// What would do.
        expected: String,
        /// What is there.
        actual: String,
    },
    /// A field of config.json asks for what layers here are not made for.
    #[error("{}: field {field} expected {known}, got {actual}", config.display())]
    ConfigUnsupported {
        /// The config.json.
        config: PathBuf,
        /// Its name.
        field: String,
        /// What layers are made for.
        known: String,
        /// What is there.
        actual: String,
    },
    /// Fields of config.json that cannot be right together.
    #[error("{}: {}: {reason}", config.display(), fields.iter().map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", "))]
    ConfigContradiction {
        /// The config.json.
        config: PathBuf,
        /// Their names and values.
        fields: Vec<(String, String)>,
        /// Why they do not fit.
        reason: &'static str,
    },
    /// A layer that is dense by config.json has the router of experts.
    #[error(
        "{}: layer {layer} has no experts by {}, and the tensor {tensor} is there", path.display(),
        fields.iter().map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")
    )]
    DenseWithExperts {
        /// The checkpoint.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// The fields of config.json that say so, with their values.
        fields: Vec<(String, String)>,
        /// The router.
        tensor: String,
    },
    /// config.json is no JSON object.
    #[error("{}: expected a JSON object, got {actual}; give the config.json of the model", config.display())]
    ConfigKind {
        /// The config.json.
        config: PathBuf,
        /// What is there.
        actual: String,
    },
    /// The fields of config.json do not fit each other.
    #[error("{}: {source}", config.display())]
    Config {
        /// The config.json.
        config: PathBuf,
        /// What does not fit.
        source: Box<fused_moe_core::Error>,
    },
    /// There is no such layer.
    #[error("{}: no layer {layer}; the model has {count}, numbered from 0", path.display())]
    NoSuchLayer {
        /// The checkpoint.
        path: PathBuf,
        /// What was asked for.
        layer: usize,
        /// How many there are.
        count: usize,
    },
    /// The layer has no experts.
    #[error("{}: layer {layer} is dense; its MoE layers are {}", path.display(), layer_numbers(moe))]
    DenseLayer {
        /// The checkpoint.
        path: PathBuf,
        /// What was asked for.
        layer: usize,
        /// The layers that have experts.
        moe: Vec<usize>,
    },
    /// Tensors of a layer are not as they should be.
    #[error("{}: layer {layer}: tensors missing or unlike what config.json says:{}", path.display(), lines(problems))]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// All that is wrong.
        problems: Vec<TensorProblem>,
    },
    /// Tensors of a layer are missing or of a format that is not read, and config.json says that they are quantised.
    #[error(
        "{}: layer {layer}: the checkpoint is quantised with {method}, which is not read yet:{}; \
         give the model with F32, F16 or BF16 weights", path.display(), lines(problems)
    )]
    Quantised {
        /// The checkpoint.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// `quant_method` of config.json.
        method: String,
        /// All that is wrong.
        problems: Vec<TensorProblem>,
    },
    /// Matrices that must have one format have several.
    #[error("{}: layer {layer} mixes formats:{}; convert its experts to one format", path.display(), lines(problems))]
    MixedFormats {
        /// The checkpoint.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// The odd ones.
        problems: Vec<TensorProblem>,
    },
    /// The tensors were found and still make no layer.
    #[error("{}: layer {layer}: {source}", path.display())]
    Layer {
        /// The checkpoint.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// What does not fit.
        source: Box<fused_moe_core::Error>,
    },
}

/// What is wrong with the header of a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Not even the length of the header.
    #[error("{bytes} bytes are too few for a safetensors file")]
    TooShort {
        /// The file's size.
        bytes: u64,
    },
    /// A header longer than the format allows.
    #[error("a header of {header} bytes, the format allows {limit}; this is no safetensors file")]
    TooLong {
        /// What the file says.
        header: u64,
        /// The format's limit.
        limit: u64,
    },
    /// The file ends within its header.
    #[error("a header of {header} bytes in a file of {bytes}: the file is cut short, or no safetensors file")]
    Cut {
        /// What the file says.
        header: u64,
        /// The file's size.
        bytes: u64,
    },
    /// Not text.
    #[error("the header is not UTF-8: {0}")]
    Utf8(#[from] std::str::Utf8Error),
    /// No JSON, or not that of a header.
    #[error("the header is not valid: {0}")]
    Contents(#[from] serde_json::Error),
    /// Tensors overlap, leave gaps or end before they begin.
    #[error("tensor {name} lies in bytes {start} to {end} of the data, expected it to begin at {expected}")]
    TensorOffsets {
        /// The first tensor that lies wrong.
        name: String,
        /// Where those before it end.
        expected: usize,
        /// Its first byte.
        start: usize,
        /// One past its last byte.
        end: usize,
    },
    /// A tensor is not as long as its shape.
    #[error("tensor {name} of {dtype} {shape:?} does not fill its {bytes} bytes exactly")]
    TensorLength {
        /// Its name.
        name: String,
        /// Its format.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The bytes that it has.
        bytes: usize,
    },
    /// The data are not as long as the header says.
    #[error("the tensors need {expected} bytes, the file has {actual}: it is cut short or has a tail")]
    DataLength {
        /// Bytes of data according to the header.
        expected: u64,
        /// Bytes after the header.
        actual: u64,
    },
}

/// What is wrong with a tensor that a layer needs.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TensorProblem {
    /// It is in no file.
    Missing {
        /// The name, or the names that would do.
        names: Vec<String>,
        /// The shape that it should have.
        expected: Shape,
        /// The likest name in its layer that the layer does not read, if one is like it.
        nearest: Option<String>,
    },
    /// It has another shape.
    Shape {
        /// Its name.
        name: String,
        /// The shape that it should have.
        expected: Shape,
        /// The shape that it has.
        actual: Vec<usize>,
    },
    /// It is there, and config.json says that there is none.
    Unexpected {
        /// Its name.
        name: String,
        /// The names of the field that would ask for it.
        fields: Vec<&'static str>,
    },
    /// It has a format that layers are not made of.
    Format {
        /// Its name.
        name: String,
        /// Its format in safetensors' spelling.
        format: String,
    },
    /// It is one number, and that is not finite.
    Number {
        /// Its name.
        name: String,
        /// The number.
        actual: f32,
    },
    /// It is a table of experts and has a format that no table has.
    TableFormat {
        /// Its name.
        name: String,
        /// Its format in safetensors' spelling.
        format: String,
    },
    /// It is a table of experts and has an entry that is none.
    Entry {
        /// Its name.
        name: String,
        /// Where.
        row: usize,
        /// The entry.
        actual: i64,
        /// E.
        experts: usize,
    },
    /// It has another format than the matrices that it must agree with.
    Mixed {
        /// Its name.
        name: String,
        /// Its format.
        format: DType,
        /// That of most of the others.
        expected: DType,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { names, expected, nearest } => {
                write!(f, "{} {expected} is missing", names.join(" or "))?;
                nearest.as_ref().map_or(Ok(()), |nearest| write!(f, ", the likest that is there is {nearest}"))
            }
            Self::Shape { name, expected, actual } => write!(f, "{name} expected {expected}, got {actual:?}"),
            Self::Mixed { name, format, expected } => write!(f, "{name} is {format}, expected {expected}"),
            Self::Unexpected { name, fields } => {
                write!(f, "{name} is there, and {} of config.json is absent or 0", fields.join(" or "))
            }
            Self::Number { name, actual } => write!(f, "{name} expected a finite number, got {actual}"),
            Self::Entry { name, row, actual, experts } => {
                write!(
                    f,
                    "{name} names expert {actual} in row {row}, expected one of 0 to {}",
                    experts.saturating_sub(1)
                )
            }
            Self::TableFormat { name, format } => {
                write!(f, "{name} is {format}; a table of experts is I64, I32 or U32, convert it to one of them")
            }
            Self::Format { name, format } => {
                write!(f, "{name} is {format}; only F32, F16 and BF16 can be read, convert it to one of them")
            }
        }
    }
}

/// At most so many names in a message.
pub(super) const LISTED: usize = 4;

fn lines(problems: &[TensorProblem]) -> String {
    let listed = problems.iter().take(LISTED).map(|problem| format!("\n  {problem}"));
    listed.chain(more(problems.len()).map(|more| format!("\n  {more}"))).collect()
}

fn few(names: &[String]) -> String {
    let listed = names.iter().take(LISTED).cloned();
    listed.chain(more(names.len())).collect::<Vec<_>>().join(", ")
}

fn more(count: usize) -> Option<String> {
    (count > LISTED).then(|| format!("and {} more", count - LISTED))
}

fn suggestion(nearest: &[&str]) -> String {
    if nearest.is_empty() { String::new() } else { format!(", perhaps {}", nearest.join(" or ")) }
}

/// Numbers of layers in short: `0, 2-5, 7`.
pub fn layer_numbers(numbers: &[usize]) -> String {
    if numbers.is_empty() {
        return "none".into();
    }
    numbers
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            _ => run.iter().map(usize::to_string).collect(),
        })
        .collect::<Vec<_>>()
        .join(", ")
}
