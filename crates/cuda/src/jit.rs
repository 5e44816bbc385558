//! Kernels: compiled at first use for the device's own architecture, kept on disk, loaded once a context.

mod cache;
mod nvrtc;

use crate::device::{Device, driver_error};
use crate::error::{Error, Result, loaded_from};
use crate::kernel::Kernel;
pub use cache::KernelCache;
use cache::{Cache, Key};
use cudarc::driver::result;
use cudarc::driver::sys::{CUfunction, CUfunction_attribute_enum as FunctionAttribute, CUmodule};
use nvrtc::Nvrtc;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

/// More shared memory than this has to be asked for.
const SHARED_WITHOUT_ASKING: usize = 48 * 1024;
/// Percent of a multiprocessor's memory that are to be shared memory, where that can be had.
const MOST_SHARED: i32 = 100;

/// The kernels of a context.
pub(crate) struct Kernels {
    device: Arc<Device>,
    compiler: Compiler,
    loaded: RwLock<HashMap<Kernel, Loaded>>,
    loading: Mutex<()>,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernels")
    }
}

#[derive(Clone, Copy)]
struct Loaded {
    module: CUmodule,
    function: CUfunction,
}

// SAFETY: the driver's handles of a context may be used from any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Kernels {
    pub(crate) fn new(device: Arc<Device>) -> Self {
        let compiler = Compiler::new(device.numbers.architecture());
        Self { device, compiler, loaded: RwLock::default(), loading: Mutex::default() }
    }

    /// The kernel, ready to be launched; after the first time this allocates nothing.
    pub(crate) fn function(&self, kernel: Kernel) -> Result<CUfunction> {
        if let Some(function) = self.find(kernel) {
            return Ok(function);
        }
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = self.find(kernel) {
            return Ok(function);
        }
        let code = self.compiler.code(kernel)?;
        self.load(kernel, &code)
    }

    /// The kernel of this machine code. Under the lock.
    fn load(&self, kernel: Kernel, code: &[u8]) -> Result<CUfunction> {
        let _current = self.device.bind("loading a kernel")?;
        let loaded = match load(kernel, code, &self.device) {
            Ok(loaded) => loaded,
            // the driver does not take what the cache holds: whatever wrote it, make it anew
            Err(Error::Driver { .. }) => load(kernel, &self.compiler.compile(kernel)?, &self.device)?,
            Err(error) => return Err(error),
        };
        self.loaded.write().unwrap_or_else(PoisonError::into_inner).insert(kernel, loaded);
        Ok(loaded.function)
    }

    /// Compiles and loads kernels that will be needed, several at a time.
    pub(crate) fn prepare(&self, kernels: &[Kernel]) -> Result<()> {
        let missing: Vec<_> = kernels.iter().copied().filter(|&kernel| self.find(kernel).is_none()).collect();
        let codes = self.compiler.codes(&missing)?;
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        missing.into_iter().zip(codes).try_for_each(|(kernel, code)| match self.find(kernel) {
            Some(_) => Ok(()),
            None => self.load(kernel, &code).map(drop),
        })
    }

    fn find(&self, kernel: Kernel) -> Option<CUfunction> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).get(&kernel).map(|loaded| loaded.function)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Ok(_current) = self.device.bind("unloading kernels") else { return };
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (_, loaded) in loaded.drain() {
            // SAFETY: unloaded nowhere else. A failure means that the context is gone, and the module with it.
            let _ = unsafe { result::module::unload(loaded.module) };
        }
    }
}

fn load(kernel: Kernel, code: &[u8], device: &Device) -> Result<Loaded> {
    let during = "loading a kernel";
    let entry = CString::new(kernel.entry())
        .map_err(|_| Error::Driver { during, reason: "a kernel's name holds a zero byte".into() })?;
    // SAFETY: a CUBIN says itself how long it is; the code comes from NVRTC or from a cache entry whose checksum held.
    let module =
        unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) }.map_err(|e| driver_error(during, e))?;
    // SAFETY: the module was loaded above.
    let found = unsafe { result::module::get_function(module, entry) };
    let found = found.and_then(|function| {
        let shared = device.numbers.shared_per_block;
        if kernel.asks_for_shared() && shared > SHARED_WITHOUT_ASKING {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was found above.
            let fixed = unsafe {
                result::function::get_function_attribute(
                    function,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                )
            }?;
            // SAFETY: as above.
            unsafe { result::function::set_function_attribute(function, attribute, shared as i32 - fixed) }?;
        }
        if kernel.leaves_shared() && device.numbers.overlaps_launches() {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // SAFETY: as above. It is a hint: without it launches only overlap less.
            let _ = unsafe { result::function::set_function_attribute(function, attribute, MOST_SHARED) };
        }
        Ok(function)
    });
    match found {
        Ok(function) => Ok(Loaded { module, function }),
        Err(error) => {
            // SAFETY: loaded above and handed to nobody.
            let _ = unsafe { result::module::unload(module) };
            Err(driver_error(during, error))
        }
    }
}

