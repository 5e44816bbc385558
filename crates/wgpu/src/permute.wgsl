// Groups the slots by expert, in one workgroup: for few slots.

@compute @workgroup_size(THREADS)
fn permute(@builtin(local_invocation_index) thread: u32) {
    let slots = Slots(0u, p.slots);
    count_slots(thread, slots);
    var own = 0u;
    for (var i = 0u; i < p.share; i++) { own += held[i]; }
    var row = sum_before(thread, own);
    let rows = sum_of_all();
    for (var i = 0u; i < p.share; i++) {
        let e = thread * p.share + i;
        let n = held[i];
        held[i] = row;
        if (e < p.experts_total) { store_offsets(p.offsets.offset + e, row); }
        row += n;
    }
    if (thread == 0u) { store_offsets(p.offsets.offset + p.experts_total, rows); }
    place_slots(thread, slots);
    for (var r = rows + thread; r < p.slots; r += THREADS) { store_row_slot(p.row_slot.offset + r, NO_ROW); }
}
