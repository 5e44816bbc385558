// The loss: what each workgroup kept of it, added up by one.

@compute @workgroup_size(THREADS)
fn loss_sum(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var i = thread; i < p.count; i += THREADS) { sum += load_shares(p.shares.offset + i); }
    sum = total(thread, sum);
    if (thread == 0u) { put(0u, 0u, sum); }
}
