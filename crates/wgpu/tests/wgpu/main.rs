//! What needs an adapter, a processor that plays one among them: where there is none, its tests are ignored and say so,
//! or fail, if `FMOE_REQUIRE_ADAPTER` is 1.

#![allow(clippy::unwrap_used, clippy::panic)]

mod conformance;
mod gradients;
mod hostile;
mod layer;
mod products;

use fused_moe_wgpu::{Error, Result, adapters};
use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

type Test = (&'static str, fn() -> Result<()>);

const TESTS: &[Test] = &[
    ("the_reference_agrees", conformance::the_reference_agrees),
    ("the_reference_agrees_with_the_gradients", conformance::the_reference_agrees_with_the_gradients),
    ("no_such_adapter", hostile::no_such_adapter),
    ("devices_that_lack_something", hostile::devices_that_lack_something),
    (
        "a_call_records_in_a_lent_encoder_and_does_nothing_else",
        layer::a_call_records_in_a_lent_encoder_and_does_nothing_else,
    ),
    ("a_device_and_a_buffer_of_the_host_programs", layer::a_device_and_a_buffer_of_the_host_programs),
    ("many_tokens_go_in_pieces", layer::many_tokens_go_in_pieces),
    ("a_token_alone_has_the_bits_it_has_in_a_batch", layer::a_token_alone_has_the_bits_it_has_in_a_batch),
    ("many_tiles_are_listed_on_the_device", layer::many_tiles_are_listed_on_the_device),
    ("one_token_takes_few_launches", layer::one_token_takes_few_launches),
    ("too_small_a_workspace_says_how_much", layer::too_small_a_workspace_says_how_much),
    ("several_threads_ask_for_the_status", layer::several_threads_ask_for_the_status),
    ("operands_that_cannot_be_bound_are_errors", layer::operands_that_cannot_be_bound_are_errors),
    (
        "bits_depend_neither_on_subgroups_nor_within_a_form_on_how_many_rows_there_are",
        products::bits_depend_neither_on_subgroups_nor_within_a_form_on_how_many_rows_there_are,
    ),
    ("a_layer_is_trained_in_one_submission", gradients::a_layer_is_trained_in_one_submission),
    ("sums_that_no_binding_holds_are_rounded_once", gradients::sums_that_no_binding_holds_are_rounded_once),
    ("what_no_binding_holds_goes_in_pieces", products::what_no_binding_holds_goes_in_pieces),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let missing = adapters().is_empty();
    if missing {
        eprintln!("{} tests are not run: {}", TESTS.len(), Error::NoAdapter);
        if std::env::var("FMOE_REQUIRE_ADAPTER").is_ok_and(|value| value == "1") {
            eprintln!("FMOE_REQUIRE_ADAPTER demands them");
            return ExitCode::FAILURE;
        }
    }
    let trial = |&(name, test): &Test| {
        let trial = Trial::test(name, move || test().map_err(Into::into));
        trial.with_ignored_flag(missing).with_kind(if missing { "no adapter" } else { "" })
    };
    libtest_mimic::run(&arguments, TESTS.iter().map(trial).collect()).exit_code()
}
