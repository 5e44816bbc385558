// The grouped product: every row times its expert's matrix. What its kernels share: where rows of x and weights are
// found, and what becomes of the sums.
//
//   out[r] = epilogue( input_weight[r] * matrix[expert of r] . x[row of r] + bias[expert of r] )
//
// The rows of a matrix come in pairs, one of each from `gate` and `up`:
//   GATED   pair j is gate row j and up row j: output j                    (ACTIVATE: act(g, u); else g at j, u at I + j)
//   else    pair j is row 2j and row 2j + 1: outputs 2j and 2j + 1
// A launch has a window of the experts (p.first, p.here), of the pairs (p.first_pair, p.pairs), of the rows (p.row_begin,
// p.row_end: those that are written) and of the rows of x (p.x_begin, p.x_rows): what lies outside is another launch's.
// What is read of a pair, a row or an expert beyond the last is never stored; a read beyond a binding is harmless in WGSL.

// Where the row of x of a slot begins; NONE: in another launch's window.
fn x_of(slot: u32) -> u32 {
    let row = slot / p.top_k - p.x_begin;
    return select(NONE, at(p.x, row, 0u), slot != NONE && row < p.x_rows);
}

fn input_weight(slot: u32) -> f32 {
    if (!has_input_weights) { return 1.0; }
    return load_input_weights(at(p.input_weights, slot / p.input_columns, slot % p.input_columns));
}

fn finish(e: u32, weight: f32, sum: f32, i: u32) -> f32 {
    var bias = 0.0;
    if (has_bias) { bias = load_bias(at(p.bias, e, i)); }
    return fma(weight, sum, bias);
}

fn store_two(row: u32, i: u32, end: u32, a: f32, b: f32) {
    let place = at(p.out, row - p.row_begin, i);
    if (i + 1u < end) { store_pair_out(place, a, b); } else if (i < end) { store_out(place, a); }
}

// Two neighbouring pairs of a row, from pair j of the window on: their sums with `gate`, then with `up`. `e` counts from
// p.first.
fn store_pairs(row: u32, e: u32, j: u32, sums: vec4<f32>) {
    let slot = slot_of(row);
    if (x_of(slot) == NONE) { return; }
    let weight = input_weight(slot);
    let i = p.first_pair + j;
    if (GATED) {
        let g = vec2<f32>(finish(e, weight, sums.x, i), finish(e, weight, sums.y, i + 1u));
        let u = vec2<f32>(finish(e, weight, sums.z, p.outputs + i), finish(e, weight, sums.w, p.outputs + i + 1u));
        if (ACTIVATE) {
            store_two(row, i, p.end, activate(g.x, u.x, p.limit, p.alpha), activate(g.y, u.y, p.limit, p.alpha));
        } else {
            store_two(row, i, p.end, g.x, g.y);
            store_two(row, p.outputs + i, p.outputs + p.end, u.x, u.y);
        }
        return;
    }
    var u: vec4<f32>;
    u.x = finish(e, weight, sums.x, 2u * i);
    u.y = finish(e, weight, sums.z, 2u * i + 1u);
    u.z = finish(e, weight, sums.y, 2u * i + 2u);
    u.w = finish(e, weight, sums.w, 2u * i + 3u);
    if (ACTIVATE) {
        u.x = activate(0.0, u.x, p.limit, p.alpha);
        u.y = activate(0.0, u.y, p.limit, p.alpha);
        u.z = activate(0.0, u.z, p.limit, p.alpha);
        u.w = activate(0.0, u.w, p.limit, p.alpha);
    }
    store_two(row, 2u * i, p.end, u.x, u.y);
    store_two(row, 2u * i + 2u, p.end, u.z, u.w);
}
