//! NVRTC, loaded at run time.

use crate::error::{Error, Result, loader_says};
use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;

type Program = *mut c_void;
type Code = c_int;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Code;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code;
type Size = unsafe extern "C" fn(Program, *mut usize) -> Code;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> Code;

/// The compiler's functions, and the library they live in.
pub(crate) struct Nvrtc {
    create: Create,
    compile: Compile,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
    cubin_size: Size,
    cubin: Text,
    log_size: Size,
    log: Text,
    describe: unsafe extern "C" fn(Code) -> *const c_char,
    /// Major and minor.
    pub(crate) version: (i32, i32),
    /// The name it was found under.
    pub(crate) name: String,
    _library: Library,
}

/// What a failed compilation says.
pub(crate) struct Failure {
    pub(crate) code: String,
    pub(crate) log: String,
}

impl Nvrtc {
    /// Errors: `NoCompiler`.
    pub(crate) fn load() -> Result<Self> {
        let names = candidates(std::env::var("FMOE_NVRTC").ok());
        let mut reason = String::new();
        for name in &names {
            // SAFETY: NVRTC's initialisers are made to run in any process.
            let found = unsafe { Library::new(name) }.and_then(|library| Self::bind(library, name));
            match found {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(error) if reason.is_empty() => reason = loader_says(&error),
                Err(_) => {}
            }
        }
        Err(Error::NoCompiler { tried: names.join(", "), reason })
    }

    fn bind(library: Library, name: &str) -> Result<Self, libloading::Error> {
        // SAFETY: the types are those of NVRTC's C interface, unchanged since CUDA 11.1, and the library is kept.
        unsafe {
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code = *library.get(b"nvrtcVersion\0")?;
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                cubin: *library.get(b"nvrtcGetCUBIN\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                describe: *library.get(b"nvrtcGetErrorString\0")?,
                version: (major, minor),
                name: name.to_string(),
                _library: library,
            })
        }
    }

    /// Source to machine code.
    pub(crate) fn compile(&self, name: &str, source: &str, options: &[String]) -> Result<Vec<u8>, Failure> {
        let text = |text: &str| {
            CString::new(text).map_err(|e| Failure { code: "text with a zero byte".into(), log: e.to_string() })
        };
        let (source, name) = (text(source)?, text(name)?);
        let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // SAFETY: the strings outlive the program, which is destroyed below.
        unsafe {
            let made = (self.create)(&mut program, source.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null());
            if made != 0 {
                return Err(Failure { code: self.error(made), log: String::new() });
            }
            let code = (self.compile)(program, pointers.len() as c_int, pointers.as_ptr());
            let result = if code == 0 {
                Ok(self.fetch(program, self.cubin_size, self.cubin))
            } else {
                let log = self.fetch(program, self.log_size, self.log);
                Err(Failure { code: self.error(code), log: String::from_utf8_lossy(&log).into_owned() })
            };
            (self.destroy)(&mut program);
            match result {
                Ok(cubin) if cubin.is_empty() => {
                    Err(Failure { code: "no machine code was made".into(), log: String::new() })
                }
                other => other,
            }
        }
    }

    /// # Safety
    /// `program` was compiled, and `size` and `text` belong together.
    unsafe fn fetch(&self, program: Program, size: Size, text: Text) -> Vec<u8> {
        let mut length = 0;
        // SAFETY: writes one number, then as many bytes.
        unsafe {
            if size(program, &mut length) != 0 {
                return Vec::new();
            }
            let mut bytes = vec![0u8; length];
            if text(program, bytes.as_mut_ptr().cast()) != 0 {
                return Vec::new();
            }
            bytes
        }
    }

    fn error(&self, code: Code) -> String {
        // SAFETY: returns a static string for any code.
        unsafe {
            let text = (self.describe)(code);
            if text.is_null() {
                return code.to_string();
            }
            std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

/// The names to try, in order: the user's choice alone where there is one.
fn candidates(chosen: Option<String>) -> Vec<String> {
    match chosen.filter(|name| !name.is_empty()) {
        Some(name) => vec![name],
        None if cfg!(windows) => ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"].map(String::from).to_vec(),
        None => ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so"]
            .map(String::from)
            .to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_choice_is_the_only_one() {
        assert_eq!(candidates(Some("/opt/libnvrtc.so".into())), ["/opt/libnvrtc.so"]);
        assert!(candidates(Some(String::new())).len() > 1);
        assert!(candidates(None).len() > 1);
    }
}
