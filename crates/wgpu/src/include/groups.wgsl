// Rows that are grouped by expert: which are whose. A launch has a window of the experts (p.first, p.here) and of the rows
// (p.row_begin, p.row_end); p.rows are all rows, and as many are the slots.
//
// FIND, what `groups` holds:
const FIND_ONE = 0u;      // nothing: all rows are the one expert's
const FIND_SLOTS = 1u;    // [R] the expert of each row, which are not grouped
const FIND_EXPERTS = 2u;  // [E + 1] the first row of each expert; workgroups go by expert
const FIND_ROWS = 3u;     // the same; workgroups go by row
const FIND_TILES = 4u;    // [M, 3] expert, first row, rows of each tile
const NONE = 0xffffffffu;

// Rows of an expert.
struct Rows { expert: u32, begin: u32, end: u32 }

fn clipped(e: u32, begin: u32, end: u32) -> Rows {
    return Rows(e, max(begin, p.row_begin), min(end, p.row_end));
}

fn rows_of(e: u32) -> Rows {
    if (FIND == FIND_ONE) { return clipped(e, 0u, p.rows); }
    return clipped(e, load_groups(p.groups + e), load_groups(p.groups + e + 1u));
}

// The slot of a row, which names its token and its input weight; NONE: there is none.
fn slot_of(row: u32) -> u32 {
    if (!has_row_slot) { return row; }
    let slot = load_row_slot(p.row_slot + row);
    return select(NONE, slot, slot < p.rows);
}
