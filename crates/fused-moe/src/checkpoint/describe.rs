//! A layer in plain English: one sentence on where a token goes, and a phrase for each other part.

use super::error::Result;
use super::family::{Family, Zero};
use super::inspect::{LayerKind, sizes};
use super::layer::CheckpointLayer;
use super::model_config::ModelConfig;
use super::resolve;
use fused_moe_core::config::*;

/// What a layer is, in words.
pub(super) fn kind(layer: &CheckpointLayer<'_>, config: &ModelConfig, family: &Family) -> Result<LayerKind> {
    // without a factor that the layer has among its tensors: two layers that differ in it alone are of one kind
    let described = resolve::layer_config(config, family, layer.index)?;
    Ok(LayerKind {
        layers: vec![layer.index],
        sizes: sizes(&described),
        routing: routing(&described, family),
        router: router(&described, layer.weights.router_bias.is_some()),
        activation: activation(described.activation),
        biases: biases(layer, family),
        shared: described.shared.as_ref().map(shared),
        around: around(&described),
    })
}

/// What happens to a token, in one sentence.
fn routing(config: &LayerConfig, family: &Family) -> String {
    let rule = &config.routing;
    let (experts, top_k) = (config.experts - rule.always, config.top_k - rule.always);
    let candidates = match config.zero_experts {
        Some(ZeroExperts { count, output }) => {
            let returns = if count == 1 { "returns" } else { "return" };
            let output = if output == ZeroOutput::Copy { "the token itself" } else { "zero" };
            format!("{} ({experts} experts and {count} that {returns} {output})", experts + count)
        }
        None => format!("{experts} experts"),
    };
    let chosen = match (top_k, experts, config.zero_experts) {
        (1, 1, None) => "only expert".to_owned(),
        (1, ..) => format!("one of {candidates}"),
        _ => format!("{top_k} of {candidates}"),
    };
    let choice = match rule.selection {
        Selection::TopK { by, bias, groups } => {
            let key = if by == SelectBy::Score { score(rule.score) } else { "router logit" };
            let bias = if bias { " plus a correction bias" } else { "" };
            let groups = groups.map(|g| groups_text(&g)).unwrap_or_default();
            format!("the {chosen} with the largest {key}{bias}{groups}")
        }
        Selection::SparseMixer { jitter } => {
            format!("the {chosen} that a sparse mixer with jitter {jitter} finds in two passes")
        }
        Selection::Table => format!("the {chosen} that a table has for its token id"),
    };
    let always = match rule.always {
        0 => String::new(),
        more => format!(" and always to {more} more, which are scored and weighted together with them"),
    };
    let mut text = format!("Each token goes to {choice}{always}, {}", weights(config, family));
    if let Some(capacity) = &config.capacity {
        let whole_call = family.capacity.is_some_and(|slots| slots.whole_call);
        text += &room(capacity, if whole_call { "call" } else { "sequence" });
    }
    text + "."
}

