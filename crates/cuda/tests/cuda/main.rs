//! What needs a GPU, two of them, or NVRTC: where one is missing, its tests are ignored and say so.

#![allow(clippy::unwrap_used, clippy::panic)]

mod around;
mod compile;
mod conformance;
mod graph;
mod hostile;
mod layer;
mod lend;
mod multi;
mod training;

use fused_moe_cuda::{Cuda, Error, Result, compiler, device_count};
use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

type Test = (&'static str, fn() -> Result<()>);

const COMPILER: &[Test] = &[("every_kernel_compiles", compile::every_kernel_compiles)];

const DEVICE: &[Test] = &[
    ("the_reference_agrees", conformance::the_reference_agrees),
    ("a_graph_replays_with_new_inputs", graph::a_graph_replays_with_new_inputs),
    ("a_graph_keeps_its_kernels_and_its_status_word", graph::a_graph_keeps_its_kernels_and_its_status_word),
    ("raw_streams_and_memory", graph::raw_streams_and_memory),
    ("a_slice_freed_at_once", lend::a_slice_freed_at_once),
    ("memory_made_of_a_slice_and_freed_at_once", lend::memory_made_of_a_slice_and_freed_at_once),
    ("what_is_lent_is_checked", lend::what_is_lent_is_checked),
    ("a_layer_captured_with_slices", lend::a_layer_captured_with_slices),
    ("lending_within_a_capture", lend::lending_within_a_capture),
    ("a_panic_within_a_capture", lend::a_panic_within_a_capture),
    ("the_status_word_without_waiting", lend::the_status_word_without_waiting),
    ("many_slots", graph::many_slots),
    ("many_tokens_with_norm", graph::many_tokens_with_norm),
    ("timing", graph::timing),
    (
        "a_captured_layer_replays_with_new_tokens_and_allocates_nothing",
        layer::a_captured_layer_replays_with_new_tokens_and_allocates_nothing,
    ),
    ("a_token_on_each_of_several_streams", layer::a_token_on_each_of_several_streams),
    ("a_token_alone_has_the_bits_it_has_in_a_batch", layer::a_token_alone_has_the_bits_it_has_in_a_batch),
    ("a_captured_layer_with_a_capacity_replays", around::a_captured_layer_with_a_capacity_replays),
    ("a_captured_layer_with_surroundings_replays", around::a_captured_layer_with_surroundings_replays),
    ("surroundings_do_not_depend_on_the_batch", around::surroundings_do_not_depend_on_the_batch),
    ("the_gradients_agree_with_the_reference", training::the_gradients_agree_with_the_reference),
    ("a_captured_training_step_replays", training::a_captured_training_step_replays),
    ("too_much_says_how_much", layer::too_much_says_how_much),
    ("experts_beyond_4_gib", layer::experts_beyond_4_gib),
    ("no_such_device", hostile::no_such_device),
    ("too_little_memory", hostile::too_little_memory),
    ("streams_of_another_context", hostile::streams_of_another_context),
    ("the_current_context_stays", hostile::the_current_context_stays),
    ("a_forged_cache_entry_is_replaced", hostile::a_forged_cache_entry_is_replaced),
    ("a_lost_device_is_said_to_be_lost", hostile::a_lost_device_is_said_to_be_lost),
];

const TWO_DEVICES: &[Test] = &[
    ("two_devices_at_the_same_time", multi::two_devices_at_the_same_time),
    ("two_devices_in_turn", multi::two_devices_in_turn),
    ("operands_of_another_device", multi::operands_of_another_device),
    ("a_kernel_on_memory_of_another_device", multi::a_kernel_on_memory_of_another_device),
];

fn main() -> ExitCode {
    if let Ok(child) = std::env::var(hostile::CHILD) {
        return hostile::child(&child);
    }
    let mut arguments = Arguments::from_args();
    // tests look at the free memory of the one device
    arguments.test_threads.get_or_insert(1);
    let no_compiler = compiler().err().filter(|error| matches!(error, Error::NoCompiler { .. }));
    let no_device = Cuda::new(0).err().filter(|error| matches!(error, Error::NoDriver { .. } | Error::NoDevice { .. }));
    let not_two = Some("there are not two CUDA devices").filter(|_| device_count().unwrap_or(0) < 2);
    let groups = [
        (COMPILER, "no NVRTC", no_compiler.map(|error| error.to_string())),
        (DEVICE, "no GPU", no_device.map(|error| error.to_string())),
        (TWO_DEVICES, "no two GPUs", not_two.map(str::to_string)),
    ];
    let mut trials = Vec::new();
    for (tests, kind, missing) in groups {
        if let Some(missing) = &missing {
            eprintln!("{} tests are not run: {missing}", tests.len());
        }
        trials.extend(tests.iter().map(|&(name, test)| {
            let trial = Trial::test(name, move || test().map_err(Into::into));
            let kind = if missing.is_some() { kind } else { "" };
            trial.with_ignored_flag(missing.is_some()).with_kind(kind)
        }));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
