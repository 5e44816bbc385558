use std::path::PathBuf;

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
    #[error(
        "no NVIDIA driver: {} and {} other names of its library were tried ({reason})",
        tried.first().map_or("", String::as_str),
        tried.len().saturating_sub(1)
    )]
    NoDriver {
        /// Names that were tried.
        tried: Vec<String>,
        /// What the loader said last.
        reason: String,
    },
    /// The driver is older than this crate needs.
    #[error("the NVIDIA driver speaks CUDA {}.{}, at least {}.{} is needed: update the driver", found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10)]
    DriverTooOld {
        /// Its CUDA version, 1000 * major + 10 * minor.
        found: u32,
        /// The lowest that will do.
        needed: u32,
    },
    /// There is no device of this number.
    #[error("no CUDA device {ordinal}: there are {count}")]
    NoDevice {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device's architecture is too old.
    #[error("{device} has compute capability {major}.{minor}, at least 8.0 is needed")]
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
        "NVRTC, CUDA's run-time compiler, was not found: none of {tried} could be loaded ({reason}); install the CUDA \
         toolkit or the Python package nvidia-cuda-nvrtc, and put its folder on LD_LIBRARY_PATH or its path in FMOE_NVRTC"
    )]
    NoCompiler {
        /// Names that were tried.
        tried: String,
        /// What the loader said last.
        reason: String,
    },
    /// A kernel did not compile.
    #[error("kernel {kernel} did not compile for {architecture} ({code}): log in {}", log.display())]
    Compile {
        /// Which kernel.
        kernel: String,
        /// The architecture that was asked for.
        architecture: String,
        /// NVRTC's error.
        code: String,
        /// Source, options and the compiler's messages.
        log: PathBuf,
    },
    /// The device has too little memory.
    #[error("out of device memory: {needed} bytes are needed, {free} are free")]
    OutOfMemory {
        /// How much was asked for.
        needed: usize,
        /// How much there is.
        free: usize,
    },
    /// A copy does not fit the memory it goes to or comes from.
    #[error("copy of {bytes} bytes: the memory has {available}")]
    Copy {
        /// How much was to be copied.
        bytes: usize,
        /// How much there is.
        available: usize,
    },
    /// The device's context is broken: nothing runs in this process any more until it is made anew.
    #[error("device lost during {during}: {reason}")]
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
