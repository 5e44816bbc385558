// What reduce.wgsl stands on, where there are subgroups of any size.

struct Here {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
}

// The threads of a subgroup, which has as many as every other one; subgroup_size may say more than there are.
fn in_subgroup(here: Here) -> u32 { return THREADS / here.subgroups; }

fn thread_of(here: Here) -> u32 { return here.subgroup * in_subgroup(here) + here.lane; }

// What the thread `mask` away in the subgroup has.
fn exchanged(x: u32, mask: u32) -> u32 { return subgroupShuffleXor(x, mask); }
fn exchanged4(x: vec4<f32>, mask: u32) -> vec4<f32> { return subgroupShuffleXor(x, mask); }
