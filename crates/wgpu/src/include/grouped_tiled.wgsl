// The grouped product for many rows: tiles of TILE rows and 32 pairs of matrix rows by 2 TILE threads, 8 rows x 2 pairs
// each, in f32 multiply-adds.
//
//   find the tile: expert by expert, columns before rows, so that workgroups that run together read the same weights
//   for each 16 columns: x tile (gathered) and weight tile to workgroup memory, widened; the next are on their way
//                        sums += outer products
//   store
//
// A sum is over one column after the other, whatever the tile: the bits of a row depend on nothing but the row.
const THREADS = 2u * TILE;
const PAIRS = 32u;
const STEP = 16u;
// fours of a column of a tile, one more so that columns begin in different banks
const X_FOURS = TILE / 4u + 1u;
const W_FOURS = 17u;

// [column][row]; a four of weights is gate, gate, up, up of two neighbouring pairs
var<workgroup> x_tile: array<vec4<f32>, STEP * X_FOURS>;
var<workgroup> w_tile: array<vec4<f32>, STEP * W_FOURS>;
var<workgroup> scan: array<u32, THREADS>;
var<workgroup> found: vec4<u32>;

// A tile: its expert (from p.first on), its first row, its rows (0: there is no tile) and its first pair.
struct Tile { expert: u32, row: u32, rows: u32, pair: u32 }

fn row_tiles(rows: Rows) -> u32 {
    return select((rows.end - rows.begin + TILE - 1u) / TILE, 0u, rows.begin >= rows.end);
}

// The n-th tile, counted within an expert by columns.
fn tile_of(rows: Rows, n: u32) -> Tile {
    let row = rows.begin + n % row_tiles(rows) * TILE;
    return Tile(rows.expert - p.first, row, min(rows.end - row, TILE), n / row_tiles(rows) * PAIRS);
}

fn find(group: vec3<u32>, thread: u32) -> Tile {
    let columns = (p.pairs + PAIRS - 1u) / PAIRS;
    if (FIND == FIND_TILES) {
        let entry = p.groups + group.y * 3u;
        let first = load_groups(entry + 1u);
        let rows = clipped(load_groups(entry), first, first + load_groups(entry + 2u));
        let e = rows.expert - p.first;
        let none = rows.begin >= rows.end || e >= p.here || group.x >= columns;
        return Tile(e, rows.begin, select(rows.end - rows.begin, 0u, none), group.x * PAIRS);
    }
    let n = number(group);
    // each thread has some experts, and finds out how many tiles come before them
    let each = (p.here + THREADS - 1u) / THREADS;
    let last = min((thread + 1u) * each, p.here);
    var own = 0u;
    for (var e = thread * each; e < last; e++) { own += row_tiles(rows_of(p.first + e)) * columns; }
    var sum = own;
    scan[thread] = own;
    if (thread == 0u) { found = vec4<u32>(); }
    workgroupBarrier();
    for (var d = 1u; d < THREADS; d *= 2u) {
        if (thread >= d) { sum += scan[thread - d]; }
        workgroupBarrier();
        scan[thread] = sum;
        workgroupBarrier();
    }
    if (n < sum && n >= sum - own) {
        var before = sum - own;
        for (var e = thread * each; e < last; e++) {
            let rows = rows_of(p.first + e);
            let tiles = row_tiles(rows) * columns;
            if (n < before + tiles) {
                let tile = tile_of(rows, n - before);
                found = vec4<u32>(tile.expert, tile.row, tile.rows, tile.pair);
                break;
            }
            before += tiles;
        }
    }
    let tile = workgroupUniformLoad(&found);
    return Tile(tile.x, tile.y, tile.z, tile.w);
}

// Row r of x, eight columns from c on.
fn put_x(r: u32, c: u32, v: mat2x4<f32>) {
    let to = c * X_FOURS + r / 4u;
    let i = r % 4u;
    x_tile[to][i] = v[0].x;
    x_tile[to + X_FOURS][i] = v[0].y;
    x_tile[to + 2u * X_FOURS][i] = v[0].z;
    x_tile[to + 3u * X_FOURS][i] = v[0].w;
    x_tile[to + 4u * X_FOURS][i] = v[1].x;
    x_tile[to + 5u * X_FOURS][i] = v[1].y;
    x_tile[to + 6u * X_FOURS][i] = v[1].z;
    x_tile[to + 7u * X_FOURS][i] = v[1].w;
}

