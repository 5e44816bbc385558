// Tokens or rows times gate_up, and the activation of it: few rows.

@compute @workgroup_size(128)
fn gate_up_dot(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    grouped_dot(group, thread);
}
