// What kernels share that stream weights past: a team of 32 threads has four rows of a matrix, a thread eight neighbours of
// each at a time.

const TEAM = 32u;
const TEAMS = THREADS / TEAM;
// elements that a team reads at once
const STEP = TEAM * 8u;

// Eight elements of each of the rows.
struct Four { r0: mat2x4<f32>, r1: mat2x4<f32>, r2: mat2x4<f32>, r3: mat2x4<f32> }

fn dot8(a: mat2x4<f32>, b: mat2x4<f32>) -> f32 { return dot(a[0], b[0]) + dot(a[1], b[1]); }

// The sums of the rows and eight more products of each.
fn plus_eight(sum: vec4<f32>, x: mat2x4<f32>, w: Four) -> vec4<f32> {
    return sum + vec4<f32>(dot8(x, w.r0), dot8(x, w.r1), dot8(x, w.r2), dot8(x, w.r3));
}