/// Compiles kernels for one architecture.
pub(crate) struct Compiler {
    architecture: String,
    cache: Cache,
    nvrtc: OnceLock<Nvrtc>,
}

impl Compiler {
    pub(crate) fn new(architecture: String) -> Self {
        Self { architecture, cache: Cache::from_environment(), nvrtc: OnceLock::new() }
    }

    fn nvrtc(&self) -> Result<&Nvrtc> {
        if let Some(nvrtc) = self.nvrtc.get() {
            return Ok(nvrtc);
        }
        let nvrtc = Nvrtc::load()?;
        Ok(self.nvrtc.get_or_init(|| nvrtc))
    }

    fn options(&self, kernel: Kernel) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={}", self.architecture),
            "--std=c++17".to_string(),
            "--device-as-default-execution-space".to_string(),
            "--generate-line-info".to_string(),
        ];
        options.extend(kernel.defines().into_iter().map(|(name, value)| format!("--define-macro={name}={value}")));
        options
    }

    fn key(&self, nvrtc: &Nvrtc, source: &str, options: &[String]) -> Key {
        let version = format!("nvrtc {}.{}", nvrtc.version.0, nvrtc.version.1);
        Key::of([source, &version].into_iter().chain(options.iter().map(String::as_str)))
    }

    /// Machine code, from the cache where it is there.
    pub(crate) fn code(&self, kernel: Kernel) -> Result<Vec<u8>> {
        let (source, options) = (kernel.source(), self.options(kernel));
        let key = self.key(self.nvrtc()?, &source, &options);
        match self.cache.get(key) {
            Some(code) => Ok(code),
            None => self.compile(kernel),
        }
    }

    /// Machine code of each of them, by several threads, up to the first that fails.
    fn codes(&self, kernels: &[Kernel]) -> Result<Vec<Vec<u8>>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(kernels.len());
        let codes: Vec<_> = kernels.iter().map(|_| OnceLock::new()).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((&kernel, place)) = kernels.iter().zip(&codes).nth(next.fetch_add(1, Ordering::Relaxed)) {
                let code = self.code(kernel);
                if code.is_err() {
                    next.store(kernels.len(), Ordering::Relaxed);
                }
                let _ = place.set(code);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        codes
            .into_iter()
            .zip(kernels)
            .map(|(code, &kernel)| code.into_inner().unwrap_or_else(|| self.code(kernel)))
            .collect()
    }

    /// Machine code, compiled here and now, and kept.
    pub(crate) fn compile(&self, kernel: Kernel) -> Result<Vec<u8>> {
        let nvrtc = self.nvrtc()?;
        let (source, options) = (kernel.source(), self.options(kernel));
        let key = self.key(nvrtc, &source, &options);
        let name = format!("{}.cu", kernel.entry());
        match nvrtc.compile(&name, &source, &options) {
            Ok(code) => {
                self.cache.put(key, &code);
                Ok(code)
            }
            Err(failure) => {
                let text = format!("{}\n{}\n{}\n\n{source}", failure.code, options.join(" "), failure.log);
                let first = failure.log.lines().find(|line| line.contains("error")).unwrap_or("no error in its log");
                Err(Error::Compile {
                    kernel: format!("{kernel:?}"),
                    architecture: self.architecture.clone(),
                    reason: format!("{}: {first}", failure.code),
                    log: self.cache.keep_log(key, &text),
                })
            }
        }
    }
}

/// Compiles every kernel of every plan that has this architecture, such as `sm_90a`; needs NVRTC and no device.
///
/// Returns how many there are. Errors: `NoCompiler`, `Compile`.
pub fn compile_all(architecture: &str) -> Result<usize> {
    let kernels: Vec<_> = Kernel::all().into_iter().filter(|kernel| kernel.is_for(architecture)).collect();
    Compiler::new(architecture.to_string()).codes(&kernels)?;
    Ok(kernels.len())
}

/// The run-time compiler that would be used: its file, and its version.
///
/// Errors: `NoCompiler`.
pub fn compiler() -> Result<(String, (i32, i32))> {
    let nvrtc = Nvrtc::load()?;
    Ok((loaded_from(&nvrtc.name), nvrtc.version))
}
