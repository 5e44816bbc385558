// d_bias[e] = sum_r d[r]: a workgroup has 64 columns of an expert.

const THREADS = 256u;

fn pair_of(row: u32, column: u32) -> vec2<f32> {
    let source = gathered(row);
    return vec2<f32>(element_of_d(source, column), element_of_d(source, column + 1u));
}

fn element_of_d(source: Source, c: u32) -> f32 {
    if (source.row == NONE || c >= p.outputs) { return 0.0; }
    let d = source.weight * load_d(at(p.d, source.row, c));
    if (!has_capped) { return d; }
    let y = load_capped(at(p.capped, source.row, c)) / p.limit;
    return d * fma(-y, y, 1.0);
}

@compute @workgroup_size(THREADS)
fn grouped_backward_bias(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let across = (p.outputs + COLUMNS - 1u) / COLUMNS;
    let n = number(group);
    let e = n / across;
    if (e >= p.here) { return; }
    if (is_idle(p.first + e)) { return; }
    let rows = rows_of(p.first + e);
    let column = n % across * COLUMNS + thread % LINE * 2u;
    let sum = column_sums(thread, vec2<u32>(rows.begin, rows.end), column);
    if (thread < LINE) { put_pair(e, column, p.outputs, sum + partial_pair(e, column, p.outputs)); }
}
