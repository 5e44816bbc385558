// Eight numbers; those of 2 bytes lie in words, the first in the low half of the first.

fn fours_of_bf16(w: vec4<u32>) -> mat2x4<f32> {
    let even = bitcast<vec4<f32>>(w << vec4<u32>(16u));
    let odd = bitcast<vec4<f32>>(w & vec4<u32>(0xffff0000u));
    return mat2x4<f32>(vec4<f32>(even.x, odd.x, even.y, odd.y), vec4<f32>(even.z, odd.z, even.w, odd.w));
}

fn fours_of_f16(w: vec4<u32>) -> mat2x4<f32> {
    return mat2x4<f32>(
        vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y)),
        vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w)),
    );
}

// The first n of eight, zeros for the others, whatever these are.
fn first_of(x: mat2x4<f32>, n: u32) -> mat2x4<f32> {
    return mat2x4<f32>(
        select(vec4<f32>(), x[0], vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(n)),
        select(vec4<f32>(), x[1], vec4<u32>(4u, 5u, 6u, 7u) < vec4<u32>(n)),
    );
}
