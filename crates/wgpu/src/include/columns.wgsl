// What kernels share that multiply tiles in workgroup memory.

// The sums of a row and the products of four columns, one after the other: w has a column of the weight a column.
fn plus_row(sum: vec4<f32>, x: vec4<f32>, w: mat4x4<f32>) -> vec4<f32> {
    return fma(vec4(x.w), w[3], fma(vec4(x.z), w[2], fma(vec4(x.y), w[1], fma(vec4(x.x), w[0], sum))));
}
