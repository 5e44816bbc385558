use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can fail on a CUDA device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request makes no sense as it stands.
    #[error(transparent)]
    Contract(#[from] fused_moe_core::Error),
    /// The driver's library was not found.
    #[error("device: no NVIDIA driver: none of {tried} could be loaded ({reason}); install the driver")]
    NoDriver {
        /// Names that were tried.
        tried: String,
        /// What the loader said first.
        reason: String,
    },
    /// The driver is older than this crate needs.
    #[error(
        "device: the NVIDIA driver speaks CUDA {}.{}, at least {}.{} is needed; update the driver",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    DriverTooOld {
        /// Its CUDA version, 1000 * major + 10 * minor.
        found: u32,
        /// The lowest that will do.
        needed: u32,
    },
    /// There is no device of this number.
    #[error(
        "device {ordinal}: the driver shows {count} CUDA device{}, numbered from 0; CUDA_VISIBLE_DEVICES may hide some",
        if *count == 1 { "" } else { "s" }
    )]
    NoDevice {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device's architecture is too old.
    #[error("device: {device} has compute capability {major}.{minor}, at least 8.0 is needed; take another device")]
    Architecture {
        /// Its name.
        device: String,
        /// Compute capability.
        major: u32,
        /// Compute capability.
        minor: u32,
    },
    /// The run-time compiler was not found.
    #[error(
        "compile: NVRTC, CUDA's run-time compiler, was not found: none of {tried} could be loaded ({reason}); install \
         the CUDA toolkit or the Python package nvidia-cuda-nvrtc, and put its folder on LD_LIBRARY_PATH or its path in \
         FMOE_NVRTC"
    )]
    NoCompiler {
        /// Names that were tried.
        tried: String,
        /// What the loader said first.
        reason: String,
    },
    /// A kernel did not compile.
    #[error("compile: {kernel} for {architecture}: {reason}; {}", kept(log.as_deref()))]
    Compile {
        /// Which kernel.
        kernel: String,
        /// The architecture that was asked for.
        architecture: String,
        /// NVRTC's error, and the first one of its log.
        reason: String,
        /// Source, options and the compiler's messages, where there was a place for them.
        log: Option<PathBuf>,
    },
    /// The device has too little memory.
    #[error(
        "allocation: {needed} bytes of device memory are needed, {free} are free; free some, take fewer tokens or a \
         larger device"
    )]
    OutOfMemory {
        /// How much was asked for.
        needed: usize,
        /// How much there is.
        free: usize,
    },
    /// A copy does not fit the memory it goes to or comes from.
    #[error("copy: {bytes} bytes do not fit the memory's {available}")]
    Copy {
        /// How much was to be copied.
        bytes: usize,
        /// How much there is.
        available: usize,
    },
    /// An operand is of another device, or of another context on this one.
    #[error("{during}: the {operand} is of another context than the backend; take one that was made for it")]
    OtherContext {
        /// What was asked for.
        during: &'static str,
        /// A stream or memory.
        operand: &'static str,
    },
    /// A stream that is being captured can not lend slices whose use cudarc tracks by events.
    #[error(
        "lend: the stream is being captured; lend the slices first and capture inside, or turn cudarc's event tracking off \
         before they are made"
    )]
    Capturing,
    /// The device's context is broken: nothing runs on it any more in this process.
    #[error("{during}: the device is lost: {reason}; start the program anew")]
    DeviceLost {
        /// What was asked for.
        during: &'static str,
        /// The driver's word for it.
        reason: String,
    },
    /// The driver refused.
    #[error("{during}: {reason}")]
    Driver {
        /// What was asked for.
        during: &'static str,
        /// The driver's word for it.
        reason: String,
    },
}

/// What the loader says of a library.
pub(crate) fn loader_says(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The file that a loaded library came from, where the system tells; else the name it was asked for by.
pub(crate) fn loaded_from(name: &str) -> String {
    let base = Path::new(name).file_name().and_then(|base| base.to_str()).unwrap_or(name);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    // address, permissions, offset, device, inode, path
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|start| &line[start..]));
    let found = paths.find(|path| path.rsplit('/').next().is_some_and(|file| file.starts_with(base)));
    found.unwrap_or(name).to_owned()
}

fn kept(log: Option<&Path>) -> String {
    log.map_or("there was no place for its log".into(), |log| format!("the log is in {}", log.display()))
}
