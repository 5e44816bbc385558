/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can fail on the CPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request makes no sense as it stands.
    #[error(transparent)]
    Contract(#[from] fused_moe_core::Error),
    /// The system gives no memory.
    #[error("{bytes} bytes of memory: {source}")]
    OutOfMemory {
        /// How much was asked for.
        bytes: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// A copy does not fit the memory it goes to or comes from.
    #[error("copy of {bytes} bytes: the memory has {available}")]
    Copy {
        /// How much was to be copied.
        bytes: usize,
        /// How much there is.
        available: usize,
    },
    /// No threads.
    #[error("threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    /// An instruction set, asked for in the program or by `FMOE_CPU_ISA`, is unknown or not here.
    #[error("instruction set {name}: expected one of {available}")]
    Isa {
        /// What was asked for: the name, or the variable and its value, as in `FMOE_CPU_ISA=mmx`.
        name: String,
        /// What this processor has.
        available: String,
    },
}
