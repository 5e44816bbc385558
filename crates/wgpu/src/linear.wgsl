// out = x . weight^T + bias: a team an output column, TOKENS rows at once.

const SQUARES = false;

fn weighted(x: mat2x4<f32>, h: u32) -> mat2x4<f32> { return x; }

@compute @workgroup_size(256)
fn linear(here: Here) {
    let first = first_row(here.group);
    // a workgroup past the end, of the last line
    if (first >= p.rows) { return; }
    let column = column_of(here);
    let sum = dots(here, first, min(column, p.columns - 1u)).sum;
    let i = thread_of(here) % TEAM;
    if (i >= TOKENS || first + i >= p.rows || column >= p.columns) { return; }
    var y = sum[i];
    if (has_bias) { y += load_bias(at(p.bias, 0u, column)); }
    store_out(at(p.out, first + i, column), y);
}
