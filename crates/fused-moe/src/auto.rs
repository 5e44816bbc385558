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
    /// A GPU through Vulkan, Metal or DX12.
    #[cfg(feature = "wgpu")]
    Wgpu(fused_moe_wgpu::Wgpu),
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
    /// [`Device::best`] takes the first available device with the largest, and none with 0: a graphics driver that runs
    /// on the processor.
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
    open: fn(usize) -> Result<Device, DeviceError>,
    /// The preference of its kind.
    preference: u32,
    /// Those of its devices, in the order of their numbers.
    preferences: fn() -> Vec<u32>,
}

/// All that are built in, best first.
const CANDIDATES: &[Candidate] = &[
    #[cfg(feature = "cuda")]
    Candidate {
        name: "cuda",
        open: Device::cuda,
        preference: 3,
        preferences: || vec![3; fused_moe_cuda::device_count().unwrap_or(0)],
    },
    #[cfg(feature = "wgpu")]
    Candidate {
        name: "wgpu",
        open: Device::wgpu,
        preference: 2,
        preferences: || fused_moe_wgpu::adapters().iter().map(|adapter| if adapter.software { 0 } else { 2 }).collect(),
    },
    #[cfg(feature = "cpu")]
    Candidate { name: "cpu", open: |_| Device::cpu(), preference: 1, preferences: || vec![1] },
];

impl Candidate {
    /// The names of its devices and their preferences; that of its kind alone, if it has none.
    fn devices(&self) -> Vec<(String, usize, u32)> {
        match (self.preferences)().as_slice() {
            [] => vec![(self.name.into(), 0, self.preference)],
            [preference] => vec![(self.name.into(), 0, *preference)],
            several => {
                let named = |(ordinal, &preference)| (format!("{}:{ordinal}", self.name), ordinal, preference);
                several.iter().enumerate().map(named).collect()
            }
        }
    }
}

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
            .map_err(|error| {
                let reason = match error {
                    // the loader's words mean nothing to somebody who has no such GPU
                    fused_moe_cuda::Error::NoDriver { tried, reason } if reason.contains("No such file") => {
                        format!("no NVIDIA driver here (looked for {tried})")
                    }
                    other => other.to_string(),
                };
                DeviceError::Unavailable { name: "cuda", reason }
            })
    }

    /// The adapter of this number, GPUs before processors that play one: a GPU through Vulkan, Metal or DX12.
    ///
    /// Errors: `Unavailable`, with the backend's reason.
    #[cfg(feature = "wgpu")]
    pub fn wgpu(index: usize) -> Result<Self, DeviceError> {
        fused_moe_wgpu::Wgpu::new(index)
            .map(Self::Wgpu)
            .map_err(|error| DeviceError::Unavailable { name: "wgpu", reason: error.to_string() })
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
        let (mut reasons, mut in_software) = (Vec::new(), Vec::new());
        for candidate in CANDIDATES {
            for (name, ordinal, preference) in candidate.devices() {
                if preference == 0 {
                    in_software.push(format!("{name} runs on the processor, and is used only by name"));
                    continue;
                }
                match (candidate.open)(ordinal).map_err(|error| error.to_string()) {
                    Ok(device) => {
                        let why = || format!("{name}, since {}", reasons.join("; "));
                        return Ok((device, (!reasons.is_empty()).then(why)));
                    }
                    // one device says what the next one would
                    Err(reason) if reasons.contains(&reason) => {}
                    Err(reason) => reasons.push(reason),
                }
            }
        }
        reasons.append(&mut in_software);
        Err(DeviceError::None { reasons })
    }

    /// A device by its name on a command line: `cpu`, `cuda`, `cuda:1`, `wgpu`, `wgpu:1`; `auto` is [`Device::best`].
    ///
    /// Errors: `Unknown`, `Unavailable`.
    pub fn by_name(name: &str) -> Result<Self, DeviceError> {
        if name == "auto" {
            return Self::best();
        }
        let (kind, ordinal) = match name.split_once(':') {
            Some((kind, ordinal)) if kind != "cpu" => (kind, ordinal.parse().ok()),
            _ => (name, Some(0)),
        };
        match (CANDIDATES.iter().find(|candidate| candidate.name == kind), ordinal) {
            (Some(candidate), Some(ordinal)) => (candidate.open)(ordinal),
            _ => Err(DeviceError::Unknown { name: name.into(), known: names() }),
        }
    }

    /// Every device of every backend that is built in, best first; a line that says why for a backend that has none.
    pub fn list() -> Vec<DeviceInfo> {
        let infos = |candidate: &'static Candidate| {
            candidate.devices().into_iter().map(|(name, ordinal, preference)| {
                let opened = (candidate.open)(ordinal);
                let description = opened.as_ref().map(|device| device.visit(Describe)).unwrap_or_default();
                let available = opened.map(|_| ()).map_err(|error| error.to_string());
                DeviceInfo { name, description, available, preference }
            })
        };
        let mut list: Vec<_> = CANDIDATES.iter().flat_map(infos).collect();
        list.sort_by_key(|info| std::cmp::Reverse(info.preference));
        list
    }

    /// Runs code that is written over [`Backend`] on this device.
    pub fn visit<V: Visitor>(&self, visitor: V) -> V::Output {
        match *self {
            #[cfg(feature = "cpu")]
            Self::Cpu(ref cpu) => visitor.visit(cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda(ref cuda) => visitor.visit(cuda),
            #[cfg(feature = "wgpu")]
            Self::Wgpu(ref wgpu) => visitor.visit(wgpu),
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
