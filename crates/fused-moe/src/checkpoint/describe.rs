//! A layer's routing in one English sentence.

use fused_moe_core::config::*;

/// What happens to a token, in one sentence.
pub(super) fn sentence(config: &LayerConfig) -> String {
    let (experts, top_k) = (config.experts, config.top_k);
    let rule = &config.routing;
    let plural = if top_k == 1 { "expert" } else { "experts" };
    let choice = match rule.selection {
        Selection::TopK { by, bias, groups } => {
            let key = if by == SelectBy::Score { score(rule.score) } else { "router logit" };
            let bias = if bias { " plus a correction bias" } else { "" };
            let groups = groups.map(|g| groups_text(&g)).unwrap_or_default();
            format!("the {top_k} of {experts} {plural} with the largest {key}{bias}{groups}")
        }
        Selection::SparseMixer { jitter } => {
            format!("the {top_k} of {experts} {plural} that a sparse mixer with jitter {jitter} finds in two passes")
        }
        Selection::Table => format!("the {top_k} of {experts} {plural} that a table has for its token id"),
    };
    let mut text = format!("Each token goes to {choice}, {}", weights(config));
    if let Some(shared) = &config.shared {
        let gate = if shared.gated { ", weighted by a sigmoid gate of its own" } else { "" };
        text += &format!(", and every token also to a shared expert of width {}{gate}", shared.intermediate);
    }
    text + "."
}

fn score(score: Score) -> &'static str {
    match score {
        Score::Softmax => "softmax score",
        Score::Sigmoid => "sigmoid score",
        Score::SqrtSoftplus => "sqrt(softplus) score",
        Score::Logit => "router logit",
    }
}

fn groups_text(groups: &Groups) -> String {
    let worth = match groups.score {
        GroupScore::SumOfBestTwo => "the sum of their best two",
        GroupScore::Best => "their best",
    };
    let masked = match groups.masked {
        Masked::NegInfinity => "",
        Masked::Zero => ", the others counting as zero",
    };
    format!(" within the best {} of {} groups by {worth}{masked}", groups.keep, groups.count)
}

fn weights(config: &LayerConfig) -> String {
    let rule = &config.routing.weights;
    let place = match config.weight_on {
        WeightOn::Output => "weighted by",
        WeightOn::Input => "its input weighted by",
    };
    let value = match (config.routing.selection, rule.value) {
        (Selection::SparseMixer { .. }, _) => "the masked softmax of each pass",
        (_, WeightValue::SoftmaxOfChosen) => "the softmax over the chosen logits",
        (_, WeightValue::Score) => match config.routing.score {
            Score::Softmax => "their softmax scores",
            Score::Sigmoid => "their sigmoid scores",
            Score::SqrtSoftplus => "their sqrt(softplus) scores",
            Score::Logit => "their logits",
        },
    };
    let normalize = match rule.normalize {
        Normalize::None => String::new(),
        Normalize::Sum { eps: 0.0 } => " divided by their sum".into(),
        Normalize::Sum { eps } => format!(" divided by their sum plus {eps:e}"),
        Normalize::SumAtLeast { min } => format!(" divided by their sum or {min:e} if that is larger"),
        Normalize::Lp { p: 1.0 } => " divided by the sum of their magnitudes".into(),
        Normalize::Lp { p } => format!(" divided by their L{p} norm"),
    };
    let factor = rule.scale * config.routed_scale;
    let scale = if factor == 1.0 { String::new() } else { format!(" times {factor}") };
    format!("{place} {value}{normalize}{scale}")
}
