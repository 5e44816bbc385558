// Sums over a team: neighbouring threads of a workgroup of THREADS, a power of two of them up to all. The same
// tree, and so the same bits, whatever the size of a subgroup, and without subgroups.
//
//   @compute @workgroup_size(256)
//   fn entry(here: Here) {
//       let thread = thread_of(here);              // teams are made of these numbers, not of local_invocation_index
//       let total = team_sum(here, 32u, x);        // in every thread of the team
//
// Every thread of the workgroup calls them, as often as every other one: they have barriers. `Here` holds the builtins
// (here.group is workgroup_id); it and `in_subgroup`, `exchanged...` are in reduce_subgroup.wgsl or reduce_memory.wgsl.

const THREADS = 256u;

var<workgroup> reduce_words: array<u32, THREADS>;
var<workgroup> reduce_vectors: array<vec4<f32>, THREADS>;

// Each component by itself.
fn team_sum4(here: Here, team: u32, x: vec4<f32>) -> vec4<f32> {
    let thread = thread_of(here);
    let near = min(team, in_subgroup(here));
    var sum = x;
    for (var mask = 1u; mask < near; mask <<= 1u) { sum += exchanged4(sum, mask); }
    for (var mask = near; mask < team; mask <<= 1u) {
        workgroupBarrier();
        reduce_vectors[thread] = sum;
        workgroupBarrier();
        sum += reduce_vectors[thread ^ mask];
    }
    return sum;
}

fn team_sum(here: Here, team: u32, x: f32) -> f32 {
    let thread = thread_of(here);
    let near = min(team, in_subgroup(here));
    var sum = x;
    for (var mask = 1u; mask < near; mask <<= 1u) { sum += bitcast<f32>(exchanged(bitcast<u32>(sum), mask)); }
    for (var mask = near; mask < team; mask <<= 1u) {
        workgroupBarrier();
        reduce_words[thread] = bitcast<u32>(sum);
        workgroupBarrier();
        sum += bitcast<f32>(reduce_words[thread ^ mask]);
    }
    return sum;
}
