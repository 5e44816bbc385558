// Third of three: each block sorts its slots to their rows.

@compute @workgroup_size(THREADS)
fn permute_scatter(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let block = number(group);
    if (block >= p.blocks) { return; }
    let slots = slots_of(block);
    for (var i = 0u; i < p.share; i++) {
        let e = thread * p.share + i;
        if (e < p.experts_total) { held[i] = load_slot_row(p.slot_row.offset + slots.begin + e); }
    }
    // all have their rows before slot_row is written over them
    storageBarrier();
    workgroupBarrier();
    place_slots(thread, slots);
    let rows = load_offsets(p.offsets.offset + p.experts_total);
    for (var r = rows + block * THREADS + thread; r < p.slots; r += p.blocks * THREADS) {
        store_row_slot(p.row_slot.offset + r, NO_ROW);
    }
}
