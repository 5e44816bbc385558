// logits = softcap(scale * (n . router^T) + bias), 64 tokens by 64 experts a workgroup. The router is `weight`.

@compute @workgroup_size(256)
fn gate_tiled(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first_row = tile_row(group);
    // a workgroup past the end, of the last line
    if (first_row >= p.rows) { return; }
    let first_column = tile_column(group);
    let sums = multiply_tile(thread, first_row, first_column);
    let r = thread / 16u * 4u;
    let column = first_column + thread % 16u * 4u;
    finish_row(first_row, r, column, sums.r0);
    finish_row(first_row, r + 1u, column, sums.r1);
    finish_row(first_row, r + 2u, column, sums.r2);
    finish_row(first_row, r + 3u, column, sums.r3);
    if (has_normed && first_column == 0u) {
        for (var r = 0u; r < TILE; r++) { write_normed(thread, first_row + r, norm_factor(squares_of(r))); }
    }
}

fn finish_row(first_row: u32, r: u32, column: u32, sums: vec4<f32>) {
    let factor = norm_factor(squares_of(r));
    for (var j = 0u; j < 4u; j++) { finish_logit(first_row + r, column + j, sums[j], factor); }
}
