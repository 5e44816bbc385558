// acc += w * y, or acc = w * y, w one number, one a row or one a column.

@compute @workgroup_size(256)
fn accumulate(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.width + 511u) / 512u;
    let n = number(group);
    let row = n / pieces;
    let i = (n % pieces) * 512u + 2u * thread;
    if (row >= p.rows || i >= p.width) { return; }
    let place = at(p.acc, row, i);
    let a = weighted(row, i);
    if (i + 1u == p.width) { store_acc(place, a); return; }
    store_pair_acc(place, a, weighted(row, i + 1u));
}

fn weighted(row: u32, i: u32) -> f32 {
    let y = load_y(at(p.y, row, i));
    if (ASSIGN) { return factor(row, i) * y; }
    return fma(factor(row, i), y, load_acc(at(p.acc, row, i)));
}

fn factor(row: u32, i: u32) -> f32 {
    if (!has_weights) { return p.weight; }
    if (p.per_column == 1u) { return load_weights(at(p.weights, 0u, i)); }
    return load_weights(at(p.weights, row, 0u));
}
