// out = x . weight^T + bias, 64 rows by 64 columns a workgroup.

const SQUARES = false;

fn weighted(x: mat2x4<f32>, h: u32) -> mat2x4<f32> { return x; }

@compute @workgroup_size(256)
fn linear_tiled(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first_row = tile_row(group);
    // a workgroup past the end, of the last line
    if (first_row >= p.rows) { return; }
    let first_column = tile_column(group);
    let sums = multiply_tile(thread, first_row, first_column);
    let row = first_row + thread / 16u * 4u;
    let column = first_column + thread % 16u * 4u;
    finish_row(row, column, sums.r0);
    finish_row(row + 1u, column, sums.r1);
    finish_row(row + 2u, column, sums.r2);
    finish_row(row + 3u, column, sums.r3);
}

fn finish_row(row: u32, first: u32, sums: vec4<f32>) {
    if (row >= p.rows) { return; }
    for (var j = 0u; j < 4u && first + j < p.columns; j++) {
        var y = sums[j];
        if (has_bias) { y += load_bias(at(p.bias, 0u, first + j)); }
        store_out(at(p.out, row, first + j), y);
    }
}
