// Sums over the threads before a thread, of a workgroup of THREADS.

const THREADS = 256u;

// Of a scan its sums; free between scans.
var<workgroup> line: array<u32, THREADS>;

// What the threads before this one have.
fn sum_before(thread: u32, x: u32) -> u32 {
    workgroupBarrier();
    line[thread] = x;
    for (var distance = 1u; distance < THREADS; distance *= 2u) {
        workgroupBarrier();
        var left = 0u;
        if (thread >= distance) { left = line[thread - distance]; }
        workgroupBarrier();
        line[thread] += left;
    }
    return line[thread] - x;
}

// What all threads had in the last scan.
fn sum_of_all() -> u32 { return workgroupUniformLoad(&line[THREADS - 1u]); }
