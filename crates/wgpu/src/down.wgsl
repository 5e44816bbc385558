// Activated rows times down: many rows.

@compute @workgroup_size(2u * TILE)
fn down(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    grouped_tiled(group, thread);
}