/// How the router makes its logits, where that is more than a product.
fn router(config: &LayerConfig, biased: bool) -> Option<String> {
    let gate = &config.gate;
    let mut parts = Vec::new();
    if let Some(RouterMlp { width, .. }) = config.router_mlp {
        parts.push(format!("layers of its own of width {width}, whose state goes on to the router of the next block"));
    }
    if gate.norm.is_some() {
        parts.push("reads the token through an RMSNorm with a factor for each channel".to_owned());
    }
    if gate.scale != 1.0 {
        parts.push(format!("logits times {}", gate.scale));
    }
    if biased {
        parts.push("logits plus a bias".to_owned());
    }
    if let Some(cap) = gate.softcap {
        parts.push(format!("logits capped at {cap} by tanh"));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// What is added to the products of the routed experts.
fn biases(layer: &CheckpointLayer<'_>, family: &Family) -> Option<String> {
    let expert = layer.weights.experts.iter().next()?;
    if !family.sum_bias.is_empty() {
        return Some("one, added to the sum of the experts".into());
    }
    let named = [("gate", &expert.gate_bias), ("up", &expert.up_bias), ("down", &expert.down_bias)];
    let there: Vec<&str> = named.into_iter().filter(|(_, bias)| bias.is_some()).map(|(name, _)| name).collect();
    (!there.is_empty()).then(|| format!("of every expert: {}", there.join(", ")))
}

/// The expert that every token goes to.
fn shared(shared: &SharedConfig) -> String {
    let gate = if shared.gated { ", times a sigmoid gate of its own" } else { "" };
    let scale = if shared.scale == 1.0 { String::new() } else { format!(", times {}", shared.scale) };
    format!("every token goes to one of width {}: {}{gate}{scale}", shared.intermediate, activation(shared.activation))
}

/// Projections and norms.
fn around(config: &LayerConfig) -> Option<String> {
    let latent = config.latent.map(|width| format!("the experts work in a width of {width} between two projections"));
    let parts: Vec<String> = latent.into_iter().chain(norms(&config.norms)).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn room(capacity: &Capacity, of: &str) -> String {
    let limit = match capacity.limit {
        CapacityLimit::Slots(1) => format!("1 slot of a {of}"),
        CapacityLimit::Slots(slots) => format!("{slots} slots of a {of}"),
        CapacityLimit::Fraction(1.0) => format!("as many slots as a {of} has tokens"),
        CapacityLimit::Fraction(part) => format!("{part} times as many slots as a {of} has tokens, rounded up"),
        CapacityLimit::EvenShare { factor } => format!("{factor} times an even share of the tokens of a {of}"),
    };
    let first = match capacity.order {
        CapacityOrder::Position => "the first ones",
        CapacityOrder::Score => "those of the most certain tokens",
    };
    let renormalized =
        if capacity.renormalize.is_some() { ", the weights of those that stay divided by their sum" } else { "" };
    format!(", an expert taking at most {limit}, {first}, the others adding nothing{renormalized}")
}

fn norms(norms: &Norms) -> Option<String> {
    let Norms { experts_in, expert_out, routed_out, shared_in, shared_out, out } = norms;
    let named = [
        (experts_in, "before the experts"),
        (expert_out, "behind each expert"),
        (routed_out, "behind their sum"),
        (shared_in, "before the shared expert"),
        (shared_out, "behind it"),
        (out, "behind everything"),
    ];
    let places: Vec<&str> = named.iter().filter(|(norm, _)| norm.is_some()).map(|(_, place)| *place).collect();
    match places.as_slice() {
        [] => None,
        [one] => Some(format!("a norm {one}")),
        [several @ .., last] => Some(format!("norms {} and {last}", several.join(", "))),
    }
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

fn weights(config: &LayerConfig, family: &Family) -> String {
    let rule = &config.routing.weights;
    let place = match config.weight_on {
        WeightOn::Output => "weighted by",
        WeightOn::Input => "its input weighted by",
    };
    let (whose, scores, logits) =
        if config.top_k == 1 { ("its", "score", "logit") } else { ("their", "scores", "logits") };
    let value = match (config.routing.selection, rule.value) {
        (Selection::SparseMixer { .. }, _) => "the masked softmax of each pass".to_owned(),
        (_, WeightValue::SoftmaxOfChosen) => "the softmax over the chosen logits".to_owned(),
        (_, WeightValue::Score) => match config.routing.score {
            Score::Softmax => format!("{whose} softmax {scores}"),
            Score::Sigmoid => format!("{whose} sigmoid {scores}"),
            Score::SqrtSoftplus => format!("{whose} sqrt(softplus) {scores}"),
            Score::Logit => format!("{whose} {logits}"),
        },
    };
    let normalize = match rule.normalize {
        Normalize::None => String::new(),
        Normalize::Sum { eps: 0.0 } => format!(" divided by {whose} sum"),
        Normalize::Sum { eps } => format!(" divided by {whose} sum (plus {eps:e})"),
        Normalize::SumAtLeast { min } => format!(" divided by {whose} sum or {min:?} if that is larger"),
        Normalize::Lp { p: 1.0 } => format!(" divided by the sum of {whose} magnitudes"),
        Normalize::Lp { p } => format!(" divided by {whose} L{p} norm"),
    };
    let own = match (rule.expert_scale, family.zero_experts) {
        (None, _) => "",
        (Some(_), Some(Zero { weighted: false, .. })) => " or, where that returns zero, by 0",
        (Some(_), _) => " times a factor of each expert",
    };
    let factor = rule.scale * config.routed_scale;
    let scale = if factor == 1.0 { String::new() } else { format!(" times {factor}") };
    let of_layer = match family.scale {
        [] => String::new(),
        names => {
            let optional = if family.scale_optional { ", if it has one" } else { "" };
            format!(" times a factor of the layer, {}{optional}", names.join(" or "))
        }
    };
    format!("{place} {value}{normalize}{own}{scale}{of_layer}")
}

/// What experts compute between their matrices, as a formula.
pub(super) fn activation(activation: Activation) -> String {
    match activation {
        Activation::Gated(function) => format!("{} * up", applied(function, "gate")),
        Activation::ClampedSilu { limit } => format!("silu(min(gate, {limit})) * clamp(up, -{limit}, {limit})"),
        Activation::ClampedSwish { alpha, limit } => {
            let gate = format!("min(gate, {limit})");
            format!("(clamp(up, -{limit}, {limit}) + 1) * {gate} * sigmoid({alpha} * {gate})")
        }
        Activation::SoftcappedSilu { gate_cap, up_cap } => {
            format!("cap(gate, {gate_cap}) * sigmoid(gate) * cap(up, {up_cap}), cap(x, c) = c * tanh(x / c)")
        }
        Activation::SiluThenClamp { limit } => format!("min(silu(gate), {limit}) * clamp(up, -{limit}, {limit})"),
        Activation::Plain(function) => applied(function, "up"),
    }
}

fn applied(function: Function, x: &str) -> String {
    match function {
        Function::Silu => format!("silu({x})"),
        Function::GeluTanh => format!("gelu_tanh({x})"),
        Function::GeluErf => format!("gelu({x})"),
        Function::Relu => format!("relu({x})"),
        Function::ReluSquared => format!("relu({x})^2"),
        Function::Identity => x.into(),
    }
}
