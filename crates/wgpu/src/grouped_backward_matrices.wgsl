// d_matrix[e] = sum_r d[r]^T x[r]: tiles of 64 rows and 64 columns of a matrix, over all rows of its expert in this launch.
//
//   for each 16 rows: what d and x have of them to workgroup memory, weighted, while those before them are multiplied:
//                     sums += outer products
//
// A vector is four neighbours of a row, written by one thread; between two rows lies one more than there are.
const PITCH = TILE / 4u + 1u;

var<workgroup> d_tile: array<vec4<f32>, STEP * PITCH>;
var<workgroup> x_tile: array<vec4<f32>, STEP * PITCH>;

fn eight_of_x(source: Source, i: u32) -> mat2x4<f32> {
    if (source.row == NONE || i >= p.inputs) { return mat2x4<f32>(); }
    return source.weight * widen8_x(read8_x(at(p.x, source.row, i), p.inputs - i));
}

// Eight elements of a row of d and of x.
struct Both { d: mat2x4<f32>, x: mat2x4<f32> }

fn both_of(rows: Rows, row: u32, c: u32, i: u32) -> Both {
    if (row >= rows.end) { return Both(); }
    var of_d = plain(row);
    var of_x = gathered(row);
    if (!GATHERS_X) {
        of_d = gathered(row);
        of_x = plain(row);
    }
    // a row that is not in the window of one of them is another launch's
    if (of_d.row == NONE || of_x.row == NONE) { return Both(); }
    return Both(eight_of_d(of_d, c), eight_of_x(of_x, i));
}

// Four columns of d, of four rows from n on.
fn columns_of_d(n: u32, four: u32) -> mat4x4<f32> {
    let place = n * PITCH + four;
    return transpose(mat4x4<f32>(
        d_tile[place], d_tile[place + PITCH], d_tile[place + 2u * PITCH], d_tile[place + 3u * PITCH],
    ));
}

@compute @workgroup_size(THREADS)
fn grouped_backward_matrices(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let across = (p.inputs + TILE - 1u) / TILE;
    let down = (p.outputs + TILE - 1u) / TILE;
    let n = number(group);
    let e = n / across / down;
    if (e >= p.here) { return; }
    if (is_idle(p.first + e)) { return; }
    let rows = rows_of(p.first + e);
    let top = n / across % down * TILE;
    let left = n % across * TILE;

    // what this thread brings: eight of row k
    let k = thread / 8u;
    let c = thread % 8u * 8u;
    let first = thread / 16u * 8u;
    let four = thread % 16u;
    var sums = Sums();
    // what is read in one turn is multiplied in the next
    for (var base = rows.begin; ; base += STEP) {
        let next = both_of(rows, base + k, top + c, left + c);
        if (base > rows.begin) { sums = multiply(sums, first / 4u, four); }
        if (base >= rows.end) { break; }
        workgroupBarrier();
        let place = k * PITCH + c / 4u;
        d_tile[place] = next.d[0];
        d_tile[place + 1u] = next.d[1];
        x_tile[place] = next.x[0];
        x_tile[place + 1u] = next.x[1];
        workgroupBarrier();
    }
    for (var i = 0u; i < 8u; i++) { put_row(e, top + first + i, left + 4u * four, row_of(sums, i)); }
}

// The sums and the products of what is in workgroup memory: of two fours of columns of d, and of one of x.
fn multiply(sums: Sums, of_d: u32, of_x: u32) -> Sums {
    var s = sums;
    for (var n = 0u; n < STEP; n += 4u) {
        let row = n * PITCH + of_x;
        let w = mat4x4<f32>(x_tile[row], x_tile[row + PITCH], x_tile[row + 2u * PITCH], x_tile[row + 3u * PITCH]);
        s = plus(s, columns_of_d(n, of_d), columns_of_d(n, of_d + 1u), w);
    }
    return s;
}

fn put_row(e: u32, c: u32, i: u32, sums: vec4<f32>) {
    if (c < p.outputs) { put_four(e * p.height + c, i, sums); }
}
