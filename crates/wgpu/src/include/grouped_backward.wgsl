// The gradients of a grouped product, out[r] = matrix[e] . x[r]: what comes in is d, a row of p.outputs elements each.
//
//   d_x[r]      = d[r] . matrix[e]
//   d_matrix[e] = sum_r d[r]^T x[r]          r over the rows of e
//   d_bias[e]   = sum_r d[r]
//
// A row of d, or of x, is that of its slot's token, or its own; it is multiplied by p.scale and by the weight of its slot.
// A launch has a window of the experts and of the rows (groups.wgsl), of the columns of d (p.outputs of p.height), and of
// the rows of what is gathered (p.source_begin, p.source_rows): of rows outside it knows nothing.

// A row in its operand's window, NONE if it is not there, and what it is multiplied by.
struct Source { row: u32, weight: f32 }

fn gathered(row: u32) -> Source {
    let slot = slot_of(row);
    let i = slot / p.top_k - p.source_begin;
    if (slot == NONE || i >= p.source_rows) { return Source(NONE, 0.0); }
    if (!has_weights) { return Source(i, p.scale); }
    return Source(i, p.scale * load_weights(at(p.weights, slot / p.weight_columns, slot % p.weight_columns)));
}

fn plain(row: u32) -> Source { return Source(row - p.row_begin, 1.0); }

// Whether an expert has no row at all, and so no gradient that could be added.
fn is_idle(e: u32) -> bool {
    if (p.keeps == 0u) { return false; }
    if (FIND == FIND_ONE) { return p.rows == 0u; }
    return load_groups(p.groups + e) >= load_groups(p.groups + e + 1u);
}
