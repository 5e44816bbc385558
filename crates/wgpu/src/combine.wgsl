// out[t] = residual[t] + routed_scale * sum_k w[t,k] * y[t,k] + shared, slots in order; then its norm. A slot whose expert is
// among p.first .. p.end copies: its part is the token itself.
//
// Without NORM a row is cut into pieces of 512 for several workgroups. With it a workgroup has the row: it sums the
// squares, keeping the values if they fit in STASH (else they are formed again), and then writes. A thread writes only
// what it alone has read, so that the residual may be out itself. Without out, only the norm is written.

var<workgroup> stash: array<vec2<f32>, max(STASH / 2u, 1u)>;

struct Row { t: u32, shared_factor: f32 }

fn value_of(row: Row, h: u32) -> vec2<f32> {
    let next = next_of(h);
    var value = vec2<f32>(0.0);
    for (var k = 0u; k < p.top_k; k++) {
        var w = 1.0;
        if (has_weights) { w = load_weights(at(p.weights, row.t, k)); }
        if (has_experts && copies(load_experts(at(p.experts, row.t, k)))) {
            let x = at(p.x, row.t, 0u);
            value = fma(vec2<f32>(w), vec2<f32>(load_x(x + h), load_x(x + next)), value);
            continue;
        }
        var source = row.t * p.top_k + k;
        if (has_slot_row) {
            source = load_slot_row(p.slot_row.offset + source);
            if (source >= p.rows) { continue; }
        }
        let y = at(p.y, source, 0u);
        value = fma(vec2<f32>(w), vec2<f32>(load_y(y + h), load_y(y + next)), value);
    }
    return out_of(value, beside(row.t, h, row.shared_factor));
}

fn copies(expert: u32) -> bool { return expert >= p.first && expert < p.end; }

fn write_normed(t: u32, h: u32, value: vec2<f32>) {
    let last = h + 1u >= p.hidden;
    var weight = vec2<f32>(1.0);
    if (has_norm_weight) {
        let w = p.norm_weight.offset + h;
        weight = vec2<f32>(load_norm_weight(w), load_norm_weight(select(w + 1u, w, last)));
    }
    let n = value * weight;
    let place = at(p.normed, t, h);
    if (last) { store_normed(place, n.x); } else { store_pair_normed(place, n.x, n.y); }
}

@compute @workgroup_size(256)
fn combine(here: Here) {
    let thread = thread_of(here);
    if (!NORM) {
        let pieces = (p.hidden + 511u) / 512u;
        let n = number(here.group);
        let t = n / pieces;
        let h = (n % pieces) * 512u + 2u * thread;
        if (t < p.tokens && h < p.hidden) { write_out(t, h, value_of(Row(t, shared_factor(t)), h)); }
        return;
    }
    // every thread of a workgroup past the end leaves
    let t = number(here.group);
    if (t >= p.tokens) { return; }
    let row = Row(t, shared_factor(t));
    var squares = 0.0;
    for (var h = 2u * thread; h < p.hidden; h += 512u) {
        let value = value_of(row, h);
        squares = fma(value.x, value.x, squares);
        if (h + 1u < p.hidden) { squares = fma(value.y, value.y, squares); }
        if (STASH > 0u) { stash[h / 2u] = value; }
    }
    let scale = 1.0 / sqrt(team_sum(here, THREADS, squares) / f32(p.hidden) + p.eps);
    for (var h = 2u * thread; h < p.hidden; h += 512u) {
        var value: vec2<f32>;
        if (STASH > 0u) { value = stash[h / 2u]; } else { value = value_of(row, h); }
        if (has_out) { write_out(t, h, value); }
        write_normed(t, h, scale * value);
    }
}
