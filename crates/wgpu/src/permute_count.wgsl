// First of three: the experts' slots of each block. They are left where the block later writes slot_row, so that the sort
// needs no memory of its own: a block has E slots at least.

@compute @workgroup_size(THREADS)
fn permute_count(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let block = number(group);
    if (block >= p.blocks) { return; }
    let slots = slots_of(block);
    count_slots(thread, slots);
    for (var i = 0u; i < p.share; i++) {
        let e = thread * p.share + i;
        if (e < p.experts_total) { store_slot_row(p.slot_row.offset + slots.begin + e, held[i]); }
    }
}
