//! Families of the table against what the model's own code computes, on the reference and on the processor.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Case, Golden, bf16_copy, relative, run, specified};
use fused_moe::DType;

/// The golden's numbers were made in f64 from f32 weights; what is left are f32 constants of the model's own code, and
/// on the processor the rounding of f32 sums of some dozen products.
const TOLERANCE: f64 = 1e-5;

/// Weights, x and y carry 8 bits each, and the routing weights follow them: a few times 2^-8 of the largest output.
const TOLERANCE_BF16: f64 = 3e-2;

fn check(name: &str) {
    let golden = Golden::open(name);
    let layer = golden.checkpoint.layer(golden.layer).unwrap();
    let (_directory, narrow) = bf16_copy(name);
    let narrow = narrow.layer(golden.layer).unwrap();
    let top_k = layer.config.top_k;
    for case in &golden.cases {
        let ids = case.token_ids.as_deref();
        let out = specified(&layer, &case.x, ids);
        same_routes(&format!("{name}, reference"), case, top_k, &out.routes.experts, &out.routes.weights);
        let error = relative(&out.y, &case.y);
        assert!(error <= TOLERANCE, "{name}, reference: {error:e}");

        let out = run(&layer, &case.x, ids, DType::F32);
        same_routes(&format!("{name}, cpu"), case, top_k, &out.experts, &out.weights);
        let error = relative(&out.y, &case.y);
        assert!(error <= TOLERANCE, "{name}, cpu: {error:e}");

        let out = run(&narrow, &case.x, ids, DType::BF16);
        let largest = case.y.iter().fold(0.0f64, |m, y| m.max(y.abs()));
        let hidden = layer.config.hidden;
        // A token whose routes rounding has changed says nothing about the experts.
        let kept: Vec<usize> =
            (0..case.tokens).filter(|&t| close_routes(case, t, top_k, &out.experts, &out.weights)).collect();
        assert!(3 * kept.len() > 2 * case.tokens, "{name}, bf16: {} of {} tokens", kept.len(), case.tokens);
        for t in kept {
            let row = t * hidden..(t + 1) * hidden;
            let error = relative(&out.y[row.clone()], &case.y[row.clone()]);
            let scale = case.y[row].iter().fold(0.0f64, |m, y| m.max(y.abs())) / largest;
            assert!(error * scale <= TOLERANCE_BF16, "{name}, bf16, token {t}: {error:e} * {scale}");
        }
    }
}

/// Ids as a set, weights by id.
fn same_routes(name: &str, case: &Case, top_k: usize, ids: &[u32], weights: &[f64]) {
    for t in 0..case.tokens {
        let row = |ids: &[u32], weights: &[f64]| {
            let mut row: Vec<(u32, f64)> = (t * top_k..(t + 1) * top_k).map(|r| (ids[r], weights[r])).collect();
            row.sort_by_key(|&(id, _)| id);
            row
        };
        for ((id, weight), (wanted_id, wanted)) in row(ids, weights).into_iter().zip(row(&case.experts, &case.weights))
        {
            assert_eq!(id, wanted_id, "{name}, token {t}");
            let error = (weight - wanted).abs();
            assert!(error <= TOLERANCE * wanted.abs().max(1.0), "{name}, token {t}: {weight} {wanted}");
        }
    }
}

fn close_routes(case: &Case, t: usize, top_k: usize, ids: &[u32], weights: &[f64]) -> bool {
    let slots = t * top_k..(t + 1) * top_k;
    slots.clone().all(|r| {
        let same = slots.clone().find(|&s| case.experts[s] == ids[r]);
        same.is_some_and(|s| (weights[r] - case.weights[s]).abs() <= 2e-2 * case.weights[s].abs().max(1.0))
    })
}

macro_rules! goldens {
    ($($name:ident)*) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        #[test]
        fn every_folder_is_checked() {
            for folder in common::goldens() {
                assert!([$(stringify!($name)),*].contains(&folder.as_str()), "{folder}");
            }
        }
    };
}

goldens! {
    mixtral qwen2_moe qwen3_moe qwen3_moe_nonorm olmoe
    afmoe aria_text bailing_hybrid cohere2_moe dbrx deepseek_v2_group deepseek_v3 deepseek_v4 deepseek_v4_hash dots1 ernie4_5_moe
    exaone_moe glm4_moe gpt_oss granitemoe granitemoeshared hunyuan_v1_moe jamba kimi_linear lfm2_moe llama4 minimax_m2
    minimax_m3_vl mistral4 phimoe qwen3_5_moe qwen3_next qwen3_vl_moe step3p7
}
