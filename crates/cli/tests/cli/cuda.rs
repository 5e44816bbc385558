//! CUDA that is not there, too old, or broken, in stand-ins for its two libraries: each its own error, and a fall back to
//! the processor only where the choice was left open. They are made with `cc`, which also links every Rust program.

use super::support::{Call, PROGRAM, Ran, fmoe};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use tempfile::TempDir;

/// `libcuda.so` and `libnvrtc.so`.
static LIBRARIES: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    for (source, library) in [("driver.c", "libcuda.so"), ("nvrtc.c", "libnvrtc.so")] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli").join(source);
        compile(&source, &folder.path().join(library));
    }
    folder
});

fn compile(source: &Path, library: &Path) {
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([library, source]).status();
    assert!(made.is_ok_and(|status| status.success()), "cc does not compile {}", source.display());
}

/// The program with both libraries, the second named.
fn with_cuda<const N: usize>(arguments: [&str; N]) -> Call {
    let folder = LIBRARIES.path().to_str().unwrap();
    let call = fmoe(arguments).env("LD_LIBRARY_PATH", folder).env("FMOE_NVRTC", &format!("{folder}/libnvrtc.so"));
    call.env("FMOE_CACHE_DIR", &format!("{folder}/cache"))
}

/// CUDA that is not usable for this reason: listed so, an error when asked for, and passed over when not.
fn unusable(call: impl Fn(&[&str]) -> Call, parts: &[&str]) {
    let call = |arguments: &[&str]| call(arguments).without_adapters();
    let ran = call(&["devices"]).succeeds();
    let found = |ran: &Ran, text: &str| parts.iter().for_each(|part| assert!(text.contains(part), "{part:?}: {ran}"));
    found(&ran, &ran.stdout);
    assert!(ran.stdout.contains("chosen: cpu\n"), "{ran}");
    assert_eq!(ran.stdout.matches(parts[0]).count(), 1, "said once: {ran}");
    for command in ["run", "check", "bench"] {
        let ran = call(&[command, "--backend", "cuda"]).errs(["error: cuda: "]);
        found(&ran, &ran.stderr);
        assert!(ran.stdout.is_empty(), "{ran}");
    }
    for choice in [&["run"][..], &["run", "--backend", "auto"]] {
        let ran = call(choice).succeeds();
        assert!(ran.choice.starts_with("on cpu, since cuda: ") && ran.stderr.is_empty(), "{ran}");
        found(&ran, &ran.choice);
        assert!(ran.stdout.contains("output   matches"), "{ran}");
    }
    assert_eq!(call(&["run", "--backend", "cpu"]).succeeds().choice, "");
}

fn with(variables: &'static [(&str, &str)]) -> impl Fn(&[&str]) -> Call {
    move |arguments| variables.iter().fold(with_cuda([]).args(arguments), |call, (name, value)| call.env(name, value))
}

#[test]
fn no_driver() {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("none.c"), folder.path().join("libcuda.so"));
    fs::write(&source, "int something;").unwrap();
    compile(&source, &library);
    let call = |arguments: &[&str]| fmoe(arguments).env("LD_LIBRARY_PATH", folder.path().to_str().unwrap());
    unusable(call, &["no NVIDIA driver", "libcuda.so", "cuDriverGetVersion", "install"]);
}

#[test]
fn a_driver_too_old() {
    unusable(with(&[("FAKE_VERSION", "11000")]), &["device: ", "speaks CUDA 11.0", "12.0 is needed", "update"]);
}

#[test]
fn no_device() {
    let parts = ["device 0: the driver shows 0 CUDA devices", "CUDA_VISIBLE_DEVICES"];
    unusable(with(&[("FAKE_COUNT", "0")]), &parts);
    // CUDA_ERROR_NO_DEVICE
    unusable(with(&[("FAKE_INIT", "100")]), &parts);
}

#[test]
fn a_driver_that_does_not_start() {
    unusable(with(&[("FAKE_INIT", "803")]), &["device count: ", "code 803"]);
}

