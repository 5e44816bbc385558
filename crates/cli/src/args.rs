//! The command line.

use clap::builder::RangedU64ValueParser;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// The Mixture-of-Experts layer: run one from a checkpoint, check this machine, measure it.
#[derive(Debug, Parser)]
#[command(name = "fmoe", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  fmoe run                                  a small layer that comes with the program, against its known output
  fmoe inspect ~/models/Qwen3-30B-A3B       what a model is made of and whether it runs
  fmoe check                                every operation on this machine against the f64 reference
  fmoe bench --shape qwen3-30b-a3b          how fast, and how far from what the machine can do

Exit code: 0 done; 1 an error, a failed check, a result outside its tolerance; 2 a command line that makes no sense.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the MoE layers of a checkpoint on an input, and compare with an expected output
    Run(Run),
    /// Say what a checkpoint is made of and which of its layers run; reads no weights
    Inspect(Inspect),
    /// Check every operation on this machine against the f64 reference
    Check(Check),
    /// Measure a layer, beside what this machine's memory and arithmetic allow
    Bench(Bench),
    /// List what layers can run on here, and what would be chosen
    Devices(Devices),
    /// List the model types that can be read
    Families(Families),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fmoe run
  fmoe run ~/models/Qwen3-30B-A3B --layer 12 --tokens 64
  fmoe run ~/models/Qwen3-30B-A3B --layer 12 --input hidden.safetensors:hidden --output out.safetensors
  fmoe run ~/models/Mixtral-8x7B --all --tokens 16
  fmoe run model --input golden.safetensors:input.0 --expect golden.safetensors:output.0

