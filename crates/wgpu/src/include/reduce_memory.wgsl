// What reduce.wgsl stands on, where there are no subgroups: each thread is one.

struct Here {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
}

fn in_subgroup(here: Here) -> u32 { return 1u; }

fn thread_of(here: Here) -> u32 { return here.thread; }

// Not reached: a subgroup of one has nobody to exchange with.
fn exchanged(x: u32, mask: u32) -> u32 { return x; }
fn exchanged4(x: vec4<f32>, mask: u32) -> vec4<f32> { return x; }
