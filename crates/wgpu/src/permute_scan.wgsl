// Second of three: the first row of each expert, and of each expert in each block. `parts` threads share the blocks of an
// expert; a thread has `share` neighbouring parts.

var<private> sums: array<u32, 16>;

fn count_of(block: u32, e: u32) -> u32 { return p.slot_row.offset + block * p.slots_per_block + e; }

@compute @workgroup_size(THREADS)
fn permute_scan(@builtin(local_invocation_index) thread: u32) {
    let parts = p.experts_total * p.parts;
    let blocks = (p.blocks + p.parts - 1u) / p.parts;
    var own = 0u;
    for (var i = 0u; i < p.share; i++) {
        let part = thread * p.share + i;
        if (part >= parts) { break; }
        let first = part % p.parts * blocks;
        for (var block = first; block < min(first + blocks, p.blocks); block++) {
            sums[i] += load_slot_row(count_of(block, part / p.parts));
        }
        own += sums[i];
    }
    var row = sum_before(thread, own);
    let rows = sum_of_all();
    if (thread == 0u) { store_offsets(p.offsets.offset + p.experts_total, rows); }
    for (var i = 0u; i < p.share; i++) {
        let part = thread * p.share + i;
        if (part >= parts) { break; }
        let e = part / p.parts;
        if (part % p.parts == 0u) { store_offsets(p.offsets.offset + e, row); }
        let first = part % p.parts * blocks;
        for (var block = first; block < min(first + blocks, p.blocks); block++) {
            let n = load_slot_row(count_of(block, e));
            store_slot_row(count_of(block, e), row);
            row += n;
        }
    }
}
