/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can fail on a GPU behind wgpu.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request makes no sense as it stands.
    #[error(transparent)]
    Contract(#[from] fused_moe_core::Error),
    /// No graphics driver offers an adapter.
    #[error(
        "no GPU was found through Vulkan, Metal or DX12: install the graphics driver (on Linux, its Vulkan loader too; on \
         Windows, DX12 needs dxcompiler.dll)"
    )]
    NoAdapter,
    /// There is no adapter of this number.
    #[error("no adapter {index}: there are {count}")]
    NoSuchAdapter {
        /// What was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The device lacks something that every kernel needs.
    #[error("{device} offers no {missing}, which every kernel needs")]
    Unsupported {
        /// Its name.
        device: String,
        /// What is missing.
        missing: &'static str,
    },
    /// A limit of the device is too low.
    #[error("{device}: {limit} is {actual}, at least {needed} is needed")]
    Limit {
        /// Its name.
        device: String,
        /// wgpu's name of the limit.
        limit: &'static str,
        /// How much it offers.
        actual: u64,
        /// How much is needed.
        needed: u64,
    },
    /// One operand is larger than a kernel of this device can be given.
    #[error("{operation}: an operand takes {bytes} bytes, this device binds {limit} at once: give it in parts")]
    Binding {
        /// The operation.
        operation: &'static str,
        /// Bytes from its first element to its last.
        bytes: u64,
        /// The largest that can be bound.
        limit: u64,
    },
    /// wgpu binds whole words, and the buffer's last one is not.
    #[error("{operation}: an element in the last bytes of a buffer of {size} cannot be bound: make it a multiple of 4")]
    Unbindable {
        /// The operation.
        operation: &'static str,
        /// Bytes of the buffer.
        size: u64,
    },
    /// A buffer lacks a use that an operation needs.
    #[error("{operation}: a buffer was made without wgpu's usage {missing}")]
    Usage {
        /// The operation.
        operation: &'static str,
        /// What it was made without.
        missing: &'static str,
    },
    /// The device has too little memory.
    #[error("out of device memory: {needed} bytes are needed")]
    OutOfMemory {
        /// How much was asked for.
        needed: u64,
    },
    /// A copy does not fit the memory it goes to or comes from.
    #[error("copy of {bytes} bytes: the memory has {available}")]
    Copy {
        /// How much was to be copied.
        bytes: usize,
        /// How much there is.
        available: usize,
    },
    /// A kernel did not compile.
    #[error("kernel {kernel} did not compile: {reason}")]
    Compile {
        /// Which kernel.
        kernel: String,
        /// wgpu's messages.
        reason: String,
    },
    /// The device is gone.
    #[error("device lost during {during}: {reason}")]
    DeviceLost {
        /// What was asked for.
        during: &'static str,
        /// wgpu's word for it.
        reason: String,
    },
    /// wgpu refused.
    #[error("{during}: {reason}")]
    Device {
        /// What was asked for.
        during: &'static str,
        /// wgpu's word for it.
        reason: String,
    },
}
