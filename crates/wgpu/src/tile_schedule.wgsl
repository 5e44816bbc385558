// The rows of each expert in tiles of at most tile_rows, in one workgroup: a thread has `share` neighbouring experts. Where
// there are arguments, they are of two dispatches, each of so many columns of workgroups and a row a tile.

var<workgroup> first_tiles: array<u32, THREADS>;

fn offset_of(e: u32) -> u32 { return load_offsets(p.offsets.offset + e); }

fn tiles_of(e: u32) -> u32 {
    let begin = offset_of(e);
    let rows = max(offset_of(e + 1u), begin) - begin;
    return rows / p.tile_rows + u32(rows % p.tile_rows != 0u);
}

@compute @workgroup_size(THREADS)
fn tile_schedule(@builtin(local_invocation_index) thread: u32) {
    var own = 0u;
    for (var e = thread * p.share; e < min((thread + 1u) * p.share, p.experts_total); e++) { own += tiles_of(e); }
    first_tiles[thread] = sum_before(thread, own);
    let tiles = min(sum_of_all(), p.capacity);
    if (thread == 0u) {
        store_count(p.count.offset, tiles);
        for (var i = 0u; i < 2u; i++) {
            store_arguments(at(p.arguments, i, 0u), select(p.columns, p.other_columns, i == 1u));
            store_arguments(at(p.arguments, i, 1u), tiles);
            store_arguments(at(p.arguments, i, 2u), 1u);
        }
    }
    for (var tile = thread; tile < tiles; tile += THREADS) {
        var low = 0u;
        for (var step = THREADS / 2u; step > 0u; step /= 2u) {
            if (first_tiles[low + step] <= tile) { low += step; }
        }
        var e = low * p.share;
        var left = tile - first_tiles[low];
        for (var n = tiles_of(e); left >= n; n = tiles_of(e)) {
            left -= n;
            e++;
        }
        let row = offset_of(e) + left * p.tile_rows;
        store_tiles(at(p.tiles, tile, 0u), e);
        store_tiles(at(p.tiles, tile, 1u), row);
        store_tiles(at(p.tiles, tile, 2u), min(p.tile_rows, offset_of(e + 1u) - row));
    }
}
