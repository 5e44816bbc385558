// d_weight[h] = sum_t d_n[t,h] * x[t,h] * f[t], by what norm_backward kept of f: a workgroup has 64 columns.

const THREADS = 256u;

fn pair_of(row: u32, column: u32) -> vec2<f32> {
    if (column >= p.hidden) { return vec2<f32>(); }
    let f = load_factors(p.factors.offset + row);
    let x = at(p.x, row, column);
    let d = at(p.d_n, row, column);
    var pair = vec2<f32>(load_d_n(d) * (load_x(x) * f), 0.0);
    if (column + 1u < p.hidden) { pair.y = load_d_n(d + 1u) * (load_x(x + 1u) * f); }
    return pair;
}

@compute @workgroup_size(THREADS)
fn norm_backward_weight(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = number(group) * COLUMNS;
    if (first >= p.hidden) { return; }
    let column = first + thread % LINE * 2u;
    let sum = column_sums(thread, vec2<u32>(0u, p.tokens), column);
    if (thread < LINE) { put_pair(0u, column, p.hidden, sum + partial_pair(0u, column, p.hidden)); }
}
