// acc += w * y, w one number, one a row or one a column.

@compute @workgroup_size(256)
fn accumulate(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.width + 511u) / 512u;
    let n = number(group);
    let row = n / pieces;
    let i = (n % pieces) * 512u + 2u * thread;
    if (row >= p.rows || i >= p.width) { return; }
    let acc = at(p.acc, row, i);
    let y = at(p.y, row, i);
    let a = load_acc(acc) + factor(row, i) * load_y(y);
    if (i + 1u == p.width) { store_acc(acc, a); return; }
    store_pair_acc(acc, a, load_acc(acc + 1u) + factor(row, i + 1u) * load_y(y + 1u));
}

fn factor(row: u32, i: u32) -> f32 {
    if (!has_weights) { return p.weight; }
    if (p.per_column == 1u) { return load_weights(at(p.weights, 0u, i)); }
    return load_weights(at(p.weights, row, 0u));
}
