//! Eight neighbours of an operand at once.

use super::Slot;
use fused_moe_core::DType;
use std::fmt::Write;

/// Whether a text reads the operand so.
pub(super) fn wanted(name: &str, parts: &[&str]) -> bool {
    let call = format!("read8_{name}(");
    parts.iter().any(|part| part.contains(&call))
}

/// `read8_<name>(i, count)` reads eight elements from element i on, of which the first `count` are there and the others
/// are to be zeros; `widen8_<name>` makes them f32. What lies between, `Raw_<name>`, is small and waits for nothing.
///
/// A wide operand is read by 16 bytes, from an i that is a multiple of the elements in them, whatever `count` is: where its
/// rows are not whole eights, what is read beyond `count` may be anything. An operand that is left out is zeros.
pub(super) fn declare(text: &mut String, name: &str, slot: Option<Slot>) {
    let Some(Slot { format, wide, .. }) = slot else {
        let _ = writeln!(
            text,
            "alias Raw_{name} = mat2x4<f32>;\n\
             fn read8_{name}(i: u32, count: u32) -> mat2x4<f32> {{ return mat2x4<f32>(); }}\n\
             fn widen8_{name}(raw: mat2x4<f32>) -> mat2x4<f32> {{ return raw; }}"
        );
        return;
    };
    let elements = |from: &str| -> String {
        let four = |n: u32| (n..n + 4).map(|j| from.replace('J', &j.to_string())).collect::<Vec<_>>().join(", ");
        format!("mat2x4<f32>(vec4<f32>({}), vec4<f32>({}))", four(0), four(4))
    };
    let (raw, read, widened) = match (wide, format) {
        (true, DType::F16) => ("vec4<u32>", format!("{name}_words[i >> 3u]"), "fours_of_f16(raw)"),
        (true, DType::BF16) => ("vec4<u32>", format!("{name}_words[i >> 3u]"), "fours_of_bf16(raw)"),
        (true, _) => {
            let four = |next: &str| format!("bitcast<vec4<f32>>({name}_words[(i >> 2u){next}])");
            ("mat2x4<f32>", format!("mat2x4<f32>({}, {})", four(""), four(" + 1u")), "raw")
        }
        (false, _) => {
            let _ = writeln!(
                text,
                "fn part_{name}(i: u32, j: u32, count: u32) -> f32 {{\n    \
                 if (j < count) {{ return load_{name}(i + j); }}\n    return 0.0;\n}}"
            );
            ("mat2x4<f32>", elements(&format!("part_{name}(i, Ju, count)")), "raw")
        }
    };
    let _ = writeln!(
        text,
        "alias Raw_{name} = {raw};\n\
         fn read8_{name}(i: u32, count: u32) -> {raw} {{ return {read}; }}\n\
         fn widen8_{name}(raw: {raw}) -> mat2x4<f32> {{ return {widened}; }}"
    );
}
