// A stable counting sort of a workgroup's slots. A thread looks after `share` neighbouring experts; of the others it learns
// through workgroup memory, which has room for CHUNK experts at a time.
//
//   count_slots  held[i] = slots of the thread's i-th expert
//   place_slots  held[i] = the row of its next slot

const NO_EXPERT = 0xffffffffu;
const NO_ROW = 0xffffffffu;
const STATUS_EXPERT_OUT_OF_RANGE = 2u;
const CHUNK = 2048u;
const SHARE = 16u;

var<workgroup> chunk: array<atomic<u32>, CHUNK>;
var<private> held: array<u32, SHARE>;

struct Slots { begin: u32, end: u32 }

// The slots of a workgroup; the last one has the rest.
fn slots_of(block: u32) -> Slots {
    let begin = block * p.slots_per_block;
    return Slots(begin, select(begin + p.slots_per_block, p.slots, block + 1u == p.blocks));
}

fn id_of(slot: u32) -> u32 { return load_experts(at(p.experts, slot / p.top_k, slot % p.top_k)); }

// The expert whose rows a slot of this id belongs to.
fn local_expert(id: u32) -> u32 { return select(NO_EXPERT, id, id >= p.first && id < p.end); }

fn count_slots(thread: u32, slots: Slots) {
    var bad = false;
    for (var base = 0u; base < p.experts_total; base += CHUNK) {
        for (var i = thread; i < CHUNK; i += THREADS) { atomicStore(&chunk[i], 0u); }
        workgroupBarrier();
        for (var slot = slots.begin + thread; slot < slots.end; slot += THREADS) {
            let id = id_of(slot);
            bad = bad || (id >= p.experts_total && id != NO_EXPERT);
            let e = local_expert(id);
            if (e != NO_EXPERT && e >= base && e - base < CHUNK) { atomicAdd(&chunk[e - base], 1u); }
        }
        workgroupBarrier();
        for (var i = 0u; i < p.share; i++) {
            let e = thread * p.share + i;
            if (e < p.experts_total && e >= base && e - base < CHUNK) { held[i] = atomicLoad(&chunk[e - base]); }
        }
        workgroupBarrier();
    }
    if (bad) { raise(STATUS_EXPERT_OUT_OF_RANGE); }
}

fn place_slots(thread: u32, slots: Slots) {
    for (var base = 0u; base < p.experts_total; base += CHUNK) {
        for (var i = 0u; i < p.share; i++) {
            let e = thread * p.share + i;
            if (e >= base && e - base < CHUNK) { atomicStore(&chunk[e - base], held[i]); }
        }
        for (var first = slots.begin; first < slots.end; first += THREADS) {
            let slot = first + thread;
            var e = NO_EXPERT;
            if (slot < slots.end) { e = local_expert(id_of(slot)); }
            if (slot < slots.end && e == NO_EXPERT) { store_slot_row(p.slot_row.offset + slot, NO_ROW); }
            if (e < base || e - base >= CHUNK) { e = NO_EXPERT; }
            line[thread] = e;
            workgroupBarrier();
            var row = 0u;
            if (e != NO_EXPERT) {
                row = atomicLoad(&chunk[e - base]);
                var other = 0u;
                for (; other + 4u <= thread; other += 4u) {
                    row += u32(line[other] == e) + u32(line[other + 1u] == e);
                    row += u32(line[other + 2u] == e) + u32(line[other + 3u] == e);
                }
                for (; other < thread; other++) { row += u32(line[other] == e); }
            }
            workgroupBarrier();
            if (e != NO_EXPERT) {
                atomicAdd(&chunk[e - base], 1u);
                store_row_slot(p.row_slot.offset + row, slot);
                store_slot_row(p.slot_row.offset + slot, row);
            }
        }
        workgroupBarrier();
    }
}
