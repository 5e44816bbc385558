// A tile of 64 x 64 sums in f32 multiply-adds, by 128 threads: 8 x 4 sums each.

const THREADS = 128u;
const STEP = 16u;

// By row, not an array, so that they surely stay in registers.
struct Sums {
    r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32>,
}

// The sums and the products of four columns of eight rows, in two fours, with as many rows of four.
fn plus(s: Sums, low: mat4x4<f32>, high: mat4x4<f32>, w: mat4x4<f32>) -> Sums {
    return Sums(
        plus_row(s.r0, low[0], w), plus_row(s.r1, low[1], w), plus_row(s.r2, low[2], w), plus_row(s.r3, low[3], w),
        plus_row(s.r4, high[0], w), plus_row(s.r5, high[1], w), plus_row(s.r6, high[2], w), plus_row(s.r7, high[3], w),
    );
}

fn row_of(s: Sums, i: u32) -> vec4<f32> {
    switch (i) {
        case 0u: { return s.r0; }
        case 1u: { return s.r1; }
        case 2u: { return s.r2; }
        case 3u: { return s.r3; }
        case 4u: { return s.r4; }
        case 5u: { return s.r5; }
        case 6u: { return s.r6; }
        default: { return s.r7; }
    }
}

// Four neighbours of a row, from column i on.
fn put_four(row: u32, i: u32, sums: vec4<f32>) {
    put_pair(row, i, p.inputs, sums.xy + partial_pair(row, i, p.inputs));
    put_pair(row, i + 2u, p.inputs, sums.zw + partial_pair(row, i + 2u, p.inputs));
}
