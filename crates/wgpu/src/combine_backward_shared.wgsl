// d_y[t] = scale * s[t] * d_out[t], d_s[t] = scale * sum_h y[t,h] * d_out[t,h], times s (1 - s) for a logit: a workgroup a
// token.

@compute @workgroup_size(THREADS)
fn combine_backward_shared(here: Here) {
    let thread = thread_of(here);
    let t = number(here.group);
    if (t >= p.tokens) { return; }
    var factor = 1.0;
    var slope = 1.0;
    if (has_gate) {
        factor = load_gate(at(p.gate, t, 0u));
        if (p.logit != 0u) {
            slope = sigmoid(factor) * sigmoid(-factor);
            factor = sigmoid(factor);
        }
    }
    factor *= p.scale;
    var sum = 0.0;
    for (var h = 2u * thread; h < p.hidden; h += 2u * THREADS) {
        let last = h + 1u == p.hidden;
        let d = at(p.d_out, t, h);
        let a = load_d_out(d);
        let b = select(load_d_out(d + select(1u, 0u, last)), 0.0, last);
        if (has_y) {
            let y = at(p.y, t, h);
            sum = fma(a, load_y(y), sum);
            if (!last) { sum = fma(b, load_y(y + 1u), sum); }
        }
        if (!has_d_y) { continue; }
        let place = at(p.d_y, t, h);
        if (last) { store_d_y(place, factor * a); } else { store_pair_d_y(place, factor * a, factor * b); }
    }
    if (!has_out) { return; }
    sum = team_sum(here, THREADS, sum);
    if (thread == 0u) { put(t, 0u, p.scale * slope * sum); }
}
