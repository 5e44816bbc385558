//! An operand in a kernel's text.

use super::{Binding, Kind, Slot};
use fused_moe_core::DType;
use std::fmt::Write;

/// The declaration of an operand, and the functions that read and write its elements.
pub(super) fn declare(text: &mut String, index: usize, binding: &Binding, slot: Option<Slot>) {
    let Binding { name, written, kind } = *binding;
    let element = if kind == Kind::Float { "f32" } else { "u32" };
    let Some(Slot { format, shared, wide }) = slot else {
        let _ =
            writeln!(text, "const has_{name} = false;\nfn load_{name}(i: u32) -> {element} {{ return {element}(0); }}");
        if written {
            let _ = writeln!(
                text,
                "fn store_{name}(i: u32, value: {element}) {{}}\n\
                 fn store_pair_{name}(i: u32, a: {element}, b: {element}) {{}}"
            );
        }
        return;
    };
    let half = matches!(format, DType::F16 | DType::BF16);
    let atomic = written && (half || kind == Kind::Status);
    let access = if written || shared { "read_write" } else { "read" };
    let of = if atomic {
        "atomic<u32>"
    } else if wide {
        "vec4<u32>"
    } else {
        "u32"
    };
    let _ = writeln!(text, "const has_{name} = true;");
    let _ = writeln!(text, "@group(0) @binding({index}) var<storage, {access}> {name}_words: array<{of}>;");
    if kind == Kind::Status {
        let _ = writeln!(text, "fn raise(bits: u32) {{ atomicOr(&{name}_words[0], bits); }}");
        return;
    }
    let word = match (atomic, wide) {
        (true, _) => format!("atomicLoad(&{name}_words[W])"),
        (_, true) => format!("{name}_words[(W) >> 2u][(W) & 3u]"),
        _ => format!("{name}_words[W]"),
    };
    let load = match format {
        DType::F16 => format!("f32_of_f16({}, i)", word.replace('W', "i >> 1u")),
        DType::BF16 => format!("f32_of_bf16({}, i)", word.replace('W', "i >> 1u")),
        _ if kind == Kind::Integer => word.replace('W', "i"),
        _ => format!("bitcast<f32>({})", word.replace('W', "i")),
    };
    let _ = writeln!(text, "fn load_{name}(i: u32) -> {element} {{ return {load}; }}");
    if !written {
        return;
    }
    let bits = match format {
        DType::F16 => "f16_of",
        DType::BF16 => "bf16_of",
        _ => "bitcast<u32>",
    };
    if half {
        // neighbours of an element may be another thread's, or nobody's
        let _ = writeln!(
            text,
            "fn store_{name}(i: u32, value: f32) {{\n    let shift = (i & 1u) * 16u;\n    \
             atomicAnd(&{name}_words[i >> 1u], 0xffff0000u >> shift);\n    \
             atomicOr(&{name}_words[i >> 1u], {bits}(value) << shift);\n}}\n\
             fn store_pair_{name}(i: u32, a: f32, b: f32) {{\n    \
             if ((i & 1u) == 0u) {{ atomicStore(&{name}_words[i >> 1u], {bits}(a) | ({bits}(b) << 16u)); return; }}\n    \
             store_{name}(i, a);\n    store_{name}(i + 1u, b);\n}}"
        );
    } else {
        let _ = writeln!(
            text,
            "fn store_{name}(i: u32, value: {element}) {{ {name}_words[i] = {bits}(value); }}\n\
             fn store_pair_{name}(i: u32, a: {element}, b: {element}) {{ store_{name}(i, a); store_{name}(i + 1u, b); }}"
        );
    }
}
