// Tiles of TILE rows of an expert, and the workgroup of THREADS threads that has each. `column_tiles` says how many tiles
// have the same rows.

var<workgroup> scan: array<u32, THREADS>;
var<workgroup> found: vec4<u32>;

// A tile: its expert (from p.first on), its first row, its rows (0: there is no tile) and its number among those of the
// same rows.
struct Tile { expert: u32, row: u32, rows: u32, column: u32 }

fn row_tiles(rows: Rows) -> u32 {
    return select((rows.end - rows.begin + TILE - 1u) / TILE, 0u, rows.begin >= rows.end);
}

// The n-th tile, counted within an expert by columns.
fn tile_of(rows: Rows, n: u32) -> Tile {
    let row = rows.begin + n % row_tiles(rows) * TILE;
    return Tile(rows.expert - p.first, row, min(rows.end - row, TILE), n / row_tiles(rows));
}

fn find(group: vec3<u32>, thread: u32) -> Tile {
    let columns = column_tiles();
    if (FIND == FIND_TILES) {
        let entry = p.groups + group.y * 3u;
        let first = load_groups(entry + 1u);
        let rows = clipped(load_groups(entry), first, first + load_groups(entry + 2u));
        let e = rows.expert - p.first;
        let none = rows.begin >= rows.end || e >= p.here || group.x >= columns;
        return Tile(e, rows.begin, select(rows.end - rows.begin, 0u, none), group.x);
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
                found = vec4<u32>(tile.expert, tile.row, tile.rows, tile.column);
                break;
            }
            before += tiles;
        }
    }
    let tile = workgroupUniformLoad(&found);
    return Tile(tile.x, tile.y, tile.z, tile.w);
}