Without a checkpoint, a small layer that comes with the program runs on its own input, against its known output.
The input is [T, H] or [B, S, H], of f32, f16, bf16 or f64 (converted to f32); the output has the input's format. \
Beside input.0, the input's file may hold input_ids.0 and router_state.0 (beside another name, input_ids and \
router_state): the tokens' ids, where experts are chosen by them, and what the router of the layer before hands on, \
where routers do. A state goes on from layer to layer with --all, and to the file of --output.")]
pub(crate) struct Run {
    /// A model directory with config.json and safetensors
    pub(crate) checkpoint: Option<PathBuf>,
    /// One of several language models in the directory, as `fmoe inspect` names them, or the last word of a name, as in
    /// `decoder` [default: the first stored]
    #[arg(long, value_name = "NAME", requires = "checkpoint")]
    pub(crate) part: Option<String>,
    /// The layer to run, by its number in the model [default: the first MoE layer]
    #[arg(long, value_name = "N", requires = "checkpoint")]
    pub(crate) layer: Option<usize>,
    /// Run every MoE layer, each on the same input; those that cannot run are named, and the exit code is 1
    #[arg(long, conflicts_with = "layer", requires = "checkpoint")]
    pub(crate) all: bool,
    /// The input, a tensor of a safetensors file; the name may be left out where there is only one
    #[arg(long, value_name = "FILE[:TENSOR]", conflicts_with = "tokens", requires = "checkpoint")]
    pub(crate) input: Option<String>,
    /// The ids of the input's tokens, for layers that choose experts by them [default: tensor `input_ids` beside the input]
    #[arg(long, value_name = "FILE[:TENSOR]", requires = "input")]
    pub(crate) ids: Option<String>,
    /// Random input of so many tokens [default: 32]
    #[arg(long, value_name = "T")]
    pub(crate) tokens: Option<usize>,
    /// Seed of the random input
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Write the output as tensor `output` (with --all, `output.0`, `output.1`, ... by layer)
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// The expected output, compared with; exit code 1 if the error passes the tolerance
    #[arg(long, value_name = "FILE[:TENSOR]", conflicts_with = "all", requires = "input")]
    pub(crate) expect: Option<String>,
    /// Largest error, relative to the largest expected value [default: by the coarsest format involved]
    #[arg(long, value_name = "X", value_parser = tolerance, allow_negative_numbers = true, conflicts_with_all = ["tokens", "all"])]
    pub(crate) tolerance: Option<f64>,
    #[command(flatten)]
    pub(crate) on: On,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fmoe inspect ~/models/Qwen3-30B-A3B
  fmoe inspect ~/models/Qwen3-30B-A3B --json | jq .kinds[0].routing

Exit code: 0 where a layer runs, 1 where none does.")]
pub(crate) struct Inspect {
    /// A model directory with config.json and safetensors
    pub(crate) checkpoint: PathBuf,
    /// One of several language models in the directory, or the last word of its name [default: the first stored]
    #[arg(long, value_name = "NAME")]
    pub(crate) part: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fmoe check
  fmoe check --filter combine
  fmoe check --full
  fmoe check --golden goldens/*
  fmoe check --backend wgpu --adapter nvidia
  FMOE_CPU_ISA=avx2 fmoe check

--golden compares with folders of config.json, model.safetensors and golden.safetensors (input.i, output_f64.i; \
if they are there: topk_ids.i, topk_weights_f64.i, experts_input.i, experts_output_f64.i, and input_ids.i and \
router_state.i as with `fmoe run`; names without _f64 will do).")]
pub(crate) struct Check {
    /// Only cases whose name contains this
    #[arg(long, value_name = "TEXT", conflicts_with = "golden")]
    pub(crate) filter: Option<String>,
    /// More formats and larger sizes
    #[arg(long, conflicts_with = "golden")]
    pub(crate) full: bool,
    /// Check the gradients instead
    #[arg(long, conflicts_with_all = ["golden", "compile_only"])]
    pub(crate) backward: bool,
    /// Check these folders of golden data instead
    #[arg(long, value_name = "DIR", num_args = 1..)]
    pub(crate) golden: Vec<PathBuf>,
    /// Compile every CUDA kernel for these architectures instead [default: sm_80 sm_90a sm_100a]; needs no device
    #[arg(long, value_name = "ARCH", num_args = 0.., default_missing_values = ["sm_80", "sm_90a", "sm_100a"],
          value_parser = architecture, conflicts_with_all = ["filter", "full", "golden", "json", "backend", "adapter"])]
    pub(crate) compile_only: Option<Vec<String>>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) on: On,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fmoe bench --shape qwen3-30b-a3b
  fmoe bench --shape olmoe --tokens 1,8,64 --dtype f32 --threads 1
  fmoe bench --hidden 2048 --intermediate 768 --experts 128 --top-k 8 --routing zipf
  fmoe bench --shape qwen3-30b-a3b --record
  fmoe bench --backend cuda --shape mixtral-8x7b --tokens 1,64,4096 --from x
  fmoe bench --backend cuda --numerics batch-invariant
  fmoe bench --backend wgpu --adapter nvidia --beside cuda
  fmoe bench --backend cpu --backward --shape olmoe --tokens 1024

The result is checked against the f64 reference before a time is printed. Each call reads another layer's weights.

The floor is the larger of the bytes that a call must read over the read bandwidth, and its floating-point operations \
over the arithmetic rate, both measured on this machine in the same run, on the CPU with the instruction set in use \
(FMOE_CPU_ISA forces one); on a GPU, the arithmetic rate is that of two dense products with as many operations, by \
cuBLAS where it is found, on --backend wgpu by this program's own kernel.")]
pub(crate) struct Bench {
    /// A named shape: qwen3-30b-a3b, mixtral-8x7b, gemma4-26b-a4b, deepseek-v3, deepseek-v3-64, gpt-oss-20b or olmoe
    /// [default: qwen3-30b-a3b]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["hidden", "intermediate", "experts", "top_k"])]
    pub(crate) shape: Option<String>,
    /// H, the width of a token
    #[arg(long, value_name = "H", requires_all = ["intermediate", "experts", "top_k"])]
    pub(crate) hidden: Option<usize>,
    /// I, the width inside an expert
    #[arg(long, value_name = "I", requires = "hidden")]
    pub(crate) intermediate: Option<usize>,
    /// E, the number of experts
    #[arg(long, value_name = "E", requires = "hidden")]
    pub(crate) experts: Option<usize>,
    /// K, experts per token
    #[arg(long, value_name = "K", requires = "hidden")]
    pub(crate) top_k: Option<usize>,
    /// Batch sizes [default: 1,4,16,64,256; on a GPU 1,8,32,128,512,2048,8192]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = count)]
    pub(crate) tokens: Vec<usize>,
    /// Format of the weights
    #[arg(long, value_name = "D", default_value = "bf16", ignore_case = true)]
    pub(crate) dtype: Format,
    /// How tokens spread over the experts
    #[arg(long, value_name = "R", default_value = "uniform", ignore_case = true)]
    pub(crate) routing: Spread,
    /// What the bits of a token's result may depend on
    #[arg(long, value_name = "N", default_value = "fast", ignore_case = true, conflicts_with = "backward")]
    pub(crate) numerics: Bits,
    /// Where a call begins [default: x; on a GPU logits]
    #[arg(long, value_name = "F", ignore_case = true)]
    pub(crate) from: Option<Origin>,
    /// Measure another backend too, on the same tokens, and print its median beside
    #[arg(long, value_name = "B")]
    pub(crate) beside: Option<String>,
    /// Measure a training step instead: the forward pass of the prepared layer, the forward pass that keeps what the backward
    /// pass needs, and the backward pass [default --tokens: 64,256,1024; on a GPU 512,2048,8192] [default --from: x]
    #[arg(long, conflicts_with = "beside")]
    pub(crate) backward: bool,
    /// Threads of the CPU backend, which is then the default [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    pub(crate) threads: Option<usize>,
    /// Seed of weights and tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Write the results as JSON (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Append the results to DIR/DEVICE/DATE.csv, those of --backward to DATE-backward.csv [default DIR: records]
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "records")]
    pub(crate) record: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) on: On,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fmoe devices
  fmoe devices --timing
  fmoe devices --json

Exit code: 0 where a device would be chosen, else 1.

Lines about XDG_RUNTIME_DIR on standard error come from a Vulkan layer of Mesa; NODEVICE_SELECT=1 silences them.")]
pub(crate) struct Devices {
    /// Time a first call on each device, with an empty kernel cache and with a warm one
    #[arg(long, conflicts_with = "json")]
    pub(crate) timing: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fmoe families
  fmoe families --json")]
pub(crate) struct Families {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl Arguments {
    /// The command line, or the end of the program where it makes no sense.
    pub(crate) fn get() -> Self {
        let arguments = Self::parse();
        if let Command::Run(run) = &arguments.command
            && run.tolerance.is_some()
            && run.checkpoint.is_some()
            && run.expect.is_none()
        {
            let message = "--tolerance needs --expect: there is nothing to compare the output with\n";
            Self::command().error(ErrorKind::MissingRequiredArgument, message).exit();
        }
        arguments
    }
}

fn tolerance(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("expected a finite number, 0 or more".to_owned()),
    }
}

/// A GPU's architecture as NVRTC names it.
fn architecture(text: &str) -> Result<String, String> {
    let name = text.strip_prefix("sm_").unwrap_or_default();
    let (number, least) = match (name.strip_suffix('a'), name.strip_suffix('f')) {
        (Some(number), _) => (number, 90),
        (_, Some(number)) => (number, 100),
        _ => (name, 80),
    };
    match number.parse::<u32>() {
        // a parser of numbers takes a sign and zeros before them
        Ok(parsed) if parsed.to_string() == number && (least..140).contains(&parsed) => Ok(text.to_owned()),
        _ => Err("expected sm_ and a number from 80 to 139, with an `a` from 90 or an `f` from 100 on, as in sm_80, \
sm_90a or sm_100f"
            .to_owned()),
    }
}

fn count(text: &str) -> Result<usize, std::num::ParseIntError> {
    text.trim().parse()
}

/// Where to run.
#[derive(Debug, Args)]
pub(crate) struct On {
    /// Where to run: a name of `fmoe devices`, as cpu, cuda, cuda:1 or wgpu [default: auto, the best there is]
    #[arg(long, value_name = "B")]
    pub(crate) backend: Option<String>,
    /// The adapter of --backend wgpu, which is then the default: its number or part of its name [default: the first]
    #[arg(long, value_name = "N|NAME")]
    pub(crate) adapter: Option<String>,
}

/// Format of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    F32,
    F16,
    Bf16,
}

/// What the bits of a token's result may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bits {
    /// The batch too: the fastest road for each batch size
    Fast,
    /// The token and the weights alone: the same bits in any batch
    BatchInvariant,
}

/// Where a call begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Origin {
    /// The tokens: the router is part of the call
    X,
    /// Router logits, given beside the tokens
    Logits,
}

/// How tokens spread over the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Spread {
    /// Every expert as likely as the next
    Uniform,
    /// Expert number n with weight 1 / n
    Zipf,
    /// Every token to the first expert, and for the rest to every other as likely as the next: half of the slots where K is
    /// 2, fewer where it is more, since a token has an expert once
    Half,
    /// Every token to the same K experts
    One,
}
