//! The best device here, and why.

use fused_moe_core::Backend;

/// A device chosen at run time.
///
/// ```
/// use fused_moe::{Backend, Device, Visitor};
/// struct Describe;
/// impl Visitor for Describe {
///     type Output = String;
///     fn visit<B: Backend>(self, backend: &B) -> String {
///         format!("{}: {}", backend.name(), backend.describe())
///     }
/// }
/// let device = Device::best()?;
/// println!("{}", device.visit(Describe));
/// # Ok::<(), fused_moe::DeviceError>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// The processor.
    #[cfg(feature = "cpu")]
    Cpu(fused_moe_cpu::Cpu),
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(fused_moe_cuda::Cuda),
}

/// Code written once for every backend, run on the one that was chosen.
pub trait Visitor {
    /// What it returns.
    type Output;

    /// Runs on a backend.
    fn visit<B: Backend>(self, backend: &B) -> Self::Output;
}

/// One line of [`Device::list`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its name on a command line.
    pub name: String,
    /// The device in words; empty where there is none.
    pub description: String,
    /// Whether it can be used, and if not, why.
    pub available: Result<(), String>,
    /// [`Device::best`] takes the first available device with the largest.
    pub preference: u32,
}

/// Why there is no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No backend has this name.
    #[error("no device is called {name:?}; built in: {}", known.join(", "))]
    Unknown {
        /// The name.
        name: String,
        /// Names that would do.
        known: Vec<&'static str>,
    },
    /// The backend is built in and finds no device.
    #[error("{name}: {reason}")]
    Unavailable {
        /// The backend.
        name: &'static str,
        /// What it says.
        reason: String,
    },
    /// Nothing to choose from.
    #[error("no device can be used: {}", reasons.join("; "))]
    None {
        /// What each backend says.
        reasons: Vec<String>,
    },
}

/// A backend that is built in.
struct Candidate {
    name: &'static str,
    preference: u32,
    open: fn() -> Result<Device, DeviceError>,
    /// How many devices it has, where it can be said.
    count: fn() -> usize,
}

/// All that are built in, best first.
const CANDIDATES: &[Candidate] = &[
    #[cfg(feature = "cuda")]
    Candidate {
        name: "cuda",
        preference: 2,
        open: || Device::cuda(0),
        count: || fused_moe_cuda::device_count().unwrap_or(0),
    },
    #[cfg(feature = "cpu")]
    Candidate { name: "cpu", preference: 1, open: Device::cpu, count: || 1 },
];

impl Device {
    /// The processor, with a thread for each of its cores.
    ///
    /// Errors: `Unavailable`, with the backend's reason.
    #[cfg(feature = "cpu")]
    pub fn cpu() -> Result<Self, DeviceError> {
        fused_moe_cpu::Cpu::new()
            .map(Self::Cpu)
            .map_err(|error| DeviceError::Unavailable { name: "cpu", reason: error.to_string() })
    }

    /// The NVIDIA GPU of this number, and that the compiler of its kernels is there.
    ///
    /// Errors: `Unavailable`, with the backend's reason.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self, DeviceError> {
        fused_moe_cuda::Cuda::new(ordinal)
            .and_then(|cuda| fused_moe_cuda::compiler().map(|_| Self::Cuda(cuda)))
            .map_err(|error| DeviceError::Unavailable { name: "cuda", reason: error.to_string() })
    }

    /// The fastest device that can be used; [`Device::best_and_why`] says how it was found.
    ///
    /// Errors: `None`, with every backend's reason.
    pub fn best() -> Result<Self, DeviceError> {
        Ok(Self::best_and_why()?.0)
    }

    /// The fastest device that can be used, and where a faster one that is built in cannot be, a line that says why.
    ///
    /// Errors: `None`, with every backend's reason.
    pub fn best_and_why() -> Result<(Self, Option<String>), DeviceError> {
        let mut reasons = Vec::new();
        for candidate in CANDIDATES {
            match (candidate.open)() {
                Ok(device) => {
                    let why = || format!("{}, since {}", candidate.name, reasons.join("; "));
                    return Ok((device, (!reasons.is_empty()).then(why)));
                }
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(DeviceError::None { reasons })
    }

    /// A device by its name on a command line: `cpu`, `cuda`, `cuda:1`; `auto` is [`Device::best`].
    ///
    /// Errors: `Unknown`, `Unavailable`.
    pub fn by_name(name: &str) -> Result<Self, DeviceError> {
        if name == "auto" {
            return Self::best();
        }
        #[cfg(feature = "cuda")]
        if let Some(ordinal) = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()) {
            return Self::cuda(ordinal);
        }
        match CANDIDATES.iter().find(|candidate| candidate.name == name) {
            Some(candidate) => (candidate.open)(),
            None => Err(DeviceError::Unknown { name: name.into(), known: names() }),
        }
    }

    /// Every device of every backend that is built in, best first; a line that says why for a backend that has none.
    pub fn list() -> Vec<DeviceInfo> {
        let info = |candidate: &Candidate, name: String| {
            let opened = Self::by_name(&name);
            DeviceInfo {
                name,
                description: opened.as_ref().map(|device| device.visit(Describe)).unwrap_or_default(),
                available: opened.map(|_| ()).map_err(|error| error.to_string()),
                preference: candidate.preference,
            }
        };
        let infos = |candidate: &'static Candidate| match (candidate.count)() {
            0 | 1 => vec![info(candidate, candidate.name.into())],
            count => (0..count).map(|ordinal| info(candidate, format!("{}:{ordinal}", candidate.name))).collect(),
        };
        CANDIDATES.iter().flat_map(infos).collect()
    }

    /// Runs code that is written over [`Backend`] on this device.
    pub fn visit<V: Visitor>(&self, visitor: V) -> V::Output {
        match *self {
            #[cfg(feature = "cpu")]
            Self::Cpu(ref cpu) => visitor.visit(cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda(ref cuda) => visitor.visit(cuda),
        }
    }
}

fn names() -> Vec<&'static str> {
    CANDIDATES.iter().map(|candidate| candidate.name).collect()
}

struct Describe;

impl Visitor for Describe {
    type Output = String;

    fn visit<B: Backend>(self, backend: &B) -> String {
        backend.describe()
    }
}
