//! Families of the table against what the model's own code computes, on the reference and on the processor.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Case, Golden, bf16_copy, relative, relative_to, run, specified};
use fused_moe::config::LayerConfig;
use fused_moe::{DType, NO_EXPERT};

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
    let config = &layer.config;
    for case in &golden.cases {
        let extra = case.extra(&layer);
        let out = specified(&layer, &case.x, extra);
        let routes = Found { config, ids: &out.routes.experts, weights: &out.routes.weights };
        routes.are_those_of(case, &format!("{name}, reference"));
        let error = relative(&out.y, &case.y);
        assert!(error <= TOLERANCE, "{name}, reference: {error:e}");

        let out = run(&layer, &case.x, extra, DType::F32);
        let routes = Found { config, ids: &out.experts, weights: &out.weights };
        routes.are_those_of(case, &format!("{name}, cpu"));
        let error = relative(&out.y, &case.y);
        assert!(error <= TOLERANCE, "{name}, cpu: {error:e}");

        let out = run(&narrow, &case.x, extra, DType::BF16);
        let routes = Found { config, ids: &out.experts, weights: &out.weights };
        let largest = case.y.iter().fold(0.0f64, |m, y| m.max(y.abs()));
        // A token whose routes rounding has changed says nothing about the experts.
        let kept: Vec<usize> = (0..case.tokens).filter(|&t| routes.are_close_to(case, t)).collect();
        assert!(3 * kept.len() > 2 * case.tokens, "{name}, bf16: {} of {} tokens", kept.len(), case.tokens);
        for t in kept {
            let row = t * config.hidden..(t + 1) * config.hidden;
            let error = relative_to(largest, &out.y[row.clone()], &case.y[row]);
            assert!(error <= TOLERANCE_BF16, "{name}, bf16, token {t}: {error:e}");
        }
    }
}

/// Routes that a layer took.
struct Found<'a> {
    config: &'a LayerConfig,
    ids: &'a [u32],
    weights: &'a [f64],
}

impl Found<'_> {
    /// Those of a token and the golden ones, by id. Experts that every token goes to are behind them, and not golden. A slot
    /// that overflowed has no weight here, and its expert's in the golden.
    fn rows(&self, case: &Case, t: usize) -> [Vec<(u32, f64)>; 2] {
        let row = |ids: &[u32], weights: &[f64], k: usize, always: usize| {
            let slots = t * k..(t + 1) * k - always;
            let mut row: Vec<(u32, f64)> = slots.map(|r| (ids[r], weights[r])).collect();
            row.sort_by_key(|&(id, _)| id);
            for (_, weight) in row.iter_mut().filter(|(id, _)| *id == NO_EXPERT) {
                *weight = 0.0;
            }
            row
        };
        let (always, k) = (self.config.routing.always, self.config.top_k);
        assert_eq!((k - always) * case.tokens, case.experts.len());
        let besides: Vec<u32> = (self.config.experts - always..self.config.experts).map(|e| e as u32).collect();
        assert_eq!(self.ids[(t + 1) * k - always..(t + 1) * k], besides);
        [row(self.ids, self.weights, k, always), row(&case.experts, &case.weights, k - always, 0)]
    }

    /// Ids as a set, weights by id.
    fn are_those_of(&self, case: &Case, name: &str) {
        for t in 0..case.tokens {
            let [found, golden] = self.rows(case, t);
            for ((id, weight), (wanted_id, wanted)) in found.into_iter().zip(golden) {
                assert_eq!(id, wanted_id, "{name}, token {t}");
                let error = (weight - wanted).abs();
                assert!(error <= TOLERANCE * wanted.abs().max(1.0), "{name}, token {t}: {weight} {wanted}");
            }
        }
    }

    fn are_close_to(&self, case: &Case, t: usize) -> bool {
        let [found, golden] = self.rows(case, t);
        found.iter().zip(&golden).all(|((id, weight), (wanted_id, wanted))| {
            id == wanted_id && (weight - wanted).abs() <= 2e-2 * wanted.abs().max(1.0)
        })
    }
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
    gemma4 inkling jetmoe longcat_flash nemotron_h_latent switch_transformers
}
