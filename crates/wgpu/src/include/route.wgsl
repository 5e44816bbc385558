// What route and gather_weights share: a workgroup of THREADS threads a token, and what its threads tell each other.

const NO_EXPERT = 0xffffffffu;
const STATUS_NO_FINITE_SCORE = 1u;
const STATUS_EXPERT_OUT_OF_RANGE = 2u;
const STATUS_TOKEN_OUT_OF_RANGE = 4u;

// Reductions use the first THREADS; a candidate is a key and its expert.
var<workgroup> board: array<vec2<u32>, CAPACITY>;

// By bits, since comparisons with NaN may be either.
fn is_zero(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) == 0u; }

// Each part by itself.
fn largest(thread: u32, x: vec2<u32>) -> vec2<u32> {
    board[thread] = x;
    for (var half = THREADS / 2u; half > 0u; half >>= 1u) {
        workgroupBarrier();
        if (thread < half) { board[thread] = max(board[thread], board[thread + half]); }
    }
    return workgroupUniformLoad(&board[0]);
}

fn total(thread: u32, x: f32) -> f32 {
    board[thread] = vec2(bitcast<u32>(x), 0u);
    for (var half = THREADS / 2u; half > 0u; half >>= 1u) {
        workgroupBarrier();
        if (thread < half) {
            let sum = bitcast<f32>(board[thread].x) + bitcast<f32>(board[thread + half].x);
            board[thread] = vec2(bitcast<u32>(sum), 0u);
        }
    }
    return bitcast<f32>(workgroupUniformLoad(&board[0]).x);
}