// Pair `j` of the tile, its gate row (half 0) or its up row (half 1).
fn put_w(j: u32, half: u32, c: u32, v: mat2x4<f32>) {
    let to = c * W_FOURS + j / 2u;
    let i = half * 2u + j % 2u;
    w_tile[to][i] = v[0].x;
    w_tile[to + W_FOURS][i] = v[0].y;
    w_tile[to + 2u * W_FOURS][i] = v[0].z;
    w_tile[to + 3u * W_FOURS][i] = v[0].w;
    w_tile[to + 4u * W_FOURS][i] = v[1].x;
    w_tile[to + 5u * W_FOURS][i] = v[1].y;
    w_tile[to + 6u * W_FOURS][i] = v[1].z;
    w_tile[to + 7u * W_FOURS][i] = v[1].w;
}

// By row, not an array, so that they surely stay in registers.
struct Sums {
    r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32>,
}

// The sums and the products of column i, of eight rows from a four of x on, and of a four of weights.
fn plus_column(s: Sums, i: u32, x: u32, w: u32) -> Sums {
    let low = x_tile[i * X_FOURS + x];
    let high = x_tile[i * X_FOURS + x + 1u];
    let v = w_tile[i * W_FOURS + w];
    return Sums(
        fma(vec4<f32>(low.x), v, s.r0),
        fma(vec4<f32>(low.y), v, s.r1),
        fma(vec4<f32>(low.z), v, s.r2),
        fma(vec4<f32>(low.w), v, s.r3),
        fma(vec4<f32>(high.x), v, s.r4),
        fma(vec4<f32>(high.y), v, s.r5),
        fma(vec4<f32>(high.z), v, s.r6),
        fma(vec4<f32>(high.w), v, s.r7),
    );
}

fn grouped_tiled(group: vec3<u32>, thread: u32) {
    let tile = find(group, thread);
    if (tile.rows == 0u) { return; }

    // the eight that this thread brings: of row r of x, and of pair j; with 64 threads gate and up, with 128 one of them
    let c = thread % 2u * 8u;
    let r = thread / 2u;
    let j = r % PAIRS;
    let both = TILE == PAIRS;
    let half = r / PAIRS;
    var x = x_of(slot_of(tile.row + min(r, tile.rows - 1u)));
    if (x == NONE) { x = p.x.offset; }
    let pair = min(tile.pair + j, p.pairs - 1u);
    let gate = at(p.gate, pair, tile.expert * p.expert_stride);
    let up = at(p.up, pair, tile.expert * p.expert_stride);

    var sums = Sums();
    let my_rows = thread / 16u * 2u;
    let my_pairs = thread % 16u;
    // columns that are left for this thread: it brings zeros beyond them
    var k = c;
    var a: Raw_x;
    var g: Raw_gate;
    var u: Raw_up;
    if (k < p.inner) {
        a = read8_x(x + k, p.inner - k);
        if (both || half == 0u) { g = read8_gate(gate + k, p.inner - k); }
        if (both || half == 1u) { u = read8_up(up + k, p.inner - k); }
    }
    for (var base = 0u; base < p.inner; base += STEP) {
        workgroupBarrier();
        put_x(r, c, widen8_x(a));
        if (both || half == 0u) { put_w(j, 0u, c, widen8_gate(g)); }
        if (both || half == 1u) { put_w(j, 1u, c, widen8_up(u)); }
        workgroupBarrier();
        k += STEP;
        if (k < p.inner) {
            a = read8_x(x + k, p.inner - k);
            if (both || half == 0u) { g = read8_gate(gate + k, p.inner - k); }
            if (both || half == 1u) { u = read8_up(up + k, p.inner - k); }
        } else {
            a = Raw_x();
            g = Raw_gate();
            u = Raw_up();
        }
        for (var i = 0u; i < STEP; i += 4u) {
            sums = plus_column(sums, i, my_rows, my_pairs);
            sums = plus_column(sums, i + 1u, my_rows, my_pairs);
            sums = plus_column(sums, i + 2u, my_rows, my_pairs);
            sums = plus_column(sums, i + 3u, my_rows, my_pairs);
        }
    }
    let first = my_rows * 4u;
    let j0 = tile.pair + my_pairs * 2u;
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
