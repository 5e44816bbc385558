//! Families without golden data: a small random checkpoint of each, in the family's own names and layouts, against a
//! plain computation of its block.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod block;
mod contradictions;
mod disk;
mod layers;
mod limited;
mod logits;
mod parts;
mod rules;
mod sigmoid;
mod softmax;
mod surrounded;
mod words;

use block::Row;
use disk::Block;
use fused_moe::checkpoint::{Checkpoint, known_families};
use serde_json::json;

fn rows() -> Vec<Row> {
    [softmax::rows(), sigmoid::rows(), logits::rows()].into_iter().flatten().collect()
}

fn blocks() -> Vec<Block> {
    [surrounded::blocks(), limited::blocks()].into_iter().flatten().collect()
}

#[test]
fn every_family_computes_its_block() {
    for row in rows() {
        row.check();
    }
}

#[test]
fn every_other_rule_is_computed() {
    for block in blocks() {
        block.check();
    }
}

/// An entry that nothing proves is not in the table.
#[test]
fn every_family_is_proven() {
    let golden =
        common::goldens().into_iter().map(|name| Checkpoint::open(common::path(&name)).unwrap().inspect().family);
    let proven: Vec<&str> =
        golden.chain(rows().iter().map(|row| row.family)).chain(blocks().iter().map(|block| block.family)).collect();
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
    for block in blocks() {
        block.contradict();
    }
}

/// Numbers that make no sense end in an error or in a layer that was checked, never in a panic.
#[test]
fn senseless_numbers() {
    let senseless = [json!(0), json!(-1), json!(1e30), json!(u64::MAX), json!("x"), json!(null), json!([]), json!({})];
    for block in blocks() {
        let model = block.model();
        let scope = if block.config["text_config"].is_object() { "/text_config" } else { "" };
        for field in block.config.pointer(scope).unwrap().as_object().unwrap().keys().filter(|key| *key != "model_type")
        {
            for value in &senseless {
                let mut config = block.config.clone();
                config.pointer_mut(scope).unwrap()[field] = value.clone();
                std::fs::write(model.join("config.json"), config.to_string()).unwrap();
                for part in Checkpoint::open(model.path()).map_or(Vec::new(), |checkpoint| checkpoint.parts().to_vec())
                {
                    if let Ok(checkpoint) = Checkpoint::open_part(model.path(), part) {
                        checkpoint.inspect();
                    }
                }
            }
        }
    }
}