#[test]
fn an_architecture_too_old() {
    unusable(with(&[("FAKE_OLD", "1")]), &["Fake 0", "compute capability 7.0", "at least 8.0"]);
    let call = with(&[("FAKE_OLD", "1"), ("FAKE_COUNT", "2")]);
    let ran = call(&["devices"]).succeeds();
    assert!(ran.stdout.contains("chosen: cuda:1\n"), "{ran}");
    let ran = call(&["run"]).fails(1);
    assert!(ran.choice.starts_with("on cuda:1, since cuda: device: Fake 0"), "{ran}");
    assert!(ran.stderr.starts_with("error: allocation: "), "{ran}");
    call(&["run", "--backend", "cuda"]).errs(["error: cuda: device: Fake 0"]);
}

#[test]
fn no_compiler() {
    let parts = ["compile: NVRTC", "/nonexistent/libnvrtc.so", "nvidia-cuda-nvrtc", "FMOE_NVRTC"];
    unusable(with(&[("FMOE_NVRTC", "/nonexistent/libnvrtc.so")]), &parts);
    let call = || fmoe(["check", "--compile-only", "sm_80"]);
    call().env("FMOE_NVRTC", "/nonexistent/libnvrtc.so").errs(parts);
    // a library that is no compiler
    call().env("FMOE_NVRTC", LIBRARIES.path().join("libcuda.so").to_str().unwrap()).errs(["compile: NVRTC", "nvrtc"]);
}

#[test]
fn several_devices() {
    let call = |arguments: &[&str]| with(&[("FAKE_COUNT", "3")])(arguments).without_adapters();
    let ran = call(&["devices"]).succeeds();
    for device in ["cuda:0", "cuda:1", "cuda:2", "Fake 0", "Fake 1", "Fake 2", "chosen: cuda:0"] {
        assert!(ran.stdout.contains(device), "{device}: {ran}");
    }
    let json: serde_json::Value = serde_json::from_str(&call(&["devices", "--json"]).succeeds().stdout).unwrap();
    let names: Vec<_> = json["devices"].as_array().unwrap().iter().map(|device| &device["name"]).collect();
    assert_eq!(names, ["cuda:0", "cuda:1", "cuda:2", "wgpu", "cpu"]);
    for (device, reason) in
        [("cuda:3", "device 3: the driver shows 3"), ("cuda:x", "cuda:1"), ("cpu:1", "no such backend")]
    {
        for command in ["run", "check", "bench"] {
            let call = call(&[command, "--backend", device]);
            if device == "cuda:3" {
                call.errs([reason])
            } else {
                call.misuses([reason])
            };
        }
    }
    with(&[])(&["run", "--backend", "cuda:1"]).errs(["the driver shows 1 CUDA device, numbered"]);
    let ran = with(&[])(&["devices"]).succeeds();
    assert!(ran.stdout.contains("chosen: cuda\n") && !ran.stdout.contains("cuda:"), "{ran}");
    let folder = LIBRARIES.path().canonicalize().unwrap();
    for (name, file) in [("driver", "libcuda.so"), ("nvrtc", "libnvrtc.so"), ("kernel cache", "cache")] {
        let line = format!("cuda {name}: {}", folder.join(file).display());
        assert!(ran.stdout.contains(&line) && !ran.stdout.contains("cannot be written"), "{line}: {ran}");
    }
    let ran = with(&[("FMOE_CACHE_DIR", "/proc/fused-moe")])(&["devices"]).succeeds();
    assert!(ran.stdout.contains("cuda kernel cache: /proc/fused-moe, cannot be written: "), "{ran}");
}

#[test]
fn memory_that_is_not_there_and_a_device_that_is_lost() {
    for device in ["cuda", "auto"] {
        let said = |call: Call, parts: &[&str]| {
            let ran = call.fails(1);
            assert!(ran.stderr.starts_with("error: allocation: "), "{ran}");
            parts.iter().for_each(|part| assert!(ran.stderr.contains(part), "{part:?}: {ran}"));
        };
        let run = || with_cuda(["run", "--backend", device]);
        said(run(), &["bytes of device memory are needed, 12345 are free", "fewer tokens"]);
        // CUDA_ERROR_ILLEGAL_ADDRESS
        said(run().env("FAKE_ALLOCATION", "700"), &["the device is lost", "code 700", "anew"]);
    }
}

