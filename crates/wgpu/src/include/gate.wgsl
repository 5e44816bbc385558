// What x is before the router, and what becomes of a router sum.

fn weighted(x: mat2x4<f32>, h: u32) -> mat2x4<f32> {
    if (!has_norm_weight) { return x; }
    let count = p.width - min(h, p.width);
    var w = widen8_norm_weight(read8_norm_weight(at(p.norm_weight, 0u, h), count));
    if (count < 8u) { w = first_of(w, count); }
    return mat2x4<f32>(x[0] * w[0], x[1] * w[1]);
}

// 1 where there is no norm
fn norm_factor(squares: f32) -> f32 {
    if (!SQUARES) { return 1.0; }
    return inverse_root(fma(squares, 1.0 / f32(p.width), p.eps));
}

fn finish_logit(row: u32, column: u32, sum: f32, factor: f32) {
    if (row >= p.rows || column >= p.columns) { return; }
    var bias = 0.0;
    if (has_bias) { bias = load_bias(at(p.bias, 0u, column)); }
    var logit = fma(p.scale, sum * factor, bias);
    if (p.softcap > 0.0) { logit = p.softcap * tanh_of(logit / p.softcap); }
    store_logits(at(p.logits, row, column), logit);
}

// Writes n of a row, by a workgroup.
fn write_normed(thread: u32, row: u32, factor: f32) {
    if (row >= p.rows) { return; }
    for (var h = 2u * thread; h < p.width; h += 512u) {
        let place = at(p.normed, row, h);
        let n = normed_element(row, h, factor);
        if (h + 1u == p.width) { store_normed(place, n); } else {
            store_pair_normed(place, n, normed_element(row, h + 1u, factor));
        }
    }
}

fn normed_element(row: u32, h: u32, factor: f32) -> f32 {
    let n = load_x(at(p.x, row, h)) * factor;
    if (!has_norm_weight) { return n; }
    return n * load_norm_weight(at(p.norm_weight, 0u, h));
}
