// d before its soft-cap: a logit y that was capped at c has the slope 1 - (y / c)^2.

fn slopes_of(row: u32, column: u32, count: u32) -> mat2x4<f32> {
    let y = widen8_capped(read8_capped(at(p.capped, row, column), count));
    let low = y[0] / p.limit;
    let high = y[1] / p.limit;
    return mat2x4<f32>(fma(-low, low, vec4(1.0)), fma(-high, high, vec4(1.0)));
}

// Eight neighbours of a row of d from column c on, zeros outside.
fn eight_of_d(source: Source, c: u32) -> mat2x4<f32> {
    if (source.row == NONE || c >= p.outputs) { return mat2x4<f32>(); }
    let count = p.outputs - c;
    var d = widen8_d(read8_d(at(p.d, source.row, c), count));
    if (has_capped) {
        let slopes = slopes_of(source.row, c, count);
        d = mat2x4<f32>(d[0] * slopes[0], d[1] * slopes[1]);
    }
    return source.weight * d;
}
