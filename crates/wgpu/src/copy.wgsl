// out = source, elements of 4 bytes.

@compute @workgroup_size(256)
fn copy(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let pieces = (p.width + 511u) / 512u;
    let n = number(group);
    let row = n / pieces;
    let i = (n % pieces) * 512u + 2u * thread;
    if (row >= p.rows) { return; }
    for (var j = i; j < min(i + 2u, p.width); j++) { store_out(at(p.out, row, j), load_source(at(p.source, row, j))); }
}