/// Compiles all kernels with a cache in `folder`.
fn kernels(folder: &str) -> Call {
    with_cuda(["check", "--compile-only", "sm_80"]).env("FMOE_CACHE_DIR", folder)
}

/// The files of a folder.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    fs::read_dir(folder).unwrap().map(|entry| read(entry.unwrap())).collect()
}

#[test]
fn kernels_that_do_not_compile() {
    let folder = tempfile::tempdir().unwrap();
    let (cache, scratch) = (folder.path().join("cache"), folder.path().join("tmp"));
    fs::create_dir(&scratch).unwrap();
    let call = |cache: &Path| {
        let call = kernels(cache.to_str().unwrap()).env("FAKE_COMPILE", "6").env("TMPDIR", scratch.to_str().unwrap());
        call.errs([
            "compile: ",
            "for sm_80",
            "FAKE_ERROR_COMPILATION: kernel.cu(3): error: no such thing; the log is in ",
        ])
    };
    // beside the kernels, and where those have no place, among the temporary files
    for (cache, place) in [(cache.as_path(), &cache), (Path::new("/proc/fused-moe"), &scratch)] {
        let ran = call(cache);
        let path = ran.stderr.split("the log is in ").nth(1).unwrap().lines().next().unwrap();
        assert!(Path::new(path).starts_with(place), "{ran}");
        let log = fs::read_to_string(path).unwrap();
        for part in ["FAKE_ERROR_COMPILATION", "--gpu-architecture=sm_80", "no such thing", "extern \"C\""] {
            assert!(log.contains(part), "{log}");
        }
    }
    let call = kernels("/proc/fused-moe").env("FAKE_COMPILE", "6").env("TMPDIR", "/proc/fused-moe");
    call.errs(["no such thing; there was no place for its log"]);
}

#[test]
fn caches_that_cannot_be_written() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for folder in ["/proc/fused-moe", file.path().to_str().unwrap()] {
        let ran = kernels(folder).succeeds();
        assert!(ran.stdout.contains("kernels for sm_80"), "{ran}");
        assert!(ran.choice.starts_with(&format!("warning: kernels cannot be kept in {folder}: ")), "{ran}");
        assert!(ran.stderr.is_empty(), "said once: {ran}");
    }
    // 2 kB at most in a file; SIGXFSZ is ignored, so that writing fails as it does on a full disk
    let folder = tempfile::tempdir().unwrap();
    let libraries = LIBRARIES.path().display();
    let command = format!("trap '' XFSZ; ulimit -f 4; exec '{PROGRAM}' check --compile-only sm_80");
    let out = Command::new("sh")
        .args(["-c", &command])
        .env("FMOE_NVRTC", format!("{libraries}/libnvrtc.so"))
        .env("FMOE_CACHE_DIR", folder.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(content(folder.path()).is_empty(), "nothing is left of what could not be kept");
}

#[test]
fn a_cache_is_filled_by_several_at_once_and_mended() {
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| kernels(folder.path().to_str().unwrap()).succeeds());
        }
    });
    let whole = content(folder.path());
    assert!(whole.len() > 100 && whole.keys().all(|name| name.ends_with(".cubin")), "{:?}", whole.keys());
    // cut, changed, empty, another's: one after the other
    let another = whole.values().next().unwrap();
    for (i, (name, bytes)) in whole.iter().enumerate() {
        let bad = match i % 4 {
            0 => bytes[..bytes.len() - 1].to_vec(),
            1 => bytes.iter().map(|byte| byte ^ 1).collect(),
            2 => Vec::new(),
            _ => another.clone(),
        };
        fs::write(folder.path().join(name), bad).unwrap();
    }
    kernels(folder.path().to_str().unwrap()).succeeds();
    assert!(content(folder.path()) == whole);
}
