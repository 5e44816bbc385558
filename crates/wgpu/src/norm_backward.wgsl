// d_x[t] = f * (d_n * weight - x * f^2 * mean(d_n * weight * x)), f = 1 / sqrt(mean(x^2) + eps): a workgroup a token. f is
// kept for the weight's gradient.

// An element of x, and of d_n times the weight.
fn element(t: u32, h: u32) -> vec2<f32> {
    var d = load_d_n(at(p.d_n, t, h));
    if (has_weight) { d *= load_weight(p.weight.offset + h); }
    return vec2<f32>(load_x(at(p.x, t, h)), d);
}

@compute @workgroup_size(THREADS)
fn norm_backward(here: Here) {
    let thread = thread_of(here);
    let t = number(here.group);
    if (t >= p.tokens) { return; }
    var squares = 0.0;
    var along = 0.0;
    for (var h = thread; h < p.hidden; h += THREADS) {
        let both = element(t, h);
        squares = fma(both.x, both.x, squares);
        along = fma(both.x, both.y, along);
    }
    squares = team_sum(here, THREADS, squares);
    let factor = inverse_root(squares / f32(p.hidden) + p.eps);
    if (has_factors && thread == 0u) { store_factors(p.factors.offset + t, factor); }
    if (!has_out) { return; }
    let back = factor * factor * (team_sum(here, THREADS, along) / f32(p.hidden));
    for (var h = 2u * thread; h < p.hidden; h += 2u * THREADS) {
        let a = element(t, h);
        let b = element(t, min(h + 1u, p.hidden - 1u));
        put_pair(t, h, p.hidden, factor * vec2<f32>(fma(-a.x, back, a.y), fma(-b.x, back, b.y)));
    }
}
