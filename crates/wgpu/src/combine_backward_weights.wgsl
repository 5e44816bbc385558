// d_w[t,k] = scale * sum_h y[row,h] * d_out[t,h], or, from what went into down and its gradient,
//            scale * (sum_i y[row,i] * d_a[row,i] + sum_h bias[e,h] * d_out[t,h]):
// a team of 32 threads a slot. A launch has a window of the tokens and of the rows; slots without a row are the first's.

const TEAM = THREADS / SLOTS;
const STEP = 8u * TEAM;

fn dot8(a: mat2x4<f32>, b: mat2x4<f32>) -> f32 { return dot(a[0], b[0]) + dot(a[1], b[1]); }

// A thread's part of the products of a slot, whose row is `row` and whose token is `t`.
fn products(lane: u32, row: u32, t: u32) -> f32 {
    var sum = 0.0;
    let y = at(p.y, row, 0u);
    for (var i = lane * 8u; i < p.inner; i += STEP) {
        let count = p.inner - i;
        let v = widen8_y(read8_y(y + i, count));
        if (has_d_a) {
            sum += dot8(v, widen8_d_a(read8_d_a(at(p.d_a, row, i), count)));
        } else {
            sum += dot8(v, widen8_d_out(read8_d_out(at(p.d_out, t, i), count)));
        }
    }
    return sum;
}

fn products_of_bias(lane: u32, e: u32, t: u32) -> f32 {
    var sum = 0.0;
    for (var h = lane * 8u; h < p.hidden; h += STEP) {
        let b = widen8_bias(read8_bias(at(p.bias, e, h), p.hidden - h));
        sum += dot8(b, widen8_d_out(read8_d_out(at(p.d_out, t, h), p.hidden - h)));
    }
    return sum;
}

@compute @workgroup_size(THREADS)
fn combine_backward_weights(here: Here) {
    let thread = thread_of(here);
    let lane = thread % TEAM;
    let slot = number(here.group) * (THREADS / TEAM) + thread / TEAM;
    let t = slot / p.top_k;
    var row = 0xffffffffu;
    var sum = 0.0;
    if (slot < p.slots) {
        row = slot;
        if (has_slot_row) { row = load_slot_row(p.slot_row + slot); }
        if (row - p.row_begin < p.rows) {
            sum = products(lane, row - p.row_begin, t);
            if (has_bias) {
                let e = load_experts(at(p.experts, t, slot % p.top_k));
                if (e < p.experts_total) { sum += products_of_bias(lane, e, t); }
            }
        }
    }
    sum = team_sum(here, TEAM, sum);
    if (lane != 0u || slot >= p.slots) { return; }
    let mine = row - p.row_begin < p.rows || (row >= p.all_rows && p.row_begin == 0u);
    if (mine) { put(t, slot % p.top_k, p.scale * sum); }
}
