//! Families without golden data: a small random checkpoint of each, in the family's own names and layouts, against a
//! plain computation of its block.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod block;
mod logits;
mod parts;
mod refused;
mod rules;
mod sigmoid;
mod softmax;

use block::Row;
use fused_moe::checkpoint::{Checkpoint, known_families};

fn rows() -> Vec<Row> {
    [softmax::rows(), sigmoid::rows(), logits::rows()].into_iter().flatten().collect()
}

#[test]
fn every_family_computes_its_block() {
    for row in rows() {
        row.check();
    }
}

/// An entry that nothing proves is not in the table.
#[test]
fn every_family_is_proven() {
    let golden =
        common::goldens().into_iter().map(|name| Checkpoint::open(common::path(&name)).unwrap().inspect().family);
    let proven: Vec<&str> = golden.chain(rows().iter().map(|row| row.family)).collect();
    for family in known_families() {
        assert!(proven.contains(&family), "{family}");
    }
}

/// Whatever number of config.json differs from the tensors, the error names what was expected and what is there.
#[test]
fn a_config_that_contradicts_the_tensors() {
    for row in rows() {
        row.contradict();
    }
}
