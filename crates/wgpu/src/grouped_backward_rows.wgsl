// d_x[r] = d[r] . matrix[e]: tiles of 64 rows and 64 columns of the matrix.
//
//   for each 16 rows of the matrix: tile of d (gathered, weighted) and of the matrix to workgroup memory, while those
//                                   before them are multiplied: sums += outer products
//
// A vector is four neighbours of a row, written by one thread. Between four columns of d and the next lie two more vectors
// than there are, between two rows of the matrix one more: stores and loads meet few banks twice.
const D_PITCH = TILE + 2u;
const M_PITCH = TILE / 4u + 1u;

var<workgroup> d_tile: array<vec4<f32>, STEP / 4u * D_PITCH>;
var<workgroup> m_tile: array<vec4<f32>, STEP * M_PITCH>;

fn column_tiles() -> u32 { return (p.inputs + TILE - 1u) / TILE; }

fn eight_of_matrix(e: u32, c: u32, i: u32) -> mat2x4<f32> {
    if (c >= p.outputs || i >= p.inputs) { return mat2x4<f32>(); }
    return widen8_matrix(read8_matrix(at(p.matrix, e * p.height + c, i), p.inputs - i));
}

// Four rows of d, of four columns.
fn rows_of_d(place: u32) -> mat4x4<f32> {
    return mat4x4<f32>(d_tile[place], d_tile[place + 1u], d_tile[place + 2u], d_tile[place + 3u]);
}

@compute @workgroup_size(THREADS)
fn grouped_backward_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let tile = find(group, thread);
    if (tile.rows == 0u) { return; }

    // the eight of d that this thread brings: row r, columns from c on; and of the matrix: row k, columns from i on
    let r = thread / 2u;
    let c = thread % 2u * 8u;
    let k = thread / 8u;
    let i = thread % 8u * 8u;
    var source = Source(NONE, 0.0);
    if (r < tile.rows) { source = gathered(tile.row + r); }
    let first = thread / 16u * 8u;
    let four = thread % 16u;
    let column = tile.column * TILE;
    var sums = Sums();
    // what is read in one turn is multiplied in the next
    for (var base = 0u; ; base += STEP) {
        let d = eight_of_d(source, base + c);
        let m = eight_of_matrix(tile.expert, base + k, column + i);
        if (base > 0u) { sums = multiply(sums, first, four); }
        if (base >= p.outputs) { break; }
        workgroupBarrier();
        let to = c / 4u * D_PITCH + r;
        d_tile[to] = d[0];
        d_tile[to + D_PITCH] = d[1];
        m_tile[k * M_PITCH + i / 4u] = m[0];
        m_tile[k * M_PITCH + i / 4u + 1u] = m[1];
        workgroupBarrier();
    }
    for (var n = 0u; n < 8u; n++) { put_row(tile, first + n, column + 4u * four, row_of(sums, n)); }
}

// The sums and the products of what is in workgroup memory: of eight rows of d from `first` on, and of a four of columns.
fn multiply(sums: Sums, first: u32, four: u32) -> Sums {
    var s = sums;
    for (var n = 0u; n < STEP / 4u; n++) {
        let place = n * D_PITCH + first;
        let row = 4u * n * M_PITCH + four;
        let w = mat4x4<f32>(
            m_tile[row], m_tile[row + M_PITCH], m_tile[row + 2u * M_PITCH], m_tile[row + 3u * M_PITCH],
        );
        s = plus(s, rows_of_d(place), rows_of_d(place + 4u), w);
    }
    return s;
}

// Row r of the tile, if it is there and its row of d in this launch's window.
fn put_row(tile: Tile, r: u32, i: u32, sums: vec4<f32>) {
    if (r >= tile.rows) { return; }
    if (gathered(tile.row + r).row == NONE) { return; }
    put_four(tile.row + r - p.row_begin, i, sums);
}
