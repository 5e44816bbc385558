// The grouped product for many rows: tiles of 32 rows and 64 pairs of matrix rows by 128 threads, 8 rows x 2 pairs each, in
// f32 multiply-adds. 32 threads have the same 8 rows, and multiply only if the tile has any of these.
//
//   find the tile: expert by expert, columns before rows, so that workgroups that run together read the same weights
//   for each 16 columns: x tile (gathered) and weight tile to workgroup memory, widened; the next are on their way
//                        sums += outer products
//   store
//
// A sum is over one column after the other: the bits of a row depend on nothing but the row.
const THREADS = 128u;
const STEP = 16u;
// threads that have the same rows
const ACROSS = PAIRS / 2u;
// A vector is four neighbouring columns of a row, written by one thread: vectors that several threads write parts of are
// not for Metal and D3D. Between four columns and the next lie two more vectors than there are, and so that neighbours read
// neighbours, the gate rows of even pairs lie together, those of odd ones, and the up rows of either, each two more: stores
// and loads meet no bank twice.
const X_PITCH = TILE + 2u;
const W_PART = PAIRS / 2u + 2u;
const W_PITCH = 4u * W_PART + 2u;

var<workgroup> x_tile: array<vec4<f32>, STEP / 4u * X_PITCH>;
var<workgroup> w_tile: array<vec4<f32>, STEP / 4u * W_PITCH>;

fn column_tiles() -> u32 { return (p.pairs + PAIRS - 1u) / PAIRS; }

// Row r of x, eight columns from c on.
fn put_x(r: u32, c: u32, v: mat2x4<f32>) {
    let to = c / 4u * X_PITCH + r;
    x_tile[to] = v[0];
    x_tile[to + X_PITCH] = v[1];
}

// Pair `j` of the tile, its gate row (half 0) or its up row (half 1).
fn put_w(j: u32, half: u32, c: u32, v: mat2x4<f32>) {
    let to = c / 4u * W_PITCH + (half * 2u + j % 2u) * W_PART + j / 2u;
    w_tile[to] = v[0];
    w_tile[to + W_PITCH] = v[1];
}

// By row, not an array, so that they surely stay in registers.
struct Sums {
    r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32>,
}

// The sums and the products of four columns, of eight rows from row `r` of the tile on, and of two neighbouring pairs: gate,
// gate, up, up.
fn plus_columns(s: Sums, four: u32, r: u32, pairs: u32) -> Sums {
    let x = four * X_PITCH + r;
    let w = four * W_PITCH + pairs;
    let rows = mat4x4<f32>(w_tile[w], w_tile[w + W_PART], w_tile[w + 2u * W_PART], w_tile[w + 3u * W_PART]);
    let columns = transpose(rows);
    return Sums(
        plus_row(s.r0, x_tile[x], columns),
        plus_row(s.r1, x_tile[x + 1u], columns),
        plus_row(s.r2, x_tile[x + 2u], columns),
        plus_row(s.r3, x_tile[x + 3u], columns),
        plus_row(s.r4, x_tile[x + 4u], columns),
        plus_row(s.r5, x_tile[x + 5u], columns),
        plus_row(s.r6, x_tile[x + 6u], columns),
        plus_row(s.r7, x_tile[x + 7u], columns),
    );
}

fn grouped_tiled(group: vec3<u32>, thread: u32) {
    let tile = find(group, thread);
    if (tile.rows == 0u) { return; }

    // the eights that this thread brings: of row r of x, if there is one, and of the gate row and the up row of pair r
    let c = thread % 2u * 8u;
    let r = thread / 2u;
    let of_x = r < tile.rows;
    var x = x_of(slot_of(tile.row + min(r, tile.rows - 1u)));
    if (x == NONE) { x = p.x.offset; }
    let pair = min(tile.column * PAIRS + r, p.pairs - 1u);
    let gate = at(p.gate, pair, tile.expert * p.expert_stride);
    let up = at(p.up, pair, tile.expert * p.expert_stride);

    var sums = Sums();
    let first = thread / ACROSS * 8u;
    let multiplies = first < tile.rows;
    let my_pairs = thread % ACROSS;
    // columns that are left for this thread: it brings zeros beyond them
    var k = c;
    var a: Raw_x;
    var g: Raw_gate;
    var u: Raw_up;
    if (k < p.inner) {
        if (of_x) { a = read8_x(x + k, p.inner - k); }
        g = read8_gate(gate + k, p.inner - k);
        u = read8_up(up + k, p.inner - k);
    }
    for (var base = 0u; base < p.inner; base += STEP) {
        workgroupBarrier();
        if (of_x) { put_x(r, c, widen8_x(a)); }
        put_w(r, 0u, c, widen8_gate(g));
        put_w(r, 1u, c, widen8_up(u));
        workgroupBarrier();
        k += STEP;
        if (k < p.inner) {
            if (of_x) { a = read8_x(x + k, p.inner - k); }
            g = read8_gate(gate + k, p.inner - k);
            u = read8_up(up + k, p.inner - k);
        } else {
            a = Raw_x();
            g = Raw_gate();
            u = Raw_up();
        }
        if (multiplies) {
            for (var four = 0u; four < STEP / 4u; four++) { sums = plus_columns(sums, four, first, my_pairs); }
        }
    }
    let j0 = tile.column * PAIRS + my_pairs * 2u;
    let row = tile.row + first;
    if (first + 0u < tile.rows) { store_pairs(row, tile.expert, j0, sums.r0); }
    if (first + 1u < tile.rows) { store_pairs(row + 1u, tile.expert, j0, sums.r1); }
    if (first + 2u < tile.rows) { store_pairs(row + 2u, tile.expert, j0, sums.r2); }
    if (first + 3u < tile.rows) { store_pairs(row + 3u, tile.expert, j0, sums.r3); }
    if (first + 4u < tile.rows) { store_pairs(row + 4u, tile.expert, j0, sums.r4); }
    if (first + 5u < tile.rows) { store_pairs(row + 5u, tile.expert, j0, sums.r5); }
    if (first + 6u < tile.rows) { store_pairs(row + 6u, tile.expert, j0, sums.r6); }
    if (first + 7u < tile.rows) { store_pairs(row + 7u, tile.expert, j0, sums.r7); }
}
