//! cuBLAS, loaded at run time where it is there: a dense product to compare with. No layer needs it.

use crate::Cuda;
use crate::error::{Error, Result};
use crate::launch::Tensor;
use crate::memory::{Mut, Ref};
use crate::stream::CudaStream;
use fused_moe_core::{DType, View};
use libloading::Library;
use std::ffi::{c_int, c_void};
use std::ptr;

type Handle = *mut c_void;
type Code = c_int;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Code;

const TRANSPOSED: c_int = 1;
const AS_IT_IS: c_int = 0;
/// Sums in f32, without tensor cores for f32.
const COMPUTE_F32: c_int = 68;
const DEFAULT_ALGORITHM: c_int = -1;

/// The library, and a handle of this device's.
pub(crate) struct Cublas {
    handle: Handle,
    cuda: Cuda,
    destroy: unsafe extern "C" fn(Handle) -> Code,
    set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> Code,
    gemm: GemmEx,
    /// Major and minor.
    pub(crate) version: (i32, i32),
    _library: Library,
}

impl std::fmt::Debug for Cublas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cublas {:?}", self.version)
    }
}

impl Cublas {
    /// None where the library is not there or does not start.
    pub(crate) fn load(cuda: &Cuda) -> Option<Self> {
        let _current = cuda.device().bind("cuBLAS").ok()?;
        names(std::env::var("FMOE_CUBLAS").ok()).into_iter().find_map(|name| {
            // SAFETY: cuBLAS's initialisers are made to run in any process.
            let library = unsafe { Library::new(name) }.ok()?;
            Self::bind(library, cuda)
        })
    }

    fn bind(library: Library, cuda: &Cuda) -> Option<Self> {
        // SAFETY: the types are those of cuBLAS's C interface, unchanged since CUDA 11, and the library is kept.
        unsafe {
            let create: unsafe extern "C" fn(*mut Handle) -> Code = *library.get(b"cublasCreate_v2\0").ok()?;
            let version: unsafe extern "C" fn(Handle, *mut c_int) -> Code =
                *library.get(b"cublasGetVersion_v2\0").ok()?;
            let destroy = *library.get(b"cublasDestroy_v2\0").ok()?;
            let set_stream = *library.get(b"cublasSetStream_v2\0").ok()?;
            let gemm = *library.get(b"cublasGemmEx\0").ok()?;
            let mut handle = ptr::null_mut();
            if create(&mut handle) != 0 {
                return None;
            }
            let mut number = 0;
            version(handle, &mut number);
            let version = (number / 10000, number % 10000 / 100);
            let cuda = cuda.clone();
            Some(Self { handle, cuda, destroy, set_stream, gemm, version, _library: library })
        }
    }

    /// Enqueues `out = x . weight^T`, all dense, row-major and of one format: x `[R, C]`, weight `[N, C]`, out `[R, N]`.
    ///
    /// Errors: `Driver` when the operands are not so or cuBLAS refuses.
    pub(crate) fn linear(
        &self,
        stream: &CudaStream,
        x: &View<Ref<'_>>,
        weight: &View<Ref<'_>>,
        out: &View<Mut<'_>>,
    ) -> Result<()> {
        let (x_of, weight_of, out_of) = (Tensor::of(x)?, Tensor::of(weight)?, Tensor::of(out)?);
        let one_format = x.dtype() == weight.dtype() && x.dtype() == out.dtype();
        let strides = [x_of.stride, weight_of.stride, out_of.stride].map(|stride| stride as usize);
        let shapes = [x.rows(), weight.cols(), out.cols()] == [out.rows(), x.cols(), weight.rows()];
        if !one_format || !shapes || strides != [x.cols(), x.cols(), out.cols()] {
            return Err(refused("operands of other formats, shapes or strides than a dense product has".into()));
        }
        let number = |size: usize| c_int::try_from(size).map_err(|_| refused(format!("{size} is no 32-bit number")));
        let (rows, outputs, inner) = (number(x.rows())?, number(weight.rows())?, number(x.cols())?);
        let format = match x.dtype() {
            DType::F16 => 2,
            DType::BF16 => 14,
            _ => 0,
        };
        let (one, zero) = (1f32, 0f32);
        let _current = self.cuda.device().bind("cuBLAS")?;
        // SAFETY: the handle lives. What is row-major is column-major transposed: out^T = weight . x^T. The operands are
        // as large as their views, and their owners promise that they stay.
        unsafe {
            check((self.set_stream)(self.handle, stream.driver().cu_stream().cast()))?;
            check((self.gemm)(
                self.handle,
                TRANSPOSED,
                AS_IT_IS,
                outputs,
                rows,
                inner,
                (&raw const one).cast(),
                weight_of.data as *const c_void,
                format,
                inner,
                x_of.data as *const c_void,
                format,
                inner,
                (&raw const zero).cast(),
                out_of.data as *mut c_void,
                format,
                outputs,
                COMPUTE_F32,
                DEFAULT_ALGORITHM,
            ))
        }
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        if self.cuda.device().bind("cuBLAS").is_ok() {
            // SAFETY: created by `bind`, destroyed nowhere else. A failure loses memory and nothing else.
            let _ = unsafe { (self.destroy)(self.handle) };
        }
    }
}

fn check(code: Code) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(refused(format!("status {code}"))) }
}

fn refused(reason: String) -> Error {
    Error::Driver { during: "cuBLAS", reason }
}

/// The names to try, in order: the user's choice alone where there is one.
fn names(chosen: Option<String>) -> Vec<String> {
    match chosen.filter(|name| !name.is_empty()) {
        Some(name) => vec![name],
        None if cfg!(windows) => ["cublas64_13.dll", "cublas64_12.dll"].map(String::from).to_vec(),
        None => {
            let names = ["libcublas.so.13", "libcublas.so.12", "libcublas.so", "/usr/local/cuda/lib64/libcublas.so"];
            names.map(String::from).to_vec()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_choice_is_the_only_one() {
        assert_eq!(names(Some("/opt/libcublas.so".into())), ["/opt/libcublas.so"]);
        assert!(names(Some(String::new())).len() > 1 && names(None).len() > 1);
    }
}
